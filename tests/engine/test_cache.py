import dataclasses
import resource
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pandas as pd
import psutil
import pytest

from lddyn import Caution
from lddyn.chapters.digits import run as digits
from lddyn.engine import cache, pool, reach, store
from lddyn.engine.store import COLUMNS, RecordError
from lddyn.publish import status

CALLS = []


def double(work: Path, seed: int, factor: float = 2.0) -> pd.DataFrame:
    CALLS.append(seed)
    return store.long([(step, step, "p", "chosen", "value", factor * seed * step) for step in range(3)])


def prob_above_one(work: Path, seed: int) -> pd.DataFrame:
    return store.long([(0, 0, "p", "chosen", "prob", 1.5)])


def from_stage(work: Path, seed: int, stage: str, factor: float) -> pd.DataFrame:
    value = store.load(stage).table.value.sum()
    return store.long([(0, 0, "p", "chosen", "value", factor * value)])


def fails_for_two(work: Path, seed: int) -> pd.DataFrame:
    if seed == 2:
        raise ValueError("seed two")
    return double(work, seed)


def two_from(stage: store.Run) -> list[dict]:
    seed = stage.manifest["parameters"]["seed"]
    return [{"seed": seed, "stage": str(stage.folder), "factor": factor} for factor in (1.0, 10.0)]


@pytest.fixture(autouse=True)
def _no_calls_yet():
    CALLS.clear()


def test_same_parameters_are_read_and_not_run_again():
    first = cache.run(double, {"seed": 3})
    again = cache.run(double, {"seed": 3})
    assert CALLS == [3]
    assert again.table.equals(first.table)
    cache.run(double, {"seed": 3, "factor": 1.0})
    assert CALLS == [3, 3]


def test_changed_code_runs_again_and_status_names_what_changed(monkeypatch):
    cache.run(double, {"seed": 1})
    hashes = reach.definitions
    monkeypatch.setattr(reach, "definitions", lambda *where: {**hashes(*where), "lddyn.data.world.judge": "other"})
    entry = status.status()[0]
    assert entry["state"] == "stale" and entry["why"] == "code lddyn.data.world.judge"
    cache.run(double, {"seed": 1})
    assert CALLS == [1, 1]


def test_reworded_docstring_or_comment_does_not_make_a_run_stale():
    import ast

    def digest(source: str) -> str:
        return ast.dump(reach.without_docstrings(ast.parse(source)))

    assert digest('def f(x):\n    """One."""\n    return x') == digest('def f(x):\n    "Two."  # why\n    return x')
    assert digest("def f(x):\n    return x") != digest("def f(x):\n    return -x")


def test_changed_input_file_counts_by_content(tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("a")
    cache.run(double, {"seed": 1}, {"data": data})
    data.rename(tmp_path / "moved.txt")
    cache.run(double, {"seed": 1}, {"data": tmp_path / "moved.txt"})
    assert CALLS == [1]
    (tmp_path / "moved.txt").write_text("b")
    cache.run(double, {"seed": 1}, {"data": tmp_path / "moved.txt"})
    assert CALLS == [1, 1]


def test_damaged_table_is_named_on_load_and_computed_again_on_run(capsys):
    run = cache.run(double, {"seed": 1})
    table = run.folder / "table.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(RecordError, match=r"table\.parquet is damaged"):
        store.load(run.folder)
    assert status.status()[0]["state"] == "damaged"
    assert cache.run(double, {"seed": 1}).table.equals(run.table)
    assert "damaged" in capsys.readouterr().err


def test_unreadable_manifest_is_one_line():
    run = cache.run(double, {"seed": 1})
    (run.folder / "manifest.json").write_text("{")
    with pytest.raises(RecordError, match="unreadable record"):
        store.load(run.folder)


def test_unwritable_folder_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path / "file" / "runs"))
    with pytest.raises(RecordError, match="cannot write in"):
        cache.run(double, {"seed": 1})
    assert CALLS == []


def test_full_disk_is_one_line_and_what_was_there_stays(tmp_path):
    path = tmp_path / "big"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(RecordError, match=r"cannot write .*big"):
            store.write_atomically(path, lambda p: p.write_bytes(b"x" * 5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_run_that_breaks_an_invariant_is_not_stored():
    with pytest.raises(RecordError, match=r"prob leaves \[0, 1\]"):
        cache.run(prob_above_one, {"seed": 0})
    assert status.status()[0]["state"] == "unfinished"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 0, "p", "chosen", "nll", float("nan"))], "is nan"),
        ([(0, 0, "p", "chosen", "logp_sum", 1.0)], "above zero"),
        (
            [(0, 0, "p", "chosen", "logp_sum", -1.0), (0, 0, "p", "chosen", "argmax_logp_sum", -2.0)],
            "same path",
        ),
        ([(0, 0, "p", "chosen", "nll", 1.0), (1, 1, "q", "chosen", "nll", 1.0)], "different prompts"),
    ],
)
def test_invariants_are_checked(rows, message):
    with pytest.raises(RecordError, match=message):
        store.check(store.long(rows))


def test_positional_columns_are_refused():
    with pytest.raises(RecordError, match="columns are"):
        store.check(pd.DataFrame([[1, 2]], columns=["a", "b"]))
    assert COLUMNS == ["step", "examples", "prompt_id", "response_type", "metric", "value"]


