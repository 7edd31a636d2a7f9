"""Figures of chapter 1."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from lddyn.chapters.digits import evidence
from lddyn.chapters.style import BLUE, GREEN, GREY, MARKS, ORANGE, RED, band


def per_seed(table: pd.DataFrame, metric: str, prompt_id: str, response_type: str) -> tuple[np.ndarray, np.ndarray]:
    rows = table[(table.metric == metric) & (table.prompt_id == prompt_id) & (table.response_type == response_type)]
    wide = rows.pivot(index="seed", columns="step", values="value")
    return wide.columns.to_numpy(), wide.to_numpy()


def mean_matrix(table: pd.DataFrame, metric: str, step: int) -> np.ndarray:
    rows = table[(table.metric == metric) & (table.step == step)]
    return rows.pivot_table(index="prompt_id", columns="response_type", values="value").to_numpy()


def one_step(image: Tensor, residual: Tensor, changes: Mapping[int, np.ndarray]) -> Figure:
    """Figures 1a and 1b: the updated image, -G, and the change of log pi at images of three classes.

    image: (28, 28); residual: G (10,); changes: class of the image -> (10,) nats.
    """
    fig, axes = plt.subplots(1, 2 + len(changes), figsize=(9, 2.2), width_ratios=[0.8, *[1] * (1 + len(changes))])
    axes[0].imshow(image, cmap="gray_r")
    axes[0].set(title="the update $x_u$", xticks=[], yticks=[])
    colors = [GREY, BLUE, ORANGE, GREY]
    panels = {"residual: $-G(x_u, y_u)$": -residual.numpy()} | {f"on images of a {c}": v for c, v in changes.items()}
    for ax, color, (title, values) in zip(axes[1:], colors, panels.items(), strict=True):
        ax.bar(range(10), values, color=color)
        ax.axhline(0, color="0.3", linewidth=0.8)
        ax.set(title=title, xticks=range(10), xlabel="class")
        ax.tick_params(labelsize=8)
    axes[2].set_ylabel(r"$\Delta\log\pi$ (nats)")
    return fig


def leaks(table: pd.DataFrame) -> Figure:
    """Figures 1c and 1d: where the mean prediction of each true class leaks to at the end of training."""
    last = mean_matrix(table, "prob_mean", table[table.metric == "prob_mean"].step.max())
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[1, 1.15])
    for true, color in ((4, BLUE), (9, ORANGE), (0, GREY)):
        left.plot(range(10), last[true], color=color, label=f"images of {true}", marker=MARKS[color], markersize=4)
    left.set(yscale="log", xticks=range(10), xlabel="predicted class", ylabel="mean probability")
    left.legend()
    shown = np.where(np.eye(10, dtype=bool), np.nan, last * 100)
    sns.heatmap(shown, ax=right, cmap="mako_r", annot=True, fmt=".1f", annot_kws={"size": 6.5}, square=True)
    right.set(xlabel="predicted class", ylabel="true class", title="mean probability of a wrong class (%)")
    return fig


def order_of_the_error(table: pd.DataFrame) -> Figure:
    """How the error of proposition 1 shrinks with the learning rate: slope 2, where the change has slope 1."""
    fig, ax = plt.subplots(figsize=(5.5, 3.6))
    error_order(ax, table)
    return fig


def error_order(ax, table: pd.DataFrame) -> None:
    rows = table[table.metric.isin(["first_order_error", "change_norm"])]
    rows = rows.assign(eta=rows.response_type.str.removeprefix("eta_").astype(float))
    for metric, color, label in (
        ("change_norm", BLUE, r"measured change $\|\Delta\log\pi\|$"),
        ("first_order_error", RED, r"error $\|\Delta\log\pi + \eta AKG\|$"),
    ):
        by_eta = rows[rows.metric == metric].groupby("eta").value
        middle = by_eta.median()
        ax.loglog(middle.index, middle, color=color, label=label, marker=MARKS[color], markersize=4)
        ax.fill_between(
            middle.index, by_eta.quantile(0.05), by_eta.quantile(0.95), color=color, alpha=0.15, linewidth=0
        )
    ax.set(xlabel=r"learning rate $\eta$", ylabel="nats (norm over classes)")
    ax.legend()


def entk(table: pd.DataFrame) -> Figure:
    """Figure 7: ||K_uo|| of some pairs over training, its mean, and how stable the ranking is."""
    fig, (pairs, mean, rank) = plt.subplots(1, 3, figsize=(9.5, 3.1))
    for (o, u), color in (((4, 4), BLUE), ((9, 4), ORANGE), ((0, 4), GREY), ((8, 5), GREEN)):
        band(pairs, *per_seed(table, "entk_norm", f"class_{o}", f"class_{u}"), color, f"{o} and {u}")
    pairs.set(xlabel="epoch", ylabel=r"$\|K(x_o, x_u)\|_F$", title="pairs of classes")
    pairs.legend()
    norms = {s: evidence.class_matrices(t, "entk_norm") for s, t in table.groupby("seed")}
    steps = next(iter(norms.values()))[0]
    band(mean, steps, np.array([m.mean((1, 2)) for _, m in norms.values()]), BLUE)
    mean.set(xlabel="epoch", ylabel=r"mean $\|K\|_F$", title="the norm changes")
    rho = np.array([evidence.rank_correlation_with_last(m) for _, m in norms.values()])
    band(rank, steps, rho, GREEN)
    rank.set(xlabel="epoch", ylabel="rank correlation with the end", title="the ranking settles", ylim=(None, 1.02))
    return fig


def kernel_and_leak(table: pd.DataFrame) -> Figure:
    """Accumulated ||K|| of a pair of classes against the mean probability that leaks between them."""
    fig, ax = plt.subplots(figsize=(4.8, 3.6))
    kernel = np.mean([evidence.accumulated_entk(t) for _, t in table.groupby("seed")], axis=0)
    leak = mean_matrix(table, "prob_mean", table[table.metric == "prob_mean"].step.max())
    for o in range(10):
        for v in range(10):
            if o != v:
                named = {o, v} in ({4, 9}, {3, 5}, {5, 8})
                color, label = (RED, None) if named else (GREY, "_other pairs")
                ax.scatter(kernel[o, v], leak[o, v], s=14, color=color, label=label, zorder=2 + named)
                if named:
                    ax.annotate(
                        f"{o}→{v}",
                        (kernel[o, v], leak[o, v]),
                        fontsize=8,
                        xytext=(3, 3),
                        textcoords="offset points",
                    )
    ax.set(yscale="log", xlabel=r"$\|K\|_F$ accumulated over training", ylabel="mean probability at the end")
    return fig
