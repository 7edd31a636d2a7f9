"""Language models: the built-in ones, which come with the package, any causal LM of `transformers`, and GGUF files.

The built-in ones, which `pretraining` made, are those of seed 0: data of this package, so that numbers do not change
with the libraries.
"""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from lddyn import InputError, first_line, hub_or_cache, unknown
from lddyn.engine import gguf, pretraining, store
from lddyn.engine.probe_set import Model, Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
disable_progress_bar()  # otherwise every load and save of a small model draws one into the notebook


# --- loading -----------------------------------------------------------------------------------------------


def load(model: str = "builtin", size: str = "small", seed: int = 0, **options: Any) -> tuple[Model, Tokenizer]:
    """A model by name, as in `located`, with the `options` of `read`."""
    return read(located(model, size, seed), **options)


def located(model: str, size: str = "small", seed: int = 0) -> str:
    """The folder or hub id behind the name of a model.

    "builtin" of a `size` of `pretraining.SIZES` and `seed` (another than 0 is pre-trained on the spot); a GGUF file, or
    "smollm2", which is one, stands for what is made of it (`gguf.converted`); others are folders or hub ids already.
    """
    if model == "builtin":
        return str(builtin(size, seed))
    return str(gguf.converted(model)) if gguf.named(model) else model


def read(
    model: str,
    device: str = "cpu",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    attention: str | None = None,
) -> tuple[Model, Tokenizer]:
    """A causal language model, in evaluation mode and with dropout set to 0 as in the paper, and its tokenizer.

    `model`: a folder, a hub id, a GGUF file or "smollm2". `attention`: "sdpa", "eager" (which forward-mode derivatives
    need), or None for the library's choice. Weights are read from safetensors only. Raises `InputError` when there is
    no such model, device or dtype.
    """
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    place = _device(device)
    source = located(model)
    loaded, tokenizer = _from_pretrained(source, DTYPES[dtype], trust_remote_code, attention)
    _mend(tokenizer, loaded, model)
    return loaded.to(place).eval(), tokenizer


def inputs(model: str = "builtin", size: str = "small", seed: int = 0) -> dict[str, Path]:
    """The files of a model, for `cache.run`; none for a hub id, which names them. Pre-trains "builtin" if need be."""
    folder = Path(located(model, size, seed))
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file.name: file for file in files if file.suffix in (".json", ".safetensors")}


def snapshot(model: Model) -> Model:
    """A frozen copy of a model as it is now, in evaluation mode. The random state stays as it was.

    Every parameter and buffer keeps its own dtype, saved or not: rotary frequencies stay float32 in a bfloat16 model.
    `copy.deepcopy` of a model that has been in a TRL trainer computes with the weights of the original, because TRL
    binds `forward` to it; and a trainer that is given no reference model reads one from disk.
    """
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), model.device:
        copy = type(model)(model.config)  # on its device: random weights of a large model take long on a CPU
    weights = dict(copy.named_parameters())
    for name, weight in model.named_parameters():  # one at a time: each is gathered from its shards
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        weights[name].data = whole.detach().clone()
    for mine, theirs in zip(copy.modules(), model.modules(), strict=True):
        for name, buffer in theirs.named_buffers(recurse=False):
            setattr(mine, name, buffer.clone())
        for name in vars(mine).keys() & vars(theirs).keys():  # such as the longest text that a rotary embedding saw
            if name != "training" and isinstance(getattr(theirs, name), int | float | Tensor):
                setattr(mine, name, getattr(theirs, name))
    return copy.eval().requires_grad_(False)


def whole(model: Model) -> Model:
    """A model without what spreads it over processes, for probing and saving.

    Out of DistributedDataParallel; where FSDP2 shards the weights, a `snapshot` with all of them, which every process
    asks for at the same time. Raises `InputError` for FSDP 1 and for sharded adapters.
    """
    if torch.distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

        if isinstance(model, FSDPModule) and not hasattr(model, "peft_config"):
            return snapshot(model)
        if isinstance(model, (FSDPModule, FullyShardedDataParallel)):
            raise InputError("neither FSDP 1 nor adapters under FSDP2 can be probed; use FSDP2 and train all weights")
    return getattr(model, "module", model)


