"""Models and files that cannot work are one line before anything is trained or overwritten."""

import json

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lddyn import InputError
from lddyn.__main__ import main
from lddyn.engine import models
from lddyn.publish import notebooks
from lddyn.workshop import estimate

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_model_that_sees_later_tokens_is_refused(kind, tmp_path, model_folder):
    config = AutoConfig.for_model(kind, is_decoder=False, max_position_embeddings=64, **SHAPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"\({kind}\) sees later tokens; a causal language model is needed"):
        models.read(str(with_tokenizer(tmp_path, model_folder)))


def with_tokenizer(folder, model_folder):
    for file in model_folder("llama").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_an_encoder_decoder_is_refused_by_every_command(tmp_path, model_folder, capsys):
    config = AutoConfig.for_model("t5", vocab_size=400, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    with_tokenizer(tmp_path, model_folder)
    for command in (["estimate"], ["train"]):
        assert main([*command, "--set", "model", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "t5 has an encoder beside its decoder" in error
    with pytest.raises(InputError, match="encoder beside its decoder"):
        models.read(str(tmp_path))


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_a_model_without_attention_heads_has_an_estimate(kind):
    shape = estimate.shape(AutoConfig.for_model(kind, vocab_size=400, hidden_size=32, num_hidden_layers=2))
    assert shape.parameters > 0 and shape.layers == 2


def test_dropout_is_off_in_the_text_part_of_a_wrapper_too(tmp_path, monkeypatch):
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=32, vocab_size=400)
    wrapper = AutoConfig.for_model("llama", vocab_size=400, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setattr(type(wrapper), "get_text_config", lambda self, *a, **k: config)
    monkeypatch.setattr(models.AutoConfig, "from_pretrained", lambda *a, **k: wrapper)
    with pytest.raises(InputError):
        models.read(str(tmp_path))  # there are no weights; the configuration has been mended before
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0.0


def test_rows_longer_than_the_positions_are_refused_before_training(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LDDYN_RUNS", str(tmp_path / "runs"))
    row = {"prompt": "why " * 150, "chosen": "because " * 150, "rejected": "no " * 150}
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row | {"prompt": f"{i} {row['prompt']}"}) + "\n" for i in range(12)))
    words = {"model": model_folder("llama"), "data": data, "n_train": 8, "n_probe": 1, "n_probe_test": 1}
    words |= {"max_prompt": 250, "max_response": 250, "epochs": 1, "evaluations": 2, "batch_size": 4}
    assert main(["train", *(w for k, v in words.items() for w in ("--set", k, str(v)))]) == 2
    assert "the model takes 256: lower max_prompt or max_response" in capsys.readouterr().err


NOTEBOOK = {
    "cells": [
        {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "execution_count": None, "outputs": [],
         "source": "lr: float = 1e-3  # (0, 1] learning rate"},
    ],
    "metadata": {"kernelspec": {"name": "python3", "language": "python", "display_name": "p"}},
    "nbformat": 4, "nbformat_minor": 5,
}  # fmt: skip


def test_braces_in_a_path_are_no_template(tmp_path):
    source, out = tmp_path / "a{b}.ipynb", tmp_path / "out{x}.ipynb"
    source.write_text(json.dumps(NOTEBOOK))
    assert notebooks.execute(source, {"lr": 0.5}, out) is None and out.exists()


def test_a_notebook_is_not_overwritten_and_a_list_is_none(tmp_path, capsys):
    source = tmp_path / "a.ipynb"
    source.write_text(json.dumps(NOTEBOOK))
    assert main(["run", str(source), "--out", str(source)]) == 2
    assert "is the notebook itself" in capsys.readouterr().err
    (tmp_path / "list.ipynb").write_text("[]")
    assert main(["run", str(tmp_path / "list.ipynb")]) == 2
    assert "is not a notebook" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_settings_in_another_encoding_are_one_line(tmp_path, capsys, encoding):
    path = tmp_path / "mine.yml"
    path.write_bytes("# Réglage\nlr: 1.0e-3\n".encode(encoding))
    assert main(["estimate", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "it is not UTF-8" in error
