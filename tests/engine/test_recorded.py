"""Recorded runs: kept without this machine's paths, read back, compared, and told about while they are made."""

import json
import logging
from types import SimpleNamespace

import pandas as pd
import pytest

from lddyn.engine import pool, recorded, store
from lddyn.engine.progress import Progress
from lddyn.engine.store import Run

ROWS = [(step, step, "train/a", "chosen", "logp_sum", -10.0 + step / 3) for step in (0, 1)]


def run(tmp_path, seed: int = 4, shift: float = 0.0, **more):
    folder = tmp_path / "runs" / f"sft.finetune-{seed:012x}"
    folder.mkdir(parents=True, exist_ok=True)
    table = store.long(ROWS)
    table["value"] += shift
    parameters = {"seed": seed, "model": str(tmp_path / "runs" / "gguf-0123456789ab"), **more}
    manifest = {
        "function": "f", "parameters": parameters, "inputs": {"w": {"path": str(tmp_path / "w"), "sha256": "ab"}},
        "code": {"f": "1"}, "finished": "2026-01-02T03:04:05+00:00", "seconds": 60.0,
    }  # fmt: skip
    (folder / "answers.json").write_text(json.dumps([{"text": "so"}]))
    return Run(folder, table, manifest)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(recorded, "FOLDER", tmp_path / "kept")
    return tmp_path


def test_a_kept_run_names_no_place_of_this_machine_and_comes_back(kept):
    folder = recorded.write(run(kept), "03_sft", "main")
    text = (folder / "manifest.json").read_text()
    assert str(kept) not in text and '"runs/gguf"' in text and "code" not in json.loads(text)
    (back,) = recorded.read("03_sft", "main")
    pd.testing.assert_series_equal(back.table.value, run(kept).table.value, rtol=1e-6)
    assert json.loads((back.folder / "answers.json").read_text()) == [{"text": "so"}]
    (judged,) = recorded.published()["03_sft"]["runs"]
    assert judged.folder == back.folder


def test_runs_come_in_the_order_of_their_seeds(kept):
    for seed in (11, 4, 10):
        recorded.write(run(kept, seed), "03_sft", "main")
    assert [r.manifest["parameters"]["seed"] for r in recorded.read("03_sft", "main")] == [4, 10, 11]


def test_a_run_that_is_made_again_says_how_far_it_is_from_the_kept_one(kept):
    assert recorded.compare(run(kept), "03_sft", "main") == "not recorded before"
    recorded.write(run(kept), "03_sft", "main")
    assert recorded.compare(run(kept, shift=-0.25), "03_sft", "main").startswith("at most 0.25 nats")
    assert recorded.compare(run(kept, format="plain"), "03_sft", "main") == "not recorded before"


def double(work, seed):
    return store.long([(0, 0, "train/a", "chosen", "logp_sum", -float(seed))])


def test_each_run_is_told_as_soon_as_it_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path))
    told = []
    runs = pool.run_all(double, [{"seed": 1}, {"seed": 2}], workers=1, done=told.append)
    assert [r.folder for r in told] == [r.folder for r in runs]
    told.clear()
    after = pool.run_then(
        double, [{"seed": 1}], double, lambda run: [{"seed": 3}, {"seed": 4}], workers=1, done=told.append
    )
    assert [r.folder for r in told] == [runs[0].folder, *(r.folder for r in after)]


def test_what_takes_long_says_how_much_is_left(caplog, monkeypatch):
    caplog.set_level("INFO", "lddyn")
    clock = iter([0.0, 70.0, 80.0, 140.0])
    monkeypatch.setattr(pool.time, "monotonic", lambda: next(clock))
    assert list(pool.counted("abc", "runs", 3)) == ["a", "b", "c"]
    assert caplog.messages == ["1 of 3 runs, 2.3 min left"]  # not after ten seconds more, nor at the end
    clock = iter([0.0, 60.0])
    assert list(pool.stages({"first": 1, "second": 3})) == ["first", "second"]
    assert caplog.messages[1:] == ["1 of 2, first", "2 of 2, second, 3.0 min left"]


def test_progress_says_where_a_training_is_and_how_far_it_has_moved(caplog, tmp_path):
    (tmp_path / "manifest.json").touch()
    parts = [
        store.long([(step, step, "train/a", "chosen", "logp_sum", value)]) for step, value in ((0, -9.0), (5, -4.0))
    ]
    progress = Progress(tmp_path / "work" / "sft", SimpleNamespace(parts=parts), every=0.0)
    state = SimpleNamespace(global_step=0, max_steps=10, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    state.global_step = 5
    with caplog.at_level(logging.INFO, logger="lddyn"):
        progress.on_step_end(None, state, None)
    (line,) = caplog.messages
    assert line.startswith(f"{tmp_path.name}: step 5 of 10, ") and line.endswith("nats: chosen +5.0")
