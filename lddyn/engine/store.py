"""Records: one long table per run and a manifest beside it; how they are written, checked, read and kept."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lddyn import InputError, unknown

COLUMNS = ["step", "examples", "prompt_id", "response_type", "metric", "value"]
PACKAGE = Path(__file__).parents[1]
CLONE = (PACKAGE.parent / "pyproject.toml").exists()  # or the package alone, as pip installs it
ROOT = PACKAGE.parent if CLONE else Path.cwd()  # where runs and executed notebooks go
SOURCES = ROOT if CLONE else PACKAGE / "shipped"  # what of the clone the package brings with it (`setup.py`)
BOOK = SOURCES / "book"  # claims, settings, and small tables as JSON in folders of it


class RecordError(RuntimeError):
    """A record on disk is missing, damaged or breaks an invariant; one line naming the folder and why."""


class Run(NamedTuple):
    folder: Path
    table: pd.DataFrame  # COLUMNS, one number a row
    manifest: dict[str, Any]


def runs_root() -> Path:
    """The folder that holds the runs: `$LDDYN_RUNS`, or `runs/` in the repository, or here where there is none."""
    return Path(os.environ.get("LDDYN_RUNS", ROOT / "runs"))


# --- what made a run ---------------------------------------------------------------------------------------


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# --- reading and writing -----------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    Raises `RecordError` when the folder cannot be written or the disk is full; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RecordError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder beside `folder`, then put it in its place."""
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def write_pretrained(folder: Path, *parts: Any) -> None:
    """Save a model as safetensors, a tokenizer, or both into a folder, in one step."""
    write_folder(folder, lambda place: [part.save_pretrained(place) for part in parts])


def write_json(path: Path, content: object) -> None:
    """Write indented JSON atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))


def check(table: pd.DataFrame) -> None:
    """Check the invariants of a table; raise `RecordError` naming the first one that is broken.

    Finite values; metrics whose name starts with `prob` in [0, 1]; log-probabilities at most zero; along one path the
    arg max is at least as likely as the response itself, log pi(y*) >= log pi(y); every evaluation of a
    metric has the same prompts.
    """
    if list(table.columns) != COLUMNS:
        raise RecordError(f"columns are {list(table.columns)}, expected {COLUMNS}")
    if table.empty:
        raise RecordError("the table is empty")
    if not np.isfinite(table.value).all():
        bad = table[~np.isfinite(table.value)].iloc[0]
        raise RecordError(f"{bad.metric} of {bad.response_type} at step {bad.step} is {bad.value}")
    prob = table[table.metric.str.startswith("prob")]
    if not prob.value.between(0, 1 + 1e-6).all():
        raise RecordError(f"{prob.loc[~prob.value.between(0, 1 + 1e-6), 'metric'].iloc[0]} leaves [0, 1]")
    logp = table[table.metric.str.contains(r"^(?:argmax_)?logp_(?:sum|mean)$", regex=True)]
    if (logp.value > 1e-4).any():
        raise RecordError(f"{logp.loc[logp.value > 1e-4, 'metric'].iloc[0]} is above zero")
    if "argmax_logp_sum" in set(logp.metric):
        pair = logp.pivot(index=["step", "prompt_id", "response_type"], columns="metric", values="value")
        pair = pair[["argmax_logp_sum", "logp_sum"]].dropna()
        worst = (pair.argmax_logp_sum - pair.logp_sum).min()
        if worst < -1e-3:
            raise RecordError(f"log pi(y*) is {-worst:.3g} nats below log pi(y) on the same path")
    per_step = table.groupby(["metric", "response_type", "step"], observed=True).prompt_id.agg(
        lambda ids: hash(frozenset(ids))
    )
    uneven = per_step.groupby(level=[0, 1], observed=True).nunique()
    if (uneven > 1).any():
        metric, kind = uneven[uneven > 1].index[0]
        raise RecordError(f"the evaluations of {metric} for {kind} are over different prompts")


def load(folder: Path | str) -> Run:
    """Read a finished run and check it; raise `RecordError` when it is missing, unfinished or damaged."""
    folder = Path(folder)
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        if not manifest["finished"]:
            raise RecordError(f"{folder}: the run is not finished")
        if file_hash(folder / "table.parquet") != manifest["table_sha256"]:
            raise RecordError(f"{folder}: table.parquet is damaged (its hash differs from the manifest's)")
        table = pd.read_parquet(folder / "table.parquet")
    except (OSError, ValueError, KeyError) as error:
        raise RecordError(f"{folder}: unreadable record ({type(error).__name__}: {error})") from error
    try:
        check(table)
    except RecordError as error:
        raise RecordError(f"{folder}: {error}") from error
    return Run(folder, table, manifest)


def long(rows: Iterable[tuple[object, ...]]) -> pd.DataFrame:
    """A table from tuples in the order of `COLUMNS`."""
    return compact(pd.DataFrame(rows, columns=COLUMNS))


def dense_early(last: int, count: int) -> list[int]:
    """At most `count` times from 0 to `last`, both included, quadratically denser at the start, where most happens."""
    return sorted({round(last * (i / (count - 1)) ** 2) for i in range(count)})


def compact(table: pd.DataFrame) -> pd.DataFrame:
    """The columns in order and with their types; names are stored once (categories)."""
    numbers = {"step": "int64", "examples": "int64", "value": "float64"}
    return table[COLUMNS].astype(numbers | dict.fromkeys(["prompt_id", "response_type", "metric"], "category"))


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """The tables of several runs in one, with a column `seed` and one for each parameter in which the runs differ.

    A parameter that is no single value stands there as a text; where a run has none of this name nothing does.
    """

    def value(run: Run, name: str) -> object:
        found = run.manifest["parameters"].get(name)
        return str(found) if isinstance(found, list | tuple | dict) else found

    parameters = pd.DataFrame([r.manifest["parameters"] for r in runs])
    differ = [c for c in parameters if parameters[c].map(str).nunique() > 1 and c != "seed"]
    tables = [
        r.table.assign(seed=r.manifest["parameters"].get("seed", 0), **{c: value(r, c) for c in differ}) for r in runs
    ]
    whole = pd.concat(tables, ignore_index=True)
    return whole.astype(dict.fromkeys(["prompt_id", "response_type", "metric"], "category"))


def steps_per_epoch(runs: Sequence[Run]) -> int:
    """Optimiser steps in an epoch of runs with the same `n_train` and `batch_size`."""
    parameters = runs[0].manifest["parameters"]
    return -(-int(parameters["n_train"]) // int(parameters["batch_size"]))


def writable(path: Path) -> None:
    """Raise `InputError` when a file cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
    except OSError as error:
        raise InputError(f"cannot write the notebook to {path}: {error.strerror}") from error


