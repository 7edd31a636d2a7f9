"""Tables of pages as text: any rows as Markdown, verdicts on claims as HTML."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from lddyn.chapters import claims


def markdown(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table of cells that are Markdown themselves."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def verdicts(
    entries: Iterable[Mapping], here: str = "this companion", links: Callable[[Mapping], str] | None = None
) -> str:
    """Judged claims as an HTML table: claim, the paper, the authors' released logs, what was measured here, verdict.

    entries: as `claims.verdicts` or `report.scorecard` gives them. `links` gives the address of the figure behind an
    entry, or an empty text.
    """
    rows = ""
    for e in entries:
        ours = "<br>".join(escape(claims.sentence(part)) for part in e["parts"]) or escape(e["reason"])
        if e.get("why") and e["verdict"] in ("partly", "not replicated"):
            ours += f'<br><em class="why">{escape(e["why"])}</em>'
        where = links(e) if links else ""
        link = f' <a href="{escape(where)}">figure</a>' if where else ""
        rows += (
            f'<tr data-verdict="{e["verdict"]}" data-chapter="{e["chapter"] or "none"}"><td>{e["id"]}</td>'
            f"<td>{escape(e['claim'])}<br><small>{escape(e['source'])}{link}</small></td>"
            f"<td>{escape(e['paper'])}</td><td>{escape(e['authors'] or '-')}</td><td>{ours}</td>"
            f'<td class="verdict {e["verdict"].replace(" ", "-")}">{e["verdict"]}</td></tr>'
        )
    heads = ("#", "claim", "the paper", "released logs", here, "verdict")
    head = "".join(f"<th>{h}</th>" for h in heads)
    return (
        f'<div class="scroll"><table class="claims"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )
