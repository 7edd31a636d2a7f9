"""Figures of chapter 4."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lddyn.chapters.squeezing.run import PUSHED, STRENGTHS
from lddyn.chapters.squeezing.steps import Moved
from lddyn.chapters.style import BLUE, GREEN, GREY, MARKS, ORANGE, RED, band
from lddyn.theory import softmax


def before_and_after(panels: Mapping[str, Moved], changes: bool = True) -> Figure:
    """Distributions over ranked labels before and after a step, and the change of each log-probability (appendix E)."""
    rows = 2 if changes else 1
    size = (1.75 * len(panels) + 0.7, 2 * rows + 0.3)
    fig, axes = plt.subplots(rows, len(panels), figsize=size, sharey="row", sharex=True, squeeze=False)
    for n, (title, (before, after, labels)) in enumerate(panels.items()):
        before, after, rank = before.numpy(), after.numpy(), np.arange(1, len(before) + 1)
        axes[0, n].plot(rank, before, color=GREY, label="before")
        axes[0, n].plot(rank, after, ".", color=BLUE, label="after", markersize=4)
        axes[0, n].set_title(title, fontsize=9)
        axes[0, n].set(yscale="log", ylim=(1e-9, 2))
        if changes:
            delta = np.log(after) - np.log(before)
            axes[1, n].bar(rank, delta, color=np.where(delta > 0, GREEN, RED), width=0.9)
            axes[1, n].axhline(0, color="0.3", linewidth=0.8)
            axes[1, n].set(ylim=(-3.2, 3.2))
        for ax in axes[:, n]:
            for label in labels:
                ax.axvline(label + 1, color=ORANGE, linestyle=":", linewidth=1.2, zorder=0)
    axes[0, 0].set_ylabel("probability")
    axes[0, -1].legend(loc="lower left", fontsize=8)
    if changes:
        axes[1, 0].set_ylabel(r"$\Delta\log p$ (nats)")
    for ax in axes[-1]:
        ax.set_xlabel("rank of the label")
    return fig


def threshold(z: Tensor, y: Tensor, strengths: Sequence[float]) -> Figure:
    """Who rises when label y is pushed, at three step sizes |eta'|, and how the bar moves with the size of the step.

    z: (V,) logits.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    logp, others = z.log_softmax(-1), torch.arange(len(z)) != y
    p = logp.exp()
    for strength, color in zip(strengths, (BLUE, ORANGE, RED), strict=True):
        change = (softmax.step(z, y, -strength).log_softmax(-1) - logp)[others]
        left.plot(p[others], change, MARKS[color], color=color, markersize=2.5, label=f"$|\\eta'| = {strength:g}$")
    left.axhline(0, color="0.3", linewidth=0.8)
    left.set(xscale="log", xlabel="probability before", ylabel=r"$\Delta\log p$ (nats)")
    left.set_yscale("symlog", linthresh=0.01)
    left.legend(fontsize=8)
    sizes = torch.logspace(-1, 3, 41).tolist()
    right.semilogx(sizes, [softmax.threshold(logp, y, -e) for e in sizes], color=BLUE, label="exact threshold")
    right.axhline(p.square().sum() - p[y], color=GREY, linestyle="--", label=r"first order, $\|p\|^2 - p_y$")
    right.axhline(p[others].max(), color=GREEN, linestyle=":", label="$p_{y^*}$")
    right.set(xlabel=r"size of the step $|\eta'|$", ylabel="a label rises above this probability", ylim=(0, None))
    right.legend(fontsize=8)
    return fig


def domain(table: pd.DataFrame) -> Figure:
    """Where the first-order law holds: its relative error, and the share of labels whose direction it gets right."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for ax, metric, color in ((left, "ladder_law_error", RED), (right, "prob_law_direction", BLUE)):
        by_rung = table[table.metric == metric].groupby("step").value
        ax.semilogx(STRENGTHS, by_rung.mean(), "o-", color=color, markersize=4)
        ax.fill_between(STRENGTHS, by_rung.quantile(0.05), by_rung.quantile(0.95), color=color, alpha=0.15, linewidth=0)
        ax.set_xlabel(r"size of the step $|\eta'|$")
    left.set(yscale="log", ylabel="error of the law / size of the change")
    right.set(ylabel="labels whose direction is right", ylim=(0, 1.03))
    return fig


def pushed_label(table: pd.DataFrame) -> Figure:
    """Claim 4: the same shape and step, with the pushed label less and less likely."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    lines = (
        (left, "pushed_top", GREEN, r"$y^*$"),
        (left, "pushed_others", RED, "other labels, mean"),
        (right, "prob_share_from_others", ORANGE, None),
    )
    for ax, metric, color, label in lines:
        wide = table[table.metric == metric].groupby(["seed", "step"]).value.mean().unstack()
        band(ax, PUSHED, wide.to_numpy(), color, label)
    for ax in (left, right):
        ax.set(xscale="log", xlabel="probability of the pushed label, $p_y$")
        ax.invert_xaxis()
    left.axhline(0, color="0.3", linewidth=0.8)
    left.set_ylabel(r"$\Delta\log p$ (nats)")
    left.legend(fontsize=8)
    right.set(ylabel="share of $y^*$'s gain taken from labels\nthat nobody pushed", ylim=(0, 1.03))
    return fig


def residual_forces(margins: Tensor, forces: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """Figure 2 as numbers: the force of every loss on chosen and on rejected against the margin, on the same axes.

    forces: name -> (on chosen, on rejected), (margins,) each. Drawn in units of the larger of the two at margin 0.
    """
    fig, axes = plt.subplots(3, 4, figsize=(9.5, 6), sharex=True, sharey=True)
    start = margins.abs().argmin()
    for ax, (name, (chosen, rejected)) in zip(axes.flat, forces.items(), strict=True):
        unit = max(abs(chosen[start]), abs(rejected[start]))
        ax.plot(margins, chosen / unit, color=BLUE, label="on chosen")
        ax.plot(margins, rejected / unit, color=RED, linestyle="--", label="on rejected")
        ax.axhline(0, color="0.3", linewidth=0.8)
        ax.axvline(0, color="0.3", linewidth=0.5, linestyle=":")
        ax.set(title=f"{name}  (unit {unit:.2g})", ylim=(-2.4, 2.4))
    axes[0, 0].legend(fontsize=8, loc="lower left")
    fig.supxlabel("margin between chosen and rejected, relative to the start (nats)", fontsize=10)
    fig.supylabel("force: up on the response (+), down (-)", fontsize=10)
    return fig
