"""The callback: anyone's trainer gains the paper's curves and alerts with two lines.

    trainer = DPOTrainer(...)
    trainer.add_callback(ProbeCallback(trainer, output_dir="runs/mine"))

It observes: once training has begun it never ends it. What it says while it runs is `lddyn.engine.alerts`.
"""

import shutil
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lddyn import Caution, InputError, first_line
from lddyn.data.responses import repetition
from lddyn.engine import alerts, cache, models, probes, reach, store
from lddyn.engine.alerts import Alert, Thresholds, Trainer
from lddyn.engine.probe_set import Encoded, Model, ProbeSet, Tokenizer


def read(folder: Path | str) -> pd.DataFrame:
    """The long table in the `output_dir` of a callback: finished, or as far as a run has come that goes on or broke.

    Raises `RecordError` where nothing was measured.
    """
    parts = [pd.read_parquet(path) for path in _parts(Path(folder)).values()]
    return pd.concat(parts, ignore_index=True)[store.COLUMNS] if parts else store.load(folder).table


def _parts(folder: Path) -> dict[int, Path]:
    """The evaluations of a run that has not ended: step -> file."""
    return {int(path.stem.removeprefix("step-")): path for path in sorted((folder / "parts").glob("step-*.parquet"))}


def _probes_of(trainer: Trainer) -> ProbeSet:
    """Pairs that a trainer trains on, and pairs of its evaluation set, which are taken as not trained on."""
    if getattr(trainer, "train_dataset", None) is None:
        raise InputError("ProbeCallback needs a ProbeSet, or a trainer with a train_dataset to draw one from")
    held_out = trainer.eval_dataset
    if isinstance(held_out, dict):
        held_out = next(iter(held_out.values()), None)
    return ProbeSet.from_pairs(trainer.train_dataset, held_out or (), skip_bad_rows="rows")


