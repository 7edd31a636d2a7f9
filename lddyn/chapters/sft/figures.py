"""Figures of chapter 3."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lddyn.chapters.sft import evidence
from lddyn.chapters.style import GREY, MARKS, PURPLE, RED, STYLES, change_panel


def early_curves(table: pd.DataFrame, per_epoch: float, epochs: float = 3) -> Figure:
    """The first epochs of the types that turn: the left half of the bell."""
    fig, ax = plt.subplots(figsize=(6.5, 3.6))
    kinds = ("chosen_semantic", "chosen_format", "chosen_initial", "rejected", "other_test", "unrelated")
    change_panel(ax, table[table.step <= epochs * per_epoch], kinds, "", per_epoch)
    ax.set(xlabel="epoch", ylabel="change of log π (nats)")
    return fig


def hallucination(table: pd.DataFrame, per_epoch: float) -> Figure:
    """Answers to other training questions against unseen ones, after trained and new prompts; and in generated text."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), width_ratios=[1, 1, 0.9])
    for ax, split, title in zip(axes, ("train", "test"), ("after trained prompts", "after new prompts"), strict=False):
        change_panel(ax, table, ("other_train", "other_test"), title, per_epoch, split)
        ax.set_xlabel("epoch")
    axes[0].set_ylabel("change of log π (nats)")
    rows = table[table.response_type == "greedy"]
    shares = rows.groupby(["metric", "step", "seed"], observed=True).value.mean().unstack("seed") * 100
    labels = {"prob_reuse_train": "training answers", "prob_reuse_control": "unseen answers"}
    for n, (metric, label) in enumerate(labels.items()):
        values = shares.loc[metric].to_numpy()  # (before and after, seeds)
        spread = [values.mean(1) - values.min(1), values.max(1) - values.mean(1)]
        color = RED if n == 0 else GREY
        look = {"color": color, "hatch": "///" * n, "edgecolor": "white", "capsize": 3}
        axes[2].bar(np.arange(2) + 0.38 * n, values.mean(1), 0.36, yerr=spread, label=label, **look)
    axes[2].set(
        xticks=[0.19, 1.19], xticklabels=["before", "after"], ylabel="4-grams reused (%)", title="greedy answers"
    )
    axes[2].legend(fontsize=7, title="to other questions, found in", title_fontsize=7)
    return fig


def sign_delta_map(table: pd.DataFrame) -> Figure:
    """Figure 3, last panel: which responses gain (rows) when a type is trained (columns); mean over seeds."""
    cells = [evidence.heat_map(t) for _, t in table.groupby("seed")]
    mean = sum(cells) / len(cells)
    order = [kind for kind in STYLES if kind in mean.index]
    fig, ax = plt.subplots(figsize=(6.2, 5))
    sns.heatmap(
        mean.loc[order], ax=ax, cmap="RdBu_r", center=0, vmin=-1, vmax=1, annot=True, fmt=".2f", annot_kws={"size": 7}
    )
    ax.set(xlabel="trained on", ylabel="observed")
    ax.tick_params(axis="x", rotation=30)
    return fig


def size_trends(cells: pd.DataFrame) -> Figure:
    """What turns and falls in SFT against the number of parameters. cells: the recorded sweep `trends`."""
    titles = {
        "bell_fall": "rephrases and rejected:\nleast fall from the peak",
        "unrelated_change": "unrelated text:\nchange over SFT",
        "other_train_over_other_test": "answers to other training\nquestions over unseen ones",
    }
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.2))
    for ax, (column, title) in zip(axes, titles.items(), strict=True):
        for (data, rows), (color, line) in zip(cells.groupby("data"), ((GREY, "-"), (PURPLE, "--")), strict=False):
            mean = rows.groupby("parameters")[column].mean()
            ax.plot(mean.index, mean, color=color, linestyle=line, label=Path(data).stem)
            dots = {"markersize": 3.5, "alpha": 0.6, "label": f"_{Path(data).stem}, single seeds"}
            ax.plot(rows.parameters, rows[column], MARKS[color], color=color, **dots)
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set(title=title, xlabel="parameters", xscale="log")
    axes[0].set_ylabel("nats")
    axes[0].legend(fontsize=8)
    return fig
