import pandas as pd
import pytest

from lddyn import InputError
from lddyn.chapters import statistics
from lddyn.chapters.dpo import evidence
from lddyn.engine import store
from lddyn.engine.store import Run

MANIFEST = {
    "git": {"commit": "abc1234", "dirty": True}, "versions": {"python": "3.11"}, "machine": "x86_64",
    "finished": "2026-01-02T03:04:05+00:00", "seconds": 1.5,
}  # fmt: skip


def test_a_recorded_table_comes_back_with_its_origin(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BOOK", tmp_path)
    (tmp_path / "recorded").mkdir()
    runs = [Run(store.ROOT / f"run-{seed}", None, MANIFEST | {"parameters": {"seed": seed}}) for seed in (4, 2)]
    store.keep(tmp_path / "recorded" / "small.json", [{"seed": 4, "value": 0.5}, {"seed": 2, "value": -0.5}], runs)
    table, made = store.kept("recorded/small")
    pd.testing.assert_frame_equal(table, pd.DataFrame({"seed": [4, 2], "value": [0.5, -0.5]}))
    words = store.in_words(made)
    assert words.startswith("2 seeds (2, 4) · 2 runs, 3 CPU seconds") and words.endswith("commit abc1234+")
    with pytest.raises(InputError, match="did you mean 'recorded/small'"):
        store.kept("recorded/smal")


def test_the_recorded_design_of_chapter_5_is_whole():
    ends, made = store.kept("recorded/when_top_rises")
    effects = evidence.effects(ends)
    assert len(effects) == 6 and list(effects) == [f"y* along {path}" for path in statistics.PATHS]
    assert sorted(ends.seed.unique()) == made["seeds"] and len(made["seeds"]) >= 6
