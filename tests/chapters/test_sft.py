import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lddyn import InputError
from lddyn.chapters import statistics
from lddyn.chapters.sft import evidence
from lddyn.chapters.sft import run as sft
from lddyn.data import preferences, reuse
from lddyn.data.responses import RESPONSE_TYPES
from lddyn.engine import models, recipe, store
from lddyn.publish import display

AUTHORS = (
    Path(__file__).parents[3] / "shared" / "data" / "authors" / "runs" / "pythia410_baseline_sft_verify_argmax_bug"
)
SETTINGS = {
    "seed": 0, "target": "chosen", "n_train": 8, "n_probe": 3, "n_probe_test": 2, "epochs": 2, "evaluations": 3,
    "batch_size": 4, "lr": 1e-2, "loss": "sequence_sum", "optimizer": "adamw", "warmup": 0, "clip": 10.0,
    "max_prompt": 24, "max_response": 16, "generate": 2, "device": "cpu", "dtype": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    extra = ("chosen_semantic", "chosen_format", "rejected_semantic", "rejected_format", "unrelated")
    rows = [
        {"prompt": f"Question: which test number {i}?\nAnswer:", "chosen": f"Use the test for {i} groups.",
         "rejected": f"Compare the means of {i} tests.", "split": "train" if i < 8 else "test",
         **{kind: f"{kind} of {i} is a text." for kind in extra}}
        for i in range(12)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def finetune(folder, **settings):
    (folder / "work").mkdir(parents=True)
    return sft.finetune(folder / "work", sft.Finetune(**SETTINGS | settings))


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "qwen2", "gpt2", "opt"])
def test_the_run_of_the_chapter_works_on_any_architecture(model_folder, data, tmp_path, architecture):
    table = finetune(tmp_path, model=str(model_folder(architecture)), data=data)
    store.check(table)
    probed = table[table.metric == "logp_sum"]
    assert list(probed.response_type.cat.categories.intersection(list(RESPONSE_TYPES))) == sorted(RESPONSE_TYPES)
    assert set(probed.prompt_id.astype(str).str.split("/").str[0]) == {"train", "test"}
    assert sorted(probed.step.unique()) == [0, 1, 4]
    start, end = (probed[(probed.response_type == "chosen") & (probed.step == s)].value.mean() for s in (0, 4))
    assert end > start + 1, "training raises the trained answer"
    assert (tmp_path / "model" / "model.safetensors").exists()
    answers = sft.read_answers(tmp_path)
    assert len(answers) == 8 and set(answers.step) == {0, 4}


def test_answers_to_other_training_questions_were_trained_on_and_test_answers_were_not(model_folder, data):
    lm, tokenizer = models.load(str(model_folder("gpt2")))
    sets = preferences.load(data, "train", limit=5), preferences.load(data, "test")
    probed = recipe.probe_set(lm, tokenizer, *sets, sft.Finetune(**SETTINGS, model="", data=data))
    trained = {f" Use the test for {i} groups." for i in range(5)}
    unseen = {f" Use the test for {i} groups." for i in range(8, 12)}
    assert set(probed.responses["other_train"]) <= trained and set(probed.responses["other_test"]) <= unseen
    pairs = zip(probed.responses["chosen"], probed.responses["other_train"], strict=True)
    assert all(chosen != other for chosen, other in pairs)
    assert set(probed.responses["chosen"][3:]) <= unseen


@pytest.mark.filterwarnings("ignore")
def test_plausible_answers_are_measured_before_and_after_training_on_the_built_in_set_only(model_folder, data):
    lm, tokenizer = models.load(str(model_folder("gpt2")))
    s = sft.Finetune(**SETTINGS, model="", data="builtin")
    rows = sft.plausible_rows(lm, tokenizer, preferences.load("builtin", "train", 5), s, step=4)
    assert set(rows.response_type) == {"chosen_plausible"} and set(rows.step) == {4}
    assert rows.prompt_id.nunique() == SETTINGS["n_probe"] and (rows.value[rows.metric == "logp_sum"] < 0).all()
    assert sft.plausible_rows(lm, tokenizer, [{"id": "train-001"}], replace(s, data=data), step=0).empty


def test_unknown_target_is_one_line(model_folder, data, tmp_path):
    with pytest.raises(InputError, match="unknown target 'chosn'; did you mean 'chosen'"):
        finetune(tmp_path, model=str(model_folder("gpt2")), data=data, target="chosn")


def test_the_small_runs_train_exactly_the_responses_that_they_probe():
    chosen = sft.settings("smoke", {"model": "anything/on-the-hub", "seeds": 1})
    small = [run for run in sft.grid(chosen) if run.n_train == chosen.n_probe]
    assert [run.target for run in small] == list(sft.HEAT_MAP_TARGETS)
    assert all(run.n_probe == run.n_train and run.n_probe_test == 0 for run in small)


