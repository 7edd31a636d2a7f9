"""What a chapter shows besides figures: the verdicts on its claims, and where its numbers come from."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from html import escape

import pandas as pd
from IPython.display import HTML, display

from lddyn import Caution
from lddyn.chapters import claims, style
from lddyn.engine import kept
from lddyn.engine.store import Run

BUNDLE = "application/vnd.lddyn+json"  # read back from the executed notebook by `book.published`


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


class Results:
    """The verdicts of a chapter and the provenance of its runs; displayed as HTML, and as JSON for the scorecard."""

    def __init__(self, chapter: str, scale: str, runs: list[Run]):
        self.chapter, self.scale, self.runs = chapter, scale, runs

    def verdicts(self) -> list[dict]:
        """The claims that this chapter measures, judged by its own runs alone."""
        entries = claims.verdicts({self.chapter: {"scale": self.scale, "runs": self.runs}})
        return [e for e in entries if any(part["chapter"] == self.chapter for part in e["parts"])]

    def _repr_mimebundle_(self, **_) -> dict:
        bundle = {"chapter": self.chapter, "scale": self.scale, "runs": [r.folder.name for r in self.runs]}
        noted = dict.fromkeys(message for run in self.runs for message in run.manifest.get("cautions", []))
        html = "".join(map(caution, noted)) + verdict_table(self.verdicts())
        html += provenance(kept.origin(self.runs), self.scale)
        return {"text/html": html, BUNDLE: bundle, "text/plain": f"{self.chapter}: {len(self.runs)} runs"}


def verdict_table(entries: Iterable[dict], links: Callable[[dict], str] | None = None) -> str:
    """The verdicts as an HTML table: claim, the paper, the authors' released logs, this companion, verdict.

    `links` gives the address of the figure behind an entry, or an empty text.
    """
    rows = ""
    for e in entries:
        mark = e["verdict"].replace(" ", "-")
        ours = "<br>".join(escape(claims.sentence(p)) for p in e["parts"]) or escape(e["reason"])
        if e.get("why") and e["verdict"] in ("partly", "not replicated"):
            ours += f'<br><em class="why">{escape(e["why"])}</em>'
        where = links(e) if links else ""
        link = f' <a href="{escape(where)}">figure</a>' if where else ""
        rows += (
            f'<tr data-verdict="{e["verdict"]}" data-chapter="{e["chapter"] or "none"}"><td>{e["id"]}</td>'
            f"<td>{escape(e['claim'])}<br><small>{escape(e['source'])}{link}</small></td>"
            f"<td>{escape(e['paper'])}</td><td>{escape(e['authors'] or '-')}</td><td>{ours}</td>"
            f'<td class="verdict {mark}">{e["verdict"]}</td></tr>'
        )
    heads = ("#", "claim", "the paper", "released logs", "this companion", "verdict")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return (
        f'<div class="scroll"><table class="claims"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def provenance(made: Mapping, scale: str) -> str:
    """One line under a result, as HTML: its scale and its origin (`kept`)."""
    return f'<p class="provenance">{escape(f"scale {scale} · {kept.in_words(made)}")}</p>'


def table(frame: pd.DataFrame, digits: int = 3) -> str:
    """A data frame as HTML with escaped text and rounded numbers."""
    return f'<div class="scroll">{frame.to_html(float_format=lambda v: f"{v:.{digits}g}", border=0)}</div>'


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
