from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from lddyn import InputError
from lddyn.chapters import statistics
from lddyn.chapters.variants import evidence, figures
from lddyn.chapters.variants import run as variants
from lddyn.data import preferences, world
from lddyn.engine import models, probes, recipe, store, training
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import ProbeSet
from lddyn.engine.probes import Decoded
from lddyn.theory import losses

matplotlib.use("Agg")
LENGTHS = {"max_prompt": 24, "max_response": 24}
COMMON = variants.Vary(
    seed=0, variant="DPO", source="data", stage="", sft_epochs=1, data="world", n_pairs=8, n_probe=2, n_probe_test=2,
    epochs=1.0, evaluations=2, rounds=1, candidates=2, judged=3, samples=2, pushes=0, push_lr=1e-2, batch_size=4,
    lr=1e-2, beta=0.1, optimizer="adamw", warmup=0, **LENGTHS, device="cpu", dtype="float32",
)  # fmt: skip


@pytest.fixture
def stage(model_folder, tmp_path):
    """A folder as `recipe.stages` leaves it."""
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / "model-1").symlink_to(model_folder("gpt_neox"))
    return str(tmp_path / "stage")


def varied(work: Path, stage: str, **changed) -> pd.DataFrame:
    work.mkdir(parents=True, exist_ok=True)
    return variants.vary(work, replace(COMMON, stage=stage, **changed))


# --- the losses