# --- small tables beside the code, below `book/`: results of long runs, with their origin ----------------------


def origin(runs: Sequence[Run]) -> dict[str, Any]:
    """Where numbers come from, out of the manifests of their runs: names, seeds, commit, versions, machine, times."""
    manifests = [r.manifest for r in runs]
    return {
        "runs": [r.folder.name for r in runs],
        "seeds": sorted({m["parameters"]["seed"] for m in manifests if "seed" in m["parameters"]}),
        "git": manifests[0]["git"],
        "versions": manifests[0]["versions"],
        "machine": manifests[0]["machine"],
        "finished": max(m["finished"] for m in manifests),
        "seconds": round(sum(m["seconds"] for m in manifests), 1),
    }


def in_words(made: Mapping[str, Any]) -> str:
    """An `origin` as one line."""
    words = [
        f"{len(made['seeds'])} seeds ({', '.join(map(str, made['seeds']))})",
        f"{len(made['runs'])} runs, {made['seconds']:.0f} CPU seconds on {made['machine']}",
        f"finished {made['finished'][:16].replace('T', ' ')} UTC",
        ", ".join(f"{k} {v}" for k, v in made["versions"].items()),
        f"commit {made['git']['commit'] or 'unknown'}{'+' if made['git']['dirty'] else ''}",
    ]
    return " · ".join(words)


def keep(path: Path, rows: list[dict[str, object]], runs: Sequence[Run], **more: object) -> None:
    """Write the rows of a table and the `origin` of its runs."""
    write_json(path, more | {"rows": rows, "manifest": origin(runs)})


def kept(name: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """A table that `keep` wrote, such as `sweeps/trends`, and its origin. Raises `InputError` when there is none."""
    try:
        content = json.loads((BOOK / f"{name}.json").read_text())
    except OSError:
        there = [p.relative_to(BOOK).with_suffix("") for p in sorted(BOOK.glob("*/*.json"))]
        raise unknown("kept table", name, there) from None
    return pd.DataFrame(content["rows"]), content["manifest"]
