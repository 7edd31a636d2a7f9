"""The training of the chapters for one's own model: on one process or several, whole or LoRA, with the same probes.

`sft.finetune` and `dpo.align` are the chapters' experiments; this is the part of them that a larger model needs,
with the settings that only matter there (processes, accumulation, bfloat16, LoRA).
"""

import os
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from lddyn import InputError, unknown
from lddyn.engine import models, recipe, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.settings import derive, lengths
from lddyn.engine.training import Training, dpo_rows, log_rows, quiet, sft_rows, train, with_adapters

METHODS = {"sft": "sequence_sum", "dpo": "sigmoid"}  # and the loss that each has unless another is named


def processes() -> tuple[int, int]:
    """How many processes train together, and which of them this is; `torchrun` and `accelerate launch` say so."""
    return int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))


def sharded() -> bool:
    """Whether `accelerate launch` asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def share_of_batch(batch_size: int, accumulation: int, world: int) -> int:
    """Examples in one backward pass of one process. Raises `InputError` when they do not come out even."""
    if batch_size % (accumulation * world):
        raise InputError(
            f"batch_size {batch_size} does not divide by accumulation {accumulation} x {world} processes; "
            f"the next one that does is {-(-batch_size // (accumulation * world)) * accumulation * world}"
        )
    return batch_size // (accumulation * world)


@dataclass(frozen=True)
class Tune:
    """One training: `train`'s parameters (`launch.PARAMETERS`), `model` a folder or hub id."""

    seed: int
    method: str
    model: str
    start: str | None
    data: str
    n_train: int
    n_probe: int
    n_probe_test: int
    epochs: float
    evaluations: int
    batch_size: int
    accumulation: int
    lr: float
    beta: float
    loss: str
    optimizer: str
    warmup: int
    clip: float
    max_prompt: int
    max_response: int
    format: str
    skip_bad_rows: str
    probe_tokens: int | None
    lora: int
    bf16: bool
    device: str
    dtype: str


def tune(work: Path, s: Tune) -> pd.DataFrame:
    """SFT or DPO of a model, with all kinds of response measured along the way; returns a long table.

    Training starts from the folder `start`, or from `model` itself when that is None; `chosen_initial` is sampled from
    `model`. `batch_size` counts the examples of one update, over all processes and accumulated passes. `probe_tokens`
    bounds the memory of probing. `lora`: the rank of adapters on all linear layers, 0 to train all weights. `bf16`:
    compute in bfloat16 and keep the weights in `dtype`. The finished weights stay in `model/` beside the table
    (adapters merged). Every process measures, the first one writes. An interrupted run continues from its last
    checkpoint.
    """
    if s.method not in METHODS:
        raise unknown("method", s.method, METHODS)
    world, rank = processes()
    quiet()
    one_pass = share_of_batch(s.batch_size, s.accumulation, world)
    lm, tokenizer = models.read(s.model, device=s.device, dtype=s.dtype)
    examples, test_set = recipe.examples(s)
    probed = recipe.probe_set(lm, tokenizer, examples, test_set, s)
    if s.start:
        lm, tokenizer = models.read(s.start, device=s.device, dtype=s.dtype)
    texts = {field: [e[field] for e in examples] for field in ("prompt", "chosen", "rejected")}
    if s.method == "sft":
        rows = sft_rows(tokenizer, texts["prompt"], texts["chosen"], **lengths(s))
    else:
        rows = dpo_rows(tokenizer, *texts.values(), **lengths(s))
    steps = int(-(-len(rows) // s.batch_size) * s.epochs)
    at = store.dense_early(steps, s.evaluations)
    callback = ProbeCallback(probed, at=at, **lengths(s), batch_tokens=s.probe_tokens)
    how = derive(Training, s, batch_size=one_pass, checkpoints=4 * world)
    reference = None
    reference = None
    if s.lora:
        reference = models.snapshot(lm) if s.method == "dpo" and world > 1 else None
        lm = with_adapters(lm, s.lora, s.seed)
    log = train(work, lm, tokenizer, rows, callback, how, reference)
    finished = lm.merge_and_unload() if s.lora else models.whole(lm)
    if rank == 0:
        models.save(finished, tokenizer, work.parent / "model")
    return store.compact(pd.concat([callback.table(), log_rows(log, s.batch_size)], ignore_index=True))
