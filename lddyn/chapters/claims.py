"""Verdicts on the paper's claims, computed from records over seeds by rules written down in `book/claims.yml`.

At the end how they, and other tables of pages, become text.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache
from html import escape

import pandas as pd
import yaml

from lddyn import InputError
from lddyn.chapters import sentences, statistics
from lddyn.engine import recorded, released, store
from lddyn.engine.store import BOOK, Run, frame

LEDGER = BOOK / "claims.yml"
VERDICTS = ("replicated", "partly", "contradicted", "undecided", "not attempted")


@cache
def ledger() -> list[dict]:
    """The claims of `book/claims.yml`; raises `InputError` naming the claim when one is not as the ledger requires."""
    entries = yaml.safe_load(LEDGER.read_text())
    for n, entry in enumerate(entries, 1):
        where = f"{LEDGER.name}, claim {entry.get('id', f'number {n}')}"
        missing = [k for k in ("id", "claim", "source", "paper") if k not in entry]
        if missing or entry["id"] != n:
            raise InputError(f"{where}: needs id (in order), claim, source, paper; missing {missing or 'order'}")
        for part in parts(entry):
            try:
                sentences.statistic(part["chapter"], part["statistic"])
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
            sentences.rule(part["holds"], where)
    return entries


def parts(claim: Mapping) -> list[dict]:
    """The parts of a claim, each with the chapter that measures it: its own, or the claim's."""
    return [{"chapter": claim.get("chapter")} | part for part in claim.get("parts", [])]


def of_chapter(chapter: str) -> list[dict]:
    """The claims that a chapter measures, alone or with others."""
    return [claim for claim in ledger() if chapter in {part["chapter"] for part in parts(claim)}]


def by_seed(runs: Sequence[Run]) -> list[pd.DataFrame]:
    """The runs' tables, joined for each seed."""
    return [table for _, table in frame(runs).groupby("seed")] if runs else []


def of_sweep(name: str) -> list[pd.DataFrame]:
    """The rows of the recorded sweep `book/sweeps/NAME.json`, a table for each seed; none where it is not recorded."""
    try:
        table, _ = store.kept(f"sweeps/{name}")
    except InputError:
        return []
    return [rows for _, rows in table.groupby("seed")]


def judge(part: Mapping, tables: Sequence[pd.DataFrame]) -> dict:
    """One part of a claim over seeds: `says, holds, ours, interval, outcome` (holds, fails or undecided), `seeds`.

    The outcome is decided by the whole interval; for an `exact` part (an identity), by every single seed. Where no run
    measures it, `ours` is None and the outcome undecided. Every other error of a statistic is raised.
    """
    measure = sentences.statistic(part["chapter"], part["statistic"])
    values = sentences.values(measure, part.get("arguments", {}), tables)
    low, high = sentences.rule(part["holds"], part["statistic"])
    if not len(values):
        ours, (a, b), outcome = None, (-math.inf, math.inf), "undecided"
    elif part.get("exact"):
        ours, (a, b) = float(values.max()), (float(values.min()), float(values.max()))
        outcome = "holds" if low <= a and b <= high else "fails"
    else:
        ours, a, b = statistics.mean_interval(values, sentences.bounds(measure))
        outcome = sentences.outcome((a, b), (low, high))
    return {
        "says": part["says"],
        "holds": part["holds"],
        "ours": ours,
        "interval": [a, b] if math.isfinite(a) else None,
        "outcome": outcome,
        "replicates": None,
        "seeds": len(values),
        "later": part.get("later"),
    }


def verdicts(published: Mapping[str, dict]) -> list[dict]:
    """A verdict for each claim. `published` maps a chapter to `{"scale": ..., "runs": [Run, ...]}`.

    The verdict is that of its parts (`word`). A part is measured in its own `chapter`,
    or in the claim's; parts whose chapter has no record are left out, and the reason names the chapter. A claim with a
    `sweep` is measured in that recorded table instead. `grade`: what stands behind it (`grade`).
    """
    tables = cache(lambda chapter: by_seed(published[chapter]["runs"]))
    return [_verdict_of_sweep(entry) if "sweep" in entry else _verdict(entry, published, tables) for entry in ledger()]


def _verdict_of_sweep(entry: Mapping) -> dict:
    tables = of_sweep(entry["sweep"])
    found = {entry["chapter"]: {"scale": "recorded"}} if tables else {}
    return _verdict(entry, found, lambda _: tables)


