"""Records: one long table per run, a manifest beside it, and a cache keyed by everything that made it.

A run is a function call. `run(function, parameters)` looks for `runs/<name>-<key>/`, where the key hashes the
parameters, the input files, the code that the function reaches inside this package and the versions of the
libraries that this code imports. What is there is read; what is not is computed, and an interrupted call
continues from whatever the function left in its `work` folder.

    runs/digits.train-5f0c.../table.parquet     step, examples, prompt_id, response_type, metric, value
                              manifest.json     parameters, inputs, code, versions, git commit, times
                              work/             checkpoints of an unfinished run
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from datetime import UTC, datetime
from functools import cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from filelock import FileLock

from lddyn import Caution

COLUMNS = ["step", "examples", "prompt_id", "response_type", "metric", "value"]
PACKAGE = Path(__file__).parent
ROOT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").exists() else Path.cwd()


class RecordError(RuntimeError):
    """A record on disk is missing, damaged or breaks an invariant; one line naming the folder and why."""


class Run(NamedTuple):
    folder: Path
    table: pd.DataFrame  # COLUMNS, one number a row
    manifest: dict


def runs_root() -> Path:
    """The folder that holds the runs: `$LDDYN_RUNS`, or `runs/` in the repository."""
    return Path(os.environ.get("LDDYN_RUNS", ROOT / "runs"))


# --- what made a run ---------------------------------------------------------------------------------------


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def imports(tree: ast.Module) -> set[str]:
    """Names of all modules that a syntax tree imports, and of what it imports from them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = body[1:]
    return tree


@cache
def _source(module: str) -> tuple[ast.Module, str] | None:
    """Syntax tree and hash of a module's file, docstrings left out; None when there is no such module."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    tree = ast.parse(Path(spec.origin).read_text())
    return tree, hashlib.sha256(ast.dump(_without_docstrings(tree)).encode()).hexdigest()


@cache
def code_hashes(module: str) -> dict[str, str]:
    """Hash of a module and of every module of this package that it imports, directly or not.

    The syntax tree is hashed, without docstrings: rewording a comment does not make a result stale.
    """
    hashes, todo = {}, {module}
    while todo:
        name = todo.pop()
        source = _source(name)
        if source and name not in hashes:
            hashes[name] = source[1]
            todo |= {i for i in imports(source[0]) if i.startswith("lddyn.")}
    return dict(sorted(hashes.items()))


@cache
def versions(module: str) -> dict[str, str]:
    """Versions of Python and of the numerical libraries that a module's code imports."""
    used = {name.split(".")[0] for m in code_hashes(module) for name in imports(_source(m)[0])}
    found = {
        name: importlib.metadata.version("scikit-learn" if name == "sklearn" else name)
        for name in ("numpy", "peft", "scipy", "sklearn", "tokenizers", "torch", "transformers", "trl")
        if name in used
    }
    return {"python": ".".join(platform.python_version_tuple()[:2])} | found


def git_state() -> dict:
    """Commit of the working tree, and whether it has uncommitted changes."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    with contextlib.suppress(OSError):
        return {"commit": git("rev-parse", "--short", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    return {"commit": "", "dirty": False}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def describe(function: Callable, parameters: Mapping, inputs: Mapping[str, Path]) -> dict:
    """Everything that decides a run's numbers: function, parameters, input files, code, versions, device."""
    module = function.__module__
    return {
        "function": f"{module}:{function.__name__}",
        "parameters": dict(parameters),
        "inputs": {k: {"path": str(p), "sha256": file_hash(p)} for k, p in sorted(inputs.items())},
        "code": code_hashes(module),
        "versions": versions(module),
        "machine": platform.machine(),
    }


def key(description: Mapping) -> str:
    """Twelve hexadecimal digits that name a description.

    Input files count by content, folders of other runs and of this package by name: the key is the same in every clone.
    """
    content = {**description, "inputs": {k: v["sha256"] for k, v in description["inputs"].items()}}
    text = json.dumps(content, sort_keys=True)
    for folder, name in ((runs_root(), "runs"), (PACKAGE, "lddyn")):
        text = text.replace(json.dumps(str(folder))[1:-1], name)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stale_because(manifest: Mapping) -> list[str]:
    """Names of what has changed since the run was made: `code lddyn.digits`, `version torch`, `input data`."""
    module = manifest["function"].split(":")[0]
    now = {"code": code_hashes(module), "version": versions(module)} if code_hashes(module) else {}
    then = {"code": manifest["code"], "version": manifest["versions"]}
    if not now:
        return [f"code {module} is gone"]
    changed = [
        f"{kind} {name}"
        for kind in then
        for name in sorted(then[kind].keys() | now[kind].keys())
        if then[kind].get(name) != now[kind].get(name)
    ]
    for name, file in manifest["inputs"].items():
        if not Path(file["path"]).exists():
            changed.append(f"input {name} is gone")
        elif file_hash(Path(file["path"])) != file["sha256"]:
            changed.append(f"input {name}")
    return changed


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


