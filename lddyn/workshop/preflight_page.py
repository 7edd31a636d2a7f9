"""What `preflight` found, in words: on the terminal, and as one page of HTML that loads nothing."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from lddyn.engine import store
from lddyn.workshop import preflight_advice, preflight_worth
from lddyn.workshop.report import STYLE

STYLE_FROM = 0.7  # accuracy of a bag of words from which pairs are called separable by style
OFF_POLICY = 1.0  # nats per token below the model's own samples from which an answer is called off-policy
Table = tuple[Sequence[str], list[Sequence[str]]]  # head, rows


class Section(NamedTuple):
    title: str
    sentences: list[str]
    table: Table | None = None


def sections(found: dict[str, Any]) -> list[Section]:
    """The page, section by section."""
    return [
        Section("What to expect", verdict(found)),
        Section("What else could be done", advice(found), choices(found)),
        Section("The pairs that lower chosen answers most", most(found), pairs(worst(found))),
        Section("The data", data(found)),
        Section("The model on it", model(found), likelihoods(found)),
    ]


def moves(nats: float) -> str:
    return f"{'rise' if nats > 0 else 'fall'} by {abs(nats):.1f} nats"


def verdict(found: dict[str, Any]) -> list[str]:
    asked, s = found["choices"][0], found["settings"]
    short = asked["margin"] < 0.95 * s["margin"]
    reached = f", the largest along this direction ({s['margin']:g} were asked for)" if short else ""
    others = "" if asked["unpushed"] is None else (
        f"; answers to prompts that are not trained on to {moves(asked['unpushed'])}"
    )  # fmt: skip
    return [
        f"At a margin of {asked['margin']:.1f} nats{reached} we expect chosen answers to {moves(asked['chosen'])} "
        f"({asked['fall']} of {asked['pairs']} fall), rejected ones to {moves(asked['rejected'])}, "
        f"y* along chosen to {moves(asked['top'])}{others}.",
        "Means over pairs, summed over the tokens of an answer, for one epoch of DPO "
        f"(beta {s['beta']:g}, {s['optimizer']}, batches of {s['batch_size']}) "
        "along the direction of its gradients at the start.",
        preflight_worth.sentence(),
    ]


def advice(found: dict[str, Any]) -> list[str]:
    """What the table and the facts suggest."""
    asked, *rest = found["choices"]
    best = max(rest, key=lambda choice: choice["chosen"])
    told = []
    if best["chosen"] > asked["chosen"] + 0.1:
        told.append(
            f"Of these, {best['choice']} is best for chosen answers: they {moves(best['chosen'])} "
            f"instead of a {'rise' if asked['chosen'] > 0 else 'fall'} of {abs(asked['chosen']):.1f}."
        )
    else:
        told.append("None of these does more for chosen answers than training as asked.")
    if found["data"]["style"] >= STYLE_FROM:
        told.append("The pairs differ in style: answers that differ in content alone would push less text together.")
    if off_policy(found) > OFF_POLICY:
        told.append("The answers are off-policy: pairs of the model's own samples would lie where it is likely to go.")
    return [*told, preflight_advice.sentence()]


def off_policy(found: dict[str, Any]) -> float:
    """How far chosen answers are below the model's own samples, in nats per token."""
    of = found["model"]
    return of["own"]["logp_per_token"] - of["chosen"]["logp_per_token"]


def most(found: dict[str, Any]) -> list[str]:
    lowering, asked = worst(found), found["choices"][0]
    if not lowering:
        return ["No pair lowers chosen answers to first order."]
    total = sum(row["part"] for row in lowering)
    return [
        f"{len(lowering)} of {asked['pairs']} pairs together change the mean of chosen answers by {total:+.2f} nats "
        "to first order, their own answers and those of all others counted. Column part: what each adds."
    ]