def _verdict(entry: Mapping, published: Mapping[str, dict], tables) -> dict:
    wanted = parts(entry)
    missing = sorted({part["chapter"] for part in wanted} - published.keys())
    judged = []
    for part in (part for part in wanted if part["chapter"] in published):
        found = judge(part, _recorded(part) if "recorded" in part else tables(part["chapter"]))
        if published[part["chapter"]]["scale"] == "laptop":
            found = _with_replicates(found, part)
        judged.append(found | {"chapter": part["chapter"]})
    any_measured = any(part["ours"] is not None for part in judged)
    commands = [f"sweep book/sweeps/{entry['sweep']}.yml" if "sweep" in entry else f"run {name}" for name in missing]
    reasons = [sentence(part) for part in judged] + [f"no record: python -m lddyn {words}" for words in commands]
    return {
        **{k: entry.get(k) for k in ("id", "group", "claim", "source", "paper", "authors", "chapter", "see")},
        **_why(entry, published, tables),
        "elsewhere": missing,
        "ours": judged[0]["ours"] if judged else None,
        "interval": judged[0]["interval"] if judged else None,
        "seeds": judged[0]["seeds"] if judged else 0,
        "scale": published[judged[0]["chapter"]]["scale"] if judged else None,
        "verdict": word([part["outcome"] for part in judged] if any_measured else []),
        "grade": grade(entry, published[judged[0]["chapter"]]["scale"]) if judged else None,
        "parts": judged,
        "released": of_logs(entry),
        "reason": "; ".join(reasons) or "no experiment of this companion tests it yet",
    }


def _with_replicates(judged: dict, part: Mapping) -> dict:
    """A judged part with the replicates of other bases and data in which its rule holds, `[held, of]`.

    What holds over seeds but not in every replicate has the outcome `mixed`.
    """
    low, high = sentences.rule(part["holds"], part["says"])
    values = [row["values"] for row in recorded.replicates() if row["chapter"] == part["chapter"]]
    held = [low <= each[released.key(part)] <= high for each in values if released.key(part) in each]
    mixed = judged["outcome"] == "holds" and not all(held)
    found = {"replicates": [sum(held), len(held)]} if held else {}
    return judged | found | ({"outcome": "mixed"} if mixed else {})


def _recorded(part: Mapping) -> list[pd.DataFrame]:
    """The tables of the recorded runs that measure a part, such as those on MNIST of chapter 1."""
    return by_seed(recorded.read(part["chapter"], part["recorded"]))


def _why(entry: Mapping, published: Mapping[str, dict], tables: sentences.Tables) -> dict:
    """`why` of a claim with its numbers, or what of it is `refuted`; neither if its chapter has no record."""
    about = {asserted.chapter for asserted in sentences.assertions(entry.get("why", ""), entry.get("chapter", ""))}
    if "why" not in entry or about - published.keys():
        return {"why": None, "refuted": []}
    found = sentences.said(entry["why"], entry["chapter"], tables)
    return {"why": None if found.refuted else found.text, "refuted": found.refuted}


def of_logs(entry: Mapping, logs: Mapping | None = None) -> dict | None:
    """A claim judged on the authors' released logs, `verdict` and `parts` (`released.judge`); None where none can tell.

    Replicated: every part that a log can tell holds in every run that can; contradicted: no part in any; else partly.
    """
    judged = [released.judge(p, *sentences.rule(p["holds"], p["says"]), logs) for p in parts(entry)]
    told = [part for part in judged if part]
    outcomes = {part["outcome"] for part in told}
    return {"verdict": word(outcomes), "parts": told, "of": len(judged)} if told else None


def logs_sentence(found: Mapping) -> str:
    """A result of `of_logs` in words, without its verdict."""
    some = f"({len(found['parts'])} of {found['of']} parts) " if len(found["parts"]) < found["of"] else ""
    return some + "; ".join(released.sentence(part) for part in found["parts"])


def word(outcomes: Collection[str]) -> str:
    """The verdict on a claim from the outcomes of its parts.

    Replicated: all hold, in all replicates too. Contradicted: some fail and none holds. Undecided: none holds and none
    fails. Partly: else.
    """
    if not outcomes:
        return "not attempted"
    if set(outcomes) == {"holds"}:
        return "replicated"
    if "holds" in outcomes or "mixed" in outcomes:
        return "partly"
    return "contradicted" if "fails" in outcomes else "undecided"


def grade(entry: Mapping, scale: str) -> str:
    """What stands behind a verdict: an identity (all parts are exact: a theorem, a check of code), or which model."""
    if all(part.get("exact") for part in parts(entry)):
        return "identity"
    return "real model" if scale == recorded.SCALE else "small model"


def sentence(part: Mapping) -> str:
    spread = "one seed" if part["interval"] is None else "[{:.3g}, {:.3g}]".format(*part["interval"])
    found = "not measured" if part["ours"] is None else f"{part['ours']:.3g} {spread}"
    told = "; with other bases and data in {} of {}".format(*part["replicates"]) if part["replicates"] else ""
    return f"{part['says']}: {found}, rule {part['holds']}: {part['outcome']}{told}"


