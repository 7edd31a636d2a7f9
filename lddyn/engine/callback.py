"""Anyone's trainer gains the paper's curves with three lines:

probes = ProbeSet.from_jsonl("my_prompts.jsonl")
callback = ProbeCallback(probes, every=25, output_dir="runs/mine")
trainer = DPOTrainer(..., callbacks=[callback])
"""

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from transformers import TrainerCallback

from lddyn import InputError
from lddyn.engine import cache, models, probes, reach, store
from lddyn.engine.probe_set import Encoded, ProbeSet


class ProbeCallback(TrainerCallback):
    """Measure a probe set before, during and after a training run of any `transformers` or TRL trainer.

    `every` counts optimiser steps; `at` names steps one by one instead. Training is bit-identical with and without
    it. With an `output_dir` the long table and a manifest are written there at the end; `table()` gives the rows so
    far. Every checkpoint of the trainer carries them, so that a resumed run continues the table. Prompts and
    responses are cut as in `ProbeSet.encode`, and probed `batch_tokens` tokens at once, or as many as suit the device
    (keys and values of large models fill a GPU). Raises `InputError` when the tokenizer is missing.
    """

    def __init__(
        self,
        probe_set: ProbeSet,
        every: int = 25,
        output_dir: str | Path | None = None,
        at: Sequence[int] | None = None,
        max_prompt: int = 256,
        max_response: int = 256,
        batch_tokens: int | None = None,
    ):
        self.probe_set, self.every, self.at = probe_set, every, None if at is None else set(at)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.lengths, self.batch_tokens = {"max_prompt": max_prompt, "max_response": max_response}, batch_tokens
        self.encoded: Encoded | None = None
        self.parts: list[pd.DataFrame] = []

    def table(self) -> pd.DataFrame:
        """The long table of everything measured so far."""
        return pd.concat(self.parts, ignore_index=True)[store.COLUMNS]

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **_):
        if processing_class is None:
            raise InputError("ProbeCallback needs the trainer's tokenizer: pass processing_class=... to the trainer")
        if self.output_dir and state.is_world_process_zero:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self.encoded = self.probe_set.encode(processing_class, **self.lengths)
        if state.global_step:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "probes.parquet"
            self.parts = [pd.read_parquet(saved)] if saved.exists() else []
        else:
            self._measure(args, state, model)

    def on_step_end(self, args, state, control, model=None, **_):
        due = state.global_step % self.every == 0 if self.at is None else state.global_step in self.at
        if due:
            self._measure(args, state, model)

    def on_save(self, args, state, control, **_):
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            store.write_atomically(folder / "probes.parquet", lambda p: self.table().to_parquet(p, index=False))

    def on_train_end(self, args, state, control, model=None, **_):
        if state.global_step not in {int(part.step.iloc[-1]) for part in self.parts}:
            self._measure(args, state, model)
        if self.output_dir and state.is_world_process_zero:
            self._write(args, state)

    def _measure(self, args, state, model) -> None:
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        with in_full_precision(models.whole(model)) as plain:
            part = probes.measure(plain, self.encoded, self.batch_tokens)
        self.parts.append(part.assign(step=state.global_step, examples=state.global_step * batch))

    def _write(self, args, state) -> None:
        table = self.table()
        store.check(table)
        store.write_atomically(self.output_dir / "table.parquet", lambda p: table.to_parquet(p, index=False))
        manifest = {
            "format": 1,
            "function": "lddyn.engine.training:ProbeCallback",
            "parameters": {"seed": args.seed, "learning_rate": args.learning_rate, "steps": state.global_step},
            "inputs": {},
            "code": reach.definitions("lddyn.engine.training", "ProbeCallback"),
            "versions": reach.versions("lddyn.engine.training", "ProbeCallback"),
            "machine": str(args.device),
            "git": cache.git_state(),
            "started": None,
            "finished": store.now(),
            "rows": len(table),
            "table_sha256": store.file_hash(self.output_dir / "table.parquet"),
        }
        store.write_json(self.output_dir / "manifest.json", manifest)


@contextmanager
def in_full_precision(model):
    """The model without the bfloat16 context that accelerate wraps around its `forward` and around nothing below it."""
    wrapped = vars(model).get("forward")
    if hasattr(model, "_original_forward"):
        model.forward = model._original_forward
    try:
        yield model
    finally:
        if wrapped is not None:
            model.forward = wrapped
