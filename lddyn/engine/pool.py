"""Several runs side by side: in processes of this machine, or through anything with a `.submit`."""

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from lddyn.engine import cache, store

LOG = logging.getLogger("lddyn")
T = TypeVar("T")


def run_all(
    function: Callable[..., pd.DataFrame],
    settings: Iterable[cache.Settings],
    inputs: Mapping[str, Path] | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    done: Callable[[store.Run], None] | None = None,
) -> list[store.Run]:
    """Run `function` once for each of `settings`, side by side, and return the runs in the same order.

    `executor` is anything with `.submit` (a process pool by default, with one process per core and one thread
    each). What finished stays, also when another run fails; the first failure is raised at the end. `done` is told each
    run when it is there.
    """
    settings = list(settings)
    with _pool(min(workers or os.cpu_count() or 1, len(settings)), executor) as submit:
        futures = [submit(function, s, inputs) for s in settings]
        for run in _finished(list(futures)):
            if done and not run.exception():
                done(run.result())
        return _results(futures)


def run_then(
    first: Callable[..., pd.DataFrame],
    settings: Iterable[cache.Settings],
    then: Callable[..., pd.DataFrame],
    settings_of: Callable[[store.Run], Iterable[cache.Settings]],
    inputs: Mapping[str, Path] | None = None,
    workers: int | None = None,
    executor: Executor | None = None,
    done: Callable[[store.Run], None] | None = None,
) -> list[store.Run]:
    """Run `first` for each of `settings`, and from each of its runs, as soon as it is there, runs of `then`.

    `settings_of` gives the settings of the runs that start from a run of `first`; returned are the runs of `then`, in
    the order of `settings`. Otherwise as `run_all`.
    """
    with _pool(workers or os.cpu_count() or 1, executor) as submit:
        before = [submit(first, s, inputs) for s in settings]
        waiting, after = list(before), {}
        for run in _finished(waiting):
            if run.exception():
                continue
            if run in before:
                after[run] = [submit(then, s, inputs) for s in settings_of(run.result())]
                waiting += after[run]
            if done:
                done(run.result())
        _results([f for f in before if f not in after] + [f for futures in after.values() for f in futures])
        return [f.result() for stage in before for f in after[stage]]


def _finished(waiting: list[Future[store.Run]]) -> Iterator[Future[store.Run]]:
    """Each future when it is done; the list empties, and may grow meanwhile.

    Any executor's futures have `done`; few can be waited for together.
    """
    while waiting:
        future = next((f for f in waiting if f.done()), None)
        if future is None:
            time.sleep(0.05)
            continue
        waiting.remove(future)
        yield future


@contextlib.contextmanager
def _pool(workers: int, executor: Executor | None) -> Iterator[Callable[..., Future[store.Run]]]:
    """A function that starts a run: in an executor, in a pool of processes, or, for one worker, on the spot.

    What is in the cache is read here: a pool starts its processes, which takes seconds, at the first run that is not.
    """

    start: Callable[..., Future[store.Run]]

    def submit(
        function: Callable[..., pd.DataFrame], settings: cache.Settings, inputs: Mapping[str, Path] | None
    ) -> Future[store.Run]:
        folder, _ = cache.place(function, settings, inputs)
        try:
            found = store.load(folder)
        except store.RecordError:
            return start(cache.run, function, settings, inputs, root=store.runs_root())
        return _call(lambda: found)

    if executor is not None:
        start = executor.submit
        yield submit
    elif workers <= 1:
        start = _call
        yield submit
    else:
        with processes(workers) as pool:
            start = pool.submit
            yield submit


def processes(workers: int) -> ProcessPoolExecutor:
    """New processes of one thread each, as an executor."""
    loud, spawn = LOG.isEnabledFor(logging.INFO), get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=spawn, initializer=as_worker, initargs=(loud,))


def _call(function: Callable[..., store.Run], *args: Any, **options: Any) -> Future[store.Run]:
    future: Future[store.Run] = Future()
    try:
        future.set_result(function(*args, **options))
    except Exception as error:  # raised by `_results`, after the others have run
        future.set_exception(error)
    return future


def _results(futures: Sequence[Future[store.Run]]) -> list[store.Run]:
    failures = [error for error in (future.exception() for future in futures) if error]
    if failures:
        raise failures[0]
    return [future.result() for future in futures]


def counted(things: Iterable[T], what: str, total: int, every: float = 60.0) -> Iterator[T]:
    """The things themselves; at most once in `every` seconds the log "lddyn" has how many were there, and what is left.

    The next thing is asked for when one is done.
    """
    begun = said = time.monotonic()
    for n, thing in enumerate(things, 1):
        yield thing
        now = time.monotonic()
        if now - said >= every and n < total:
            said = now
            LOG.info("%d of %d %s, %.1f min left", n, total, what, (now - begun) / n * (total - n) / 60)


def stages(shares: Mapping[str, float]) -> Iterator[str]:
    """The names, one whenever a stage begins; the log "lddyn" has it, and how long it and the rest will take.

    shares: of the whole time that each stage takes, in any unit.
    """
    begun, done, whole = time.monotonic(), 0.0, sum(shares.values())
    for n, (name, share) in enumerate(shares.items(), 1):
        left = f", {(time.monotonic() - begun) / done * (whole - done) / 60:.1f} min left" if done else ""
        LOG.info("%d of %d, %s%s", n, len(shares), name, left)
        yield name
        done += share


def show_progress() -> None:
    """Let this process, and those of its pools, print how far they are (the log "lddyn"), on stderr."""
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    LOG.setLevel(logging.INFO)


def as_worker(loud: bool = False) -> None:
    """In a new process: one thread, said before torch and the tokenizers are imported, and no life after its parent."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if loud:
        show_progress()

    def end_with_parent() -> None:
        if parent := parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