def worst(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs with the lowest parts, where these are negative."""
    lowest = sorted(found["pairs"], key=lambda row: row["part"])[: found["settings"]["most"]]
    return [row for row in lowest if row["part"] < 0]


def data(found: dict[str, Any]) -> list[str]:
    of = found["data"]
    told = [
        f"{of['pairs']} pairs were looked at: {of['duplicates']} duplicates, {of['repeated_prompts']} with a prompt "
        f"that came before, {of['equal_within_limit']} equal within the limit.",
        "Tokens, median and most: "
        + ", ".join(f"{name} {of['median_tokens'][name]:.0f} and {of['most_tokens'][name]}" for name in of["cut"])
        + "; cut by the limits: "
        + ", ".join(f"{name} {share:.0%}" for name, share in of["cut"].items())
        + ".",
        f"A bag of words tells chosen from rejected on {of['style']:.0%} of answers that it was not trained on "
        "(50% is chance).",
    ]
    return told + found["cautions"]


def model(found: dict[str, Any]) -> list[str]:
    gap, valley = off_policy(found), found["model"]["rejected"]["valley"]
    where = "below" if gap > 0 else "above"
    return [
        f"Chosen answers are {abs(gap):.1f} nats per token {where} the model's own samples; {valley:.0%} of the tokens "
        "of rejected answers lie in the valley (below 5%), where pushing down moves mass to y*."
    ]


def likelihoods(found: dict[str, Any]) -> Table:
    head = ("answers", "log π", "per token", "y* per token", "in the valley", "median rank", "‖π‖²")
    return head, [
        (name, f"{v['logp']:.1f}", f"{v['logp_per_token']:.2f}", f"{v['top_per_token']:.2f}", f"{v['valley']:.0%}",
         f"{v['rank']:.0f}", f"{v['peakiness']:.2f}")
        for name, v in found["model"].items()
    ]  # fmt: skip


def choices(found: dict[str, Any]) -> Table:
    head = ("choice", "pairs", "margin", "chosen", "that fall", "rejected", "y*", "not pushed")
    return head, [
        (c["choice"], str(c["pairs"]), f"{c['margin']:.1f}", f"{c['chosen']:+.1f}", f"{c['fall'] / c['pairs']:.0%}",
         f"{c['rejected']:+.1f}", f"{c['top']:+.1f}", "-" if c["unpushed"] is None else f"{c['unpushed']:+.1f}")
        for c in found["choices"]
    ]  # fmt: skip


def pairs(rows: Iterable[dict[str, Any]]) -> Table:
    head = ("pair", "part", "chosen", "rejected", "y*", "CHES by length", "gradient product", "prompt")
    return head, [
        (row["id"], f"{row['part']:+.3f}", f"{row['chosen']:+.1f}", f"{row['rejected']:+.1f}", f"{row['top']:+.1f}",
         f"{row['normalised_ches']:.3g}", f"{row['product']:.3g}", " ".join(row["prompt"].split()))
        for row in rows
    ]  # fmt: skip


# --- on the terminal and as HTML -------------------------------------------------------------------------------


def text(found: dict[str, Any]) -> str:
    """The page for a terminal."""
    blocks = []
    for title, sentences, table in sections(found):
        lines = [title.upper(), *(f"  {sentence}" for sentence in sentences)]
        if table and table[1]:
            rows = [[cell[:60] for cell in row] for row in [table[0], *table[1]]]
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            lines += ["    " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def page(found: dict[str, Any]) -> str:
    """The page as HTML, with every pair."""
    s = found["settings"]
    everything = Section("Every pair", [], pairs(sorted(found["pairs"], key=lambda row: row["part"])))
    body = "\n".join(_html(section) for section in [*sections(found), everything])
    name = f"{s['data']} with {s['model']}"
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Before DPO: {escape(name)}</title>
<style>{STYLE}</style></head><body>
<h1>Before DPO: {escape(name)}</h1>
{body}
<p>{escape(" · ".join(f"{key} {value}" for key, value in s.items()))}</p>
</body></html>
"""


def _html(section: Section) -> str:
    told = "".join(f"<p>{escape(sentence)}</p>" for sentence in section.sentences)
    if section.table and section.table[1]:
        head, rows = section.table
        cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
        told += f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>'
    return f"<h2>{escape(section.title)}</h2>{told}"


def write(found: dict[str, Any], out: Path) -> None:
    """Write the page as HTML."""
    html = page(found)
    store.write_atomically(out, lambda path: path.write_text(html, encoding="utf-8"))
