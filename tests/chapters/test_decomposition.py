from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch

from lddyn import InputError
from lddyn.chapters import claims
from lddyn.chapters.decomposition import evidence
from lddyn.chapters.decomposition import run as decomposition
from lddyn.data import preferences
from lddyn.engine import cache, models, recipe, store
from lddyn.engine.probe_set import ProbeSet
from lddyn.engine.training import Training, sft_rows, train
from lddyn.theory import first_order, kernels

torch.set_num_threads(1)
CHAPTER = "02_decomposition"
LENGTHS = {"max_prompt": 12, "max_response": 8}


@pytest.fixture(scope="module")
def lm(model_folder):
    return models.load(str(model_folder("gpt_neox")))


@pytest.fixture(scope="module")
def encoded(lm):
    examples = decomposition.drawn("builtin", 6, 0)
    test_set = preferences.load("builtin", "test")
    (s, *_) = decomposition.grid(decomposition.settings("smoke", LENGTHS))
    return recipe.probe_set(*lm, examples, test_set, s).encode(lm[1], **LENGTHS)


@pytest.fixture(scope="module")
def followed(model_folder, tmp_path_factory):
    """The table of a tiny SFT run, the DPO run after it and one with LoRA, as the chapter reads them."""
    given = {"seeds": 1, "lr": 2e-4, "model": str(model_folder("gpt_neox")), **LENGTHS}
    settings = decomposition.settings("smoke", given)
    main, *variants = decomposition.grid(settings)
    files, root = recipe.files(settings), tmp_path_factory.mktemp("runs")
    runs = [cache.run(decomposition.follow, main, files, root=root)]
    (after,) = decomposition.dpo_grid(settings, runs[0])
    runs += [cache.run(decomposition.follow, s, files, root=root) for s in (after, variants[-1])]
    return store.frame(runs)


def test_sum_of_one_step_predictions_is_the_change_of_the_run(followed):
    for name, rows in evidence.followed(followed).items():
        assert evidence.step_explained(rows) > 0.99, name
    for name in ("SFT", "DPO"):
        rows = evidence.followed(followed)[name]
        assert evidence.run_explained(rows) > 0.99
        sums = evidence.predictions(rows).groupby(["prompt_id", "response_type"], observed=True).measured.sum()
        whole = evidence.predictions(rows, "all").set_index(["prompt_id", "response_type"]).measured
        np.testing.assert_allclose(sums, whole.loc[sums.index], atol=1e-4)


def test_closed_form_of_g_and_bounds_hold_on_a_run(followed):
    assert evidence.largest(followed, "g_error") < 1e-4
    assert 0 < evidence.largest(followed, "lbk_share") <= 1
    assert evidence.largest(followed, "peakiness_error") < 1e-5
    assert evidence.first_order_slope(followed) == pytest.approx(2, abs=0.1)


def test_every_statistic_of_the_chapter_is_a_finite_number(followed):
    parts = [part for claim in claims.of_chapter(CHAPTER) for part in claims.parts(claim) if part["chapter"] == CHAPTER]
    assert len(parts) > 10
    for part in parts:
        assert np.isfinite(claims.judge(part, [followed])["ours"]), part["says"]


def test_influence_of_single_sft_steps_is_symmetric(followed):
    heat = evidence.step_heat(evidence.followed(followed)["SFT"])
    np.testing.assert_allclose(heat, heat.T, rtol=1e-3, atol=1e-2 * np.abs(heat.to_numpy()).max())


def test_frozen_factors_agree_at_the_start_and_differ_after_a_step(lm, encoded):
    model = models.snapshot(lm[0]).requires_grad_()
    batch = [decomposition.pair_of(encoded, i)[0] for i in range(2)]
    frozen = decomposition.Frozen(model, encoded, batch)
    start = pd.DataFrame(frozen(model), columns=["prompt_id", "response_type", "metric", "value"])
    wide = start.pivot(index=["prompt_id", "response_type"], columns="metric", values="value")
    for column in wide:
        np.testing.assert_allclose(wide[column], wide["rate_all"], rtol=1e-4, atol=1e-3)
    texts = decomposition.texts_of(encoded, range(2))
    change = first_order.predicted_change(model, first_order.step(model, 1.0, batch), texts).sums
    np.testing.assert_allclose(start[start.metric == "rate_all"].value, change, rtol=1e-3, atol=1e-3)
    model.load_state_dict(first_order.stepped(model, first_order.step(model, 0.1, batch)), strict=False)
    moved = pd.DataFrame(frozen(model), columns=start.columns).groupby("metric").value.sum()
    assert moved.nunique() == 4


def test_watching_changes_nothing_in_the_training(lm, tmp_path):
    examples = decomposition.drawn("builtin", 4, 0)
    prompts, chosen = ([e[field] for e in examples] for field in ("prompt", "chosen"))
    probed = ProbeSet(prompts[:2], {"chosen": chosen[:2]})
    weights = []
    for look in (lambda *_: [], lambda model, encoded, _: kernels_of(model, encoded)):
        model = models.snapshot(lm[0]).requires_grad_()
        callback = decomposition.Watch(probed, [0, 2], 1, 2, look, **LENGTHS)
        rows = sft_rows(lm[1], prompts, chosen, **LENGTHS)
        how = Training(seed=0, lr=1e-3, epochs=1, batch_size=2)
        train(tmp_path / str(len(weights)), model, lm[1], rows, callback, how)
        weights.append(first_order.parameters(model))
        assert {"predicted_1", "measured_1", "predicted_all", "logp_sum"} <= set(callback.table().metric)
    assert all(torch.equal(p, weights[1][name]) for name, p in weights[0].items())


def kernels_of(model, encoded):
    text = decomposition.texts_of(encoded, [0])[0]
    (estimate,) = kernels.kernel_norms(model, [text], text, 2, 1)
    return [(encoded.prompt_ids[0], "chosen", "kernel_norm", estimate.value)]


def test_share_explained_is_one_for_a_right_and_zero_for_no_prediction():
    measured = np.array([1.0, -2.0])
    assert evidence.explained(measured, measured) == 1
    assert evidence.explained(np.zeros(2), measured) == 0
    assert evidence.explained(-measured, measured) < 0


def test_only_main_runs_are_followed_by_dpo_and_unknown_names_are_clear(tmp_path):
    settings = decomposition.settings("smoke", {})
    after = [
        decomposition.dpo_grid(settings, store.Run(tmp_path, None, {"parameters": asdict(s)}))
        for s in decomposition.grid(settings)
    ]
    assert [len(runs) for runs in after] == [1] * settings.seeds + [0] * 3 * settings.seeds
    with pytest.raises(InputError, match="scale"):
        decomposition.settings("huge", {})
