"""Serve MathJax from the book itself, so that maths is typeset without a network."""

import importlib.util
import shutil
from pathlib import Path

# the full bundle: smaller ones fetch extensions such as \boldsymbol lazily, and then leave all maths of the page raw
SCRIPT, FONTS = "tex-chtml-full.js", "output/chtml/fonts/woff-v2"


def _copy(app, exception):
    if exception is None and app.builder.format == "html":
        source = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
        target = Path(app.outdir) / "_static" / "mathjax"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / SCRIPT, target)
        shutil.copytree(source / FONTS, target / FONTS, dirs_exist_ok=True)


def setup(app):
    app.config.mathjax_path = f"mathjax/{SCRIPT}"
    app.connect("build-finished", _copy)
    return {"parallel_read_safe": True}
