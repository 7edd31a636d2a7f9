"""One style, one colour per family of responses, and curves of seeds with their range."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from lddyn.chapters import statistics

BLUE, ORANGE, GREEN, RED, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#c53030", "#718096"
PURPLE = "#6b46c1"
# one colour a family, one line a member of it; also the order of legends and heat maps
STYLES = {
    "chosen": (BLUE, "-"),
    "chosen_semantic": (BLUE, "--"),
    "chosen_format": (BLUE, ":"),
    "chosen_initial": (PURPLE, "-"),
    "rejected": (ORANGE, "-"),
    "rejected_semantic": (ORANGE, "--"),
    "rejected_format": (ORANGE, ":"),
    "other_train": (RED, "-"),
    "other_test": (RED, "--"),
    "unrelated": (GREEN, "-"),
    "chosen_shuffled": (GREY, "-"),
    "test_shuffled": (GREY, "--"),
}

PANELS = {
    "the answer and its rephrases": ("chosen", "chosen_semantic", "chosen_format", "chosen_initial"),
    "the rejected answer": ("rejected", "rejected_semantic", "rejected_format"),
    "answers to other questions": ("other_train", "other_test"),
    "unrelated and shuffled text": ("unrelated", "chosen_shuffled", "test_shuffled"),
}


def use_style() -> None:
    """Set the one style. SVG files do not change when the data do not: fixed ids, no date."""
    sns.set_theme(style="ticks", context="notebook", font_scale=0.85)
    plt.rcParams |= {
        "figure.figsize": (6.5, 3.6),
        "figure.constrained_layout.use": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "svg.hashsalt": "lddyn",
        "svg.fonttype": "path",
    }
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None}, bbox_inches="tight")
    except (ImportError, AttributeError):  # not in a notebook
        pass


def band(ax, x, values: np.ndarray, color: str, label: str | None = None, **line) -> None:
    """Mean over seeds with the range of the seeds behind it. values: (seeds, points)."""
    ax.plot(x, values.mean(0), color=color, label=label, **line)
    if len(values) > 1:
        ax.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.18, linewidth=0)


def curves(table: pd.DataFrame, kind: str, metric: str = "logp_sum", split: str = "train") -> tuple:
    """Steps and (seeds, steps): mean over prompts of a metric of one type, for each seed."""
    seeds = [statistics.mean_over_prompts(t, kind, metric, split) for _, t in table.groupby("seed")]
    return seeds[0].index.to_numpy(), np.array([s.to_numpy() for s in seeds])


def change_panel(ax, table: pd.DataFrame, kinds, title: str, per_epoch: float, split: str = "train") -> None:
    for kind in kinds:
        color, line = STYLES[kind]
        steps, values = curves(table, kind, split=split)
        band(ax, steps / per_epoch, values - values[:, :1], color, kind, linestyle=line)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_title(title)
    ax.legend(fontsize=7)


# --- figures of chapters 3 and 5 -------------------------------------------------------------------------------


def response_curves(table: pd.DataFrame, per_epoch: float, split: str = "train") -> Figure:
    """Figures 3 and 4: change of log pi of all types of response since the start, nats summed over a response.

    `per_epoch`: optimiser steps in an epoch.
    """
    fig, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True)
    for ax, (title, kinds) in zip(axes.flat, PANELS.items(), strict=True):
        change_panel(ax, table, kinds, title, per_epoch, split)
    for ax in axes[1]:
        ax.set_xlabel("epoch")
    for ax in axes[:, 0]:
        ax.set_ylabel("change of log π (nats)")
    return fig


def two_scales(runs: Mapping[str, tuple[pd.DataFrame, float]]) -> Figure:
    """`response_curves` of several models side by side: name -> their table, and optimiser steps in an epoch."""
    fig, axes = plt.subplots(len(PANELS), len(runs), figsize=(9, 10), sharex="col", squeeze=False)
    for column, (name, (table, per_epoch)) in zip(axes.T, runs.items(), strict=True):
        for ax, (title, kinds) in zip(column, PANELS.items(), strict=True):
            change_panel(ax, table, kinds, title, per_epoch)
        column[0].set_title(f"{name}\n\n{column[0].get_title()}")
        column[-1].set_xlabel("epoch")
    for ax in axes[:, 0]:
        ax.set_ylabel("change of log π (nats)")
    return fig


def peakiness_and_rest(table: pd.DataFrame, per_epoch: float) -> Figure:
    """Figure 9: ||A||_F of some types, and log pi(y*) against the mass outside it, along chosen and rejected."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.1))
    for kind in ("chosen", "rejected", "other_test", "unrelated"):
        color, line = STYLES[kind]
        steps, values = curves(table, kind, "a_norm_mean")
        band(axes[0], steps / per_epoch, values, color, kind, linestyle=line)
        for ax, metric in ((axes[1], "argmax_logp_sum"), (axes[2], "rest_logp_sum")):
            steps, values = curves(table, kind, metric)
            band(ax, steps / per_epoch, values, color, kind, linestyle=line)
    titles = (r"peakiness $\|A\|_F$", "log π(y*) along the path", "log of the mass outside y*")
    for ax, title, unit in zip(axes, titles, ("", "nats", "nats"), strict=True):
        ax.set(xlabel="epoch", title=title, ylabel=unit)
    axes[0].legend(fontsize=7)
    return fig


def agreement_with_authors(ours: pd.Series, theirs: pd.Series, metric: str) -> Figure:
    """End change of every type here against that in the authors' released log."""
    fig, ax = plt.subplots(figsize=(4.8, 3.8))
    for kind in ours.index:
        color, _ = STYLES[kind]
        ax.scatter(theirs[kind], ours[kind], color=color, s=22)
        ax.annotate(kind, (theirs[kind], ours[kind]), fontsize=7, xytext=(4, 2), textcoords="offset points")
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    name = {"logp_sum": "log π (nats)", "a_norm_mean": "$\\|A\\|_F$"}[metric]
    rank = spearmanr(ours, theirs).statistic
    ax.set(xlabel=f"the authors' log: change of {name}", ylabel=f"this companion: change of {name}")
    ax.set_title(f"same sign in {(ours * theirs > 0).sum()} of {len(ours)}, rank correlation {rank:.2f}")
    return fig