def long(rows: Iterable[tuple]) -> pd.DataFrame:
    """A table from tuples in the order of `COLUMNS`."""
    return compact(pd.DataFrame(rows, columns=COLUMNS))


def dense_early(last: int, count: int) -> list[int]:
    """At most `count` times from 0 to `last`, both included, quadratically denser at the start, where most happens."""
    return sorted({round(last * (i / (count - 1)) ** 2) for i in range(count)})


def compact(table: pd.DataFrame) -> pd.DataFrame:
    """The columns in order and with their types; names are stored once (categories)."""
    numbers = {"step": "int64", "examples": "int64", "value": "float64"}
    return table[COLUMNS].astype(numbers | dict.fromkeys(["prompt_id", "response_type", "metric"], "category"))


# --- running -----------------------------------------------------------------------------------------------


def peak_memory_mb() -> int:
    """Largest resident size of this process so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


@contextlib.contextmanager
def _threads(count: int | None):
    import torch  # slow, and not needed to read records

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _noted() -> Iterator[list[str]]:
    """The messages of every `Caution` meanwhile, once each, which are then not printed; other warnings are."""
    messages, show = [], warnings.showwarning

    def note(message, category, *where, **how):
        if not issubclass(category, Caution):
            show(message, category, *where, **how)
        elif str(message) not in messages:
            messages.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", Caution)
        warnings.showwarning = note
        yield messages


def run(
    function: Callable,
    parameters: Mapping,
    inputs: Mapping[str, Path] | None = None,
    threads: int | None = 1,
    root: Path | None = None,
) -> Run:
    """Return the run of `function(work=folder, **parameters)`: from the cache, or computed now.

    `function` is importable, returns a long table (`COLUMNS`) and may keep checkpoints in `work`, which
    survives an interruption and is removed at the end. `inputs` are files whose content counts. One thread
    by default: tiny models are fastest so, and the numbers do not depend on the number of cores; with more (None: as
    many as PyTorch takes) sums are made in another order, and the last digits may differ. The manifest says how many.
    Two processes that ask for the same run wait for each other. Raises `RecordError` when the
    folder cannot be written, before anything is computed.
    """
    folder, description = _place(function, parameters, inputs, root)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise RecordError(f"cannot write in {folder.parent}: {error.strerror or error}") from error
    with lock:
        if (folder / "table.parquet").exists():
            try:
                return load(folder)
            except RecordError as error:
                print(f"lddyn: {error}; computing it again", file=sys.stderr)
        return _compute(function, parameters, description, folder, threads)


def _place(function: Callable, parameters: Mapping, inputs: Mapping[str, Path] | None, root: Path | None = None):
    """The folder of a run, whether it is there or not, and the description that names it."""
    description = describe(function, parameters, inputs or {})
    name = f"{function.__module__.removeprefix('lddyn.')}.{function.__name__}"
    return (root or runs_root()) / f"{name}-{key(description)}", description


def _compute(function, parameters, description, folder: Path, threads) -> Run:
    work = folder / "work"
    resumed = work.exists()
    with contextlib.suppress(OSError):
        work.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": 1,
        **description,
        "git": git_state(),
        "platform": platform.platform(terse=True),
        "started": now(),
        "finished": None,
        "resumed": resumed,
    }
    write_json(folder / "manifest.json", manifest)
    clock = time.perf_counter()
    with _threads(threads) as used, _noted() as cautions:
        table = function(work=work, **parameters)
    manifest |= {"threads": used, "cautions": cautions}
    try:
        check(table)
    except RecordError as error:
        raise RecordError(f"{folder}: the run broke an invariant: {error}") from error
    write_atomically(folder / "table.parquet", lambda p: table.to_parquet(p, index=False))
    manifest |= {
        "finished": now(),
        "seconds": round(time.perf_counter() - clock, 2),
        "peak_memory_mb": peak_memory_mb(),
        "rows": len(table),
        "table_sha256": file_hash(folder / "table.parquet"),
    }
    write_json(folder / "manifest.json", manifest)
    for file in sorted(work.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    work.rmdir()
    return load(folder)


def run_all(
    function: Callable,
    settings: Iterable[Mapping],
    inputs: Mapping[str, Path] | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
) -> list[Run]:
    """Run `function` once for each of `settings`, side by side, and return the runs in the same order.

    `executor` is anything with `.submit` (a process pool by default, with one process per core and one thread
    each). What finished stays, also when another run fails; the first failure is raised at the end.
    """
    settings = [dict(s) for s in settings]
    with _pool(min(workers or os.cpu_count() or 1, len(settings)), executor) as submit:
        return _results([submit(function, s, inputs) for s in settings])


def run_then(
    first: Callable,
    settings: Iterable[Mapping],
    then: Callable,
    settings_of: Callable[[Run], Iterable[Mapping]],
    inputs: Mapping[str, Path] | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
) -> list[Run]:
    """Run `first` for each of `settings`, and from each of its runs, as soon as it is there, runs of `then`.

    `settings_of` gives the settings of the runs that start from a run of `first`; returned are the runs of `then`, in
    the order of `settings`. Otherwise as `run_all`.
    """
    with _pool(workers or os.cpu_count() or 1, executor) as submit:
        before = [submit(first, dict(s), inputs) for s in settings]
        waiting, after = list(before), {}
        while waiting:
            done = next((f for f in waiting if f.done()), None)
            if done is None:
                time.sleep(0.05)  # any executor's futures have `done`; few can be waited for together
                continue
            waiting.remove(done)
            if not done.exception():
                after[done] = [submit(then, dict(s), inputs) for s in settings_of(done.result())]
        _results([f for f in before if f not in after] + [f for futures in after.values() for f in futures])
        return [f.result() for stage in before for f in after[stage]]


@contextlib.contextmanager
def _pool(workers: int, executor: Executor | None):
    """A function that starts a run: in an executor, in a pool of processes, or, for one worker, on the spot.

    What is in the cache is read here: a pool starts its processes, which takes seconds, at the first run that is not.
    """

    def submit(function: Callable, parameters: dict, inputs: Mapping[str, Path] | None) -> Future:
        folder, _ = _place(function, parameters, inputs)
        try:
            found = load(folder)
        except RecordError:
            return start(run, function, parameters, inputs, root=runs_root())
        return _call(lambda: found)

    if executor is not None:
        start = executor.submit
        yield submit
    elif workers <= 1:
        start = _call
        yield submit
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=as_worker) as pool:
            start = pool.submit
            yield submit


def _call(function: Callable, *args, **options) -> Future:
    future = Future()
    try:
        future.set_result(function(*args, **options))
    except Exception as error:  # raised by `_results`, after the others have run
        future.set_exception(error)
    return future


def _results(futures: Sequence[Future]) -> list:
    failures = [error for error in (future.exception() for future in futures) if error]
    if failures:
        raise failures[0]
    return [future.result() for future in futures]


def as_worker() -> None:
    """In a new process: one thread, said before torch and the tokenizers are imported, and no life after its parent."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def end_with_parent():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def frame(runs: Sequence[Run]) -> pd.DataFrame:
    """The tables of several runs in one, with a column `seed` and one for each parameter in which the runs differ."""
    parameters = pd.DataFrame([r.manifest["parameters"] for r in runs])
    differ = [c for c in parameters if parameters[c].map(str).nunique() > 1 and c != "seed"]
    tables = [
        r.table.assign(seed=r.manifest["parameters"].get("seed", 0), **{c: r.manifest["parameters"][c] for c in differ})
        for r in runs
    ]
    whole = pd.concat(tables, ignore_index=True)
    return whole.astype(dict.fromkeys(["prompt_id", "response_type", "metric"], "category"))


