import copy
import json
import shutil
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lddyn import InputError
from lddyn.data import preferences
from lddyn.engine import models, prose, store

TINY = {"architecture": {"width": 16, "layers": 1, "heads": 2, "vocab": 400}, "libraries": ["seaborn"], "steps": 250}
needs_builtin = pytest.mark.skipif(not preferences.BUILTIN.exists(), reason="the built-in set is not there yet")


@pytest.fixture
def tiny(monkeypatch):
    """A built-in model that pre-trains in two seconds."""
    monkeypatch.setitem(models.SIZES, "test", TINY)
    return "test"


def altered(folder, target, weights=None, **settings):
    """A copy of a model folder with other weights or other entries in its JSON files."""
    shutil.copytree(folder, target)
    if weights is not None:
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    for name, values in settings.items():
        file = target / f"{name}.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return str(target)


def logits(model, length: int = 6):
    with torch.no_grad():
        return model(torch.arange(5, 5 + length)[None]).logits[0]


# --- loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "qwen2", "gpt2", "opt"])
def test_every_architecture_loads_in_evaluation_mode_and_without_dropout(model_folder, architecture):
    model, tokenizer = models.load(str(model_folder(architecture)))
    assert model.dtype == torch.float32 and not model.training and tokenizer.padding_side == "right"
    before = logits(model)
    assert before.isfinite().all() and before.shape == (6, model.config.vocab_size)
    assert torch.equal(before, logits(model.train()))  # gpt2 and opt drop 10% in training by default
    assert tokenizer.decode(tokenizer("Question: café?").input_ids) == "Question: café?"


def test_dtype_and_device_that_do_not_exist_are_one_line(model_folder):
    folder = str(model_folder("llama"))
    assert models.load(folder, dtype="bfloat16")[0].dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"unknown dtype 'float23'; did you mean 'float32'"):
        models.load(folder, dtype="float23")
    for device in ("gpu", "meta"):
        with pytest.raises(InputError, match=f"unknown device '{device}'.*cuda:N"):
            models.load(folder, device=device)
    with pytest.raises(InputError, match="'cuda:99': this machine has"):
        models.load(folder, device="cuda:99")


def test_a_model_that_is_not_cached_says_what_is_without_a_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as error:
        models.load("nobody/has-this")
    line = str(error.value)
    assert "\n" not in line and "'nobody/has-this'" in line and "offline: 'builtin'" in line
    assert "hf download nobody/has-this" in line


