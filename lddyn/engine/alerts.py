"""What a training does to its answers: a few numbers for the trainer's own log, and alerts, once each.

It tells what a callback has measured and makes no record.
"""

import logging
import sys
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from lddyn import Caution
from lddyn.data.responses import RESPONSE_TYPES

LOG = logging.getLogger("lddyn")
PREFIX = "lddyn"
Trainer = Any  # one of `transformers` or TRL

# In no pair, and text: answers to other training questions are pushed after their own, shuffled words are no text.
UNPUSHED = [k for k in RESPONSE_TYPES if k not in ("chosen", "rejected", "other_train") and "shuffled" not in k]
PATHS = ("chosen", "rejected")  # along which y* is followed


@dataclass(frozen=True)
class Thresholds:
    """When to speak: changes since the first evaluation, means over prompts that are trained on.

    `chosen`: nats, summed over a response, that chosen answers have fallen by while the margin to the rejected ones
    rose. `peak`: nats that y* rose by along the answers of the pairs, mean of both, while these fell, taken together.
    `repetition`: rise of the share of repeated four-word runs in greedy answers, 0 to 1.
    """

    chosen: float = 10.0
    peak: float = 5.0
    repetition: float = 0.2


USUAL = Thresholds()


class Alert(NamedTuple):
    name: str
    step: int
    text: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.text}"


def numbers(first: pd.DataFrame, now: pd.DataFrame) -> dict[str, float]:
    """What the log shows of an evaluation: means over prompts, and their changes since the first one, in nats.

    `lddyn/logp/SPLIT/TYPE`: log pi of each type of response, after prompts that are trained on (`train`) and others
    (`test`), summed over a response. `lddyn/change/...`, after the first: of `chosen`, `rejected`, their `margin`
    (chosen minus rejected), of y* along each of both, and of text that nobody pushes (`unpushed`, mean of UNPUSHED).
    `lddyn/repetition` and its change: share of repeated four-word runs in greedy answers, where they are asked for.
    """
    before, after = _means(first), _means(now)
    split = "train" if any(key[0] == "train" for key in after) else "test"
    change = {key[1:]: after[key] - before[key] for key in after if key[0] == split and key in before}
    logp, top = (
        {kind: value for (kind, what), value in change.items() if what == metric}
        for metric in ("logp_sum", "argmax_logp_sum")
    )
    changes = {kind: logp[kind] for kind in PATHS if kind in logp}
    if len(changes) == 2:
        changes["margin"] = logp["chosen"] - logp["rejected"]
    changes |= {f"argmax_along_{kind}": top[kind] for kind in PATHS if kind in top}
    if unpushed := [logp[kind] for kind in UNPUSHED if kind in logp]:
        changes["unpushed"] = sum(unpushed) / len(unpushed)
    told = {f"logp/{part}/{kind}": value for (part, kind, what), value in after.items() if what == "logp_sum"}
    if ("greedy", "rep4") in change:
        told["repetition"], changes["repetition"] = after[split, "greedy", "rep4"], change["greedy", "rep4"]
    told |= {f"change/{name}": value for name, value in changes.items()}
    return {f"{PREFIX}/{name}": float(value) for name, value in told.items()}


def _means(part: pd.DataFrame) -> dict[tuple[str, str, str], float]:
    """Means over prompts: (split, type of response, metric) -> value."""
    rows = part[part.metric.isin(["logp_sum", "argmax_logp_sum", "rep4"])]
    split = rows.prompt_id.astype(str).str.startswith("test/").map({True: "test", False: "train"})
    means: dict[tuple[str, str, str], float] = (
        rows.groupby([split, "response_type", "metric"], observed=True, sort=False).value.mean().to_dict()
    )
    return means


def raised(told: dict[str, float], step: int, limits: Thresholds) -> list[Alert]:
    """The alerts that hold at an evaluation with these `numbers`."""
    change = {name.removeprefix(f"{PREFIX}/change/"): value for name, value in told.items()}
    found = {}
    chosen, margin = change.get("chosen", 0.0), change.get("margin", 0.0)
    if chosen <= -limits.chosen and margin > 0:
        found["chosen falls"] = (
            f"chosen answers have fallen by {-chosen:.1f} nats a response while the margin rose by {margin:.1f}"
        )
    if paths := [kind for kind in PATHS if f"argmax_along_{kind}" in change]:
        answers = sum(change[kind] for kind in paths) / len(paths)
        peak = sum(change[f"argmax_along_{kind}"] for kind in paths) / len(paths)
        if peak >= limits.peak and answers < 0:
            found["mass moves to y*"] = (
                f"y*, the likeliest token at each place, has risen by {peak:.1f} nats along {' and '.join(paths)} "
                f"answers, which changed by {answers:+.1f} (means)"
            )
    repetition = change.get("repetition", 0.0)
    if repetition >= limits.repetition:
        found["text repeats"] = (
            f"{told[f'{PREFIX}/repetition']:.0%} of the four-word runs of greedy answers are repeated, "
            f"{repetition:+.0%} since the first evaluation"
        )
    return [Alert(name, step, text) for name, text in found.items()]


def log(
    told: dict[str, float], args: TrainingArguments, state: TrainerState, control: TrainerControl, trainer: Trainer
) -> None:
    """Add a row to the trainer's log; given the trainer, tell its trackers too, and not those that print.

    Not by `trainer.log`: TRL's would end the averages that it keeps for its own next row.
    """
    row = {**told, "epoch": state.epoch}
    state.log_history.append({**row, "step": state.global_step})
    for callback in trainer.callback_handler.callbacks if trainer else ():
        if not isinstance(callback, PrinterCallback | ProgressCallback):
            callback.on_log(args, state, control, logs=dict(row), model=trainer.model)


def tell(alert: Alert, args: TrainingArguments, state: TrainerState) -> None:
    """An alert as a `Caution`, a line of the log "lddyn", a row of the trainer's log, and trackio's in use."""
    if not state.is_world_process_zero:
        return
    LOG.info("alert, %s", alert)
    state.log_history.append({f"{PREFIX}/alert": alert.text, "epoch": state.epoch, "step": alert.step})
    warnings.warn(str(alert), Caution, stacklevel=2)
    trackio: Any = sys.modules.get("trackio") if "trackio" in args.report_to else None
    if hasattr(trackio, "alert"):
        trackio.alert(title=alert.name, text=alert.text, level=trackio.AlertLevel.WARN)
