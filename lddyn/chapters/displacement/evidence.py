"""Chapter 8: negative samples, unlearning, and outputs that are not a softmax."""

import numpy as np
import pandas as pd

from lddyn.chapters.statistics import bounded, by_setting, curve, needed


def of(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    """The rows of the run of an arm; `NotMeasured` where there is none."""
    return needed(by_setting(table, "arm").get(arm, table.iloc[:0]), what=f"run of {arm!r}")


def change(table: pd.DataFrame, arm: str, kind: str = "chosen", metric: str = "logp_sum", split: str = "train"):
    """End of an arm minus its start: log pi of a type of response (or y* along it, or the entropy), mean over prompts.

    kind: `chosen` a right answer as it was written, `chosen_format` the same with wrong values, `unrelated`.
    """
    values = curve(of(table, arm), kind, metric=metric, split=split)
    return float(values.iloc[-1] - values.iloc[0])


def apart(table: pd.DataFrame, arm: str, than: str, **which) -> float:
    """`change` of an arm minus that of another."""
    return change(table, arm, **which) - change(table, than, **which)


@bounded(-1, 1)
def gain(table: pd.DataFrame, arm: str, answers: str = "sampled", than: str = "", split: str = "test") -> float:
    """Change of the share of right answers, minus that of the arm `than` where one is given.

    answers: `sampled` (pass@1), `any` (pass@k: at least one of the samples of a prompt), `greedy`.
    """
    which = {"kind": answers, "metric": "prob_right", "split": split}
    return change(table, arm, **which) - (change(table, than, **which) if than else 0.0)


def slowing(table: pd.DataFrame, arm: str) -> float:
    """Nats an update that the pushed answers lose after the last but one evaluation, over those before it."""
    values = curve(of(table, arm), "chosen")
    speed = values.diff().to_numpy()[1:] / np.diff(values.index)
    return float(speed[-1] / ((values.iloc[-2] - values.iloc[0]) / (values.index[-2] - values.index[0])))


def kept_at_equal(table: pd.DataFrame, arm: str, than: str) -> float:
    """Answers that nobody pushed, where both arms have lowered the pushed ones equally far: how much higher in `arm`.

    In nats; as far as the arm that falls less has come, between evaluations by straight lines.
    """
    fallen, kept = {}, {}
    for name in (arm, than):
        pushed, others = (curve(of(table, name), "chosen", split=split) for split in ("train", "test"))
        fallen[name] = np.maximum.accumulate(pushed.iloc[0] - pushed.to_numpy())
        kept[name] = (others - others.iloc[0]).to_numpy()
    far = min(values[-1] for values in fallen.values())
    at = {name: np.interp(far, fallen[name], kept[name]) for name in kept}
    return float(at[arm] - at[than])


def spill(table: pd.DataFrame, arm: str) -> float:
    """Change of answers that nobody pushed as a share of that of the pushed ones."""
    return change(table, arm, split="test") / change(table, arm)


def exact(table: pd.DataFrame, output: str, metric: str, step: int = 1) -> float:
    """Mean over random distributions of what a push in the valley does through an output: see `run.outputs`.

    metric: `top` (gain of y*, probability), `top_at_zero` (its part while the pushed label is at 0), `prob_share` (of
    that gain, what others than the pushed label pay), `prob_rising` and `prob_zero` (of the other labels).
    """
    rows = table[(table.response_type == output) & (table.metric == metric) & (table.step == step)]
    return float(needed(rows, what=f"{metric} of {output}").value.mean())


@bounded(0, 1)
def bar_right(table: pd.DataFrame) -> float:
    """Share of labels whose direction the bar of their output says rightly, worst distribution of all outputs."""
    return float(needed(table[table.metric == "prob_bar_right"]).value.min())


def signs_differ(table: pd.DataFrame) -> float:
    """Largest difference between the expected residuals of right, wrong and both kinds of samples."""
    return float(needed(table[table.metric == "signs_differ"]).value.max())
