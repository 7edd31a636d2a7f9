"""Replicates with other bases and data: what they say counts."""

import json

import pytest

from lddyn.chapters import claims
from lddyn.data import preferences
from lddyn.engine import recorded
from lddyn.workshop import replicates


def test_the_halves_share_no_training_pair_and_all_test_pairs(tmp_path, monkeypatch):
    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path))
    first, second = ({e["id"] for e in preferences.load(file, "train")} for file in replicates.halves().values())
    assert not first & second and first | second == {e["id"] for e in preferences.load("builtin", "train")}
    tests = [[e["prompt"] for e in preferences.load(file, "test")] for file in replicates.halves().values()]
    assert tests[0] == tests[1] == [e["prompt"] for e in preferences.load("builtin", "test")]


@pytest.mark.parametrize(("values", "outcome"), [([3.0, 2.0], "holds"), ([3.0, -2.0], "mixed"), ([], "holds")])
def test_what_does_not_hold_with_another_base_is_not_replicated(monkeypatch, values, outcome):
    part = {"chapter": "03_sft", "statistic": "sft_chosen_change", "holds": "> 0", "says": "rise"}
    rows = [{"chapter": "03_sft", "values": {"03_sft: sft_chosen_change()": value}} for value in values]
    monkeypatch.setattr(recorded, "replicates", lambda: rows)
    judged = {
        "says": "rise",
        "holds": "> 0",
        "ours": 1.0,
        "interval": [0.5, 1.5],
        "outcome": "holds",
        "replicates": None,
    }
    found = claims._with_replicates(judged, part)
    assert found["outcome"] == outcome
    assert ("in 1 of 2" in claims.sentence(found)) == (outcome == "mixed")


@pytest.mark.slow
def test_every_replicate_says_what_its_runs_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "REPLICATES", tmp_path / "replicates.json")
    monkeypatch.setattr(recorded.store, "ROOT", tmp_path)
    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(replicates, "BASES", (0,))
    monkeypatch.setattr(replicates, "HALVES", ("first",))
    assert replicates.record("smoke", {}, {"size": "tiny", "n_train": 8}).startswith("2 replicates in 3 runs")
    rows = json.loads((tmp_path / "replicates.json").read_text())["rows"]
    assert {row["chapter"] for row in rows} == {"03_sft", "05_dpo"}
    assert "05_dpo: top_minus_sft_chosen()" in rows[1]["values"] and "03_sft: reuse_gap()" in rows[0]["values"]
