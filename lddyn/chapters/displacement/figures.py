"""Figures of chapter 8."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from lddyn.chapters.displacement.evidence import of
from lddyn.chapters.style import BLUE, GREEN, GREY, MARKS, ORANGE, PURPLE, RED, band, curves
from lddyn.theory import losses, softmax

LOOK = {
    "right": (BLUE, "-"),
    "wrong": (RED, "-"),
    "both": (PURPLE, "-"),
    "right, stale": (BLUE, "--"),
    "wrong, stale": (RED, "--"),
    "wrong, stale, clip": (ORANGE, "--"),
    "wrong, stale, mask": (GREEN, "--"),
    "ascent": (RED, "-"),
    "npo": (ORANGE, "-"),
    "npo, kept": (GREEN, "-"),
}
PANELS = (  # title, type of response, metric, prompts, unit
    ("right answers, sampled", "sampled", "prob_right", "test", "share (pass@1)"),
    ("at least one of the samples right", "any", "prob_right", "test", "share (pass@k)"),
    ("right answers, greedy", "greedy", "prob_right", "test", "share"),
    ("a right answer as written", "chosen", "logp_sum", "train", "log π (nats)"),
    ("the same with wrong values", "chosen_format", "logp_sum", "train", "log π (nats)"),
    ("y* along the right answer", "chosen", "argmax_logp_sum", "train", "log π (nats)"),
)


def policy_gradients(table: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """What some arms of policy gradients do to answers that are right, wrong and likeliest, over updates."""
    fig, axes = plt.subplots(2, 3, figsize=(9.5, 5.2), sharex=True)
    for ax, (title, kind, metric, split, unit) in zip(axes.flat, PANELS, strict=True):
        for arm in arms:
            color, line = LOOK[arm]
            steps, values = curves(of(table, arm), kind, metric, split)
            band(ax, steps, values, color, arm, linestyle=line)
        ax.set(title=title, ylabel=unit)
        if metric == "prob_right":
            ax.set_ylim(-0.03, 1.03)
    axes[0, 0].legend(fontsize=7)
    for ax in axes[1]:
        ax.set_xlabel("updates")
    return fig


def unlearning(table: pd.DataFrame, arms: Sequence[str]) -> Figure:
    """Answers to be forgotten, those about other people, one against the other, and y*."""
    fig, (pushed, others, both, top) = plt.subplots(1, 4, figsize=(11, 3.1))
    for arm in arms:
        color, line = LOOK[arm]
        rows = of(table, arm)
        steps, fallen = curves(rows, "chosen")
        _, kept = curves(rows, "chosen", split="test")
        _, peak = curves(rows, "chosen", "argmax_logp_sum")
        fallen, kept, peak = (values - values[:, :1] for values in (fallen, kept, peak))
        for ax, values in ((pushed, fallen), (others, kept), (top, peak)):
            band(ax, steps, values, color, arm, linestyle=line)
        for n, (x, y) in enumerate(zip(fallen, kept, strict=True)):
            both.plot(x, y, MARKS[color], color=color, linestyle=line, markersize=3, label=arm if n == 0 else "_" + arm)
    for ax, title in ((pushed, "to be forgotten"), (others, "about other people"), (top, "y* along the forgotten")):
        ax.set(title=title, xlabel="updates", ylabel="change of log π (nats)")
    both.axline((0, 0), slope=1, color="0.6", linewidth=0.8)
    both.set(title="one against the other", xlabel="to be forgotten (nats)", ylabel="about other people (nats)")
    pushed.legend(fontsize=7)
    return fig


def forces(beta: float) -> Figure:
    """The push of gradient ascent and of NPO on an answer, against how far it has fallen."""
    fig, ax = plt.subplots(figsize=(5, 2.8))
    fallen = torch.linspace(0, 60, 121, dtype=torch.float64)
    zero = torch.zeros_like(fallen)
    _, ascent = losses.unlearning_force(zero, -fallen, zero, zero)
    _, npo = losses.npo_force(zero, -fallen, zero, zero, beta=beta)
    ax.plot(fallen, ascent, color=RED, label="gradient ascent")
    ax.plot(fallen, npo, color=ORANGE, linestyle="--", label="NPO")
    ax.set(xlabel="fallen since the start (nats)", ylabel="force on the answer", ylim=(-1.05, 0.05))
    ax.legend(fontsize=8)
    return fig


def through_outputs(p: torch.Tensor, y: torch.Tensor, steps: int, size: float) -> Figure:
    """One label pushed again and again through softmax, entmax and sparsemax, from the same distribution p, (V,)."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3), sharey=True)
    top = softmax.top_other(p, y)
    for ax, (name, (_, output, logits)) in zip(axes, softmax.OUTPUTS.items(), strict=True):
        z, path = logits(p), [p]
        for _ in range(steps):
            z = softmax.step(z, y, -size, output)
            path.append(output(z))
        x, values = np.arange(steps + 1) * size, torch.stack(path)  # (steps + 1, V)
        rest = values.sum(-1) - values[:, y] - values[:, top]
        lines = (("y*", values[:, top], GREEN, "-"), ("all others", rest, GREY, "--"))
        for label, line, color, dash in (*lines, ("the pushed label", values[:, y], RED, ":")):
            ax.plot(x, line, color=color, linestyle=dash, label=label)
        ax.set(title=name, xlabel=r"pushed so far, $|\eta'|$")
    axes[0].set_ylabel("probability")
    axes[0].legend(fontsize=7)
    return fig


def predictors(table: pd.DataFrame, names: dict[str, str]) -> Figure:
    """Spearman of each predictor with the measured change of the chosen answers, a point a recorded setting."""
    fig, ax = plt.subplots(figsize=(6.5, 3.2))
    order = table[list(names)].median().sort_values().index
    for height, column in enumerate(order):
        color = BLUE if column == "forecast" else GREY
        ax.plot(table[column], np.full(len(table), height), MARKS[color], color=color, alpha=0.6, label=names[column])
        ax.plot([table[column].median()], [height], "|", color=RED, markersize=16, label=f"_median, {names[column]}")
    ax.set_yticks(range(len(order)), [names[column] for column in order])
    ax.axvline(0, color="0.6", linewidth=0.8)
    ax.set(xlabel="Spearman with the measured change of the chosen answers", xlim=(-1, 1))
    return fig
