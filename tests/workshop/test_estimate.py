import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lddyn import InputError, __main__
from lddyn.engine import pretraining, training
from lddyn.workshop import estimate, launch

FAMILIES = {
    "gpt_neox": {},
    "qwen2": {"num_key_value_heads": 4},
    "llama": {"num_key_value_heads": 2},
    "gpt2": {"bos_token_id": 0, "eos_token_id": 0},
}


def config(family, layers, width=64, vocab=500):
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "vocab_size": vocab}
    found = AutoConfig.for_model(family, **sizes, **FAMILIES[family])
    if family != "gpt2":
        found.intermediate_size = 4 * width
    for name, value in found.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(found, name, 0.0)
    return found


def kept_for_backward(model, tokens=128):
    """Bytes that PyTorch keeps for the backward pass through the body, the weights left out."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        hidden = model.base_model(input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=False).last_hidden_state
        hidden.sum()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_torch_keeps_for_the_backward_pass(family):
    two, four = (AutoModelForCausalLM.from_config(config(family, n)) for n in (2, 4))
    s = estimate.shape(config(family, 4))
    measured = (kept_for_backward(four) - kept_for_backward(two)) / 2 / 128 / 4
    assert 10 * s.width + s.feedforward == pytest.approx(measured, rel=0.15)
    assert s.parameters == sum(p.numel() for p in four.parameters())


def test_parameters_of_the_papers_models_are_those_of_their_checkpoints():
    exact = {"410m": 405_334_016, "1b": 1_011_781_632, "1.4b": 1_414_647_808, "2.8b": 2_775_208_960}
    exact = {f"EleutherAI/pythia-{name}-deduped": count for name, count in exact.items()}
    exact |= {"Qwen/Qwen1.5-0.5B": 463_987_712, "Qwen/Qwen1.5-1.8B": 1_836_828_672}
    assert {name: estimate.shape(estimate.config_of(name)).parameters for name in estimate.known()} == exact


def test_adapters_are_counted_as_peft_makes_them():
    model = AutoModelForCausalLM.from_config(config("gpt_neox", 2))
    adapted = training.with_adapters(model, 3, seed=0)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert estimate.shape(config("gpt_neox", 2)).adapted * 3 == trained


MEASURE = """
import re, torch
torch.set_num_threads(1)
from lddyn.engine import training
from lddyn.workshop import estimate
from test_estimate import config
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(config("gpt_neox", 4, 256, 8000))
optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
def step(tokens):
    ids = torch.randint(0, 8000, (4, tokens))
    response = (torch.arange(tokens) >= tokens // 2).expand(4, tokens)
    with training.head_sees(model, response):
        logits = model(input_ids=ids, use_cache=False).logits.float()
    torch.nn.functional.cross_entropy(logits, ids[response], reduction="sum").backward()
    optimizer.step(); optimizer.zero_grad()
def peak():  # ru_maxrss would start from the size of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
step(2)
before = peak()
step(256)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_memory_of_a_training_step_is_as_estimated(monkeypatch):
    """The peak of a process, which also has what the allocator keeps: within 40%."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, cwd=Path(__file__).parent, check=True
    )
    monkeypatch.setattr(estimate, "_shape_of", lambda *_: estimate.shape(config("gpt_neox", 4, 256, 8000)))
    chosen = launch.settings((), {"batch_size": 4, "max_prompt": 128, "max_response": 128})
    parts = estimate.estimate(chosen, rate=1e12).parts
    assert (parts["activations"] + parts["logits"]) * 2**20 == pytest.approx(int(done.stdout), rel=0.4)


def test_what_does_not_fit_is_refused_with_the_nearest_that_does():
    chosen = launch.settings(["pythia-2.8b"], {"method": "dpo", "device": "cpu"})
    everything = estimate.estimate(chosen, rate=1e12).gib
    estimate.refuse_what_does_not_fit(chosen, free=everything + 1)
    wanted = [(everything - 1, "probe_tokens"), (25, "lora 16"), (8, "--set model"), (0.2, "--set model builtin")]
    for free, words in wanted:
        with pytest.raises(InputError, match=f"needs about .* GiB and {free:.3g} GiB are free") as error:
            estimate.refuse_what_does_not_fit(chosen, free=free)
        assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="nothing known fits"):
        estimate.refuse_what_does_not_fit(chosen, free=1e-4)


def test_the_proposed_setting_is_accepted(capsys):
    words = ["qwen1.5-1.8b", "--set", "device", "cpu", "--memory", "12"]
    assert __main__.main(["estimate", *words]) == 2
    proposed = capsys.readouterr().err.split("): ")[1].split(";")[0].split()
    assert proposed[:1] == ["--set"] and __main__.main(["estimate", *words, *proposed]) == 0


def test_a_gpu_that_is_not_there_is_one_line_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert __main__.main(["train", "pythia-410m"]) == 2
    error = capsys.readouterr().err
    assert "no CUDA device" in error and error.count("\n") == 1
    assert __main__.main(["estimate", "pythia-410m", "--memory", "80"]) == 0
    assert "on cuda: unknown time" in capsys.readouterr().out


def test_more_processes_need_less_each_and_more_together():
    chosen = launch.settings((), {"method": "dpo", "batch_size": 8})
    one, two = (estimate.estimate(chosen, world, rate=1e12) for world in (1, 2))
    assert two.parts["activations"] == pytest.approx(one.parts["activations"] / 2)
    assert two.parts["gradients"] == pytest.approx(2 * one.parts["gradients"])


def test_sharding_divides_the_state_but_probing_and_the_reference_need_whole_weights(capsys):
    chosen = launch.settings(["pythia-2.8b"], {"method": "dpo", "batch_size": 64})
    one, eight = (estimate.estimate(chosen, world, world > 1, rate=1e12) for world in (1, 8))
    for name in ("weights", "gradients", "optimizer", "activations"):
        assert eight.parts[name] == pytest.approx(one.parts[name] / 8)
    whole = one.parts["reference"]
    assert eight.parts["probing"] == pytest.approx(one.parts["probing"] + whole)
    assert eight.parts["reference"] == pytest.approx(whole / 8 + 2 * whole)
    words = ["pythia-2.8b", "--set", "batch_size", "64", "--memory", "80", "--sharded"]
    assert __main__.main(["estimate", *words]) == 2 and "needs about" in capsys.readouterr().err
    assert __main__.main(["estimate", *words, "--processes", "8"]) == 0
    assert __main__.main(["estimate", *words[:-3], "--memory", "20", "--sharded", "--processes", "8"]) == 2
    assert "--set probe_tokens 1024 --set accumulation 8;" in capsys.readouterr().err


def test_the_built_in_model_comes_in_any_size():
    assert estimate.shape(estimate.config_of("builtin", "576x12")).parameters == pytest.approx(49e6, rel=0.01)
    small = estimate.shape(estimate.config_of("builtin", "small")).parameters
    with torch.device("meta"):
        tokens = type("T", (), {"eos_token_id": 0, "pad_token_id": 1})
        built = pretraining._untrained(tokens, **pretraining.SIZES["small"]["architecture"])
    assert small == sum(p.numel() for p in built.parameters())
    with pytest.raises(InputError, match="a width that 32 divides"):
        estimate.architecture("100x2")


def test_the_table_of_the_book_has_every_model_of_the_paper():
    page = launch.table()
    assert page.count("\n| `") == len(estimate.known()) and "nan" not in page
