"""Probes against a plain forward of one text, over random architectures, lengths, batches, rotary types and adapters.

`LDDYN_FUZZ=2000 pytest tests/engine/test_fuzz.py` makes as many draws; a failing one is named by its seed.
"""

import copy
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lddyn import Caution, InputError
from lddyn.engine import models, store
from lddyn.engine.probe_set import Encoded
from lddyn.engine.probes import measure

VOCAB, ROOM = 400, 512
SLIDING = {"sliding_window": 24}
OLD = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": ROOM}
ARCHITECTURES = {
    "apertus": {}, "arcee": {}, "biogpt": {}, "bloom": {"n_layer": 2, "n_head": 4}, "codegen": OLD | {"rotary_dim": 4},
    "cohere": {}, "cohere2": SLIDING | {"head_dim": 8}, "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "gemma2": SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    "gemma3_text": SLIDING | {"head_dim": 8, "query_pre_attn_scalar": 8}, "glm": {"head_dim": 8}, "gpt2": OLD,
    "gpt_neo": {
        "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 24,
    },
    "gpt_neox": {}, "gpt_oss": SLIDING | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": OLD | {"rotary_dim": 4}, "granite": {"logits_scaling": 3.0}, "lfm2": {}, "llama": {},
    "llama4_text": {"attention_chunk_size": 24, "num_local_experts": 2, "intermediate_size_mlp": 64, "head_dim": 8},
    "mamba": {"state_size": 8}, "mistral": SLIDING, "mixtral": {"num_local_experts": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": ROOM}, "nemotron": {}, "olmo2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "persimmon": {}, "phi": {}, "phi3": SLIDING, "qwen2": {},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "qwen3": {"head_dim": 8}, "rwkv": {"attention_hidden_size": 32, "context_length": ROOM}, "smollm3": {},
    "stablelm": {}, "starcoder2": SLIDING,
}  # fmt: skip
ROPES = {
    "dynamic": {"factor": 2.0},
    "linear": {"factor": 2.0},
    "llama3": {"factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "longrope": {
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0, "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
}  # fmt: skip
SOME = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS = {
    "adalora": (peft.AdaLoraConfig, SOME | {"total_step": 100}),
    "adaption": (peft.AdaptionPromptConfig, {"adapter_len": 4, "adapter_layers": 1}),
    "boft": (peft.BOFTConfig, {"target_modules": ["q_proj"], "boft_block_size": 4}),
    "dora": (peft.LoraConfig, {"target_modules": "all-linear", "use_dora": True}),
    "embeddings": (peft.LoraConfig, {"target_modules": ["q_proj", "embed_tokens"]}),
    "head": (peft.LoraConfig, SOME | {"modules_to_save": ["lm_head"]}),
    "ia3": (peft.IA3Config, {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "layer norms": (peft.LNTuningConfig, {}),
    "loha": (peft.LoHaConfig, SOME),
    "lokr": (peft.LoKrConfig, SOME),
    "lora": (peft.LoraConfig, {"target_modules": "all-linear"}),
    "oft": (peft.OFTConfig, {"target_modules": ["q_proj"], "oft_block_size": 8, "r": 0}),
    "p-tuning": (peft.PromptEncoderConfig, {"num_virtual_tokens": 4, "encoder_hidden_size": 16}),
    "prefix": (peft.PrefixTuningConfig, {"num_virtual_tokens": 4}),
    "prompt": (peft.PromptTuningConfig, {"num_virtual_tokens": 4}),
    "tokens": (peft.LoraConfig, SOME | {"trainable_token_indices": [1, 2]}),
    "vera": (peft.VeraConfig, {"target_modules": ["q_proj"], "r": 4}),
}


def built(architecture: str, seed: int = 0, std: float = 0.2, **more):
    common = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": ROOM}
    common |= {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": std}
    config = AutoConfig.for_model(architecture, **(common | ARCHITECTURES[architecture] | more))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()


def adapted(model, name: str, seed: int = 0):
    """The model with adapters that do something."""
    kind, options = ADAPTERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight += 0.05 * torch.randn_like(weight)
    return model.eval()


def encoded(draw: random.Random, longest: int) -> Encoded:
    def ids(low: int) -> list[int]:
        return [draw.randrange(5, VOCAB) for _ in range(draw.randint(low, longest))]

    prompts = [ids(2) for _ in range(draw.randint(1, 5))]
    kinds = ("chosen", "rejected", "unrelated")[: draw.randint(1, 3)]
    return Encoded([f"p{i}" for i in range(len(prompts))], prompts, {k: [ids(1) for _ in prompts] for k in kinds})


@torch.no_grad()
def truth(model, prompt: list[int], response: list[int]) -> float:
    """log pi of a response, nats: one text, no cache, no padding, from a model that has seen nothing before."""
    ids = torch.tensor([prompt + response])
    logp = copy.deepcopy(model)(input_ids=ids).logits[0, -ids.shape[1] :].double().log_softmax(-1)
    return logp[len(prompt) - 1 : -1].gather(1, torch.tensor(response)[:, None]).sum().item()


def worst(model, texts: Encoded, table) -> float:
    sums = table[table.metric == "logp_sum"].set_index(["prompt_id", "response_type"]).value
    return max(
        abs(sums[name, kind] - truth(model, prompt, responses[i]))
        for kind, responses in texts.responses.items()
        for i, (name, prompt) in enumerate(zip(texts.prompt_ids, texts.prompts, strict=True))
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(int(os.environ.get("LDDYN_FUZZ", "40"))))
def test_probes_equal_a_plain_forward(seed):
    draw = random.Random(seed)
    architecture, std, more, longest = draw.choice(list(ARCHITECTURES)), draw.choice([0.02, 0.2]), {}, 60
    if architecture in ("llama", "qwen2", "qwen3", "olmo2") and draw.random() < 0.5:
        rope = draw.choice(list(ROPES))
        more["rope_parameters"] = {"rope_type": rope, "rope_theta": 10000.0} | ROPES[rope]
    model = built(architecture, seed, std, **more)
    if architecture == "llama" and draw.random() < 0.5:
        model = adapted(model, draw.choice(list(ADAPTERS)), seed)
    for factor in (1.0, draw.choice([1.0, 1.5])):  # the second time with what training may do to the weights
        with torch.no_grad():
            for weight in model.parameters():
                weight *= factor
        texts = encoded(draw, longest)
        table = measure(model, texts, batch_tokens=draw.choice([None, 64, 300]))
        assert worst(model, texts, table) < 1e-3


@pytest.mark.filterwarnings("ignore")  # peft, of what it has not seen and of what it calls
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_is_probed_as_it_computes(name):
    model = adapted(built("llama"), name)
    texts = encoded(random.Random(0), 40)
    assert worst(model, texts, measure(model, texts)) < 1e-3


def test_adapters_that_want_a_task_are_refused_in_one_line():
    config = peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=1, task_type="CAUSAL_LM")
    with pytest.raises(InputError, match="MULTITASK_PROMPT_TUNING adapters cannot be probed"):
        measure(peft.get_peft_model(built("llama"), config), encoded(random.Random(0), 9))


def test_padding_does_not_count_in_a_sliding_window_and_no_sharing_is_lost():
    """The longest answer belongs to the prompt in the middle, so two extreme prompts alone would not show it."""
    draw, model = random.Random(1), built("mistral", sliding_window=64)
    lengths = {"prompts": (6, 30, 58), "chosen": (4, 60, 5)}
    ids = {k: [[draw.randrange(5, VOCAB) for _ in range(n)] for n in each] for k, each in lengths.items()}
    texts = Encoded(["a", "b", "c"], ids["prompts"], {"chosen": ids["chosen"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", Caution)
        assert worst(model, texts, measure(model, texts)) < 1e-3


def test_a_soft_cap_counts_also_when_logits_were_small_at_the_first_look():
    model = built("gemma2", std=0.02)
    texts = encoded(random.Random(2), 9)
    measure(model, texts)
    with torch.no_grad():
        model.model.norm.weight.add_(60.0)
    assert worst(model, texts, measure(model, texts)) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_frozen_copy_is_the_model(tmp_path, architecture, dtype):
    built(architecture).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype)).eval()
    ids = torch.arange(5, 305).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(models.snapshot(model)(ids).logits, model(ids).logits)


@pytest.mark.slow
def test_a_copy_gathered_from_two_processes_is_the_model():
    some = "cohere2,gemma2,gemma3_text,gpt2,gpt_neox,gpt_oss,llama,mistral,opt,phi3,qwen2,qwen3"
    script = Path(__file__).with_name("gathered.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(script),
        some,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{store.ROOT}:{script.parent}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