def sentence_on_recorded(part: Mapping) -> str:
    """`sentence`, and whether the rule is younger than the recorded runs that it judges."""
    return sentence(part) + (f" (rule of later: {part['later']})" if part["later"] else "")


def on_real_model(published: Mapping[str, dict]) -> list[dict]:
    """The claims of which something is measured in runs on the real model (`recorded.published`), judged there."""
    return [e for e in verdicts(published) if e["scale"] == recorded.SCALE and e["verdict"] != "not attempted"]


def of_group(entries: Iterable[dict], group: str | None = None) -> list[dict]:
    """The claims of a group: of none, those of the paper; `beyond`, those of others that chapter 8 tests."""
    return [entry for entry in entries if entry.get("group") == group]


def measured(entries: Iterable[Mapping], chapter: str) -> list[dict]:
    """The judged claims of which a chapter has measured a part."""
    return [dict(e) for e in entries if any(part["chapter"] == chapter for part in e["parts"])]


def agreement(small: Iterable[Mapping], real: Iterable[Mapping]) -> str:
    """On how many claims two scales have the same verdict, and the others with both, as a sentence."""
    here = {e["id"]: e["verdict"] for e in small if e["parts"]}
    pairs = {e["id"]: (here[e["id"]], e["verdict"]) for e in real if e["parts"] and e["id"] in here}
    same = [str(number) for number, (a, b) in pairs.items() if a == b]
    other = [f"{number} ({a}; here {b})" for number, (a, b) in pairs.items() if a != b]
    words = f"Of {len(pairs)} claims that both models measure, {len(same)} have the same verdict"
    words += f" ({', '.join(same)})" if same else ""
    return f"{words}; the others: {', '.join(other)}." if other else f"{words}."


# --- as text of a page -------------------------------------------------------------------------------------


def markdown_table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table of cells that are Markdown themselves."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def as_html(
    entries: Iterable[Mapping],
    here: str = "this companion",
    links: Callable[[Mapping], str] | None = None,
    real: Iterable[Mapping] | None = None,
) -> str:
    """Judged claims as an HTML table: claim, the paper, the authors' released logs, what was measured here, verdict.

    entries: as `verdicts` or `report.scorecard` gives them. `links` gives the address of the figure behind an
    entry, or an empty text. `real`: the same claims judged on the real model, for a column of its own.
    """
    rows, of_real = "", {e["id"]: e for e in real or []}
    for e in entries:
        ours = "<br>".join(escape(sentence(part)) for part in e["parts"]) or escape(e["reason"])
        if e.get("why") and e["verdict"] not in ("replicated", "not attempted"):
            ours += f'<br><em class="why">{escape(e["why"])}</em>'
        where = links(e) if links else ""
        link = f' <a href="{escape(where)}">figure</a>' if where else ""
        rows += (
            f'<tr data-verdict="{e["verdict"]}" data-chapter="{e["chapter"] or "none"}"><td>{e["id"]}</td>'
            f"<td>{escape(e['claim'])}<br><small>{escape(e['source'])}{link}</small></td>"
            f"<td>{escape(e['paper'])}</td><td>{_logs_cell(e)}</td><td>{ours}</td>"
            f'<td class="verdict {e["verdict"].replace(" ", "-")}">'
            f"{'this chapter’s part: ' if e.get('elsewhere') else ''}{e['verdict']}"
            f"<br><small>{e.get('grade') or ''}</small></td>"
        )
        rows += ("" if real is None else _real_cell(of_real.get(e["id"]))) + "</tr>"
    heads = ("#", "claim", "the paper", "released logs", here, "verdict", *([] if real is None else ["SmolLM2-135M"]))
    head = "".join(f"<th>{h}</th>" for h in heads)
    return (
        f'<div class="scroll"><table class="claims"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _logs_cell(entry: Mapping) -> str:
    """What the released logs say: judged where they can tell; else the text of the ledger, typed with its source."""
    if not (found := entry.get("released")):
        return escape(entry["authors"] or "-")
    return _judged_cell(found["verdict"], found["parts"], found["of"], released.sentence)


def _real_cell(entry: Mapping | None) -> str:
    """The verdict on the real model with its parts."""
    if entry is None or not entry["parts"]:
        return "<td>-</td>"
    of, told = len(parts(ledger()[entry["id"] - 1])), [part for part in entry["parts"] if part["ours"] is not None]
    return f"<td>{_judged_cell(entry['verdict'], told, of, sentence_on_recorded)}</td>"


def _judged_cell(verdict: str, judged: Sequence[Mapping], of: int, words: Callable[[Mapping], str]) -> str:
    """A verdict with its parts in words; over some of the parts it says of how many."""
    some = f" ({len(judged)} of {of} parts measured)" if len(judged) < of else ""
    found = "<br>".join(escape(words(part)) for part in judged)
    return f'<strong class="{verdict.replace(" ", "-")}">{verdict}</strong>{some}<br>{found}'