class ProbeCallback(TrainerCallback):  # type: ignore[misc]  # mypy does not follow transformers
    """Measure a probe set before, during and after a training run of any `transformers` or TRL trainer, and tell it.

    Takes a `ProbeSet`, a trainer, or both. Without a probe set, one is drawn from the pairs of the trainer
    (`ProbeSet.from_pairs`). Without a trainer, the numbers of `alerts.numbers` stand in its log (`log_history`); with
    it, its trackers get them too (wandb, trackio, TensorBoard).

    `every` counts optimiser steps; `at` names steps one by one instead; the last one is always measured. `thresholds`
    say when an alert is raised, once each; None raises none. `generate`: so many prompts are answered greedily at each
    evaluation, to see whether text begins to repeat; it costs `max_response` forward passes.

    Training is bit-identical with and without it. With an `output_dir` every evaluation is on disk when it is made, and
    the long table and a manifest are written there at the end; `table()` gives the rows so far, `read` those on disk.
    Every checkpoint of the trainer carries them, so that a resumed run continues the table. Prompts and responses are
    cut and rendered as in `ProbeSet.encode`, and probed `batch_tokens` tokens at once, or as many as suit the device
    (keys and values of large models fill a GPU). The processes of a distributed training share the prompts among them.

    Raises `InputError` before the first step when the tokenizer is missing or does not fit the probes. After that it
    never raises: it warns once, keeps what it has and lets the training go on; `stopped` says why.
    """

    def __init__(
        self,
        probe_set: ProbeSet | Trainer | None = None,
        every: int = 25,
        output_dir: str | Path | None = None,
        at: Collection[int] | None = None,
        max_prompt: int = 256,
        max_response: int = 256,
        batch_tokens: int | None = None,
        format: str = "auto",
        thresholds: Thresholds | None = alerts.USUAL,
        generate: int = 0,
        trainer: Trainer | None = None,
    ):
        if not isinstance(probe_set, ProbeSet):
            trainer = trainer or probe_set
            probe_set = _probes_of(trainer)
        self.probe_set, self.every, self.at = probe_set, every, None if at is None else set(at)
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.lengths: dict[str, Any] = {"max_prompt": max_prompt, "max_response": max_response, "format": format}
        self.batch_tokens, self.thresholds, self.generate, self.trainer = batch_tokens, thresholds, generate, trainer
        self.tokenizer: Tokenizer  # this and the next are set when training begins
        self.encoded: Encoded
        self.parts: list[pd.DataFrame] = []
        self.alerts: list[Alert] = []
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
        self.tokenizer, self.encoded = tokenizer, self.probe_set.encode(tokenizer, **self.lengths)
        self.parts, self.alerts, self.seen, self.stopped = [], [], 0, None
        with self._watching("start"):
            if models.whole(model).get_output_embeddings() is None:
                raise InputError(f"{type(model).__name__} has no output layer, so it gives no log-probabilities")
            if state.global_step:
                self._continue(args, state)
            if self.output_dir and state.is_world_process_zero:
                self._tidy(self.output_dir, state.global_step)
            if not self.parts:
                self._evaluate(args, state, control, model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Model | None = None,
        **_: Any,
    ) -> None:
        self.seen += _batch(args, state)
        due = state.global_step % self.every == 0 if self.at is None else state.global_step in self.at
        if due or state.global_step == state.max_steps:
            with self._watching(f"step {state.global_step}"):
                self._evaluate(args, state, control, model)

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
            with self._watching("the end"):  # of a training that something stopped; its trackers have finished
                self._evaluate(args, state, control, model, trackers=False)
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
            self.stopped = f"ProbeCallback measures no more since {where}: {first_line(error)}"
            warnings.warn(self.stopped, Caution, stacklevel=2)

    def _continue(self, args: TrainingArguments, state: TrainerState) -> None:
        """After a resumption: the rows of the checkpoint, or of `output_dir`; without either the table begins here."""
        named = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else args.output_dir
        places = (Path(args.output_dir) / f"checkpoint-{state.global_step}", Path(named))
        saved = next((p / "probes.parquet" for p in places if (p / "probes.parquet").exists()), None)
        if saved:
            self.parts = [part for _, part in pd.read_parquet(saved).groupby("step")]
        elif self.output_dir:
            there = _parts(self.output_dir).items()
            self.parts = [pd.read_parquet(path) for step, path in there if step <= state.global_step]
        batch = _batch(args, state)
        if self.parts:
            last = self.parts[-1].iloc[-1]
            self.seen = int(last.examples) + (state.global_step - int(last.step)) * batch
            for part in self.parts:
                self._noticed(part)
            return
        self.seen = state.global_step * batch
        warnings.warn(
            f"training goes on at step {state.global_step} from a checkpoint without probes: the table begins there",
            Caution,
            stacklevel=2,
        )

    def _tidy(self, folder: Path, step: int) -> None:
        """On disk is what was measured before: not what a run left that broke off later or was another one."""
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            self._keep(folder, part)
        for later in (path for n, path in _parts(folder).items() if n > step):
            later.unlink()

    def _keep(self, folder: Path, part: pd.DataFrame) -> None:
        name = folder / "parts" / f"step-{part.step.iloc[0]:09d}.parquet"
        store.write_atomically(name, lambda p: part.to_parquet(p, index=False))

    def _evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Model,
        trackers: bool = True,
    ) -> None:
        if self.stopped:
            return
        self._measure(args, state, model)
        told, new = self._noticed(self.parts[-1])
        try:
            alerts.log(told, args, state, control, self.trainer if trackers else None)
            for alert in new:
                alerts.tell(alert, args, state)
        except Exception as error:  # a tracker that is away is no reason to measure no more, on one process alone
            warnings.warn(f"ProbeCallback could not tell what it measured: {first_line(error)}", Caution, stacklevel=2)

    def _measure(self, args: TrainingArguments, state: TrainerState, model: Model) -> None:
        with in_full_precision(models.whole(model)) as plain:
            part = self._divided(plain)
            if self.generate:
                part = pd.concat([part, self._written(plain)], ignore_index=True)
        if not np.isfinite(part.value).all():
            raise InputError("the model has diverged, its log-probabilities are not finite")
        part = part.assign(step=state.global_step, examples=self.seen)
        self.parts.append(part)
        if self.output_dir and state.is_world_process_zero:
            self._keep(self.output_dir, part)

    def _divided(self, model: Model) -> pd.DataFrame:
        """`probes.measure`, every process its part of the prompts; all get all rows, in the order of one process."""
        if not torch.distributed.is_initialized():
            return probes.measure(model, self.encoded, self.batch_tokens)
        processes = torch.distributed.get_world_size()
        mine = self.encoded.part(torch.distributed.get_rank(), processes)
        parts: list[pd.DataFrame | Exception | None] = [None] * processes
        try:
            part = probes.measure(model, mine, self.batch_tokens) if mine.prompts else None
        except Exception as error:  # the others wait for this process
            part = error
        torch.distributed.all_gather_object(parts, part)
        for failed in (part for part in parts if isinstance(part, Exception)):
            raise failed
        place = {name: n for n, name in enumerate(self.encoded.prompt_ids)}
        rows = pd.concat([part for part in parts if part is not None])
        return rows.sort_values("prompt_id", key=lambda names: names.map(place), kind="stable", ignore_index=True)

    def _written(self, model: Model) -> pd.DataFrame:
        """Greedy answers to the first prompts, those that are trained on before others: `rep4`, and log pi in nats."""
        ids = sorted(self.probe_set.prompt_ids, key=lambda name: name.startswith("test/"))[: self.generate]
        prompts = dict(zip(self.probe_set.prompt_ids, self.probe_set.prompts, strict=True))
        how = {name: self.lengths[name] for name in ("max_prompt", "format")}
        answers = probes.greedy(
            model, self.tokenizer, [prompts[name] for name in ids], self.lengths["max_response"], **how
        )
        rows = [
            (name, "greedy", metric, value)
            for name, answer in zip(ids, answers, strict=True)
            for metric, value in (("rep4", repetition(answer.text)), ("logp_sum", min(answer.logp, 0.0)))
        ]
        return pd.DataFrame(rows, columns=["prompt_id", "response_type", "metric", "value"])

    def _noticed(self, part: pd.DataFrame) -> tuple[dict[str, float], list[Alert]]:
        """The numbers of an evaluation, and the alerts that it is the first to raise."""
        told = alerts.numbers(self.parts[0], part)
        held = alerts.raised(told, int(part.step.iloc[0]), self.thresholds) if self.thresholds else []
        new = [alert for alert in held if alert.name not in {known.name for known in self.alerts}]
        self.alerts += new
        return told, new

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
            "cautions": [*map(str, self.alerts), *([self.stopped] if self.stopped else [])],
            "alerts": [alert._asdict() for alert in self.alerts],
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
