"""Train once for each combination of models, seeds and other settings, through anything with a `.submit`.

    settings: [smoke.yml]          # optional parameter files, as for `train`
    set: {method: sft, epochs: 4}  # what all runs share
    over: {lr: [1e-4, 1e-3], seed: [0, 1, 2]}
    statistics: [bell_rise]        # of the chapter that trains by this method; metrics below need none

Runs are records: a second call computes what is missing. The table has one row for each run.
"""

import contextlib
import importlib
import itertools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lddyn import InputError, unknown
from lddyn.chapters import claims, sentences
from lddyn.engine import cache, pool, settings, store
from lddyn.workshop import estimate, launch, report, tune

LOG = logging.getLogger("lddyn")
FOLDER = store.BOOK / "sweeps"
ENGINES = ("processes", "dask", "submitit")
KEYS = ("title", "settings", "set", "over", "statistics")
SHOWN = ("chosen", "other_train", "rejected", "other_test", "unrelated")  # changes that every table has


def read(path: Path) -> dict:
    """A sweep file with all its keys; raises `InputError` naming what is wrong in it."""
    content = settings.read_yaml(path)
    for name in content:
        if name not in KEYS:
            raise unknown(f"key of {path.name}", name, KEYS)
    over = content.get("over")
    if not isinstance(over, dict) or not all(isinstance(values, list) and values for values in over.values()):
        raise InputError(f"{path.name}: `over` must map settings to lists of values that are not empty")
    content = {"title": path.stem, "settings": [], "set": {}, "statistics": []} | content
    for name in content["statistics"]:
        statistic(content, name)
    return content


def statistic(plan: Mapping, name: str):
    """A statistic of the chapter that trains by the sweep's method; `InputError` where it has none of this name."""
    method = plan["set"].get("method", launch.PARAMETERS["method"].default)
    return sentences.statistic(report.CHAPTERS.get(method, method), name)


def combinations(plan: Mapping) -> list[launch.Launch]:
    """The settings of each run, checked, in the order of the file: the last name varies fastest."""
    names = list(plan["over"])
    products = itertools.product(*plan["over"].values())
    words = [plan["set"] | dict(zip(names, values, strict=True)) for values in products]
    return [launch.settings(plan["settings"], each) for each in words]


def change(table: pd.DataFrame, kind: str) -> float:
    """Mean change of log pi(y) of a type of response from the first to the last evaluation, nats."""
    rows = table[(table.metric == "logp_sum") & (table.response_type == kind)]
    by_step = rows.groupby("step", observed=True).value.mean()
    return float(by_step.iloc[-1] - by_step.iloc[0])


def row(settings: launch.Launch, plan: Mapping, run: store.Run) -> dict:
    """One line of the table: what was varied, parameters, changes in nats, statistics, seconds."""
    shape = estimate.shape(estimate.config_of(settings.model, settings.size))
    values = {name: getattr(settings, name) for name in plan["over"]} | {"parameters": shape.parameters}
    values |= {kind: change(run.table, kind) for kind in SHOWN if kind in set(run.table.response_type)}
    values |= {name: float(statistic(plan, name)(run.table)) for name in plan["statistics"]}
    return values | {"seconds": run.manifest["seconds"]}


