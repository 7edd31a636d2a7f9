"""What a chapter shows besides figures: the verdicts on its claims, and where its numbers come from."""

import warnings
from collections.abc import Mapping
from html import escape

import numpy as np
import pandas as pd
from IPython.display import HTML, display
from matplotlib.markers import MarkerStyle

from lddyn import Caution
from lddyn.chapters import claims, sentences, style
from lddyn.data.responses import MEANINGS
from lddyn.engine import recorded, store
from lddyn.engine.store import Run

BUNDLE = "application/vnd.lddyn+json"  # read back from the executed notebook by `pages.published`
REFUTED = "application/vnd.lddyn.refuted+json"  # read back by `build.refuted`
EXAMPLE = "kinds-by-example"  # the anchor of `kinds` on the page of chapter 3
DASHES = {"-": "none", "--": "6 3", ":": "1.5 3"}


def begin() -> None:
    """What every notebook starts with: the style of its figures; and a `Caution` appears on the page as one."""
    style.use_style()
    show = warnings.showwarning

    def on_page(message, category, *where, **how):
        if issubclass(category, Caution):
            display(HTML(caution(str(message))))
        else:
            show(message, category, *where, **how)

    warnings.showwarning = on_page


def caution(message: str) -> str:
    """A message that a reader must see, as HTML."""
    return f'<p class="caution"><strong>Caution.</strong> {escape(message)}</p>'


class Said:
    """A text that asserts what a table of runs says (`sentences`), as Markdown.

    about: the scale of the runs that it was written about, or `recorded`; at another scale the page says so, and what
    the table does not bear out is no mistake of the text (`build.refuted`).
    """

    def __init__(self, chapter: str, scale: str, table: pd.DataFrame, text: str, about: str = "laptop"):
        tables = [rows for _, rows in table.groupby("seed")]
        self.found, self.binding = sentences.said(text, chapter, lambda _: tables), about in (scale, "recorded")
        self.note = "" if self.binding else f"*Written about runs at scale {about}; these are at scale {scale}.*\n\n"

    def _repr_mimebundle_(self, **_) -> dict:
        text = self.note + self.found.text
        return {"text/markdown": text, "text/plain": text} | ({REFUTED: self.found.refuted} if self.binding else {})


class Results:
    """The verdicts of a chapter and the provenance of its runs; displayed as HTML, and as JSON for the scorecard."""

    def __init__(self, chapter: str, scale: str, runs: list[Run]):
        self.chapter, self.scale, self.runs = chapter, scale, runs

    def verdicts(self) -> list[dict]:
        """The claims that this chapter measures, judged by its own runs alone."""
        return claims.measured(claims.verdicts({self.chapter: {"scale": self.scale, "runs": self.runs}}), self.chapter)

    def _repr_mimebundle_(self, **_) -> dict:
        bundle = {"chapter": self.chapter, "scale": self.scale, "runs": [r.folder.name for r in self.runs]}
        noted = dict.fromkeys(message for run in self.runs for message in run.manifest.get("cautions", []))
        html = "".join(map(caution, noted)) + claims.as_html(self.verdicts())
        html += provenance(store.origin(self.runs), self.scale)
        return {"text/html": html, BUNDLE: bundle, "text/plain": f"{self.chapter}: {len(self.runs)} runs"}


def real_model(chapter: str, results: Results) -> str:
    """The verdicts of a chapter's recorded runs on the real model alone, and how they agree with `results`, as HTML."""
    published = recorded.published(chapter)
    entries, runs = claims.on_real_model(published), published[chapter]["runs"]
    said = escape(claims.agreement(results.verdicts(), entries))
    table = claims.as_html((e | {"why": None} for e in entries), here="SmolLM2-135M")  # `why` is about the small model
    return f"<p>{said}</p>{table}{provenance(store.origin(runs), recorded.SCALE)}"


def provenance(made: Mapping, scale: str) -> str:
    """One line under a result, as HTML: its scale and its origin (`store.origin`)."""
    return f'<p class="provenance">{escape(f"scale {scale} · {store.in_words(made)}")}</p>'


def table(frame: pd.DataFrame, digits: int = 3, index: bool = True) -> str:
    """A data frame as HTML with escaped text and rounded numbers."""
    html = frame.to_html(float_format=lambda v: f"{v:.{digits}g}", border=0, index=index)
    return f'<div class="scroll">{html}</div>'


def kinds(responses: Mapping[str, str], start: Mapping[str, float]) -> str:
    """Every kind of response by one example, as HTML: its line and mark in figures, what it is, and its text.

    responses: kind -> text; start: kind -> its log-probability, nats per token.
    """
    rows = (
        f"<dt>{swatch(kind)} {kind}<small>{start[kind]:.2f} nats a token</small></dt>"
        f"<dd><small>{MEANINGS[kind]}</small>{escape(responses[kind].strip())}</dd>"
        for kind in style.STYLES
        if kind in responses
    )
    return f'<dl class="kinds" id="{EXAMPLE}">{"".join(rows)}</dl>'


def swatch(kind: str) -> str:
    """The line and the mark of a kind of response in figures, as SVG."""
    color, dash = style.STYLES[kind]
    mark = MarkerStyle(style.MARKS[color])
    outline = np.asarray(mark.get_path().transformed(mark.get_transform()).to_polygons()[0])  # (points, 2)
    points = " ".join(f"{20 + 9 * x:.1f},{7 - 9 * y:.1f}" for x, y in outline)
    return (
        f'<svg width="40" height="14" aria-hidden="true" style="--c:{color}">'
        f'<path d="M0 7H40" stroke-dasharray="{DASHES[dash]}"/><polygon points="{points}"/></svg>'
    )


def answers(frame: pd.DataFrame) -> str:
    """Texts that a model wrote, one row a prompt, as HTML: escaped, and with their own line breaks."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("question", *frame.columns))
    rows = "".join(
        f"<tr><th>{escape(prompt)}</th>{''.join(f'<td>{escape(text.strip())}</td>' for text in texts)}</tr>"
        for prompt, *texts in frame.itertuples()
    )
    return f'<div class="scroll answers"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def tokens(table: pd.DataFrame, value: str, limit: float) -> str:
    """A text as HTML, each token coloured by a number: blue where it is positive, orange where negative.

    table: rows with `token` and the column `value`; colours are full at plus and minus `limit`.
    """
    spans = []
    for token, number in zip(table.token, table[value], strict=True):
        strength = min(abs(number) / limit, 1) * 0.75
        color = f"rgba({'43,108,176' if number > 0 else '221,107,32'},{strength:.2f})"
        spans.append(f'<span style="background:{color}" title="{number:+.2f} nats">{escape(token)}</span>')
    return f'<p class="tokens">{"".join(spans)}</p>'
