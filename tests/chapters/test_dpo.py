import inspect
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from lddyn import InputError
from lddyn.chapters import claims, sentences, statistics
from lddyn.chapters.dpo import evidence
from lddyn.chapters.dpo import run as dpo
from lddyn.data import preferences, responses
from lddyn.engine import models, probes, recipe, store
from lddyn.engine.probe_set import ProbeSet
from lddyn.engine.settings import derive

AUTHORS = Path(__file__).parents[3] / "shared" / "data" / "authors" / "runs"
DPO_LOG = AUTHORS / "prob_pythia410m_dpo" / "prob_train_metrics.json"
LENGTHS = {"max_prompt": 24, "max_response": 24}
STAGE = store.Run(Path("stage"), None, {"parameters": {"seed": 0}})
ROLES = ("chosen", "chosen_semantic", "chosen_format", "rejected", "rejected_semantic", "rejected_format")


def example(n: int) -> dict:
    texts = {role: f" The {role.replace('_', ' ')} answer to number {n} is a list." for role in ROLES}
    return {
        "id": f"e{n}",
        "prompt": f"Question: what is number {n}?\nAnswer:",
        **texts,
        "unrelated": f" A goldfish, {n}.",
    }


@pytest.fixture
def data(tmp_path):
    rows = [example(n) | {"split": "train" if n < 8 else "test"} for n in range(12)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def chapter(model_folder, data):
    small = {"n_train": 8, "n_probe": 3, "n_probe_test": 2, "batch_size": 4, "sft_batch_size": 4, "epochs": 1}
    small |= {"evaluations": 3, "lr": 1e-2, "sft_lr": 1e-2, "generate": 0, "account": 0}
    return dpo.settings("smoke", small | LENGTHS | {"model": str(model_folder("gpt_neox")), "data": data})


def staged(work, model_folder, data, *epochs):
    work.mkdir(parents=True)
    return recipe.stages(work, *recipe.stage_grid(chapter(model_folder, data), epochs, seeds=[0]))


def aligned(work, model_folder, data, **changed):
    work.mkdir(parents=True)
    base = {"seed": 0, "stage": "", "sft_epochs": 0, "pairs": "as_written", "measure": "paths"}
    return dpo.align(work, derive(dpo.Align, chapter(model_folder, data), **base | changed))


# --- pairs


def test_swapped_pairs_exchange_every_second_pair_with_its_rephrases():
    before = [example(n) for n in range(4)]
    after = evidence.paired(before, "swapped")
    assert after[0] == before[0] and after[2] == before[2]
    for role in ROLES:
        other = role.replace("chosen", "rejected") if "chosen" in role else role.replace("rejected", "chosen")
        assert after[1][role] == before[1][other]
    assert after[1]["prompt"] == before[1]["prompt"] and after[1]["unrelated"] == before[1]["unrelated"]


def test_pairs_change_only_the_rejected_answer():
    (before,) = [example(0)]
    for pairs, source in (("style", "rejected_format"), ("rephrase", "chosen_semantic"), ("as_written", "rejected")):
        (after,) = evidence.paired([before], pairs)
        assert after["rejected"] == before[source]
        assert {k: v for k, v in after.items() if k != "rejected"} == {
            k: v for k, v in before.items() if k != "rejected"
        }


def test_unknown_pairs_and_measure_name_the_nearest(tmp_path, model_folder, data):
    with pytest.raises(InputError, match="did you mean 'swapped'"):
        evidence.paired([example(0)], "swaped")
    with pytest.raises(InputError, match="did you mean 'paths'"):
        aligned(tmp_path / "w", model_folder, data, measure="path")


def test_probes_see_the_pair_that_is_trained_on(tmp_path, data):
    given = {"data": data, "n_train": 6, "pairs": "rephrase", "skip_bad_rows": "no"}
    path = dpo.write_pairs(tmp_path / "pairs.jsonl", SimpleNamespace(**given))
    train, test = preferences.load(path, "train"), preferences.load(path, "test")
    assert len(train) == 6 and len(test) == 4
    assert all(e["rejected"] == e["chosen_semantic"] for e in [*train, *test])
    assert [e["id"] for e in train] == [e["id"] for e in preferences.load(data, "train", limit=6)]


# --- the account


def test_mass_account_balances_and_finds_y_star_among_the_others():
    before = torch.full((2, 20), 0.01, dtype=torch.float64)
    before[0, 3], before[0, 5], before[1, 7], before[1, 0] = 0.5, 0.32, 0.62, 0.2
    after = before.clone()
    after[0, 3] -= 0.4  # the pushed token is itself the likeliest: y* is the next, token 5
    after[0, 5] += 0.4
    after[1, 0] -= 0.15  # y* is token 7
    after[1, 7] += 0.1
    after[1, 19] += 0.05  # among equals, so in the tail or the top ten, but never lost
    account = dpo.mass(before.log(), after.log(), torch.tensor([3, 0]))
    assert torch.allclose(account.pushed, torch.tensor([-0.4, -0.15], dtype=torch.float64))
    assert torch.allclose(account.top, torch.tensor([0.4, 0.1], dtype=torch.float64))
    assert torch.allclose(sum(account), torch.zeros(2, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(account.top10 + account.tail, torch.tensor([0.0, 0.05], dtype=torch.float64), atol=1e-12)


def test_first_difference_counts_the_shared_tokens():
    assert dpo.first_difference([1, 2, 3], [1, 2, 4, 5]) == 2
    assert dpo.first_difference([1, 2], [1, 2, 3]) == 2
    assert dpo.first_difference([9], [1]) == 0


def test_account_reads_the_distribution_that_predicts_each_token(model_folder):
    """One place off, and the account would be about the wrong context."""
    model, tokenizer = models.load(str(model_folder("gpt_neox")))
    probed = ProbeSet([example(0)["prompt"]], {"rejected": [example(0)["rejected"]]}, ["train/e0"])
    encoded = probed.encode(tokenizer, **LENGTHS)
    ids = encoded.responses["rejected"][0]
    logp = dpo.log_probs(model, encoded.prompts[0], ids)
    summed = logp.gather(-1, torch.tensor(ids).unsqueeze(-1)).sum().item()
    measured = probes.measure(model, encoded).query("metric == 'logp_sum'").value.item()
    assert logp.shape[0] == len(ids) and summed == pytest.approx(measured, abs=1e-3)


def test_repetition_counts_runs_that_occurred_before():
    assert responses.repetition("one two three four five six seven") == 0.0
    assert responses.repetition("a b c d " * 10) == pytest.approx(1 - 4 / 37)
    assert responses.repetition("too short") == 0.0


# --- the runs


def test_a_stage_of_a_long_run_has_the_weights_of_a_short_one(model_folder, data, tmp_path):
    weights = []
    for name, epochs in (("long", [1, 3]), ("short", [1])):
        table = staged(tmp_path / name / "work", model_folder, data, *epochs)
        kept, _ = models.load(str(tmp_path / name / "model-1"))
        weights.append(torch.cat([p.detach().flatten() for p in kept.parameters()]))
        assert sorted(table.step.unique()) == [0, *(2 * e for e in epochs)]
    assert torch.equal(*weights)


def test_dpo_starts_from_its_stage_and_refers_to_it(model_folder, data, tmp_path):
    stage = staged(tmp_path / "stage" / "work", model_folder, data, 2)
    table = aligned(tmp_path / "a" / "work", model_folder, data, stage=str(tmp_path / "stage"), sft_epochs=2)
    started = statistics.curve(table, "chosen").iloc[0]
    assert started == pytest.approx(statistics.curve(stage, "chosen").iloc[-1], abs=1e-3)
    loss = table[table.metric == "train_loss"].sort_values("step").value
    assert loss.empty or loss.iloc[0] < 0.75  # log 2 when policy and reference are the same


def test_a_whole_run_measures_everything_and_keeps_its_invariants(model_folder, data, tmp_path):
    table = aligned(tmp_path / "b" / "work", model_folder, data, measure="all", generate=2, account=2, epochs=2)
    store.check(table)
    measured = set(table.response_type.unique()) - {"all"}
    assert measured >= {*responses.RESPONSE_TYPES, "greedy", "rejected_first", "rejected_unlikely"}
    balance = table[table.metric.astype(str).str.startswith("mass_")]
    sums = balance.groupby(["prompt_id", "response_type"], observed=True).value.sum()
    assert len(sums) and sums.abs().max() < 1e-5
    assert (table[(table.metric == "rep4")].groupby("step").size() == 4).all()
    margin = statistics.margins(table, beta=0.1)
    assert margin.iloc[0].abs().max() == 0 and margin.iloc[-1].mean() > 0


def test_the_grid_crosses_at_its_centre_and_has_no_run_twice(data):
    """The figures and verdicts find a design as the runs that differ from the commonest settings in one thing."""
    runs = dpo.grid(dpo.settings("smoke", {"data": data}), STAGE)
    assert len(set(runs)) == len(runs)
    short = pd.DataFrame([asdict(run) for run in runs if run.measure != "all"])
    assert sorted(evidence.vary(short, "sft_epochs").sft_epochs) == [0, 1, 4]
    assert len(evidence.vary(short, "lr")) == 2 and len(evidence.vary(short, "lr", "beta")) == 4
    assert len(evidence.vary(short)) == 1
    assert set(evidence.vary(short, "pairs").pairs) == set(evidence.PAIRS)
    cells = evidence.crossed(short)[["pairs", "sft_epochs", "lr"]]
    assert len(cells) == len(cells.drop_duplicates()) == 3 * len(evidence.PAIRS)


@pytest.mark.parametrize("scale", ["laptop", "pretrained"])
def test_rates_of_pairs_as_written_alone_are_no_part_of_the_crossed_design(scale):
    """The scale pretrained has one below those that all kinds of pairs are crossed with."""
    c = dpo.settings(scale, {"model": "anything/on-the-hub"})
    cells = evidence.crossed(pd.DataFrame([vars(run) for run in dpo.grid(c, STAGE) if run.measure == "paths"]))
    assert set(cells.lr) == {c.few_lr, c.few_lr / 4} and c.more_rates
    assert cells.groupby("pairs").size().to_dict() == dict.fromkeys(evidence.PAIRS, 3)


def test_data_without_rephrases_leaves_out_the_pairs_that_need_them(tmp_path):
    rows = [{k: example(n)[k] for k in ("id", "prompt", "chosen", "rejected")} for n in range(12)]
    path = tmp_path / "plain.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    runs = dpo.grid(dpo.settings("smoke", {"data": str(path)}), STAGE)
    assert {run.pairs for run in runs} == {"as_written", "swapped"}
    with pytest.raises(InputError, match="needs the response type 'chosen_semantic'"):
        evidence.paired(rows, "rephrase")


# --- the statistics


def made_up(chosen, rejected, start=-50.0) -> pd.DataFrame:
    """A table of one prompt each of train and test: log pi at the steps 0, 1, 2, ... of the two answers."""
    return store.long(
        (step, step, f"{split}/{n}", kind, "logp_sum", start + change + n)
        for kind, changes in (("chosen", chosen), ("rejected", rejected))
        for step, change in enumerate(changes)
        for split in ("train", "test")
        for n in range(2)
    )


def test_margins_start_at_zero_and_count_both_falls():
    margins = statistics.margins(made_up([0, -1, -2], [0, -4, -12]), beta=0.1)
    assert margins.mean(axis=1).tolist() == pytest.approx([0, 0.3, 1.0])
    assert evidence.late_change(made_up([0, -1, -2], [0, -4, -12])) == pytest.approx(-1)
    assert evidence.below_start(made_up([0, -1, -2], [0, 0, 0]).assign(seed=0)).tolist() == [1.0]
    assert evidence.below_start(made_up([0, -1, 2], [0, 0, 0]).assign(seed=0)).tolist() == [0.0]


def test_the_ledger_gives_each_statistic_the_arguments_that_it_takes():
    """Otherwise a verdict fails only after the runs."""
    for part in (part for claim in claims.of_chapter("05_dpo") for part in claims.parts(claim)):
        measure = sentences.statistic(part["chapter"], part["statistic"])
        inspect.signature(measure).bind("table", **part.get("arguments", {}))


def test_rephrases_are_averaged_only_where_the_chosen_answer_is_up():
    table = made_up([0, 5, -5], [0, -1, -7])
    table["response_type"] = table.response_type.cat.rename_categories({"rejected": "chosen_semantic"})
    assert evidence.rephrases_where_chosen_is_up(table) == pytest.approx(-1)


def test_valley_regression_holds_the_rest_fixed():
    """The raw correlation here has the wrong sign: it comes from how far the rejected answer fell."""
    random = np.random.default_rng(0)
    rows = []
    for n in range(60):
        x, fall = random.normal(-4, 1), random.normal(-2, 1)
        fall += -1.5 * x  # confounded
        start = {kind: random.normal(-4, 1) for kind in ("chosen", "other_train", "other_test", "unrelated")}
        change = 0.3 * x + 0.4 * fall + random.normal(0, 0.01)
        ends = {"rejected": (x, x + fall)} | {k: (v, v + change) for k, v in start.items()}
        for kind, values in ends.items():
            rows += [(step, step, f"train/{n}", kind, "logp_mean", value) for step, value in enumerate(values)]
        rows.append((0, 0, f"train/{n}", "rejected", "tokens", float(random.integers(20, 60))))
    fit = evidence.valley(store.long(rows).assign(seed=0), draws=50)
    assert fit["slope"] == pytest.approx(0.3, abs=0.02)
    assert fit["interval"][0] < 0.3 < fit["interval"][1] and fit["interval"][1] - fit["interval"][0] < 0.1


def test_log_of_the_authors_is_read_as_dpo():
    if not DPO_LOG.exists():
        pytest.skip("the authors' logs are not on this machine")
    log = statistics.authors_log(DPO_LOG)
    change = log.iloc[-1] - log.iloc[0]
    assert change.rejected < change.chosen_semantic < change.chosen
    assert change.drop("chosen").max() < 0


def test_effects_compare_like_with_like():
    """A contrast of pairs at the large rate must not mix in the runs at the small one."""
    cells = [(kind, n, 4e-4) for kind in evidence.PAIRS for n in (2, 8)] + [(kind, 2, 1e-4) for kind in evidence.PAIRS]
    rows = []
    for kind, n, lr in [*cells, ("as_written", 0, 4e-4)]:
        for seed in range(3):
            top = 5 * (lr > 2e-4) - 1 * (n == 8) - 20 * (kind == "style" and lr > 2e-4) + 9 * (n == 0) + seed
            paths = {f"y* along {path}": float(top) for path in statistics.PATHS}
            rows.append({"pairs": kind, "sft_epochs": n, "lr": lr, "beta": 0.1, "seed": seed} | paths)
    effects = evidence.effects(pd.DataFrame(rows))["y* along chosen"]
    assert effects["style pairs, not as written"].startswith("-20.0 [-20.0")
    assert effects["swapped pairs, not as written"].startswith("+0.0")
    assert effects["larger rate, style pairs"].startswith("-15.0")
    assert effects["larger rate, all other pairs"].startswith("+5.0")
    assert effects["long SFT, not short"].startswith("-1.0")