# --- engines -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def engine(name: str, workers: int | None = None, address: str | None = None):
    """Something with `.submit`, whose results have `.result`.

    processes: of this machine, one for each core; dask: a scheduler at `address`, or one on this machine; submitit: the
    cluster `address` (slurm, or local by default), which decides how many run at once. Raises `InputError` when the
    name is unknown, the package is not installed or no scheduler is at the address.
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    if name == "processes":
        with pool.processes(workers or os.cpu_count() or 1) as workers_here:
            yield workers_here
        return
    try:
        module = importlib.import_module({"dask": "distributed"}.get(name, name))
    except ImportError as error:
        raise InputError(f"the engine {name!r} needs another package: pip install 'lddyn[sweep]' ({error})") from error
    if name == "submitit":
        executor = module.AutoExecutor(store.runs_root() / "submitit", cluster=address or "local")
        executor.update_parameters(timeout_min=24 * 60, cpus_per_task=1)
        yield executor
        return
    try:
        here = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None}
        client = module.Client(address, timeout=10) if address else module.Client(**here)
    except (OSError, ValueError) as error:
        raise InputError(f"no dask scheduler at {address!r} ({str(error).splitlines()[0]})") from error
    with client:
        yield client


def run_all(jobs: Sequence[tuple[tune.Tune, dict[str, Path]]], executor, threads: int = 1) -> list[store.Run]:
    """The records of all jobs, in order. What finished stays when another fails; the first failure is raised last."""
    root, runs, failures = store.runs_root().absolute(), [], []
    futures = [executor.submit(cache.run, tune.tune, *job, threads=threads, root=root) for job in jobs]
    for future in pool.counted(futures, "runs", len(futures)):
        try:
            runs.append(future.result())
        except Exception as error:  # each engine has its own
            failures.append(error)
    if failures:
        raise failures[0]
    return runs


# --- the sweep ---------------------------------------------------------------------------------------------


def sweep(
    path: Path,
    engine_name: str = "processes",
    workers: int | None = None,
    address: str | None = None,
    out: Path | None = None,
) -> str:
    """Run a sweep file, write its table and manifest as JSON, and return the table as text.

    Raises `InputError` before anything runs when a setting is wrong.
    """
    plan = read(path)
    chosen = combinations(plan)
    out = out or path.with_suffix(".json")
    store.writable(out)
    cores = os.cpu_count() or 1
    threads = cores // min(workers or cores, cores, len(chosen)) if engine_name == "processes" else 1
    hours = sum(estimate.estimate(each).hours for each in chosen) / (cores // threads)
    time_here = "unknown time, no such device here" if math.isnan(hours) else f"about {estimate.duration(hours)}"
    LOG.info("%d runs, %s where none is cached", len(chosen), time_here)
    with engine(engine_name, workers, address) as executor:
        runs = run_all([launch.job(each) for each in chosen], executor, threads)
    rows = [row(each, plan, run) for each, run in zip(chosen, runs, strict=True)]
    store.keep(out, rows, runs, title=plan["title"], plan=plan)
    return f"{table(rows).to_string(index=False)}\n{out}"


def table(rows: Sequence[Mapping]) -> pd.DataFrame:
    """The rows with short numbers, for people."""
    frame = pd.DataFrame(rows)
    frame["seconds"] = frame.seconds.round().astype(int)
    numbers = [name for name in frame if frame[name].dtype == np.float64]
    return frame.assign(**{name: frame[name].map(lambda v: f"{v:.4g}") for name in numbers})


def recorded(folder: Path = FOLDER) -> list[tuple[Path, dict | None]]:
    """Every sweep file of the book with its recorded table, or None where it was not run."""
    found = []
    for path in sorted(folder.glob("*.yml")):
        result = path.with_suffix(".json")
        found.append((path, json.loads(result.read_text()) if result.exists() else None))
    return found


def sections(folder: Path = FOLDER) -> str:
    """The sections of the book's page `sweeps` as Markdown: each file with its table, or that it was not recorded."""
    parts = []
    for path, result in recorded(folder):
        title = read(path)["title"]
        name = path.relative_to(store.ROOT) if path.is_relative_to(store.ROOT) else path
        command = f"    python -m lddyn sweep {name}\n"
        if result is None:
            parts.append(f"## {title}\n\n*Not recorded.* To record it:\n\n{command}")
            continue
        frame = table(result["rows"])
        whole = claims.markdown_table([*frame], frame.to_numpy())
        parts.append(f"## {title}\n\n{whole}\n\n{store.in_words(result['manifest'])}\n\n{command}")
    return "\n".join(parts)
