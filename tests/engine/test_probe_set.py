"""Probes of a data set or of a trainer: what is drawn is what is trained on, and says so where it is not."""

import json

import datasets
import pytest
from trl import DPOConfig, DPOTrainer, extract_prompt

from lddyn import Caution, InputError
from lddyn.data import preferences
from lddyn.engine import models
from lddyn.engine.probe_set import BUILT, ProbeSet

PLAIN = [
    {"prompt": f"Question: which {i}?\nAnswer:", "chosen": f" It is {i}, I say.", "rejected": f" None of {i} at all."}
    for i in range(12)
]
MESSAGES = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
        "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
    }
    for row in PLAIN
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:trl")


def whole(row):
    """A row whose prompt stands in both answers."""
    return {kind: row["prompt"] + row[kind] for kind in ("chosen", "rejected")}


def data_set(rows, count=None):
    return datasets.Dataset.from_list(rows[:count])


@pytest.fixture
def trainer_of(model_folder, tmp_path):
    def build(rows, held_out=None, template=None):
        model, tokenizer = models.read(str(model_folder("llama")))
        tokenizer.chat_template = template
        args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False, max_length=None)
        return DPOTrainer(
            model,
            ref_model=models.snapshot(model),
            args=args,
            train_dataset=data_set(rows),
            eval_dataset=data_set(held_out) if held_out else None,
            processing_class=tokenizer,
        )

    return build


@pytest.mark.parametrize(
    ("rows", "template"),
    [(PLAIN, None), ([whole(row) for row in PLAIN], None), (MESSAGES, CHATML), ([whole(r) for r in MESSAGES], CHATML)],
    ids=["plain", "plain, implicit prompt", "messages", "messages, implicit prompt"],
)
def test_probes_of_a_trainer_have_the_tokens_that_it_trains_on(trainer_of, rows, template):
    trainer = trainer_of(rows, template=template)
    assert "chosen_ids" in trainer.train_dataset.column_names
    probes = ProbeSet.from_pairs(trainer.train_dataset, n=5)
    encoded = probes.encode(trainer.processing_class)
    for i, name in enumerate(probes.prompt_ids):
        row = trainer.train_dataset[int(name.removeprefix("train/"))]
        assert encoded.prompts[i] == row["prompt_ids"]
        assert encoded.responses["chosen"][i] == row["chosen_ids"]
        assert encoded.responses["rejected"][i] == row["rejected_ids"]
    end = trainer.processing_class.eos_token
    assert not any(end in text for texts in probes.responses.values() for text in texts)


def test_what_needs_no_model_is_built_and_other_answers_are_of_other_prompts():
    probes = ProbeSet.from_pairs(PLAIN[:8], PLAIN[8:], n=5, n_test=3)
    assert set(probes.responses) == {"chosen", "rejected", *BUILT}
    assert [name[:5] for name in probes.prompt_ids] == ["train"] * 5 + ["test/"] * 3
    of_test = {row["chosen"] for row in PLAIN[8:]}
    assert set(probes.responses["other_test"]) <= of_test and not of_test & set(probes.responses["other_train"])
    built_in = {row["unrelated"] for row in preferences.load("builtin", "test")}
    assert set(probes.responses["unrelated"]) <= built_in
    for i, text in enumerate(probes.responses["chosen"]):
        assert text not in (probes.responses["other_train"][i], probes.responses["other_test"][i])
        assert sorted(probes.responses["chosen_shuffled"][i].split()) == sorted(text.split())


def test_types_that_the_data_have_are_kept_and_without_a_test_set_there_are_no_unseen_answers():
    rows = [row | {"unrelated": " A goldfish.", "chosen_gptsemantic": " It may be so."} for row in PLAIN]
    probes = ProbeSet.from_pairs(rows, n=4)
    assert set(probes.responses) == {
        "chosen", "rejected", "chosen_semantic", "unrelated", "other_train", "chosen_shuffled",
    }  # fmt: skip
    assert set(probes.responses["unrelated"]) == {" A goldfish."}
    assert "other_test" not in ProbeSet.from_pairs(PLAIN, PLAIN[:1]).responses, "it would have its own answer alone"


