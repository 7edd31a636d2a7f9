"""What a training needs before it starts: memory by part, and time, from a model's configuration without its weights.

Bytes are counted for what PyTorch keeps: weights, gradients, optimiser state, DPO's reference, the activations kept for
the backward pass, logits, and the keys and values of the probes. Elements of activations per token and layer were
counted on small models of each family (a test does it again).
"""

import contextlib
import math
import os
import re
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from lddyn import InputError, first_line, hub_or_cache
from lddyn.engine import pretraining, probes, store

ARCHITECTURES = store.BOOK / "settings" / "architectures.yml"
GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
STATES = {"adamw": 2, "rmsprop": 1, "sgd": 0}  # copies of the trained weights that an optimiser keeps
FEEDFORWARD = {"gpt_neox": 2, "gpt2": 5, "opt": 4}  # kept copies of the widest layer; 4 with a gate
REACHED = 0.35  # share of the rate of a large matrix product that training reaches
TYPES = 12  # responses to a probed prompt


class Shape(NamedTuple):
    """What memory and time depend on."""

    parameters: int
    adapted: int  # inputs plus outputs of all linear layers but the last; times the rank gives LoRA's parameters
    layers: int
    width: int
    feedforward: int  # width of the widest layer, times the copies that are kept
    key_value: int  # width of keys and of values
    vocab: int


class Estimate(NamedTuple):
    model: str
    shape: Shape
    parts: dict[str, float]  # GiB of one process
    flops: float  # of all processes
    hours: float
    device: str

    @property
    def gib(self) -> float:
        """The most that is held at one time: training and probing take turns."""
        working = {name: self.parts[name] for name in ("activations", "logits", "probing")}
        fixed = sum(self.parts.values()) - sum(working.values())
        return fixed + max(working["activations"] + working["logits"], working["probing"])


# --- the model ---------------------------------------------------------------------------------------------


@cache
def known() -> dict[str, dict]:
    """Hub id: configuration of the models that are known without a network."""
    return yaml.safe_load(ARCHITECTURES.read_text())


def architecture(size: str) -> dict[str, int]:
    """Width, layers, heads and vocabulary of the built-in model: of a named size, or of WIDTHxLAYERS such as 192x6."""
    if size in pretraining.SIZES:
        return pretraining.SIZES[size]["architecture"]
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match or int(match[1]) % 32 or not int(match[1]) or not int(match[2]):
        allowed = f"{', '.join(pretraining.SIZES)}, or WIDTHxLAYERS such as 192x6 with a width that 32 divides"
        raise InputError(f"unknown size {size!r} (allowed: {allowed})")
    vocabulary = pretraining.SIZES["small"]["architecture"]["vocab"]
    return {"width": int(match[1]), "layers": int(match[2]), "heads": int(match[1]) // 32, "vocab": vocabulary}


def config_of(model: str, size: str = "small"):
    """The configuration of a model: built-in, known, from its folder or from the hub; `InputError` if there is none."""
    from transformers import AutoConfig

    if model == "builtin":
        a = architecture(size)
        inside = {"hidden_size": a["width"], "intermediate_size": 4 * a["width"], "num_hidden_layers": a["layers"]}
        inside |= {"num_attention_heads": a["heads"], "vocab_size": a["vocab"], "tie_word_embeddings": True}
        return AutoConfig.for_model("gpt_neox", **inside)
    if model in known():
        return AutoConfig.for_model(**known()[model])
    try:
        if Path(model).is_dir():
            return AutoConfig.from_pretrained(model)
        with hub_or_cache():
            return AutoConfig.from_pretrained(model)
    except Exception as error:  # the libraries raise OSError, ValueError, KeyError and more
        raise InputError(f"cannot read the configuration of {model!r} ({first_line(error)})") from error


def shape(config) -> Shape:
    """Count a model's parameters on PyTorch's `meta` device, which holds no memory."""
    import torch
    from transformers import AutoModelForCausalLM

    if config.is_encoder_decoder:
        raise InputError(f"{config.model_type} has an encoder beside its decoder; a causal language model is needed")
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:  # no causal language model
        raise InputError(f"{config.model_type} is no causal language model ({first_line(error)})") from error
    config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1  # state-space models have none
    widest = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
    last = model.get_output_embeddings()
    linear = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not last]
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        adapted=sum(sum(m.weight.shape) for m in linear),
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        feedforward=widest * FEEDFORWARD.get(config.model_type, 4),
        key_value=config.hidden_size * (getattr(config, "num_key_value_heads", None) or heads) // heads,
        vocab=config.vocab_size,
    )


@cache
def _shape_of(model: str, size: str) -> Shape:
    return shape(config_of(model, size))


# --- memory and time ---------------------------------------------------------------------------------------


