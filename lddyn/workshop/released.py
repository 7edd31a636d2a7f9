"""`python -m lddyn released PATH`: the authors' released logs, judged by the statistics and rules of the chapters.

PATH is a table of logs (Parquet) or a folder with clones of the public repositories. The logs stay outside the project;
statistics, end changes and thinned curves, with repository and commit, go to `book/recorded/released.json`. A log has
the means over about 500 prompts, so that what is asked of single prompts is asked of their mean, and what a log does
not have is left out. The unit is a run of one model, not a seed.
"""

import json
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from lddyn.chapters import claims, sentences, statistics
from lddyn.chapters.extend.evidence import ARMS
from lddyn.data.responses import RESPONSE_TYPES
from lddyn.engine import released, store
from lddyn.workshop.released_files import BATCH, FEWEST, read, spacing

TOP = "y*"  # the most likely token at each position along the chosen answer
CHAPTERS = {"sft": "03_sft", "dpo": "05_dpo"}  # by the end of a kind's name; what each run is measured by
IN_SFT = {"sft_rise_share", "sft_rejected"}  # chapter 7
IN_DPO = {"dpo_change", "falls_less", "others_fall_less", "top_at_start"}
SAME = 5.0  # nats: starts of log pi(chosen) that lie closer are starts from the same amount of SFT
POINTS = 15  # of a recorded curve

Log = dict[str, Any]


def record(path: Path, out: Path) -> str:
    """Read the logs at `path`, write what they tell to `out`; returns a verdict a claim, as text.

    Raises `InputError` naming the file where it cannot be read.
    """
    store.writable(out)
    table, left_out = read(path)
    content = facts(table)
    store.write_atomically(out, lambda place: place.write_text(as_json(content)))
    judged = [(claim, found) for claim in claims.ledger() if (found := claims.of_logs(claim, content))]
    lines = [f"{claim['id']:>2}  {found['verdict']:<15} {claims.logs_sentence(found)}" for claim, found in judged]
    lines += [f"left out: {why}" for why in left_out]
    return "\n".join([*lines, f"{len(content['runs'])} logs, {len(content['comparisons'])} comparisons: {out}"])


def as_json(content: Mapping) -> str:
    """The facts as JSON, one entry a line."""
    parts = [
        f'"{name}": [\n' + ",\n".join(json.dumps(e, separators=(",", ":")) for e in entries) + "\n]"
        for name, entries in content.items()
    ]
    return "{" + ",\n".join(parts) + "}\n"


def facts(table: pd.DataFrame) -> dict[str, list[Log]]:
    """What a table of logs (`released_files.read`) tells: `runs` and `comparisons`, in a fixed order.

    A run: `repository, commit, run, model, size` (billions of parameters), `kind, split`; `evaluations`, and how many
    were `dropped`; `before`, what was trained before it (`trained_before`), and `start`, how far log pi(chosen) then is
    above the untouched model's, nats; `begins`, the longer log of which it is the beginning; `margin`, the growth of
    log pi(chosen) - log pi(rejected), nats, the dose of a DPO; `changes` of every type from start to end, nats summed
    over a response; `values` of the statistics (`released.key`); `at` and `curves`, changes at a few evaluations.
    Values have four digits, curves one decimal.
    """
    logs = sorted(phases(table), key=lambda log: (log["size"] or 0, *(log[k] for k in _NAMES)))
    for log in logs:
        log["curves"] = curves_of(log["table"])
    for log in logs:
        same = [other for other in logs if all(other[name] == log[name] for name in ("model", "split"))]
        lowest = min(_start(other) for other in same)
        untouched = [other for other in same if _start(other) < lowest + SAME]
        log["base"] = max((_starts(other) for other in untouched), key=len)
        log["before"] = trained_before(log)
    return {"runs": [_run(log, logs) for log in logs], "comparisons": comparisons(logs)}


_NAMES = ("model", "kind", "repository", "run", "split")


