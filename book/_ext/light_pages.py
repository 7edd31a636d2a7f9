"""Take out of every page what the theme loads and no page of ours needs.

That is a script of 1.5 MB that draws the icons which its style sheet draws as well, and fonts that are loaded before it
is known whether a page has a letter of them.
"""

import re
from pathlib import Path

NEEDLESS = re.compile(
    r'<script src="[^"]*/fontawesome/[^"]*\.js[^"]*"></script>|<link rel="preload" as="font"[^>]*/fontawesome/[^>]*>'
)


def _lighten(app, exception):
    if exception is None:
        for page in Path(app.outdir).rglob("*.html"):
            page.write_text(NEEDLESS.sub("", page.read_text()))


def setup(app):
    app.connect("build-finished", _lighten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