def test_reuse_counts_runs_of_four_words_without_punctuation_and_case():
    source = reuse.ngrams("Put the values into a list, then sort it.")
    assert reuse.share("put the values into", source) == 1.0
    assert reuse.share("Then put the values into a set", source) == pytest.approx(2 / 4)
    assert reuse.share("too short", source) == 0.0


def test_reuse_leaves_out_the_own_answer_and_the_own_prompt():
    def example(prompt, chosen):
        return {"prompt": prompt, "chosen": chosen}

    trained = [example("p", "a b c d e"), example("q", "f g h i j")]
    control = [example("r", "k l m n o"), example("s", "u v w x y")]
    written = [{"step": 0, "prompt_id": "train/1", "prompt": "p", "text": "a b c d f g h i"}]
    rows = sft.reuse_rows(written, trained, control, batch_size=8).set_index("metric").value
    assert rows["prob_reuse_train"] == pytest.approx(1 / 5) and rows["prob_reuse_control"] == 0


def table_of(changes: dict[str, list[float]]) -> pd.DataFrame:
    rows = []
    for kind, values in changes.items():
        for step, value in enumerate(values):
            rows.append((step, step, "train/1", kind, "logp_sum", value - 100))
            rows += [
                (step, step, "train/1", kind, m, v) for m, v in (("a_norm_mean", 4.0), ("residual_norm_mean", 0.5))
            ]
    return store.long(rows).assign(seed=0)


def test_bell_needs_a_rise_and_a_fall():
    bell = {kind: [0.0, 3.0, -2.0] for kind in statistics.BELLS}
    assert evidence.bell_rise(table_of(bell)) == 3 and evidence.bell_fall(table_of(bell)) == 5
    assert evidence.bell_rise(table_of(bell | {"rejected": [0.0, -1.0, -2.0]})) == 0


def test_sign_delta_is_the_sum_of_changes_over_the_root_of_a_and_the_residual():
    """Smoothed before the sum, the first of a few evaluations counts for most of it."""
    table = table_of({"chosen": [0.0, 2.0, 2.0, 4.0]}).assign(target="chosen")
    change = 2.0 / np.sqrt(4.0) / 0.5  # then 0, then the same
    assert statistics.sign_delta(table, "chosen")["chosen"] == pytest.approx(2 * change)
    smoothed = change * (1 + 0.9 + (0.81 + 0.1))  # with 0.9
    assert statistics.sign_delta(table, "chosen", smoothed=True)["chosen"] == pytest.approx(smoothed)


def test_main_run_is_told_from_the_small_ones_by_its_number_of_prompts():
    large, small = table_of({"chosen": [0.0, 5.0]}), table_of({"chosen": [0.0, -5.0]})
    both = pd.concat([large.assign(n_train=100, target="chosen"), small.assign(n_train=4, target="chosen")])
    assert evidence.sft_chosen_change(both) == 5


def test_the_gap_after_new_prompts_is_not_that_after_trained_ones():
    trained, new = (table_of({"other_train": [0.0, rise], "other_test": [0.0, 1.0]}) for rise in (5.0, 2.0))
    both = pd.concat([trained, new.assign(prompt_id="test/1")])
    assert evidence.reuse_gap(both) == 4 and evidence.reuse_gap(both, split="test") == 1


def test_columns_of_the_heat_map_stand_in_the_order_of_the_runs():
    targets = ("unrelated", "chosen")
    parts = [table_of({"chosen": [0.0, 1.0], "unrelated": [0.0, 2.0]}).assign(target=t, n_train=4) for t in targets]
    assert tuple(evidence.heat_map(pd.concat(parts))) == targets


def test_generated_markup_is_shown_as_text():
    tokens = pd.DataFrame({"token": ["<script>alert(1)</script>", "&"], "change": [1.0, -1.0]})
    assert "<script>" not in display.tokens(tokens, "change", 4) and "&lt;script&gt;" in display.tokens(
        tokens, "change", 4
    )
    assert "<script>" not in display.table(pd.DataFrame({"text": ["<script>"]}))


def test_a_file_that_is_not_the_authors_log_is_named(tmp_path):
    (tmp_path / "log.json").write_text('{"loss": 1}\n')
    with pytest.raises(InputError, match=r"log\.json is not a log"):
        statistics.authors_log(tmp_path / "log.json")


@pytest.mark.skipif(not AUTHORS.exists(), reason="needs the authors' released log")
def test_authors_log_of_sft_has_the_values_that_they_report():
    log = statistics.authors_log(AUTHORS / "prob_train_metrics.json")
    assert log.chosen.iloc[0] == pytest.approx(-151.98, abs=0.01) and log.chosen.iloc[-1] > -100
    a_norm = statistics.authors_log(AUTHORS / "prob_train_metrics.json", "a_norm_mean")
    assert {"chosen_initial", "other_train", "test_shuffled"} < set(a_norm) and (a_norm.iloc[-1] > a_norm.iloc[0]).all()
