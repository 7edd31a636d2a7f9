import copy
import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from lddyn import InputError
from lddyn.engine import models


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
