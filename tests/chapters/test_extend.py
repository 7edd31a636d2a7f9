"""Chapter 7: two stages on one axis, fair comparisons, and statistics that leave out what a seed does not measure."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest

from lddyn import InputError
from lddyn.chapters import claims, statistics
from lddyn.chapters.extend import evidence, figures, judging
from lddyn.chapters.extend import run as extend
from lddyn.data import world
from lddyn.engine import cache, store

SETTINGS = extend.Follow(
    seed=0, design="main", arm="baseline", model="", data="world", n_train=8, n_probe=2, n_probe_test=1, sft_epochs=1,
    sft_evaluations=3, sft_lr=1e-3, sft_batch_size=4, epochs=3, evaluations=3, lr=1e-3, batch_size=4, beta=0.1,
    optimizer="adamw", warmup=0, max_prompt=80, max_response=24, judged=3, judgements=4, device="cpu", dtype="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    root, model = tmp_path_factory.mktemp("runs"), str(model_folder("gpt_neox"))
    return [cache.run(extend.follow, replace(SETTINGS, arm=arm, model=model), root=root) for arm in evidence.ARMS]


def test_dpo_begins_at_zero_and_extended_has_twice_the_steps_of_sft(runs):
    steps = [sorted(r.table[r.table.metric == "logp_sum"].step.unique()) for r in runs]
    assert steps == [[-2, -1, 0, 2, 4, 6], [-4, -2, 0, 2, 4, 6], [-4, -2, 0, 2, 4, 6]]
    assert [s for s in steps[1] if s > 0] == [s for s in steps[0] if s > 0]
    first = [r.table[(r.table.step < -1) & (r.table.metric == "logp_sum")] for r in runs]
    at_start = [t[t.step == t.step.min()].groupby("response_type", observed=True).value.sum() for t in first]
    pd.testing.assert_series_equal(at_start[0], at_start[1])


def test_the_arms_differ_in_sft_only_as_they_say(runs):
    rejected = {}
    for run in runs:
        curve = statistics.curve(run.table, "rejected")
        rejected[run.manifest["parameters"]["arm"]] = curve[0] - curve.iloc[0]
    assert rejected["extended"] > rejected["baseline"]


def test_answers_are_there_for_every_judgement_and_scored_by_the_exact_judge(runs):
    answers = extend.read_answers(runs)
    assert set(answers.epoch) == {0, 1, 2, 3} and set(answers.decoding) == {"greedy", "sampled"}
    assert (answers.groupby(["arm", "epoch", "decoding"]).size() == 3).all()
    one = answers[(answers.arm == "extended") & (answers.decoding == "sampled")].iloc[0]
    table = runs[1].table
    row = table[(table.prompt_id == one.prompt_id) & (table.step == one.step) & (table.response_type == "sampled")]
    assert row[row.metric == "score"].value.item() == world.judge(one.prompt, one.text).score
    outcomes = evidence.compare(answers, judging.exact(world.judge))
    assert len(outcomes) == 24 and not outcomes.outcome.eq("malformed").any()
    assert len(evidence.win_rates(outcomes)) == 8


def test_an_interrupted_run_ends_with_the_same_numbers(runs, tmp_path, monkeypatch):
    measure, calls = extend.Answering._measure, []

    def fails_once(self, args, state, model):
        calls.append(state.global_step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        measure(self, args, state, model)

    monkeypatch.setattr(extend.Answering, "_measure", fails_once)
    settings = extend.Follow(**runs[1].manifest["parameters"])
    with pytest.raises(KeyboardInterrupt):
        cache.run(extend.follow, settings, root=tmp_path)
    resumed = cache.run(extend.follow, settings, root=tmp_path)
    assert resumed.manifest["resumed"]
    pd.testing.assert_frame_equal(resumed.table, runs[1].table)
    assert json.loads((resumed.folder / "answers.json").read_text()) == json.loads(
        (runs[1].folder / "answers.json").read_text()
    )


def test_an_unknown_arm_is_named(tmp_path):
    with pytest.raises(InputError, match="did you mean 'extended'"):
        extend.follow(tmp_path, replace(SETTINGS, arm="extend"))


def test_other_designs_are_run_on_the_first_seed_only_and_change_what_they_say(monkeypatch):
    monkeypatch.setattr(extend.recipe.models, "builtin", lambda size, seed: "folder")
    given = {"first_world_seed": 5, "world_seeds": 2}
    grid = extend.world_grid(extend.in_world(extend.settings("laptop", given)))
    main = [s for s in grid if s.design == "main"]
    others = [s for s in grid if s.design != "main"]
    assert [(s.seed, s.arm) for s in main] == [(seed, arm) for seed in (5, 6) for arm in evidence.ARMS]
    assert {s.seed for s in others} == {5} and {s.design for s in others} == set(evidence.OTHER_DESIGNS)
    assert {s.arm for s in others} == {"baseline", "extended"}
    slow = next(s for s in others if s.design == "a third of the rate")
    assert slow.lr == pytest.approx(main[0].lr / 3) and slow.data == "world"
    assert all((s.n_train, s.epochs, s.judged) == (main[0].n_train, main[0].epochs, main[0].judged) for s in others)


def test_a_model_of_your_own_is_for_natural_text_only(monkeypatch):
    monkeypatch.setattr(extend.recipe.models, "builtin", lambda size, seed: size)
    c = extend.settings("laptop", {"model": "mine", "data": "hh", "epochs": 0.5, "seeds": 1})
    assert {(s.model, s.data, s.epochs, s.judged) for s in extend.natural_grid(c)} == {("mine", "hh", 0.5, 0)}
    main = [s for s in extend.world_grid(extend.in_world(c)) if s.design == "main"]
    assert {(s.model, s.data, s.epochs) for s in main} == {("world", "world", 6)} and len(main) == 15


# --- statistics


def line(arm: str, rejected_rate: float, chosen_rate: float, seed: int = 0) -> list[tuple]:
    """SFT of four steps, then DPO of eight in which chosen and rejected move by so many nats a step."""
    rows = []
    for step in range(-4, 9):
        up, dpo = (step + 4) * 2.0 if step < 0 else 8.0, max(step, 0)
        values = {"chosen": -100 + up + chosen_rate * dpo, "rejected": -120 + rejected_rate * dpo}
        values |= dict.fromkeys(evidence.OTHERS, -90 + 2 * chosen_rate * dpo)
        for kind, value in values.items():
            rows.append((step, 0, "train/1", kind, "logp_sum", value, arm, seed))
            rows.append((step, 0, "train/1", kind, "argmax_logp_sum", value / 2, arm, seed))
    return rows


def table(*rows) -> pd.DataFrame:
    whole = pd.DataFrame([r for part in rows for r in part], columns=[*store.COLUMNS, "arm", "seed"])
    return whole.assign(design="natural")


def test_equal_margin_compares_where_the_gaps_have_grown_equally():
    slow_copy = table(line("baseline", -4.0, -1.0), line("extended", -2.0, -0.5))
    assert evidence.falls_less(slow_copy, "chosen") == pytest.approx(4.0)  # half as far in everything
    assert evidence.falls_less(slow_copy, "chosen", at="margin") == pytest.approx(0.0)
    assert evidence.others_fall_less(slow_copy, at="margin") == pytest.approx(0.0)
    kinder = table(line("baseline", -4.0, -1.0), line("extended", -4.0, -0.5))
    assert evidence.falls_less(kinder, "chosen", at="margin") > 2


def test_sft_is_measured_up_to_the_start_of_dpo_only():
    both = table(line("baseline", -4.0, -1.0), line("extended", -2.0, -0.5))
    assert evidence.sft_rise_share(both, "chosen") == pytest.approx(1.0)
    assert evidence.sft_rejected(both) == pytest.approx(0.0)
    assert evidence.top_at_start(both) == pytest.approx(np.mean([-0.25, -0.5]))


def scores(arm: str, by_step: list[list[float]], seed: int = 0) -> list[tuple]:
    return [
        (step, 0, f"test/{n}", "sampled", "score", value, arm, seed)
        for step, values in enumerate(by_step)
        for n, value in enumerate(values)
    ]


def test_leads_count_prompts_and_not_points():
    ours = scores("extended", [[0, 0], [2, 2], [2, 1], [2, -9]])
    theirs = scores("baseline", [[2, 2], [2, 1], [1, 0], [1, 0]])
    both = table(ours, theirs).assign(design="main")
    assert [evidence.lead(both, epoch) for epoch in evidence.JUDGED] == [-1.0, 0.5, 1.0, 0.0]
    assert evidence.lead(both, 4, over=[2, 6]) == 0.5


def test_a_seed_that_does_not_measure_a_statistic_does_not_count():
    natural = [table(line("baseline", -4.0, -1.0), line("extended", -4.0, rate)) for rate in (-0.5, -0.51)]
    in_world = table(scores("extended", [[1]] * 4), scores("baseline", [[0]] * 4)).assign(design="main")
    for measure in (
        partial(evidence.falls_less, kind="chosen"),
        partial(evidence.others_fall_less, at="margin"),
        evidence.sft_rejected,
        partial(evidence.sft_rise_share, kind="chosen"),
        evidence.top_at_start,
    ):
        with pytest.raises(statistics.NotMeasured):
            measure(in_world)
    with pytest.raises(statistics.NotMeasured):
        evidence.lead(natural[0], 4)
    part = {"chapter": "07_extend", "statistic": "falls_less", "holds": "> 0", "says": "chosen"}
    part["arguments"] = {"kind": "chosen"}
    found = claims.judge(part, [*natural, in_world])
    assert found["seeds"] == 2 and found["ours"] == pytest.approx(3.96) and found["outcome"] == "holds"


def test_a_sentence_calls_nobody_ahead_where_the_interval_holds_zero():
    rows = {"decoding": "sampled", "epoch": [0.0, 4.0], "won": 0.4, "lost": 0.5}
    open_ = pd.DataFrame(rows | {"lead_low": -0.3, "lead_high": 0.1})
    said = evidence.win_rate_sentence(open_)
    assert "at no epoch that was judged; it is behind at epoch none" in said and "wins 40% and loses 50%" in said
    assert "eight win rates 2 (0.4729, 0.5151) have an interval that contains one half" in said
    decided = open_.assign(lead_low=[-0.3, 0.1], lead_high=[-0.1, 0.3])
    assert "from epoch 4 on; it is behind at epoch 0." in evidence.win_rate_sentence(decided)


def test_sentences_of_the_notebook_say_what_its_table_says():
    arms = {"baseline": -1.0, "extended": -0.5, "equal steps": -1.0}
    natural = table(*(line(arm, -4.0, rate, seed) for seed in (0, 1) for arm, rate in arms.items()))
    found = evidence.differences(natural)
    assert found.loc["chosen in DPO", "mean"] == pytest.approx(4) and (found.low <= found.high).all()
    assert "extended and baseline is +4.0 nats at equal steps" in evidence.margin_sentence(natural)


def test_every_figure_can_be_drawn_from_the_runs(runs):
    whole = store.frame(runs).assign(seed=0)
    rates = evidence.win_rates(evidence.compare(extend.read_answers(runs), judging.exact(world.judge)))
    natural = whole.assign(design="natural")
    drawn = [
        figures.two_stages(natural, 1, 3),
        figures.start_of_dpo(natural, 3),
        figures.at_equal_margin(natural),
        figures.win_rates_over_epochs(rates, rates),
        figures.won_tied_lost(rates),
        figures.what_the_judge_found(whole.assign(design="main"), 3),
        figures.lead_by_design(pd.concat([rates, rates.assign(design="twice the SFT")])),
    ]
    assert all(figure.axes for figure in drawn)
    softer = evidence.softening(whole.assign(design="main"))
    assert set(softer.name) == {"DPO (7)", "extended (7)", "more SFT (7)"} and softer.won.between(0, 1).all()
