"""The authors' released logs, as `python -m lddyn released` has recorded them: statistics of runs, judged by a rule.

`book/recorded/released.json` has `runs`, one entry a log, and `comparisons`, one entry a group of logs that a statistic
needs together; each has `model` and `values`, a number for every statistic that it can tell. The rule is applied when
the file is read, so that another rule needs no logs.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from lddyn.engine import store

FILE = store.BOOK / "recorded" / "released.json"
COUNTED = {"03_sft": "sft", "05_dpo": "dpo"}  # the kind of run that a chapter's claims are about


@cache
def recorded() -> dict[str, Any]:
    """The content of `book/recorded/released.json`; without runs where there is none."""
    content: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"runs": [], "comparisons": []}
    return content


def key(part: Mapping[str, Any]) -> str:
    """The name of a part's value: `05_dpo: step_order(kind=rejected)`."""
    given = ", ".join(f"{name}={value}" for name, value in part.get("arguments", {}).items())
    return f"{part['chapter']}: {part['statistic']}({given})".replace("'", "")


def judge(
    part: Mapping[str, Any], low: float, high: float, logs: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """One part over all logs that can tell, or None where none can: `says, holds, values` and the counts below.

    A run holds where its value lies in [low, high], a model where all its runs hold: `runs` of them and `held`,
    `models` and `models_held`. Counted are the logs of training prompts of the kind that the part's chapter trains
    (`COUNTED`), and all comparisons. `outcome`: holds (in every run), fails (in every run) or mixed.
    """
    content, name, kind = logs or recorded(), key(part), COUNTED.get(part["chapter"])
    counted = [run for run in content["runs"] if run["kind"] == kind and run["split"] == "train"]
    told = [entry for entry in [*counted, *content["comparisons"]] if name in entry["values"]]
    if not told:
        return None
    values = [
        {"run": e["run"], "model": e["model"], "value": e["values"][name], "holds": low <= e["values"][name] <= high}
        for e in told
    ]
    models = {value["model"] for value in values}
    failing = {value["model"] for value in values if not value["holds"]}
    held = sum(value["holds"] for value in values)
    return {
        "says": part["says"],
        "holds": part["holds"],
        "outcome": "holds" if held == len(values) else "mixed" if held else "fails",
        "runs": len(values),
        "held": held,
        "models": len(models),
        "models_held": len(models - failing),
        "values": values,
    }


def sentence(judged: Mapping[str, Any]) -> str:
    """A result of `judge` in words: in how many runs and models the rule holds, and the range of the values."""
    values = judged["values"]
    if len(values) == 1:
        return f"{judged['says']}: {values[0]['value']:.3g}, rule {judged['holds']}: {judged['outcome']}"
    numbers = [value["value"] for value in values]
    count = f"{judged['held']} of {judged['runs']} runs ({judged['models_held']} of {judged['models']} models)"
    return f"{judged['says']}: {min(numbers):.3g} to {max(numbers):.3g}, rule {judged['holds']}: holds in {count}"
