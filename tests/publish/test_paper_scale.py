"""The page on the released logs: what it says is what the recorded values say, and it speaks of every run."""

import re

import numpy as np
import pandas as pd
import pytest

from lddyn.data.responses import RESPONSE_TYPES
from lddyn.engine import released, store
from lddyn.publish import pages, paper_scale


def run(name, kind, **more):
    """A recorded log of a model; `changes` of chosen and rejected, values of statistics."""
    entry = {
        "repository": "some/repository", "commit": "0" * 40, "run": name, "model": "Pythia-1B", "size": 1.0,
        "kind": kind, "split": "train", "evaluations": 12, "dropped": 0, "before": "nothing", "start": 0.0,
        "begins": None, "margin": 6.0, "changes": dict.fromkeys(RESPONSE_TYPES, -2.0) | {"chosen": 4.0}, "values": {},
        "at": [0, 11],
    }  # fmt: skip
    return entry | {"curves": {kind: [0.0, value] for kind, value in entry["changes"].items()}} | more


@pytest.fixture
def recorded(monkeypatch):
    """A function that puts logs in the place of the recorded ones."""

    def put(*runs, comparisons=()):
        monkeypatch.setattr(released, "recorded", lambda: {"runs": list(runs), "comparisons": list(comparisons)})

    return put


def test_the_page_names_every_recorded_log_with_its_source(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "GENERATED", tmp_path)
    monkeypatch.setattr(pages, "_draw", lambda name, *_, **__: (tmp_path / name).touch())
    pages.write_paper_scale({})
    page = (tmp_path / "paper_scale.md").read_text()
    for entry in released.recorded()["runs"]:
        assert f"<td>{entry['run']}</td>" in page and (entry["commit"] or "not known")[:10] in page
    figures = re.findall(r"```{figure} (\S+)\n:name: \S+\n\n\S", page)
    assert len(figures) == 3 and all((tmp_path / name).exists() for name in figures)


def test_directions_are_generated_from_the_values(recorded):
    rise, fall = "05_dpo: chosen_rise()", "05_dpo: chosen_fall()"
    recorded(
        run("base", "dpo", values={rise: 8.0, fall: 1.0}),
        run("after", "dpo", before="SFT", start=20.0, values={rise: 0.0, fall: 9.0}),
    )
    said = paper_scale.starts_sentence()
    assert (
        said
        == "In DPO chosen first rises by 8.0 nats from the untouched model (1 log) and by 0.0 nats after SFT (1 log)."
    )
    assert list(paper_scale.starts()["trained before"]) == ["nothing", "SFT (+20 nats)"]


def test_a_run_at_a_larger_rate_does_not_hide_among_the_others(recorded):
    values = {"05_dpo: chosen_rise()": 0.0, "05_dpo: chosen_fall()": 30.0}
    rates = {"05_dpo: rate_effect()": -27.0, "05_dpo: rate_effect(metric=argmax_logp_sum)": -8.0}
    recorded(
        run("a_5e7", "dpo", values=values | {"05_dpo: chosen_rise()": 5.0}),
        run("a", "dpo", values=values),
        comparisons=[{"kind": "larger rate", "run": "a / a_5e7", "model": "Pythia-1B", "values": rates}],
    )
    said = paper_scale.starts_sentence()
    assert "by 5.0 nats from the untouched model (1 log)" in said and "(`a`) it ends 27 nats lower" in said


def test_controls_stand_beside_what_they_control(recorded):
    recorded(
        run("sft", "sft", values={"03_sft: reuse_gap()": 20.0}),
        run("sft", "sft", split="test", values={"03_sft: reuse_gap(split=test)": -0.3}),
        run("wrong", "sft_on_rejected", values={"03_sft: reuse_gap()": 0.2}),
    )
    assert list(paper_scale.controls().difference) == ["+20.0", "-0.3", "+0.2"]
    assert paper_scale.controls_sentence().startswith("The difference is +20.0 nats (trained answers")


def ours(**changes):
    """One seed of runs of the companion: types that end at `changes`."""
    rows = [
        (step, step, "train/0", kind, "logp_sum", -9.0 + step * end) for kind, end in changes.items() for step in (0, 1)
    ]
    return store.long(rows).assign(seed=0)


def test_end_changes_stand_beside_ours_with_dose_and_agreement(recorded):
    theirs = {"chosen": 5.0, "rejected": -9.0, "other_train": -3.0, "unrelated": -1.0}
    table = ours(chosen=1.0, rejected=-2.0, other_train=-1.0, unrelated=0.5)
    mine = paper_scale.ours({"the small model": {"05_dpo": table}}, "dpo")
    rank, signs, of = paper_scale.agreement(mine["the small model"], theirs)
    assert (rank, signs, of) == (pytest.approx(1.0), 3, 4)
    log = run("base", "dpo", changes=theirs, margin=14.0)
    first, second = paper_scale.end_changes([log], mine).to_dict("records")
    assert (first["dose"], first["chosen"], second["dose"], second["signs, the small model"]) == (
        "3",
        "+1.0",
        "14",
        "3/4",
    )
    assert "(dose 3 nats) the rank correlation over types is 1.00 and the signs agree in 75%" in (
        paper_scale.agreement_sentence([log], mine)
    )


def test_without_runs_of_our_own_the_page_says_so(recorded):
    recorded(run("base", "dpo"))
    assert paper_scale.ours({"the small model": {}}, "dpo") == {}
    assert paper_scale.agreement_sentence(paper_scale.runs("dpo"), {}).startswith("No chapter of this companion")


def test_figures_have_a_column_for_each_model_and_start():
    shown = paper_scale.longest(paper_scale.runs("dpo"))
    assert all("rejected" in log["curves"] for log in shown)
    fig = paper_scale.multiples(shown)
    titles = [ax.get_title() for ax in fig.axes if ax.get_title()]
    assert len(titles) == len(shown) == len(set(titles))
    assert np.isfinite(pd.Series([line.get_ydata()[-1] for ax in fig.axes for line in ax.lines], dtype=float)).all()
