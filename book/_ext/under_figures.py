"""Under every figure: its data, the commands that make it again, where its numbers come from, what draws it.

`lddyn/publish/figures.py` has written them into `generated/figures/`, with the alternative text of the image and what
the curves of the figure can be switched to. A figure without them is a warning, and so stops the build.
"""

import json
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

FOLDER = "generated/figures"
log = logging.getLogger(__name__)


class UnderFigures(SphinxTransform):
    default_priority = 400  # after the page was read, before its downloads are collected

    def apply(self):
        for figure in list(self.document.findall(nodes.figure)):
            for image in figure.findall(nodes.image):
                # a file that a page draws, or the label of a notebook's figure
                files = [
                    Path(self.env.srcdir, FOLDER, f"{name}.json") for name in (Path(image["uri"]).stem, *figure["ids"])
                ]
                if file := next(filter(Path.exists, files), None):
                    self.env.note_dependency(str(file))
                    content = json.loads(file.read_text())
                    image["alt"] = content["alt"]
                    root = "../" * self.env.docname.count("/")
                    figure += under(content, f"/{FOLDER}/{file.stem}.csv", root)
                else:
                    log.warning(f"nothing is known of the figure {figure['ids']}", location=figure, type="lddyn")


def under(content, data, root):
    """The nodes that come after a figure's caption.

    data: the CSV file, from the root of the book; root: the way from the page to the first one.
    """
    kinds = []
    if content["kinds"]:
        kinds = [nodes.reference("", "Kinds of response, by example", refuri=root + content["kinds"], internal=True)]
    csv = addnodes.download_reference("", "", nodes.Text("Data (CSV)"), reftarget=data)
    made = [
        nodes.paragraph("", "", nodes.strong("", what), nodes.Text(f": {how}")) for what, how in content["made"].items()
    ]
    commands = nodes.literal_block("", "\n".join(content["commands"]), language="console")
    source = nodes.paragraph("", "", nodes.strong("", "Drawn by"), nodes.Text(f" {content['source']}"))
    views = json.dumps(content["views"], separators=(",", ":")).replace("<", r"\u003c")
    return nodes.legend(
        "",
        _html('<div class="under">'),
        nodes.paragraph("", "", csv),
        *(nodes.paragraph("", "", link) for link in kinds),
        _html('<details class="hide"><summary>How it was made</summary>'),
        *made,
        source,
        commands,
        _html("</details></div>"),
        *([_html(f'<script type="application/json" class="curves">{views}</script>')] if content["views"] else []),
    )


def _html(text):
    return nodes.raw("", text, format="html")


def setup(app):
    app.add_transform(UnderFigures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
