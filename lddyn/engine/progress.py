"""How far a training is: a line a minute of the log "lddyn", which `pool.show_progress` prints."""

import logging
import time
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lddyn.engine.callback import ProbeCallback

LOG = logging.getLogger("lddyn")
SHOWN = {"chosen": ("chosen", "logp_sum"), "rejected": ("rejected", "logp_sum"), "y*": ("chosen", "argmax_logp_sum")}


def moved(probed: ProbeCallback) -> str:
    """Change of log pi of chosen, rejected and y* along chosen since the first evaluation, as far as they are probed.

    Nats summed over a response, mean over the prompts.
    """
    if not probed.parts:
        return ""
    ends, words = (probed.parts[0], probed.parts[-1]), []
    for name, (kind, metric) in SHOWN.items():
        first, last = (p.value[(p.response_type == kind) & (p.metric == metric)].mean() for p in ends)
        if first == first:  # not a number where it is not probed
            words.append(f"{name} {last - first:+.1f}")
    return ", ".join(words)


class Progress(TrainerCallback):  # type: ignore[misc]  # mypy does not follow transformers
    """Say every minute where a training is, how long it still takes, and how far log pi has moved.

    `work`: its folder, somewhere in that of a run, by which it is called.
    """

    def __init__(self, work: Path, probed: ProbeCallback, every: float = 60.0):
        of_run = (folder for folder in work.parents if (folder / "manifest.json").exists())
        self.name, self.probed, self.every = next(of_run, work).name, probed, every

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.begun = self.said = time.monotonic()
        self.first = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        now, step, last = time.monotonic(), state.global_step, state.max_steps
        if not state.is_world_process_zero or (now - self.said < self.every and step < last):
            return
        self.said = now
        left = (now - self.begun) / (step - self.first) * (last - step) / 60
        LOG.info("%s: step %d of %d, %.1f min left; nats: %s", self.name, step, last, left, moved(self.probed))