def test_an_unreachable_hub_is_not_asked_again_and_again(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(InputError, match="offline: 'builtin'"):
        models.load("nobody/has-this")
    assert time.monotonic() - start < 5


def test_a_folder_that_is_not_a_model_says_so(tmp_path):
    with pytest.raises(InputError, match=r"there is no model folder './nowhere'"):
        models.load("./nowhere")
    with pytest.raises(InputError, match=r"needs config\.json, model"):
        models.load(str(tmp_path))


def test_pickled_weights_are_refused(model_folder, tmp_path):
    folder = altered(model_folder("llama"), tmp_path / "pickled")
    weights = tmp_path / "pickled" / "model.safetensors"
    torch.save(load_file(weights), tmp_path / "pickled" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(InputError, match="safetensors"):
        models.load(folder)


def test_weights_that_are_missing_or_damaged_are_not_replaced_by_random_ones(model_folder, tmp_path):
    weights = load_file(model_folder("gpt_neox") / "model.safetensors")
    name = next(name for name in weights if "dense_h_to_4h.weight" in name)
    folder = altered(model_folder("gpt_neox"), tmp_path / "lacking", {k: v for k, v in weights.items() if k != name})
    with pytest.raises(InputError, match=rf"lacks 1 weights, such as {name}"):
        models.load(folder)
    whole = (model_folder("gpt_neox") / "model.safetensors").read_bytes()
    (tmp_path / "lacking" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"lacking' needs config\.json"):
        models.load(folder)


def test_a_tokenizer_without_padding_or_end_of_text_is_mended(model_folder, tmp_path):
    bare = {"tokenizer_config": {"pad_token": None, "eos_token": None}}
    folder = altered(model_folder("llama"), tmp_path / "bare", config={"eos_token_id": 0, "pad_token_id": None}, **bare)
    _, tokenizer = models.load(folder)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    folder = altered(model_folder("llama"), tmp_path / "none", config={"eos_token_id": None}, **bare)
    with pytest.raises(InputError, match="end-of-text token"):
        models.load(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused(model_folder, tmp_path):
    weights = load_file(model_folder("llama") / "model.safetensors")
    fewer = {
        k: v[:200].clone() if k in ("model.embed_tokens.weight", "lm_head.weight") else v for k, v in weights.items()
    }
    folder = altered(model_folder("llama"), tmp_path / "fewer", fewer, config={"vocab_size": 200})
    with pytest.raises(InputError, match="tokenizer has 309 tokens, its embedding 200 rows"):
        models.load(folder)


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2"])
def test_a_snapshot_does_not_follow_the_model_that_trl_has_patched(model_folder, architecture):
    model, _ = models.load(str(model_folder(architecture)))
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)  # TRL binds the instance's forward like this
    state = torch.random.get_rng_state()
    frozen, trap = models.snapshot(model), copy.deepcopy(model)
    assert torch.equal(state, torch.random.get_rng_state())
    before = logits(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1
    assert torch.equal(logits(frozen), before)
    assert torch.equal(logits(trap), logits(model)) and not torch.equal(logits(trap), before)
    assert not any(p.requires_grad for p in frozen.parameters())


# --- the built-in model ------------------------------------------------------------------------------------


@needs_builtin
def test_killed_and_restarted_pretraining_ends_with_the_same_weights(tiny, tmp_path, monkeypatch):
    whole = models.builtin(tiny)
    backward, calls = models._backward, []

    def killed(model, batch):
        calls.append(batch)
        if len(calls) == 130:
            raise KeyboardInterrupt
        return backward(model, batch)

    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path / "again"))
    monkeypatch.setattr(models, "_backward", killed)
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
    train, held_out = models.documents({"seaborn": "0.13"}, seed=0)
    questions = [text for text in train if text.startswith("Question:")]
    assert 0.07 < len(questions) / len(train) < 0.09
    assert set(questions) == {e["prompt"] + e["chosen"] for e in preferences.load(split="pretrain")}
    assert len(held_out) == 400 and not set(held_out) & set(train)
    assert len(train) - len(questions) + len(held_out) == 20_000


@pytest.mark.parametrize("size", models.SIZES)
def test_builtin_models_come_with_the_package_and_their_recipe_is_that_of_the_code(size):
    folder = models.builtin(size)
    recipe = yaml.safe_load((folder / "recipe.yml").read_text())
    assert folder == models.SHIPPED / size
    assert {name: store.file_hash(folder / name) for name in recipe["sha256"]} == recipe["sha256"]
    made = recipe["parameters"] | {"libraries": list(recipe["parameters"]["libraries"])}
    assert made == {**models.SIZES[size], "seed": 0}
    if size != "world":
        assert recipe["corpus"]["preferences"] == store.file_hash(preferences.BUILTIN)


def test_a_model_made_again_is_compared_with_the_one_of_the_package(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "SHIPPED", tmp_path / "shipped")
    assert models.repeat(tiny, ship=True) == (True, "test: equal to the model of this package")
    monkeypatch.setitem(models.SIZES, "test", TINY | {"steps": 251})
    equal, line = models.repeat(tiny)
    assert not equal and "sha256 differ" in line


def test_blocks_lose_no_token_and_predict_each_once():
    def tokenizer(texts):
        return type("Encoded", (), {"input_ids": [[int(word) for word in text.split()] for text in texts]})

    tokenizer.eos_token_id = 0
    rows = models.blocks(tokenizer, ["1 2 3", "4 5 6 7", "8 9"], 4)
    assert rows.tolist() == [[1, 2, 3, 0, 4], [4, 5, 6, 7, 0]]


def test_chunked_gradients_equal_those_of_the_mean_loss(model_folder):
    model, _ = models.load(str(model_folder("gpt_neox")))
    batch = torch.randint(5, 300, (8, 130), generator=torch.Generator().manual_seed(0))
    loss = models._backward(model, batch)
    chunked = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    whole = model(batch, labels=batch).loss  # the library's own shift and mean
    whole.backward()
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for a, p in zip(chunked, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-6)


def test_the_first_step_has_a_learning_rate_and_the_last_almost_none():
    rates = [models._schedule(step / 100) for step in range(100)]
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