def phases(table: pd.DataFrame) -> Iterable[Log]:
    """One log for each training: the names, and `table` as statistics take it.

    Where several runs were appended to one file, the longest counts; `dropped` evaluations are left out. A DPO whose
    name ends with `sft` and a number from 100 up begins with so many steps of SFT in the same log; they are a log of
    their own, of SFT on the answers that gain more.
    """
    for _, rows in table.groupby([*_NAMES], sort=True):
        names = rows.iloc[0][["commit", "size", *_NAMES]].to_dict()
        names |= {name: None for name in ("commit", "size") if pd.isna(names[name])}
        whole, rows = rows, longest(rows)
        names["dropped"] = whole.step.nunique() - rows.step.nunique()
        last, before = rows.step.max(), re.search(r"_sft(\d{3,})$", names["run"])
        change = int(before[1]) * BATCH // spacing(last + 1) if before and names["kind"] == "dpo" else 0
        if change >= FEWEST:
            first = names | {"run": f"{names['run']}: SFT", "table": shaped(rows[rows.step <= change])}
            gain = {kind: statistics.change(first["table"], kind) for kind in ("chosen", "rejected")}
            yield first | {"kind": "sft" if gain["chosen"] > gain["rejected"] else "sft_on_rejected"}
        since = rows[rows.step >= change]
        yield names | {"table": shaped(since.assign(step=since.step - change))}


def longest(rows: pd.DataFrame) -> pd.DataFrame:
    """The longest of the runs in one file, counted from 0; another one begins where all values are the first again."""
    wide = rows.pivot(index="step", columns=["response_type", "metric"], values="value")
    begun = ((wide - wide.iloc[0]).abs().max(axis=1) < 1e-3).cumsum()
    kept = begun.index[begun == begun.value_counts().idxmax()]
    return rows[rows.step.isin(kept)].assign(step=lambda part: part.step - kept[0])


