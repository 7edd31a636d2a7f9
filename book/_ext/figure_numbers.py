"""Figures are numbered within their chapter: Figure 4.2 is the second one of `notebooks/04_...`.

Sphinx counts through the whole book, as the titles carry their chapter's number themselves.
"""

import re


def number(app, env):
    for document, kinds in env.toc_fignumbers.items():
        chapter = re.match(r"notebooks/(\d+)_", document)
        for count, figure in enumerate(kinds.get("figure", {}) if chapter else [], 1):
            kinds["figure"][figure] = (int(chapter[1]), count)
    return []


def setup(app):
    app.connect("env-get-updated", number, priority=900)  # after Sphinx has counted
    return {"parallel_read_safe": True, "parallel_write_safe": True}
