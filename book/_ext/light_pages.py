"""Take out of every page what the theme loads and no page of ours needs; show the colours of day or night at once.

Needless are a script of 1.5 MB, which draws the icons that a style sheet draws as well, and fonts that are loaded
before it is known whether a page has a letter of them. The theme sets colours last of all, and with an error.
"""

import re
from pathlib import Path

NEEDLESS = re.compile(
    r'<script src="[^"]*/fontawesome/[^"]*\.js[^"]*"></script>|<link rel="preload" as="font"[^>]*/fontawesome/[^>]*>'
)
THEME = """const theme = document.documentElement.dataset;
theme.mode ||= "auto";
theme.theme ||= matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";"""


def _lighten(app, exception):
    if exception is None:
        for page in Path(app.outdir).rglob("*.html"):
            page.write_text(NEEDLESS.sub("", page.read_text()))


def setup(app):
    app.add_js_file(None, body=THEME)
    app.connect("build-finished", _lighten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