def test_a_draw_depends_on_its_seed_alone():
    first, again, other = (ProbeSet.from_pairs(PLAIN, n=6, seed=seed) for seed in (0, 0, 1))
    assert first == again and first.prompt_ids != other.prompt_ids
    assert len(ProbeSet.from_pairs(PLAIN, n=100).prompts) == 12


def test_of_a_stream_the_first_rows_are_taken():
    probes = ProbeSet.from_dataset(data_set(PLAIN).to_iterable_dataset(), n=3)
    assert probes.prompts == [row["prompt"] for row in PLAIN[:3]]


@pytest.mark.parametrize("rows", [PLAIN, MESSAGES], ids=["plain", "messages"])
def test_an_implicit_prompt_is_where_trl_finds_it(rows):
    implicit = [whole(row) for row in rows]
    probes = ProbeSet.from_dataset(data_set(implicit), n=12)
    for name, prompt, chosen in zip(probes.prompt_ids, probes.prompts, probes.responses["chosen"], strict=True):
        theirs = extract_prompt(implicit[int(name.removeprefix("train/"))])
        if rows is PLAIN:
            assert prompt + chosen == theirs["prompt"] + theirs["chosen"]
        else:
            assert prompt.turns == theirs["prompt"] and chosen.strip() == theirs["chosen"][0]["content"]


def test_splits_files_and_hub_ids_are_found_by_name(tmp_path):
    both = datasets.DatasetDict({"train": data_set(PLAIN, 8), "test": data_set(PLAIN[8:])})
    probes = ProbeSet.from_dataset(both, held_out="test", n=4, n_test=2)
    assert len(probes.prompts) == 6 and "other_test" in probes.responses
    assert ProbeSet.from_dataset(both["train"], held_out=both["test"], n=4, n_test=2) == probes
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PLAIN))
    assert len(ProbeSet.from_dataset(file).prompts) == 10, "every sixth row of a file is for testing"
    assert ProbeSet.from_dataset("builtin", held_out="test", n=3, n_test=2).prompt_ids[3].startswith("test/")
    with pytest.raises(InputError, match="unknown split 'tset'; did you mean 'test'"):
        ProbeSet.from_dataset(both, held_out="tset")
    with pytest.raises(InputError, match="names a split, but data is a single one"):
        ProbeSet.from_dataset(both["train"], held_out="test")


def test_pairs_without_texts_are_one_line():
    with pytest.raises(InputError, match=r"no texts of chosen and rejected, their columns are chosen_ids, prompt_ids"):
        ProbeSet.from_pairs(data_set([{"chosen_ids": [1], "prompt_ids": [2], "rejected_ids": [3]}]))
    with pytest.raises(InputError, match="no texts of rejected, their columns are prompt, chosen"):
        ProbeSet.from_pairs([{"prompt": "a", "chosen": "b"}])
    with pytest.raises(InputError, match="columns are none"):
        ProbeSet.from_pairs([])


def test_a_bad_row_is_named_or_another_one_is_drawn():
    rows = [row | ({"rejected": row["chosen"]} if i % 2 else {}) for i, row in enumerate(PLAIN)]
    with pytest.raises(InputError, match=r"train pairs, row \d+: chosen and rejected are equal"):
        ProbeSet.from_pairs(rows, n=12)
    with pytest.warns(Caution, match="train pairs: skipped 6 bad rows"):
        probes = ProbeSet.from_pairs(rows, n=12, skip_bad_rows="rows")
    assert len(probes.prompts) == 6
    with pytest.warns(Caution, match="skipped 12"), pytest.raises(InputError, match="none of the pairs"):
        ProbeSet.from_pairs([row | {"rejected": row["chosen"]} for row in PLAIN], skip_bad_rows="rows")


def test_answers_without_a_space_before_them_are_a_caution():
    with pytest.warns(Caution, match="without a space, so training sees other tokens"):
        ProbeSet.from_pairs([{name: text.strip() for name, text in row.items()} for row in PLAIN], n=2)