def estimate(chosen, world: int = 1, sharded: bool = False, rate: float | None = None) -> Estimate:
    """Memory in GiB of one of `world` processes, and hours, of a training with settings from `launch.settings`.

    Every text is taken to be as long as it may be. `sharded`: by FSDP2; probing then gathers the weights. `rate`:
    floating-point operations a second of one device (default: measured on a matrix product).
    """
    s = _shape_of(chosen.start or chosen.model, chosen.size)
    device = "cuda" if chosen.device.startswith("cuda") else "cpu"
    pairs = 2 if chosen.method == "dpo" else 1
    length = chosen.max_prompt + chosen.max_response
    tokens = length * pairs * chosen.batch_size // (chosen.accumulation * world)
    weight = BYTES[chosen.dtype]
    kept = 2 if chosen.bf16 else weight
    trained = s.adapted * chosen.lora if chosen.lora else s.parameters
    trained_bytes = 4 if chosen.lora else weight  # adapters are float32
    answered = tokens * chosen.max_response // length  # the output layer sees only these
    at_head = min(answered, 4096) * min(s.vocab, 2**15) if pairs == 2 else answered * s.vocab  # TRL's DPO has tiles
    probed = chosen.n_probe + chosen.n_probe_test
    probed_tokens = probed * (chosen.max_prompt + TYPES * length)
    cached = min(chosen.probe_tokens or probes.BATCH_TOKENS[device], probed_tokens)
    whole, share = s.parameters * weight, 1 / world if sharded else 1
    bytes_of = {
        "weights": s.parameters * (weight + 2 * chosen.bf16) * share,  # autocast keeps a copy
        "gradients": trained * trained_bytes * (share if sharded else 1 + (world > 1)),  # DDP has a copy to send
        "optimizer": trained * trained_bytes * STATES[chosen.optimizer] * share,
        "reference": whole * (share + 2 * sharded) if pairs == 2 else 0,  # TRL gathers it at once, through a buffer
        "activations": tokens * s.layers * (10 * s.width + s.feedforward) * kept,
        "logits": 3 * at_head * 4,
        "probing": 2 * cached * s.layers * 2 * s.key_value * weight + sharded * whole,
    }
    examples = chosen.n_train * chosen.epochs
    passes = 8 if pairs == 2 else 6  # forward and backward cost 6 operations a parameter and token, the reference 2
    unique = probed * (chosen.max_prompt + TYPES * chosen.max_response)
    probing = 2 * s.parameters * unique * chosen.evaluations * world
    flops = passes * s.parameters * length * pairs * examples + probing
    rate = rate or measured_rate(device, chosen.bf16 or chosen.dtype == "bfloat16")
    hours = flops / world / (rate * REACHED) / 3600
    return Estimate(chosen.model, s, {k: v / GIB for k, v in bytes_of.items()}, flops, hours, device)


@cache
def measured_rate(device: str, bf16: bool) -> float:
    """Floating-point operations a second in a matrix product, as fast as this device does it (about 0.2 s).

    Not a number where there is no such device.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return math.nan
    n = 8192 if device == "cuda" else 768
    a = torch.ones(n, n, device=device, dtype=torch.bfloat16 if bf16 and device == "cuda" else torch.float32)
    best = float("inf")
    for _ in range(4):
        clock = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - clock)
    return 2 * n**3 / best


def free_memory(device: str) -> float:
    """GiB that a new process can have: of the GPU, or of the machine and of the container that it runs in."""
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / GIB if torch.cuda.is_available() else 0.0
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit
        free = min(free, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return free / GIB


# --- what is said ------------------------------------------------------------------------------------------


def report(e: Estimate) -> str:
    """One line: parameters, memory by part, time."""
    parts = ", ".join(f"{name} {gib:.2g}" for name, gib in e.parts.items() if gib)
    known_time = "unknown time, there is none here" if math.isnan(e.hours) else duration(e.hours)
    return (
        f"{e.model}: {e.shape.parameters / 1e6:,.4g} M parameters; at most about {e.gib:.2g} GiB of memory ({parts}); "
        f"on {e.device}: {known_time}"
    )


def duration(hours: float) -> str:
    """Hours in the unit that suits them."""
    for unit, length in (("days", 24), ("hours", 1), ("minutes", 1 / 60)):
        if hours >= 2 * length:
            return f"{hours / length:.0f} {unit}"
    return f"{max(1, hours * 3600):.0f} seconds"


def alternatives(chosen, world: int = 1, sharded: bool = False) -> list[dict]:
    """Settings that need less, nearest first: smaller passes (the same numbers), then LoRA, then smaller models.

    Adapters are not sharded.
    """
    few, fewest = {"probe_tokens": 4096}, {"probe_tokens": 1024, "accumulation": chosen.batch_size // world}
    lora = {"lora": 16, "dtype": "bfloat16", "bf16": False}
    changes = [few, fewest] if sharded else [few, fewest, few | lora, fewest | lora]
    here = _shape_of(chosen.start or chosen.model, chosen.size).parameters
    sizes = {name: _shape_of(name, "small").parameters for name in (*known(), "builtin")}
    smaller = sorted((name for name in sizes if sizes[name] < here), key=sizes.get, reverse=True)
    changes += [{"model": name, "start": None, "size": "small"} | c for name in smaller for c in changes]
    return [{name: value for name, value in c.items() if getattr(chosen, name) != value} for c in changes]


def refuse_what_does_not_fit(chosen, world: int = 1, sharded: bool = False, free: float | None = None) -> None:
    """Raise `InputError` with the nearest setting that fits when a training needs more memory than there is.

    `free`: GiB for all processes of this machine (default: what is free now, of each one's GPU on CUDA).
    """
    e = estimate(chosen, world, sharded, rate=1e12)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world)) if e.device == "cpu" else 1
    free = free_memory(e.device) if free is None else free
    if e.gib * here <= free:
        return
    need = f"{e.model} needs about {e.gib * here:.3g} GiB and {free:.3g} GiB are free"
    if e.device == "cuda" and free == 0:
        raise InputError(f"{need}: this machine has no CUDA device; --set device cpu")
    for change in alternatives(chosen, world, sharded):
        less = estimate(replace(chosen, **change), world, sharded, rate=1e12)
        if less.gib * here <= free:
            words = " ".join(f"--set {k} {str(v).lower() if isinstance(v, bool) else v}" for k, v in change.items())
            raise InputError(f"{need}; the nearest that fits ({less.gib * here:.2g} GiB): {words}; or --force")
    raise InputError(f"{need}; nothing known fits, shorten max_prompt and max_response")
