"""The built-in models: made again they are the same, from the texts that they may see and no others."""

import shutil

import pytest
import torch
import yaml

from lddyn import InputError
from lddyn.data import preferences
from lddyn.engine import models, pretraining, prose, reach, store

TINY = {"architecture": {"width": 16, "layers": 1, "heads": 2, "vocab": 400}, "libraries": ["seaborn"], "steps": 250}
needs_builtin = pytest.mark.skipif(not preferences.BUILTIN.exists(), reason="the built-in set is not there yet")


@pytest.fixture
def tiny(monkeypatch):
    """A built-in model that pre-trains in two seconds."""
    monkeypatch.setitem(pretraining.SIZES, "test", TINY)
    return "test"


def logits(model, length: int = 6):
    with torch.no_grad():
        return model(torch.arange(5, 5 + length)[None]).logits[0]


# --- the built-in model ------------------------------------------------------------------------------------


@needs_builtin
def test_killed_and_restarted_pretraining_ends_with_the_same_weights(tiny, tmp_path, monkeypatch):
    whole = models.builtin(tiny)
    backward, calls = pretraining._backward, []

    def killed(model, batch):
        calls.append(batch)
        if len(calls) == 130:
            raise KeyboardInterrupt
        return backward(model, batch)

    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path / "again"))
    monkeypatch.setattr(pretraining, "_backward", killed)
    with pytest.raises(KeyboardInterrupt):
        models.builtin(tiny)
    again = models.builtin(tiny)
    assert len(calls) == 130 + TINY["steps"] - 100  # it went on from step 100
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (again / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    assert store.load(again.parent).table.equals(store.load(whole.parent).table)
    assert not list(again.parent.glob("*.tmp")) and not (again.parent / "work").exists()


@needs_builtin
def test_the_builtin_model_learns_is_cached_and_names_its_corpus(tiny):
    model, tokenizer = models.load("builtin", size=tiny)
    folder = models.builtin(tiny)
    run = store.load(folder.parent)
    held_out = run.table[run.table.prompt_id == "held out"].sort_values("step").value.tolist()
    assert held_out == sorted(held_out, reverse=True) and held_out[-1] < 5.2 < torch.tensor(400.0).log()
    assert set(run.manifest["inputs"]) == {"prose", "preferences"}
    assert run.manifest["parameters"]["libraries"] == prose.versions(["seaborn"])
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert model.lm_head.weight is model.gpt_neox.embed_in.weight
    shutil.rmtree(folder)
    rebuilt, _ = models.load("builtin", size=tiny)  # a record without its weights is not enough
    assert torch.equal(logits(rebuilt), logits(model))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= models.inputs("builtin", tiny).keys()
    with pytest.raises(InputError, match="unknown size 'smal'; did you mean 'small'"):
        models.load("builtin", size="smal")


@needs_builtin
def test_pretraining_sees_its_own_preferences_and_no_others(monkeypatch):
    monkeypatch.setattr(prose, "documents", lambda libraries: [f"Paragraph {i}." for i in range(20_000)])
    train, held_out = pretraining.documents({"seaborn": "0.13"}, seed=0)
    questions = [text for text in train if text.startswith("Question:")]
    assert 0.07 < len(questions) / len(train) < 0.09
    assert set(questions) == {e["prompt"] + e["chosen"] for e in preferences.load(split="pretrain")}
    assert len(held_out) == 400 and not set(held_out) & set(train)
    assert len(train) - len(questions) + len(held_out) == 20_000


@pytest.mark.parametrize("size", pretraining.SIZES)
def test_builtin_models_come_with_the_package_and_their_recipe_is_that_of_the_code(size):
    folder = models.builtin(size)
    recipe = yaml.safe_load((folder / "recipe.yml").read_text())
    assert folder == pretraining.SHIPPED / size
    assert {name: store.file_hash(folder / name) for name in recipe["sha256"]} == recipe["sha256"]
    made = recipe["parameters"] | {"libraries": list(recipe["parameters"]["libraries"])}
    assert made == {**pretraining.SIZES[size], "seed": 0}
    if size != "world":
        assert recipe["corpus"]["preferences"] == store.file_hash(preferences.BUILTIN)


def test_a_model_made_again_is_compared_with_the_one_of_the_package(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "SHIPPED", tmp_path / "shipped")
    assert pretraining.repeat(tiny, ship=True) == (True, "test: equal to the model of this package")
    monkeypatch.setitem(pretraining.SIZES, "test", TINY | {"steps": 251})
    equal, line = pretraining.repeat(tiny)
    assert not equal and "sha256 differ" in line


def test_how_weights_are_made_counts_where_they_are_made_and_as_files_where_they_are_read():
    own = reach.definitions("lddyn.engine.pretraining", "pretrain")
    assert {"lddyn.engine.pretraining._backward", "lddyn.engine.prose.collect", "lddyn.data.world.documents"} <= set(
        own
    )
    reader = reach.definitions("lddyn.engine.models", "load")
    assert "lddyn.engine.models.builtin" in reader and not [name for name in reader if "pretraining" in name]


def test_blocks_lose_no_token_and_predict_each_once():
    def tokenizer(texts):
        return type("Encoded", (), {"input_ids": [[int(word) for word in text.split()] for text in texts]})

    tokenizer.eos_token_id = 0
    rows = pretraining.blocks(tokenizer, ["1 2 3", "4 5 6 7", "8 9"], 4)
    assert rows.tolist() == [[1, 2, 3, 0, 4], [4, 5, 6, 7, 0]]


def test_chunked_gradients_equal_those_of_the_mean_loss(model_folder):
    model, _ = models.load(str(model_folder("gpt_neox")))
    batch = torch.randint(5, 300, (8, 130), generator=torch.Generator().manual_seed(0))
    loss = pretraining._backward(model, batch)
    chunked = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    whole = model(batch, labels=batch).loss  # the library's own shift and mean
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for a, p in zip(chunked, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-6)


def test_the_first_step_has_a_learning_rate_and_the_last_almost_none():
    rates = [pretraining._schedule(step / 100) for step in range(100)]
    assert rates[0] > 0.01 and 0.9 < max(rates) <= 1 and rates[-1] < 0.01


# --- prose -------------------------------------------------------------------------------------------------

DOCSTRING = """Compute the mean of the values along the given axis of the array.

    The mean is the sum of the elements along the axis divided by the number of elements, see :func:`numpy.sum`.

    Parameters
    ----------
    axis : int, optional
        The axis along which the means are computed. The default is the ``last`` axis of the array.
    dtype : a type that is to be used in the computation of the mean for all of the elements.

    ====  ==========================================================
    mode  what happens with the values that are out of the range
    ====  ==========================================================

    >>> mean([1, 2])  # the example is not a sentence that is to be read as prose at all.
    1.5
    """


def test_prose_is_sentences_and_no_parameter_table_or_code():
    assert list(prose.paragraphs(DOCSTRING)) == [
        "Compute the mean of the values along the given axis of the array.",
        "The mean is the sum of the elements along the axis divided by the number of elements, see numpy.sum.",
        "The axis along which the means are computed. The default is the last axis of the array.",
    ]


def test_the_corpus_is_the_same_every_time_and_repeats_nothing(tmp_path):
    libraries = prose.versions(["seaborn"])
    texts = []
    for name in ("one", "two"):
        (tmp_path / name / "work").mkdir(parents=True)
        table = prose.collect(tmp_path / name / "work", libraries)
        texts.append((tmp_path / name / "prose.txt").read_text())
    assert texts[0] == texts[1]
    paragraphs = texts[0].split()
    lines = [line for line in texts[0].splitlines() if line]
    assert len(lines) == len(set(lines)) == table.value[table.metric == "paragraphs"].sum() > 200
    assert len(paragraphs) > 5000 and all(prose.is_prose(line) for line in lines)