def _device(name: str) -> torch.device:
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise InputError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; use 'cpu'")
        if device.type in ("cpu", "cuda"):
            return device
    raise unknown("device", name, ["cpu", "cuda", "cuda:N"])


def _from_pretrained(
    source: str, dtype: torch.dtype, trust_remote_code: bool, attention: str | None
) -> tuple[Model, Tokenizer]:
    options = {"trust_remote_code": trust_remote_code}
    try:
        with contextlib.nullcontext() if Path(source).is_dir() else hub_or_cache():
            config = AutoConfig.from_pretrained(source, **options)
            if config.is_encoder_decoder:
                raise InputError(f"{config.model_type} has an encoder beside its decoder")
            for part in {id(part): part for part in (config, config.get_text_config())}.values():
                for name, value in part.to_dict().items():
                    if "drop" in name and isinstance(value, float):
                        setattr(part, name, 0.0)
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # the libraries raise OSError, ValueError, KeyError, SafetensorError and more
        raise InputError(_why_not(source, error)) from error
    if info["missing_keys"]:  # transformers fills them with random numbers and only warns
        missing = sorted(info["missing_keys"])
        raise InputError(f"model {source!r} lacks {len(missing)} weights, such as {missing[0]}")
    if sees_later_tokens(model.eval()):
        raise InputError(f"model {source!r} ({config.model_type}) sees later tokens; a causal language model is needed")
    return model, tokenizer


@torch.no_grad()
def sees_later_tokens(model: Model) -> bool:
    """Whether what follows a token changes what is predicted before it, as in BERT."""
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
    first, second = model(input_ids=ids, use_cache=False).logits[:, :3].float()
    return bool((first - second).abs().max() > 1e-6 * first.abs().max())  # masked: exactly zero


def _why_not(source: str, error: Exception) -> str:
    reason = first_line(error)
    if "trust_remote_code" in str(error):
        return f"model {source!r} comes with its own code, which runs only with trust_remote_code=True"
    if Path(source).is_dir():
        return f"model folder {source!r} needs config.json, model*.safetensors and a tokenizer: {reason}"
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        return f"there is no model folder {source!r}"
    offline = ", ".join(["'builtin'", *_cached()])
    return (
        f"cannot load model {source!r} ({reason}); available offline: {offline}; with a network: hf download {source}"
    )


def _cached() -> list[str]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    with contextlib.suppress(CacheNotFound):
        return sorted(repr(repo.repo_id) for repo in scan_cache_dir().repos if repo.repo_type == "model")
    return []


def _mend(tokenizer: Tokenizer, model: Model, name: str) -> None:
    eos = model.config.eos_token_id
    if tokenizer.eos_token is None and isinstance(eos, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    if tokenizer.eos_token is None:
        raise InputError(f"model {name!r}: neither its tokenizer nor its config names an end-of-text token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InputError(f"model {name!r}: its tokenizer has {len(tokenizer)} tokens, its embedding {rows} rows")


# --- the built-in model ------------------------------------------------------------------------------------


def builtin(size: str = "small", seed: int = 0) -> Path:
    """The folder of a built-in model: the one that comes with the package, or for another seed pre-trained now."""
    if size not in pretraining.SIZES:
        raise unknown("size", size, pretraining.SIZES)
    shipped = pretraining.SHIPPED / size
    if seed == 0 and shipped.is_dir():
        return shipped
    return pretraining.pretrained(seed=seed, **pretraining.SIZES[size])


def save(model: Model, tokenizer: Tokenizer, folder: Path) -> None:
    """Save a finished model as safetensors, with its tokenizer, in one step."""
    store.write_pretrained(folder, model, tokenizer)
