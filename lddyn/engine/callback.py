"""The callback: anyone's trainer gains the paper's curves with three lines.

    probes = ProbeSet.from_jsonl("my_prompts.jsonl")
    callback = ProbeCallback(probes, every=25, output_dir="runs/mine")
    trainer = DPOTrainer(..., callbacks=[callback])

It observes: once training has begun it never ends it.
"""

import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lddyn import Caution, InputError
from lddyn.engine import cache, models, probes, reach, store
from lddyn.engine.probe_set import Encoded, Model, ProbeSet, Tokenizer


class ProbeCallback(TrainerCallback):  # type: ignore[misc]  # mypy does not follow transformers
    """Measure a probe set before, during and after a training run of any `transformers` or TRL trainer.

    `every` counts optimiser steps; `at` names steps one by one instead. Training is bit-identical with and without
    it. With an `output_dir` every evaluation is on disk when it is made, and the long table and a manifest are written
    there at the end; `table()` gives the rows so far. Every checkpoint of the trainer carries them, so that a resumed
    run continues the table. Prompts and responses are cut and rendered as in `ProbeSet.encode`, and probed
    `batch_tokens` tokens at once, or as many as suit the device (keys and values of large models fill a GPU).

    Raises `InputError` before the first step when the tokenizer is missing or does not fit the probes. After that it
    never raises: it warns once, keeps what it has and lets the training go on; `stopped` says why.
    """

    def __init__(
        self,
        probe_set: ProbeSet,
        every: int = 25,
        output_dir: str | Path | None = None,
        at: Collection[int] | None = None,
        max_prompt: int = 256,
        max_response: int = 256,
        batch_tokens: int | None = None,
        format: str = "auto",
    ):
        self.probe_set, self.every, self.at = probe_set, every, None if at is None else set(at)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.lengths: dict[str, Any] = {"max_prompt": max_prompt, "max_response": max_response, "format": format}
        self.batch_tokens = batch_tokens
        self.encoded: Encoded  # set when training begins
        self.parts: list[pd.DataFrame] = []
        self.seen = 0  # examples that were trained on
        self.stopped: str | None = None

    def table(self) -> pd.DataFrame:
        """The long table of everything measured so far; without rows before the first evaluation."""
        parts = self.parts or [pd.DataFrame(columns=store.COLUMNS)]
        return pd.concat(parts, ignore_index=True)[store.COLUMNS]

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Model | None = None,
        processing_class: Tokenizer | None = None,
        **_: Any,
    ) -> None:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)  # a processor has one
        if tokenizer is None:
            raise InputError("ProbeCallback needs the trainer's tokenizer: pass processing_class=... to the trainer")
        self.encoded = self.probe_set.encode(tokenizer, **self.lengths)
        self.parts, self.seen, self.stopped = [], 0, None
        with self._watching("start"):
            if models.whole(model).get_output_embeddings() is None:
                raise InputError(f"{type(model).__name__} has no output layer, so it gives no log-probabilities")
            if self.output_dir and state.is_world_process_zero:
                (self.output_dir / "parts").mkdir(parents=True, exist_ok=True)
            if state.global_step:
                self._continue(args, state, model)
            else:
                self._measure(args, state, model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Model | None = None,
        **_: Any,
    ) -> None:
        self.seen += _batch(args, state)
        if state.global_step % self.every == 0 if self.at is None else state.global_step in self.at:
            with self._watching(f"step {state.global_step}"):
                self._measure(args, state, model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and self.parts:
            with self._watching("a checkpoint"):
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                store.write_atomically(folder / "probes.parquet", lambda p: self.table().to_parquet(p, index=False))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Model | None = None,
        **_: Any,
    ) -> None:
        if state.global_step not in {int(part.step.iloc[-1]) for part in self.parts}:
            with self._watching("the end"):
                self._measure(args, state, model)
        if self.output_dir and state.is_world_process_zero and self.parts:
            with self._watching("writing"):
                self._write(self.output_dir, args, state)

    @contextmanager
    def _watching(self, where: str) -> Iterator[None]:
        """What fails in here is told once, and nothing is measured any more."""
        try:
            yield
        except Exception as error:  # whatever a model, a disk or a library raises
            self._stop(where, error)

    def _stop(self, where: str, error: Exception) -> None:
        if self.stopped is None:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            self.stopped = f"ProbeCallback measures no more since {where}: {reason}"
            warnings.warn(self.stopped, Caution, stacklevel=2)

    def _continue(self, args: TrainingArguments, state: TrainerState, model: Model) -> None:
        """After a resumption: the rows of the checkpoint, or of `output_dir`; without either the table begins here."""
        named = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else args.output_dir
        places = (Path(args.output_dir) / f"checkpoint-{state.global_step}", Path(named))
        saved = next((p / "probes.parquet" for p in places if (p / "probes.parquet").exists()), None)
        if saved:
            whole = pd.read_parquet(saved)
            self.parts = [part for _, part in whole.groupby("step")]
        elif self.output_dir:
            parts = [pd.read_parquet(path) for path in sorted((self.output_dir / "parts").glob("step-*.parquet"))]
            self.parts = [part for part in parts if part.step.iloc[0] <= state.global_step]
        batch = _batch(args, state)
        if self.parts:
            last = self.parts[-1].iloc[-1]
            self.seen = int(last.examples) + (state.global_step - int(last.step)) * batch
            return
        self.seen = state.global_step * batch
        warnings.warn(
            f"training goes on at step {state.global_step} from a checkpoint without probes: the table begins there",
            Caution,
            stacklevel=2,
        )
        self._measure(args, state, model)

    def _measure(self, args: TrainingArguments, state: TrainerState, model: Model) -> None:
        if self.stopped:
            return
        with in_full_precision(models.whole(model)) as plain:
            part = probes.measure(plain, self.encoded, self.batch_tokens)
        if not np.isfinite(part.value).all():
            raise InputError("the model has diverged, its log-probabilities are not finite")
        part = part.assign(step=state.global_step, examples=self.seen)
        self.parts.append(part)
        if self.output_dir and state.is_world_process_zero:
            name = self.output_dir / "parts" / f"step-{state.global_step:09d}.parquet"
            store.write_atomically(name, lambda p: part.to_parquet(p, index=False))

    def _write(self, folder: Path, args: TrainingArguments, state: TrainerState) -> None:
        table = self.table()
        store.check(table)
        store.write_atomically(folder / "table.parquet", lambda p: table.to_parquet(p, index=False))
        where = ("lddyn.engine.callback", "ProbeCallback")
        manifest = {
            "format": 1,
            "function": ":".join(where),
            "parameters": {"seed": args.seed, "learning_rate": args.learning_rate, "steps": state.global_step},
            "since": int(table.step.min()),  # not 0 where the beginning was not measured
            "cautions": [self.stopped] if self.stopped else [],
            "inputs": {},
            "code": reach.definitions(*where),
            "versions": reach.versions(*where),
            "machine": str(args.device),
            "git": cache.git_state(),
            "started": None,
            "finished": store.now(),
            "rows": len(table),
            "table_sha256": store.file_hash(folder / "table.parquet"),
        }
        store.write_json(folder / "manifest.json", manifest)
        shutil.rmtree(folder / "parts", ignore_errors=True)


def _batch(args: TrainingArguments, state: TrainerState) -> int:
    """Examples of one update: the batch size in use, which the trainer may have found by itself."""
    one_pass = state.train_batch_size or args.per_device_train_batch_size
    return int(one_pass * args.gradient_accumulation_steps * args.world_size)


@contextmanager
def in_full_precision(model: Model) -> Iterator[Model]:
    """The model without the bfloat16 context that accelerate wraps around its `forward` and around nothing below it."""
    wrapped = vars(model).get("forward")
    if hasattr(model, "_original_forward"):
        model.forward = model._original_forward
    try:
        yield model
    finally:
        if wrapped is not None:
            model.forward = wrapped
