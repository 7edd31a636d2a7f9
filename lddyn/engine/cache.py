"""The cache of runs: a run is a function call, computed once and kept under all that decides its numbers.

`run(function, settings)` looks for `runs/<name>-<key>/`, where the key hashes the settings, the input files, the
definitions that the function reaches inside this package (`reach`) and the versions of the libraries that these use.
What is there is read; what is not is computed, and an interrupted call continues from whatever the function left in
its `work` folder.

    runs/sft.finetune-5f0c.../table.parquet     step, examples, prompt_id, response_type, metric, value
                              manifest.json     settings, inputs, code, versions, git commit, times
                              work/             checkpoints of an unfinished run
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from lddyn import Caution
from lddyn.engine import reach, store

Settings = Any  # a frozen dataclass, or a mapping


def git_state() -> dict[str, object]:
    """Commit of the working tree, and whether it has uncommitted changes; of a package alone, what pip was given."""
    if not store.CLONE:
        told = json.loads(importlib.metadata.distribution("lddyn").read_text("direct_url.json") or "{}")
        return {"commit": told.get("vcs_info", {}).get("commit_id", "")[:7], "dirty": False}

    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(store.ROOT), *words], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    with contextlib.suppress(OSError):
        return {"commit": git("rev-parse", "--short", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    return {"commit": "", "dirty": False}


def describe(function: Callable[..., pd.DataFrame], settings: Settings, inputs: Mapping[str, Path]) -> dict[str, Any]:
    """Everything that decides a run's numbers: function, settings, input files, code, versions, device."""
    module, name = function.__module__, function.__name__
    return {
        "function": f"{module}:{name}",
        "parameters": dict(settings) if isinstance(settings, Mapping) else dataclasses.asdict(settings),
        "inputs": {k: {"path": str(p), "sha256": store.file_hash(p)} for k, p in sorted(inputs.items())},
        "code": reach.definitions(module, name),
        "versions": reach.versions(module, name),
        "machine": platform.machine(),
    }


def key(description: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits that name a description.

    Input files count by content, folders of other runs and of this package by name: the key is the same in every clone.
    """
    content = {**description, "inputs": {k: v["sha256"] for k, v in description["inputs"].items()}}
    text = json.dumps(content, sort_keys=True)
    for folder, name in ((store.runs_root(), "runs"), (store.PACKAGE, "lddyn")):
        text = text.replace(json.dumps(str(folder))[1:-1], name)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stale_because(manifest: Mapping[str, Any]) -> list[str]:
    """Names of what has changed since the run was made: `code lddyn.data.world.judge`, `version torch`."""
    where = manifest["function"].split(":")
    now = {"code": reach.definitions(*where), "version": reach.versions(*where)}
    then = {"code": manifest["code"], "version": manifest["versions"]}
    if not now["code"]:
        return [f"code {'.'.join(where)} is gone"]
    changed = [
        f"{kind} {name}"
        for kind in then
        for name in sorted(then[kind].keys() | now[kind].keys())
        if then[kind].get(name) != now[kind].get(name)
    ]
    for name, file in manifest["inputs"].items():
        if not Path(file["path"]).exists():
            changed.append(f"input {name} is gone")
        elif store.file_hash(Path(file["path"])) != file["sha256"]:
            changed.append(f"input {name}")
    return changed


# --- running -----------------------------------------------------------------------------------------------


def peak_memory_mb() -> int:
    """Largest resident size of this process so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[int]:
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
    messages: list[str] = []
    show = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *where: Any, **how: Any) -> None:
        if not issubclass(category, Caution):
            show(message, category, *where, **how)
        elif str(message) not in messages:
            messages.append(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("always", Caution)
        warnings.showwarning = note
        yield messages


def run(
    function: Callable[..., pd.DataFrame],
    settings: Settings,
    inputs: Mapping[str, Path] | None = None,
    threads: int | None = 1,
    root: Path | None = None,
) -> store.Run:
    """Return the run of `function(work, settings)`: from the cache, or computed now.

    `settings` is a frozen dataclass, or a mapping for a function that takes its few parameters by name. `function` is
    importable, returns a long table (`COLUMNS`) and may keep checkpoints in `work`, which
    survives an interruption and is removed at the end. `inputs` are files whose content counts. One thread
    by default: tiny models are fastest so, and the numbers do not depend on the number of cores; with more (None: as
    many as PyTorch takes) sums are made in another order, and the last digits may differ. The manifest says how many.
    Two processes that ask for the same run wait for each other. Raises `RecordError` when the
    folder cannot be written, before anything is computed.
    """
    folder, description = place(function, settings, inputs, root)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise store.RecordError(f"cannot write in {folder.parent}: {error.strerror or error}") from error
    with lock:
        if (folder / "table.parquet").exists():
            try:
                return store.load(folder)
            except store.RecordError as error:
                print(f"lddyn: {error}; computing it again", file=sys.stderr)
        return _compute(function, settings, description, folder, threads)


def place(
    function: Callable[..., pd.DataFrame],
    settings: Settings,
    inputs: Mapping[str, Path] | None,
    root: Path | None = None,
) -> tuple[Path, dict[str, Any]]:
    """The folder of a run, whether it is there or not, and the description that names it."""
    description = describe(function, settings, inputs or {})
    name = f"{function.__module__.removesuffix('.run').split('.')[-1]}.{function.__name__}"
    return (root or store.runs_root()) / f"{name}-{key(description)}", description


def _compute(
    function: Callable[..., pd.DataFrame],
    settings: Settings,
    description: Mapping[str, Any],
    folder: Path,
    threads: int | None,
) -> store.Run:
    work = folder / "work"
    resumed = work.exists()
    with contextlib.suppress(OSError):
        work.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": 1,
        **description,
        "git": git_state(),
        "platform": platform.platform(terse=True),
        "started": store.now(),
        "finished": None,
        "resumed": resumed,
    }
    store.write_json(folder / "manifest.json", manifest)
    clock = time.perf_counter()
    with _threads(threads) as used, _noted() as cautions:
        named = isinstance(settings, Mapping)
        table = function(work=work, **settings) if named else function(work, settings)
    manifest |= {"threads": used, "cautions": cautions}
    try:
        store.check(table)
    except store.RecordError as error:
        raise store.RecordError(f"{folder}: the run broke an invariant: {error}") from error
    store.write_atomically(folder / "table.parquet", lambda p: table.to_parquet(p, index=False))
    manifest |= {
        "finished": store.now(),
        "seconds": round(time.perf_counter() - clock, 2),
        "peak_memory_mb": peak_memory_mb(),
        "rows": len(table),
        "table_sha256": store.file_hash(folder / "table.parquet"),
    }
    store.write_json(folder / "manifest.json", manifest)
    for file in sorted(work.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    work.rmdir()
    return store.load(folder)
