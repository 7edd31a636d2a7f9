"""Reading the authors' released logs: a Parquet table of them, or a folder with clones of the public repositories."""

import json
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lddyn import InputError, first_line, unknown
from lddyn.data.responses import OUR_NAMES, RESPONSE_TYPES
from lddyn.engine import store

COLUMNS = [
    "repository", "commit", "run", "model", "size", "kind", "split", "step", "response_type", "metric", "value",
]  # fmt: skip
KINDS = ("sft", "sft_on_rejected", "extend_sft", "dpo", "extend_dpo", "sparse_dpo")
IN_TABLE = ("repository", "run", "model", "method", "split", "evaluation", "response_type", "value")
FEWEST = 10  # evaluations of a log that is judged
BATCH = 4  # examples of an update in the released runs
MODELS = {  # as the names of runs have them
    r"pythia410m?": "Pythia-410M",
    r"pythia1b": "Pythia-1B",
    r"pythia14": "Pythia-1.4B",
    r"pythia28": "Pythia-2.8B",
    r"qwen05": "Qwen1.5-0.5B",
    r"(?:qwen|qw)(?:18)?": "Qwen1.5-1.8B",  # `qwen` alone: so in the fork
}
METHODS = r"sft\d*|dpo|extend|sparse|suprej|supreject"
OTHER_WORDS = (
    r"base|baseline|prob|chosen|hh|ep\d+|observe|observeargmax\d*|longer|save|checkbug|verify|argmax|verifyargmax|bug|"
    r"5e7|\d{8}"
)


def spacing(evaluations: int) -> int:
    """Examples between two evaluations, as far as the number of them tells; no log says it."""
    return 1000 if evaluations <= 50 else 100