def status(root: Path | None = None) -> list[dict]:
    """One entry for each run folder: `run, state, why, parameters, seconds, finished`.

    The state is `fresh`, `stale` (why names what changed), `running`, `unfinished` or `damaged`.
    """
    entries = []
    for path in sorted((root or runs_root()).glob("*/manifest.json")):
        entry = {"run": path.parent.name, "state": "fresh", "why": "", "parameters": {}}
        try:
            manifest = json.loads(path.read_text())
            entry |= {k: manifest.get(k) for k in ("parameters", "seconds", "finished")}
            changed = stale_because(manifest)
            if changed:
                entry |= {"state": "stale", "why": ", ".join(changed)}
            elif not manifest["finished"]:
                running = _is_locked(path.parent)
                entry |= {
                    "state": "running" if running else "unfinished",
                    "why": f"since {manifest['started']}",
                }
            elif file_hash(path.parent / "table.parquet") != manifest["table_sha256"]:
                entry |= {"state": "damaged", "why": "table.parquet differs from the manifest's hash"}
        except (OSError, ValueError, KeyError) as error:
            entry |= {"state": "damaged", "why": f"{type(error).__name__}: {error}"}
        entries.append(entry)
    return entries


def _is_locked(folder: Path) -> bool:
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except (TimeoutError, OSError):
        return True
    lock.release()
    return False