def test_one_failing_run_does_not_throw_away_the_others():
    with pytest.raises(TypeError):
        pool.run_all(double, [{"seed": 1}, {"wrong": 2}, {"seed": 3}], workers=2)
    finished = [e for e in status.status() if e["state"] == "fresh"]
    assert sorted(e["parameters"]["seed"] for e in finished) == [1, 3]


SMALL = digits.Training(
    seed=0, net="mlp", data="digits", mnist_dir="", n_train=200, n_test=300,
    epochs=20, evaluations=10, lr=0.03, eta=0.01,
)  # fmt: skip
SCRIPT = f"""
from lddyn.chapters.digits import run as digits
from lddyn.engine import cache, pool
if __name__ == '__main__': cache.run(digits.train, digits.{SMALL})
"""


def wait_for_checkpoints(folder: Path, count: int) -> None:
    deadline = time.time() + 240  # the machine may be busy
    while len(list(folder.rglob("checkpoint.pt"))) < count and time.time() < deadline:
        time.sleep(0.02)


@pytest.mark.slow
def test_killed_training_resumes_to_the_numbers_of_an_uninterrupted_run(tmp_path, runs_folder):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT])
    wait_for_checkpoints(runs_folder, 1)
    process.kill()
    process.wait()
    assert [e["state"] for e in status.status()] == ["unfinished"]
    resumed = cache.run(digits.train, SMALL)
    assert resumed.manifest["resumed"]
    whole = cache.run(digits.train, SMALL, root=tmp_path / "other")
    assert not whole.manifest["resumed"]
    pd.testing.assert_frame_equal(resumed.table, whole.table, check_exact=True)


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(runs_folder):
    long = [f"digits.{dataclasses.replace(SMALL, seed=seed, epochs=1000)}" for seed in (0, 1)]
    script = SCRIPT.replace(
        f"cache.run(digits.train, digits.{SMALL})", f"pool.run_all(digits.train, [{', '.join(long)}])"
    )
    parent = psutil.Popen([sys.executable, "-c", script])
    wait_for_checkpoints(runs_folder, 2)
    workers = parent.children(recursive=True)
    parent.kill()
    parent.wait()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=30)[1], "none goes on alone"
    assert {e["state"] for e in status.status()} == {"unfinished"}


@pytest.mark.slow
def test_two_processes_that_ask_for_one_run_compute_it_once(runs_folder):
    processes = [subprocess.Popen([sys.executable, "-c", SCRIPT]) for _ in range(2)]
    assert [p.wait(240) for p in processes] == [0, 0]
    assert [e["state"] for e in status.status()] == ["fresh"]
    assert len(list(runs_folder.glob("digits.train-*/table.parquet"))) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_runs_that_start_from_another_run_come_in_the_order_of_their_stages(workers):
    settings = [{"seed": 3}, {"seed": 1}]
    runs = pool.run_then(double, settings, from_stage, two_from, workers=workers)
    assert [r.table.value.item() for r in runs] == [18.0, 180.0, 6.0, 60.0]


def test_what_is_in_the_cache_is_read_without_any_executor():
    class Refuses:
        submit = None

    settings = [{"seed": 7}, {"seed": 8}]
    computed = (
        pool.run_all(double, settings, workers=1),
        pool.run_then(double, settings, from_stage, two_from, workers=1),
    )
    read = (
        pool.run_all(double, settings, executor=Refuses()),
        pool.run_then(double, settings, from_stage, two_from, executor=Refuses()),
    )
    assert [[r.folder for r in runs] for runs in read] == [[r.folder for r in runs] for runs in computed]


def test_a_stage_that_fails_does_not_take_the_runs_of_the_others_with_it():
    with pytest.raises(ValueError, match="seed two"):
        pool.run_then(fails_for_two, [{"seed": 2}, {"seed": 1}], from_stage, two_from, workers=1)
    finished = [e for e in status.status() if e["finished"] and e["run"].startswith("test_cache.from_stage")]
    assert len(finished) == 2


def test_a_clone_in_another_folder_has_the_same_keys(tmp_path, monkeypatch):
    keys = []
    for clone in ("here", "there"):
        monkeypatch.setenv("LDDYN_RUNS", str(tmp_path / clone))
        given = {"seed": 1, "stage": str(tmp_path / clone / "double-0123"), "factor": 1.0}
        keys.append(cache.key(cache.describe(from_stage, given, {})))
    assert keys[0] == keys[1]


def warns(work: Path, seed: int) -> pd.DataFrame:
    for _ in range(2):
        warnings.warn("prompts are computed in full", Caution, stacklevel=1)
    return double(work, seed)


def test_what_a_reader_must_know_is_in_the_manifest(recwarn):
    assert cache.run(warns, {"seed": 1}).manifest["cautions"] == ["prompts are computed in full"]
    assert not recwarn.list


def test_the_manifest_says_how_many_threads_computed_it():
    assert cache.run(double, {"seed": 1}).manifest["threads"] == 1
    assert cache.run(double, {"seed": 2}, threads=2).manifest["threads"] == 2


def test_a_key_is_the_same_wherever_the_package_lies(monkeypatch, tmp_path):
    def named(package: Path) -> str:
        monkeypatch.setattr(store, "PACKAGE", package)
        return cache.key({"inputs": {}, "model": str(package / "data" / "models" / "tiny")})

    assert named(tmp_path / "one") == named(tmp_path / "two")