@pytest.mark.parametrize("name", {which.loss: name for name, which in evidence.VARIANTS.items()}.values())
def test_the_function_drawn_in_the_figure_is_the_loss_that_is_trained(model_folder, tmp_path, monkeypatch, name):
    examples, which = preferences.load("world", "train", limit=4), evidence.VARIANTS[name]
    texts = [[e[field] for e in examples] for field in ("prompt", "chosen", "rejected")]
    monkeypatch.setitem(losses.LOSSES, "function", losses.LOSSES[which.loss]._replace(trl=None))
    found = []
    for loss in (which.loss, "function"):
        lm, tokenizer = models.load(str(model_folder("gpt_neox")))
        rows = training.dpo_rows(tokenizer, *texts, max_prompt=24, max_response=100)
        callback = ProbeCallback(ProbeSet(texts[0][:1], {"chosen": texts[1][:1]}), at=[], **LENGTHS)
        how = {"seed": 0, "lr": 1e-3, "epochs": 1, "batch_size": 1, "optimizer": "sgd", "checkpoints": 1}
        how |= {"method": "dpo", "loss": loss, "options": which.options, "beta": which.beta or 0.1}
        training.train(tmp_path / loss, lm, tokenizer, rows, callback, training.Training(**how))
        found.append(torch.cat([p.detach().flatten() for p in lm.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


def test_forces_are_those_of_the_closed_forms():
    chosen, rejected = torch.linspace(-60, -30, 9), torch.linspace(-30, -60, 9)
    reference = torch.full((9,), -40.0, dtype=torch.float64), torch.full((9,), -45.0, dtype=torch.float64)
    for name, force, settings in (
        ("DPO", losses.dpo_force, {}),
        ("SPPO", losses.sppo_force, {}),
        ("DPOP", losses.dpop_force, {"lam": 5.0}),
        ("gated", losses.gated_force, {"rejected_length": 12}),
    ):
        found = evidence.forces(name, chosen, rejected, reference, (10, 12), 0.1)
        expected = force(chosen.double(), rejected.double(), *reference, beta=0.1, **settings)
        torch.testing.assert_close(found, tuple(expected))
    slow = evidence.forces("low rate", chosen, rejected, reference, (10, 12), 0.1)
    fast = evidence.forces("DPO", chosen, rejected, reference, (10, 12), 0.1)
    torch.testing.assert_close(slow[0], 0.25 * fast[0])


# --- pairs


def sampler(monkeypatch, texts: dict):
    """Let `probes.sample` answer from `texts`: question -> answers in turn."""

    def sample(policy, tokenizer, prompts, *_, **__):
        seen = dict.fromkeys(texts, 0)
        answers = []
        for prompt in prompts:
            answers.append(Decoded(texts[prompt][seen[prompt] % len(texts[prompt])], [], 0.0))
            seen[prompt] += 1
        return answers

    monkeypatch.setattr(probes, "sample", sample)


def test_ranked_pairs_are_the_best_and_the_worst_and_ties_give_none(monkeypatch):
    first, second = preferences.load("world", "train", limit=2)
    answers = {
        first["prompt"]: [first["rejected_semantic"], first["chosen"], "Nonsense."],
        second["prompt"]: ["Nonsense.", "Nonsense.", "Nonsense."],
    }
    sampler(monkeypatch, answers)
    both = replace(COMMON, source="both own", candidates=3)
    prompts, chosen, rejected, share = variants.make_pairs(None, None, [first, second], 0, both)
    scores = [world.judge(first["prompt"], text).score for text in answers[first["prompt"]]]
    assert share == 0.5 and prompts == [first["prompt"]] * 2, "as many pairs as prompts"
    assert chosen == [first["chosen"].strip()] * 2
    assert world.judge(first["prompt"], rejected[0]).score == min(scores)
    sampler(monkeypatch, {e["prompt"]: ["Nonsense."] for e in (first, second)})
    with pytest.raises(InputError, match="score the same"):
        variants.make_pairs(None, None, [first, second], 0, both)


def test_own_samples_take_the_place_of_the_rejected_answer_only(monkeypatch):
    examples = preferences.load("world", "train", limit=2)
    sampler(monkeypatch, {e["prompt"]: [" Own."] for e in examples})
    _, chosen, rejected, share = variants.make_pairs(None, None, examples, 0, replace(COMMON, source="SPIN"))
    assert chosen == [e["chosen"] for e in examples] and rejected == ["Own."] * 2 and share == 1.0
    assert variants.make_pairs(None, None, examples, 0, COMMON).rejected == [e["rejected"] for e in examples]


@pytest.mark.parametrize(
    "source, moves, follows",
    [("own rejected", True, False), ("SPIN", True, True), ("both own, once", False, False)],
)
def test_samples_come_from_the_policy_and_the_reference_that_the_source_names(
    stage, tmp_path, monkeypatch, source, moves, follows
):
    policies, references = [], []
    train = variants.train

    def weight(model):
        return next(model.parameters()).detach().clone()

    def pairs(policy, tokenizer, examples, *_):
        policies.append(weight(policy))
        return variants.Pairs(*([e[k] for e in examples] for k in ("prompt", "chosen", "rejected")))

    def spy(*args, reference, **options):
        references.append(weight(reference))
        return train(*args, reference=reference, **options)

    monkeypatch.setattr(variants, "make_pairs", pairs)
    monkeypatch.setattr(variants, "train", spy)
    varied(tmp_path / "w" / "work", stage, source=source, rounds=2, judged=0)
    assert torch.equal(policies[0], policies[1]) != moves
    assert torch.equal(references[0], references[1]) != follows
    assert torch.equal(policies[0], references[0]), "both begin as the SFT model"


# --- the runs


def test_interrupted_rounds_end_with_the_numbers_of_an_uninterrupted_run(stage, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    save, saved = models.save, []

    def killed(lm, tokenizer, folder):
        if len(saved) == 1:
            raise Killed
        saved.append(folder)
        save(lm, tokenizer, folder)

    changed = {"rounds": 2, "source": "own rejected"}
    monkeypatch.setattr(models, "save", killed)
    with pytest.raises(Killed):
        varied(tmp_path / "a" / "work", stage, **changed)
    monkeypatch.setattr(models, "save", save)
    resumed = varied(tmp_path / "a" / "work", stage, **changed)
    whole = varied(tmp_path / "b" / "work", stage, **changed)
    pd.testing.assert_frame_equal(resumed, whole)
    store.check(whole)
    assert sorted(whole[whole.metric == "logp_sum"].step.unique()) == [0, 1, 2]
    assert set(whole[whole.metric == "judge_score"].step) == {2}


def test_early_stop_ends_at_the_first_evaluation_beyond_the_margin(stage, tmp_path, monkeypatch):
    monkeypatch.setitem(evidence.VARIANTS, "early stop", evidence.VARIANTS["early stop"]._replace(stop=1e-9))
    few = {"batch_size": 1, "evaluations": 4, "judged": 0}
    whole = varied(tmp_path / "a" / "work", stage, **few)
    stopped = varied(tmp_path / "b" / "work", stage, variant="early stop", **few)
    margin = statistics.margins(whole, 0.1).mean(axis=1)
    expected = margin.index[margin >= 1e-9][0]
    assert stopped.step.max() == expected < whole.step.max()


def test_a_resumed_run_counts_its_margin_from_the_first_evaluation():
    """What was measured before comes back from a checkpoint as one table of several steps."""
    rows = [
        (s, s, "train/0", kind, "logp_sum", s * v - 9)
        for s in (0, 1, 2)
        for kind, v in (("chosen", 1), ("rejected", -2))
    ]
    table = store.long(rows)
    callback = variants.StopAtMargin(ProbeSet(["a"], {"chosen": ["b"]}), 1.0, 0.1)
    callback.parts = [table[table.step < 2], table[table.step == 2]]
    assert callback.margin() == 6.0


def test_a_run_without_training_is_the_sft_model(stage, tmp_path):
    table = varied(tmp_path / "w" / "work", stage, epochs=0.0)
    assert set(table.step) == {0} and set(table[table.metric == "judge_score"].response_type) == {"greedy", "sampled"}


def test_unknown_names_are_one_line(stage, tmp_path):
    with pytest.raises(InputError, match="did you mean 'gated'"):
        varied(tmp_path / "a", stage, variant="gatd")
    with pytest.raises(InputError, match="did you mean 'own rejected'"):
        varied(tmp_path / "b", stage, source="own rejecte")


def test_every_push_starts_from_the_same_weights(stage, monkeypatch):
    lm, tokenizer = models.load(f"{stage}/model-1")
    sets = preferences.load("world", "train", limit=8), preferences.load("world", "test")
    s = replace(COMMON, n_probe=3, n_probe_test=0, pushes=2)
    probed = recipe.probe_set(lm, tokenizer, *sets, s, variants.KINDS)
    forth = variants.push(lm, tokenizer, probed, s)
    monkeypatch.setattr(variants, "PUSHED", variants.PUSHED[::-1])
    back = variants.push(lm, tokenizer, probed, s)
    order = ["prompt_id", "response_type", "metric"]
    both = [t.astype(dict.fromkeys(order, str)).set_index(order).value.sort_index() for t in (forth, back)]
    pd.testing.assert_series_equal(*both)
    falls = forth[forth.metric == "pushed_change"]
    assert (falls.value < 0).all() and set(falls.response_type) == set(variants.PUSHED)


# --- statistics and figures


def test_push_slope_is_found_beside_differences_between_prompts():
    rng, rows = np.random.default_rng(0), []
    for prompt in range(20):
        level = rng.normal(0, 5)
        for kind in variants.PUSHED:
            start, tokens = rng.normal(-1 + level / 10), rng.integers(20, 60)
            values = {"pushed_start": start, "watched_change": 0.3 * start + 0.01 * tokens + level}
            values |= {"pushed_tokens": tokens, "pushed_change": -1.0, "watched_top_change": 0.0}
            rows += [(0, 0, f"train/{prompt}", kind, metric, value) for metric, value in values.items()]
    table = store.long(rows).assign(seed=0)
    assert evidence.push_slope(table) == pytest.approx(0.3)
    fit = evidence.push_fit(table, draws=20)
    assert fit["interval"][0] <= 0.3 + 1e-9 and fit["interval"][1] >= 0.3 - 1e-9
    figures.push_scatter(fit)


def test_a_tie_counts_half_and_every_figure_is_drawn(stage, tmp_path):
    def run(name, **changed):
        table = varied(tmp_path / name / "work", stage, **changed)
        return store.Run(tmp_path / name, table, {"parameters": asdict(replace(COMMON, stage=stage, **changed))})

    done = [
        run("sft", epochs=0.0, pushes=2),
        run("dpo"),
        run("sppo", variant="SPPO"),
        run("own", source="SPIN", rounds=2),
    ]
    table = store.frame(done)
    of_losses, of_sources = evidence.loss_runs(table), evidence.source_runs(table)
    ends = evidence.variant_ends(of_losses).set_index("name")
    assert ends.won["SFT"] == 0.5 and set(ends.index) == {"SFT", "DPO", "SPPO"}
    assert set(of_sources.name) == {"SFT", "SPIN"}
    figures.forces_and_outcomes(ends.reset_index(), of_losses, 0.1)
    figures.margins_over_steps(of_losses, ["DPO", "SPPO"])
    figures.softening(ends.reset_index())
    figures.pushed_sources(evidence.variant_ends(of_sources))
    figures.pushed_over_rounds(of_sources)
    assert np.isfinite(evidence.push_slope(table))
    assert evidence.source_effect(table.assign(source="data"), "data", "chosen") == 0
    assert set(evidence.said(done)) == {"after SFT", "SPIN"}