def shaped(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of one log in the shape of a run's table: one prompt, `train/mean` or `test/mean`, and one seed.

    Examples are evaluations too: the spacing is not in the logs.
    """
    named = {"step": rows.step, "examples": rows.step, "prompt_id": rows.split + "/mean"}
    return pd.DataFrame(named | {name: rows[name] for name in ("response_type", "metric", "value")} | {"seed": 0})


def curves_of(table: pd.DataFrame) -> dict[str, pd.Series]:
    """The curves of one log over evaluations, nats, of every type that was measured and of y*."""
    top = table.metric == "argmax_logp_sum"
    groups = table.assign(kind=table.response_type.mask(top, TOP)).groupby("kind")
    found = {kind: rows.set_index("step").value.sort_index() for kind, rows in groups}
    return {kind: found[kind] for kind in (*RESPONSE_TYPES, TOP) if kind in found}


def _start(log: Log) -> float:
    """log pi(chosen) at the first evaluation, nats."""
    return float(log["curves"]["chosen"].iloc[0])


def _starts(log: Log) -> dict[str, float]:
    """The first value of every type that was measured, nats."""
    return {kind: float(curve.iloc[0]) for kind, curve in log["curves"].items() if kind != TOP}


def trained_before(log: Log) -> str:
    """What a log starts from, as its first values tell: `nothing`, `SFT` on chosen, `SFT on rejected`, `extended SFT`.

    The names do not say on which answers; of one that has gained more than the other, trained were its like. For the
    untouched model counts the lowest start of a log of the same model and prompts: with DPO alone it cannot be told.
    """
    gain = {kind: value - log["base"][kind] for kind, value in _starts(log).items() if kind in log["base"]}
    if gain["chosen"] < SAME:
        return "nothing"
    if log["kind"] == "extend_dpo":
        return "extended SFT"
    return "SFT on rejected" if gain.get("rejected", -math.inf) > gain["chosen"] else "SFT"


def _run(log: Log, logs: list[Log]) -> Log:
    curves = log["curves"]
    at = store.dense_early(len(curves["chosen"]) - 1, POINTS)
    changes = {kind: digits(values.iloc[-1] - values.iloc[0]) for kind, values in curves.items()}
    margin = digits(changes["chosen"] - changes["rejected"]) if "rejected" in changes else None
    chapter = CHAPTERS["dpo" if log["kind"].endswith("dpo") else "sft"]
    gained = _start(log) - log["base"]["chosen"]
    return {name: log[name] for name in ("repository", "commit", "run", "model", "size", "kind", "split")} | {
        "evaluations": len(curves["chosen"]),
        "dropped": log["dropped"],
        "before": log["before"],
        "start": 0.0 if log["before"] == "nothing" else digits(gained),
        "begins": next((other["run"] for other in logs if _begins(log, other)), None),
        "margin": margin,
        "changes": changes,
        "values": values_of(log["table"], chapter),
        "at": at,
        "curves": {kind: [round(float(v - c.iloc[0]), 1) for v in c.iloc[at]] for kind, c in curves.items()},
    }


def _begins(log: Log, other: Log) -> bool:
    """Whether a log is the beginning of a longer one: the same numbers, stopped earlier."""
    if any(log[name] != other[name] for name in ("model", "kind", "split")):
        return False
    mine, longer = log["curves"]["chosen"], other["curves"]["chosen"]
    return len(mine) < len(longer) and bool((mine - longer.iloc[: len(mine)]).abs().max() < 0.01)


def digits(value: float) -> float:
    """A number with four significant digits."""
    return float(f"{value:.4g}")


def values_of(table: pd.DataFrame, chapter: str, only: Collection[str] = ()) -> dict[str, float]:
    """The statistics of a chapter's claims (`only` these, or all) that a table can tell, named as by `released.key`."""
    found = {}
    for part in (part for claim in claims.ledger() if "sweep" not in claim for part in claims.parts(claim)):
        name = part["statistic"]
        if part["chapter"] != chapter or (only and name not in only):
            continue
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # NumPy, for the mean of nothing
            value = sentences.value(sentences.statistic(chapter, name), table, part.get("arguments", {}))
        if math.isfinite(value):
            found[released.key(part)] = digits(value)
    return found


# --- several logs together ---------------------------------------------------------------------------------------


def comparisons(logs: list[Log]) -> list[Log]:
    """What only several logs tell: extended against baseline (claims 43 to 48), more SFT before DPO (37), a larger
    learning rate (40), all runs of SFT (28). Each with `kind, run, model` and `values`."""
    train = [log for log in logs if log["split"] == "train"]
    found = [*_extended(train), *_more_sft(train), *_larger_rate(train), *_everywhere(train)]
    return [entry for entry in found if entry["values"]]


def _entry(kind: str, logs: list[Log], values: Mapping[str, float]) -> Log:
    return {"kind": kind, "run": " / ".join(log["run"] for log in logs), "model": logs[0]["model"], "values": values}


def _owner(log: Log) -> tuple[str, str]:
    """Logs that may be compared: of one model, by the same people."""
    return log["model"], log["repository"].split("/")[0]


def _arms(starts: Mapping[str, float], arms: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables of arms joined, each after one row a type for the untouched model, at step -1."""
    base = [(-1, -1, "train/mean", kind, "logp_sum", value, 0) for kind, value in starts.items()]
    tables = [pd.concat([pd.DataFrame(base, columns=list(t)), t]).assign(arm=arm) for arm, t in arms.items()]
    return pd.concat(tables, ignore_index=True)


def _extended(logs: list[Log]) -> Iterable[Log]:
    """Extended against baseline. In SFT at equal exposures: half of the extended examples are chosen answers, so that
    the baseline's log is cut at half the evaluations; without such a log, at the start of DPO, after the baseline's
    own SFT. In DPO at its evaluations.
    """
    for ours in (log for log in logs if log["kind"] == "extend_dpo"):
        near = [log for log in logs if _owner(log) == _owner(ours)]
        theirs = [log for log in near if log["kind"] == "dpo" and log["before"] == "SFT"]
        before = [log for log in near if log["kind"] in ("sft", "extend_sft") and "rejected" in log["curves"]]
        if not theirs or not before:
            continue
        other = min(theirs, key=lambda log: abs(len(log["curves"]["chosen"]) - len(ours["curves"]["chosen"])))
        starts = _starts(before[0])
        dpo = _arms(starts, dict(zip(ARMS, (other["table"], ours["table"]), strict=False)))
        by_kind = {log["kind"]: log for log in before}
        used, sft = [ours, other], dpo
        if len(by_kind) == 2:
            used = [by_kind["extend_sft"], by_kind["sft"], *used]
            half = used[0]["table"].step.max() // 2
            baseline, extended = used[1]["table"], used[0]["table"]
            ends = {"baseline": baseline[baseline.step == half], "extended": extended[extended.step == 2 * half]}
            sft = _arms(starts, {arm: rows.assign(step=0) for arm, rows in ends.items()})
        values = values_of(sft, "07_extend", IN_SFT) | values_of(dpo, "07_extend", IN_DPO)
        yield _entry("extended", used, values)


def _more_sft(logs: list[Log]) -> Iterable[Log]:
    """DPO after different amounts of SFT on chosen answers, which log pi(chosen) at its start tells: of each amount the
    log with most types, then the longest; all are cut at the same evaluation."""
    groups: dict[tuple, list[Log]] = {}
    for log in sorted(logs, key=lambda log: _start(log)):
        if log["kind"] == "dpo" and log["before"] in ("nothing", "SFT"):
            groups.setdefault((log["model"], spacing(len(log["curves"]["chosen"]))), []).append(log)
    for same in groups.values():
        amounts: list[Log] = []
        for log in same:
            if not amounts or _start(log) > _start(amounts[-1]) + SAME:
                amounts.append(log)
            elif len(log["table"]) > len(amounts[-1]["table"]):
                amounts[-1] = log
        if len(amounts) > 1:
            tables = {round(_start(log)): log["table"] for log in amounts}
            yield _entry("more SFT", amounts, values_of(_cut(tables, "sft_epochs"), "05_dpo", {"sft_effect"}))


def _cut(tables: Mapping[float, pd.DataFrame], setting: str) -> pd.DataFrame:
    """Tables joined up to their last common evaluation, with a column that tells them apart."""
    last = min(table.step.max() for table in tables.values())
    parts = [table[table.step <= last].assign(**{setting: value}) for value, table in tables.items()]
    return pd.concat(parts, ignore_index=True)


def _larger_rate(logs: list[Log]) -> Iterable[Log]:
    """Two logs of DPO whose names differ by the learning rate 5e-7; that of the other one, larger, no log tells."""
    by_name = {(*_owner(log), log["run"]): log for log in logs if log["kind"] == "dpo"}
    for (*owner, name), large in by_name.items():
        if small := by_name.get((*owner, f"{name}_5e7")):
            table = _cut({5e-7: small["table"], math.inf: large["table"]}, "lr")
            yield _entry("larger rate", [large, small], values_of(table, "05_dpo", {"rate_effect"}))


def _everywhere(logs: list[Log]) -> Iterable[Log]:
    """Claim 28: its statistics over all logs of SFT, as over the cells of a sweep."""
    sft, values = [log for log in logs if log["kind"] == "sft"], {}
    for part in (part for claim in claims.ledger() if "sweep" in claim for part in claims.parts(claim)):
        measure = sentences.statistic("03_sft", column := part["arguments"]["column"])
        cells = pd.DataFrame({column: [sentences.value(measure, log["table"], {}) for log in sft]}).dropna()
        if len(cells):
            everywhere = sentences.statistic(part["chapter"], part["statistic"])
            values[released.key(part)] = digits(everywhere(cells, **part["arguments"]))
    if sft:
        models = ", ".join(sorted({log["model"] for log in sft}))
        yield {"kind": "all SFT", "run": f"{len(sft)} logs of SFT", "model": models, "values": values}
