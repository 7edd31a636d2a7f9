"""Before DPO: the forecast is what a step does, and the page says what the numbers say."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

from lddyn import InputError
from lddyn.__main__ import main
from lddyn.chapters.dpo import evidence as dpo
from lddyn.chapters.dpo import run as dpo_run
from lddyn.data import preferences
from lddyn.engine import models, store
from lddyn.engine.probe_set import ProbeSet
from lddyn.engine.settings import derive
from lddyn.theory import first_order, kernels, losses
from lddyn.workshop import forecast, preflight, preflight_advice, preflight_page, preflight_worth
from lddyn.workshop.forecast import How, Pairs

LIMITS = ["--max-prompt", "64", "--max-response", "32"]


@pytest.fixture(scope="module")
def lm():
    return models.load("builtin", "tiny")


@pytest.fixture(scope="module")
def pairs(lm) -> Pairs:
    examples = preferences.load("builtin", "train", 8)
    texts = {kind: [e[kind] for e in examples] for kind in ("chosen", "rejected")}
    ids = ProbeSet([e["prompt"] for e in examples], texts).encode(lm[1], 64, 24)
    return Pairs(*(list(zip(ids.prompts, ids.responses[kind], strict=True)) for kind in texts))


def rows(path, count: int, *more: dict):
    made = [{"prompt": f"How many legs have {n}?", "chosen": f"They have {n}.", "rejected": f"{n} less one."}
            for n in range(count)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in (*made, *more)))
    return str(path)


def test_a_small_dose_of_the_forecast_is_a_step_of_gradient_descent(lm, pairs):
    said = forecast.forecast(lm[0], pairs, pairs.rejected[:2], 1e-2, How(optimizer="sgd", batch_size=3))
    update = first_order.step(lm[0], 1.0, *pairs, loss=losses.dpo_loss, beta=0.1)
    after = forecast.stats(
        lm[0], pairs.chosen, first_order.stepped(lm[0], first_order.scaled(update, said.dose))
    )  # whatever the batches are, their mean is the whole
    change = forecast.sums(after) - forecast.sums(forecast.stats(lm[0], pairs.chosen))
    assert said.chosen.tolist() == pytest.approx(change.tolist(), abs=1e-3)
    assert said.slopes.tolist() == pytest.approx(change.tolist(), rel=0.1, abs=1e-3)
    assert said.unpushed.tolist() == pytest.approx(said.rejected[:2].tolist(), abs=1e-3)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_parts_of_the_pairs_add_up_to_the_change(lm, pairs, optimizer):
    towards = forecast.direction(lm[0], pairs, How(optimizer=optimizer))
    whole = first_order.predicted_change(lm[0], towards.update, pairs.chosen).sums.mean().item()
    assert forecast.parts(lm[0], pairs, pairs.chosen, towards).sum().item() == pytest.approx(whole, rel=1e-4)


def test_adaptive_steps_move_parameters_of_small_and_large_gradients_alike(lm, pairs):
    towards = forecast.direction(lm[0], pairs, How(optimizer="rmsprop", batch_size=8))
    moved = torch.cat([u.flatten() for u in towards.update.values()]).abs()
    assert moved[moved > 0].quantile(0.1).item() == pytest.approx(1, rel=1e-3), "one batch: the sign of its gradient"


def test_the_forecast_is_at_the_margin_that_was_asked_for(lm, pairs):
    said = forecast.forecast(lm[0], pairs, [], 5.0)
    assert (said.chosen - said.rejected).mean().item() == pytest.approx(5.0, rel=0.01) and len(said.unpushed) == 0
    assert said.margin == pytest.approx(5.0, rel=0.01)


def test_a_margin_that_cannot_grow_is_said(lm, pairs):
    with pytest.raises(InputError, match="does not grow"):
        forecast.forecast(lm[0], Pairs(pairs.chosen, pairs.chosen), [], 5.0)


def test_an_anchor_pulls_chosen_answers_up(lm, pairs):
    plain, anchored = (forecast.forecast(lm[0], pairs, [], 5.0, How(loss=loss)) for loss in ("dpo", "rpo"))
    assert anchored.chosen.mean() > plain.chosen.mean()


@pytest.mark.filterwarnings("ignore::lddyn.Caution")
def test_what_is_wrong_with_the_data_is_counted_and_the_rest_is_used(tmp_path):
    same = {"prompt": "How many legs have 1?", "chosen": "They have 1.", "rejected": "1 less one."}
    long = "It is the same for " + "very " * 40
    late = {"prompt": "What then?", "chosen": long + "long.", "rejected": long + "short."}
    bad = {"prompt": "Why?", "chosen": "So.", "rejected": "So."}
    data = rows(tmp_path / "pairs.jsonl", 16, same | {"split": "train"}, late | {"split": "train"}, bad)
    found = preflight.preflight(preflight.Preflight(data, size="tiny", pairs=10, max_response=24, unpushed=2))
    of = found["data"]
    assert of["duplicates"] == 1 and of["repeated_prompts"] == 1 and of["equal_within_limit"] == 1
    assert of["cut"]["chosen"] == pytest.approx(1 / of["pairs"]) and len(found["pairs"]) == 10
    assert "chosen and rejected are equal" in " ".join(found["cautions"]), "bad rows are left out and named"


def test_a_text_that_the_model_has_no_room_for_is_said(tmp_path):
    words = {"prompt": "How?", "chosen": "very " * 2000, "rejected": "so " * 2000, "split": "train"}
    with pytest.raises(InputError, match="lower max_prompt or max_response"):
        preflight.preflight(preflight.Preflight(rows(tmp_path / "a", 5, words), size="tiny", max_response=5000))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    hostile = {"prompt": "<script>alert(1)</script>", "chosen": "No & no.", "rejected": "<b>Yes.", "split": "train"}
    data = rows(tmp_path_factory.mktemp("data") / "<pairs>.jsonl", 7, hostile)
    return preflight.preflight(preflight.Preflight(data, size="tiny", pairs=8, margin=4.0, sft_first=1, sft_lr=1e-3))


def test_the_page_is_escaped_and_loads_nothing(found, tmp_path):
    preflight_page.write(found, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and "&lt;pairs&gt;" in html
    assert not re.search(r"(src|href)=|https?://|@import|url\(", html)
    assert json.loads(json.dumps(found)) == found


def test_every_choice_has_a_forecast_at_its_margin(found):
    by_name = {choice["choice"]: choice for choice in found["choices"]}
    assert next(iter(by_name)) == "as asked" and "after SFT on both answers (1 epochs)" in by_name
    assert by_name["half the dose"]["margin"] == pytest.approx(2.0, rel=0.02)
    assert by_name["without 3 pairs"]["pairs"] == 4, "of seven pairs to train on, at most half are left out"


def test_the_verdict_says_what_the_numbers_say(found):
    asked = {"choice": "as asked", "pairs": 8, "margin": 4.0, "chosen": -3.0, "rejected": -7.0, "top": 1.5}
    asked |= {"unpushed": -2.0, "fall": 6}
    told = preflight_page.verdict(found | {"choices": [asked]})[0]
    assert "chosen answers to fall by 3.0 nats (6 of 8 fall)" in told and "y* along chosen to rise by 1.5" in told
    assert "not trained on to fall by 2.0" in told
    better, worse = asked | {"choice": "this", "chosen": -1.0}, asked | {"choice": "that", "chosen": -4.0}
    assert "this is best" in preflight_page.advice(found | {"choices": [asked, worse, better]})[0]
    assert "None of these" in preflight_page.advice(found | {"choices": [asked, worse]})[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{tmp}/none.jsonl"], "none.jsonl"),
        (["{tmp}/few.jsonl"], "at least 5"),
        (["{tmp}/plain.jsonl"], "no field 'chosen'"),
        (["{tmp}/good.jsonl", "--optimizer", "adam"], "did you mean 'adamw'"),
        (["{tmp}/good.jsonl", "--model", "{tmp}/nothing"], "no model folder"),
        (["{tmp}/good.jsonl", "--margin", "-1"], "takes a number above 0"),
        (["{tmp}/good.jsonl", "--report", "{tmp}"], "it is a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, says, tmp_path, capsys):
    rows(tmp_path / "few.jsonl", 3)
    rows(tmp_path / "good.jsonl", 8)
    (tmp_path / "plain.jsonl").write_text(json.dumps({"prompt": "Why?", "rejected": "No."}) + "\n")
    try:
        code = main(["preflight", *(word.format(tmp=tmp_path) for word in words), *LIMITS])
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and says in error and "Traceback" not in error


# --- what it is worth ------------------------------------------------------------------------------------------


def test_a_forecast_that_ranks_the_pairs_gets_one_and_its_means_are_kept(tmp_path):
    change = {"a": -2.0, "b": 1.0, "c": 4.0, "d": 5.0}
    table = []
    for name, value in change.items():
        table += [(0, 0, name, "chosen", metric, value) for metric in ("change", "change_0", "change_1")]
        table += [(0, 0, name, "chosen", metric, -value) for metric in preflight_worth.RIVALS]
        table += [(0, 0, name, "chosen", metric, 2 * value + 1) for metric in ("forecast", "slope")]
        for kind, metrics in (("rejected", 2), ("top", 2)):
            table += [(0, 0, name, kind, metric, -6.0) for metric in ("change", "forecast")[:metrics]]
    table += [(0, 0, "t", "unpushed", metric, -1.0) for metric in ("change", "forecast")]
    manifest = {"parameters": {"pairs": "style", "sft_epochs": 2, "seed": 400, "lr": 4e-4}}
    row = preflight_worth.measured(store.Run(tmp_path, store.long(table), manifest))
    assert row["forecast"] == row["between_orders"] == 1 and row["ches"] == -1
    assert row["margin"] == 8 and row["chosen_change"] == 2 and row["chosen_forecast"] == 5
    assert row["start"] == "2 epochs of SFT" and row["unpushed_change"] == -1


def recorded(**values: float) -> pd.DataFrame:
    row = dict.fromkeys(preflight_worth.RIVALS, 0.2) | {"forecast": 0.8, "pairs": "style", "start": "base"}
    row |= {"attainable": 0.9, "lr": 4e-4, "seed": 400}
    return pd.DataFrame([row, row | values])


def test_the_record_says_where_a_rival_is_better():
    told = preflight_worth.verdict(recorded(forecast=0.4, overlap=0.5))
    assert "at least 0.7 on 1 of 2 settings" in told and "CHES on 2" in told and "overlap on 1" in told
    assert "overlap ranks best on 1: style pairs from base at 0.0004 (seed 400)" in told
    assert "Where it does not" not in preflight_worth.verdict(recorded())


def test_seeds_that_differ_are_told_apart_and_a_single_order_attains_nothing_known():
    assert "Medians by seed: 0.80 (400), 0.60 (401)" in preflight_worth.verdict(recorded(seed=401, forecast=0.6))
    alone = preflight_worth.verdict(recorded().assign(attainable=None))
    assert "Medians by seed" not in alone and "attainable" not in alone


def test_orders_that_disagree_leave_less_to_forecast():
    assert preflight_worth.attainable(1.0, 4) == 1 and preflight_worth.attainable(-0.1, 4) == 0
    rng = np.random.default_rng(0)
    expected, noise = rng.normal(size=100_000), rng.normal(size=(4, 100_000))
    orders = expected + 2 * noise
    between = float(np.corrcoef(orders)[0, 1])
    truth = np.corrcoef(expected, orders.mean(0))[0, 1]
    assert preflight_worth.attainable(between, 4) == pytest.approx(truth, abs=0.02)


def test_the_record_says_how_far_the_means_were_off():
    kinds = ("chosen", "top", "unpushed")
    row = {f"{kind}_change": -2.0 for kind in kinds} | {f"{kind}_forecast": -1.5 for kind in kinds}
    told = preflight_worth.calibration(
        pd.DataFrame([row | {"chosen_slope": 4.0}, row | {"chosen_slope": 6.0, "top_forecast": 1.0}])
    )
    assert "chosen answers by 0.5 (at most 0.5), with the right sign on 2 of 2" in told
    assert "y* by 1.8 (at most 3.0), with the right sign on 1 of 2" in told
    assert "fell on 2 of these settings" in told
    assert "first order alone misses that of chosen answers by 7.0" in told


def kept_record(folder, name: str, rows: list[dict]):
    made = {"runs": [], "seeds": [], "seconds": 0, "finished": "", "machine": "", "versions": {}, "git": {}}
    store.write_json(folder / name, {"rows": rows, "manifest": made})


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "BOOK", tmp_path)
    monkeypatch.setattr(store, "SOURCES", tmp_path)
    folder = tmp_path / "recorded" / "preflight"
    folder.mkdir(parents=True)
    monkeypatch.setattr(preflight_worth, "RECORDED", folder)
    monkeypatch.setattr(preflight_advice, "RECORDED", folder / "advice.json")
    return folder


def test_seeds_of_a_model_are_read_together_and_models_apart(records):
    assert preflight_worth.recorded() == [] and "has not been recorded" in preflight_worth.sentence()
    row = {"data": "builtin", "forecast": 0.5, "chosen_forecast": 1.0, "chosen_change": 3.0, "margin": 9.0}
    for model, seed in (("a", 400), ("builtin", 401), ("builtin", 400)):
        kept_record(records, f"{model}-builtin-{seed}.json", [row | {"model": model, "seed": seed}])
    kept_record(records, "advice.json", [])
    assert [(r.model, list(r.table.seed), len(r.made)) for r in preflight_worth.recorded()] == [
        ("builtin", [400, 401], 2),
        ("a", [400], 1),
    ]
    assert "On 2 recorded settings (model builtin, data builtin)" in preflight_worth.sentence()


@pytest.mark.slow
def test_every_setting_is_recorded_with_the_forecast_and_its_rivals(records):
    preflight_worth.record(seeds=(7,), given={"size": "tiny", "n_train": 16, "sft_short": 1, "orders": (0, 1)})
    ((_, _, table, made),) = preflight_worth.recorded()
    assert sorted(zip(table.pairs, table.start, table.lr, strict=True)) == sorted(
        (kind, start, lr) for kind in dpo.PAIRS for start in ("base", "1 epochs of SFT") for lr in (4e-4, 1.6e-3)
    )
    assert made[0]["seeds"] == [7] and table[["forecast", *preflight_worth.RIVALS]].notna().all().all()


# --- what the advice is worth ----------------------------------------------------------------------------------


def test_each_filter_keeps_the_half_that_its_score_ranks_first(lm, pairs):
    settings = derive(preflight_worth.Worth, dpo_run.settings("smoke", {}), seed=3, model="", stage="", sft_epochs=0,
                      pairs="style", orders=(0,))  # fmt: skip
    kept = preflight_advice.halves(lm[0], pairs, settings)
    assert set(kept) == {"random", *preflight_advice.FILTERS}
    low = kernels.ches(lm[0], *pairs).argsort()[:4]
    assert kept["ches"] == sorted(low.tolist()) and all(len(set(half)) == 4 for half in kept.values())
    towards = forecast.direction(lm[0], pairs)
    part = forecast.parts(lm[0], pairs, pairs.chosen, towards)
    assert part[kept["forecast"]].min() > part[[i for i in range(8) if i not in kept["forecast"]]].max()


def advised(**held_out: list[float]) -> pd.DataFrame:
    """Four settings; chosen answers of held-out pairs by way of training, 0 where nothing is said."""
    zero = dict.fromkeys(preflight_advice.MEASURED, 0.0)
    return pd.DataFrame([
        zero | {"pairs": "style", "seed": n, "lr": 1e-3, "way": way, "held_out_chosen": held_out.get(way, [0.0] * 4)[n]}
        for way in preflight_advice.TRAINED for n in range(4)
    ])  # fmt: skip


def test_a_filter_is_judged_beside_a_random_half_and_not_by_its_own_pairs():
    table = advised(random=[-5.0, -6.0, -4.0, -5.0], ches=[-1.0, -2.5, 0.0, -1.5], all=[-3.0, -3.0, -4.0, -2.0],
                    forecast=[-6.0, -4.0, -6.0, -4.5], half_rate=[1.0, 2.0, 1.0, 2.0],
                    normalised_ches=[-9.0] * 4)  # fmt: skip
    table.loc[table.way == "forecast", "chosen"] = 50.0
    told = preflight_advice.verdict(table)
    assert "1 of 3, the half with the lowest CHES." in told[0]
    assert "the half with the lowest CHES: +3.8 [" in told[2] and "more on 4 of 4 settings, higher" in told[2]
    assert "no difference that these settings show" in told[1] and "settings, lower" in told[3]
    assert any("highest with half the rate: at +1.5; with training as asked at -3.0" in s for s in told)


@pytest.mark.slow
def test_all_ways_take_as_many_steps_and_are_measured_on_pairs_that_none_of_them_has(records, monkeypatch):
    monkeypatch.setattr(preflight_advice, "HELD_OUT", 4)
    monkeypatch.setattr(preflight_advice, "PAIRS", {"style": "rejected_format"})
    steps, train = [], preflight_worth.train

    def counted(work, model, tokenizer, rows, callback, how):
        steps.append(len(rows) / how.batch_size * how.epochs)
        return train(work, model, tokenizer, rows, callback, how)

    monkeypatch.setattr(preflight_worth, "train", counted)
    preflight_advice.record((7,), {"size": "tiny", "n_train": 16, "orders": (0,)})
    table, _ = store.kept("recorded/preflight/advice")
    assert set(steps) == {4.0} and len(steps) == len(preflight_advice.TRAINED)
    assert (
        list(table.way) == list(preflight_advice.TRAINED)
        and dict(zip(table.way, table.trained, strict=True))["ches"] == 8
    )
    assert (table.chosen_with_all[table.way == "all"] == table.chosen[table.way == "all"]).all()
    assert (table.margin > table.held_out_margin).all() and "Beside a random half" in preflight_advice.sentence()