def read(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """All logs as a long table with COLUMNS, and which were left out and why.

    size: billions of parameters; kind: one of KINDS; split: of the prompts, `train` or `test`; step: number of the
    evaluation; value: nats summed over a response, mean over about 500 prompts, `logp_sum` of the twelve types and
    `argmax_logp_sum` of y* along the chosen answer. Raises `InputError` naming the file that is not as it should be.
    """
    path = Path(path)
    if path.is_dir():
        table, left_out = _clones(path)
    else:
        table, left_out = _parquet(path), []
    short = table.groupby(["repository", "run", "split"]).step.transform("nunique") < FEWEST
    names = table[short][["repository", "run"]].drop_duplicates().itertuples(index=False)
    left_out += [f"{repository} {run}: fewer than {FEWEST} evaluations" for repository, run in names]
    table = table[~short]
    if table.empty:
        raise InputError(f"{path} has no log with at least {FEWEST} evaluations whose name says what was trained")
    sizes = table.model.str.extract(r"(\d+(?:\.\d+)?)([MB])", flags=re.IGNORECASE)
    scale = sizes[1].str.upper().map({"M": 1e-3, "B": 1.0})
    names = dict.fromkeys(("repository", "run", "model", "kind", "split", "response_type", "metric"), object)
    table = table.assign(size=(sizes[0].astype(float) * scale).round(3))
    return table[COLUMNS].astype(names).reset_index(drop=True), left_out


def _parquet(path: Path) -> pd.DataFrame:
    """The table of logs that somebody has gathered: IN_TABLE, and `commit` where it has one."""
    try:
        table = pd.read_parquet(path)
    except Exception as error:  # pyarrow has many
        raise InputError(f"cannot read {path} as a Parquet table of logs: {first_line(error)}") from None
    missing = [name for name in IN_TABLE if name not in table]
    if missing:
        raise InputError(f"{path} lacks the column {', '.join(missing)} (needed: {', '.join(IN_TABLE)})")
    for column, allowed in (
        ("method", KINDS),
        ("split", ("train", "test")),
        ("response_type", [*RESPONSE_TYPES, "argmax"]),
    ):
        for name in table[column].unique():
            if name not in allowed:
                raise InputError(f"{path}: {unknown(column, name, allowed)}")
    if not np.isfinite(table.value).all():
        raise InputError(f"{path}: run {table[~np.isfinite(table.value)].run.iloc[0]!r} has a value that is not finite")
    table = table.rename(columns={"method": "kind", "evaluation": "step"}).astype({"value": "float64"})
    if "commit" not in table:
        known = commits()
        names = table.repository + " " + table.run
        table["commit"] = names.map(known).astype(object).where(names.isin(known), None)
    top = table.response_type == "argmax"
    metric = np.where(top, "argmax_logp_sum", "logp_sum")
    return table.assign(metric=metric, response_type=table.response_type.mask(top, "chosen"))


@cache
def commits() -> dict[str, str]:
    """Of logs in a table without commits, one that has the file: `repository run` -> commit (book/recorded)."""
    listed = json.loads((store.BOOK / "recorded" / "released_commits.json").read_text())
    return {
        f"{repository} {run}": commit
        for repository, of in listed.items()
        for commit, runs in of.items()
        for run in runs
    }


# --- clones ------------------------------------------------------------------------------------------------------


def _clones(folder: Path) -> tuple[pd.DataFrame, list[str]]:
    files = sorted(folder.rglob("prob_*_metrics.json"))
    if not files:
        raise InputError(f"{folder} has no prob_train_metrics.json (allowed: a clone of a repository with such logs)")
    tables, left_out = [], []
    for file in files:
        run = file.parent.name
        if (said := named(run)) is None:
            left_out.append(f"{file.relative_to(folder)}: its name does not say what was trained")
            continue
        rows = log(file)
        if not all(np.isfinite(row[-1]) for row in rows):
            left_out.append(f"{file.relative_to(folder)}: a value is not finite")
            continue
        repository, commit = _origin(file.parent)
        about = {"repository": repository, "commit": commit, "run": run, "model": said[0], "kind": said[1]}
        tables.append(pd.DataFrame(rows, columns=["split", "step", "response_type", "metric", "value"]).assign(**about))
    if not tables:
        raise InputError(f"{folder} has no log whose name says what was trained")
    return pd.concat(tables, ignore_index=True), left_out


def named(run: str) -> tuple[str, str] | None:
    """Model and kind of a run out of its name; None where a word of it is not known: another loss, other data."""
    words = run.lower().split("_")
    models = [model for word in words for names, model in MODELS.items() if re.fullmatch(names, word)]
    rest = [word for word in words if not any(re.fullmatch(names, word) for names in MODELS)]
    if len(models) != 1 or not all(re.fullmatch(f"{METHODS}|{OTHER_WORDS}", word) for word in rest):
        return None
    if {"suprej", "supreject"} & set(rest):
        return models[0], "sft_on_rejected"
    method = "dpo" if "dpo" in rest else "sft" if rest and re.search(r"sft|\d{8}", run) else None
    prefix = "extend_" if "extend" in rest else "sparse_" if "sparse" in rest else ""
    return (models[0], prefix + method) if method and prefix + method in KINDS else None


def log(file: Path) -> list[tuple[str, int, str, str, float]]:
    """The rows of one log: split, evaluation, type, metric, value. Objects may follow one another on one line.

    y* counts where ||A|| has a key for each type: before that correction it was measured along another path.
    Raises `InputError` naming the file where it is no such log.
    """
    rows: list[tuple[str, int, str, str, float]] = []
    for step, entry in enumerate(_objects(file)):
        found = []
        for name, value in entry.items():
            if match := re.fullmatch(r"logps_eval_prob_(train|test)/(\w+)", name):
                kind = OUR_NAMES.get(match[2], match[2])
                found += [(match[1], step, kind, "logp_sum", float(value))] if kind in RESPONSE_TYPES else []
        if not any(kind == "chosen" for _, _, kind, _, _ in found):
            raise InputError(
                f"{file}: object {step + 1} has no logps_eval_prob_train/chosen or logps_eval_prob_test/chosen"
            )
        if "argmax_prob_logits" in entry and "chosen_A_o" in entry:
            found.append((found[0][0], step, "chosen", "argmax_logp_sum", float(entry["argmax_prob_logits"])))
        rows += found
    if not rows:
        raise InputError(f"{file} is empty (allowed: JSON objects, one an evaluation)")
    return rows


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, on lines of their own or not."""
    try:
        text, decoder, place = file.read_text(), json.JSONDecoder(), 0
        while place < len(text.rstrip()):
            entry, place = decoder.raw_decode(text, len(text) - len(text[place:].lstrip()))
            if not isinstance(entry, dict):
                raise ValueError(f"{str(entry)[:20]!r} is no object")
            yield entry
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: {first_line(error)} (allowed: JSON objects, one an evaluation)") from None


@cache
def _origin(folder: Path) -> tuple[str, str | None]:
    """The repository of a folder, as `owner/name`, and its commit; the folder's own name where git knows neither."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        address, commit = git("remote", "get-url", "origin"), git("rev-parse", "HEAD")
    except OSError:
        address, commit = "", ""
    match = re.search(r"([^/:]+/[^/:]+?)(?:\.git)?/?$", address)
    return (match[1] if match else folder.name), commit or None
