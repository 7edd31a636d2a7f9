"""Figures: one style, one colour per family of responses, one function per figure.

Every function takes a table with a `seed` column (`records.frame`) and returns a matplotlib figure.
Lines are means over seeds, bands the range of the seeds.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lddyn import evidence

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


def _per_seed(table: pd.DataFrame, metric: str, prompt_id: str, response_type: str) -> tuple[np.ndarray, np.ndarray]:
    rows = table[(table.metric == metric) & (table.prompt_id == prompt_id) & (table.response_type == response_type)]
    wide = rows.pivot(index="seed", columns="step", values="value")
    return wide.columns.to_numpy(), wide.to_numpy()


def _mean_matrix(table: pd.DataFrame, metric: str, step: int) -> np.ndarray:
    rows = table[(table.metric == metric) & (table.step == step)]
    return rows.pivot_table(index="prompt_id", columns="response_type", values="value").to_numpy()


# --- chapter 1 ---------------------------------------------------------------------------------------------


def digits_one_step(image, arrow: np.ndarray, changes: dict[str, np.ndarray]) -> Figure:
    """Figures 1a and 1b: the updated image, -G, and the change of log pi at images of three classes.

    image: (28, 28); arrow: -G (10,); changes: title -> (10,) nats.
    """
    fig, axes = plt.subplots(1, 2 + len(changes), figsize=(9, 2.2), width_ratios=[0.8, *[1] * (1 + len(changes))])
    axes[0].imshow(image, cmap="gray_r")
    axes[0].set(title="the update $x_u$", xticks=[], yticks=[])
    colors = [GREY, BLUE, ORANGE, GREY]
    panels = {"residual: $-G(x_u, y_u)$": arrow, **changes}
    for ax, color, (title, values) in zip(axes[1:], colors, panels.items(), strict=True):
        ax.bar(range(10), values, color=color)
        ax.axhline(0, color="0.3", linewidth=0.8)
        ax.set(title=title, xticks=range(10), xlabel="class")
        ax.tick_params(labelsize=8)
    axes[2].set_ylabel(r"$\Delta\log\pi$ (nats)")
    return fig


def digits_leaks(table: pd.DataFrame) -> Figure:
    """Figures 1c and 1d: where the mean prediction of each true class leaks to at the end of training."""
    last = _mean_matrix(table, "prob_mean", table[table.metric == "prob_mean"].step.max())
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), width_ratios=[1, 1.15])
    for true, color in ((4, BLUE), (9, ORANGE), (0, GREY)):
        left.plot(range(10), last[true], "o-", color=color, label=f"images of {true}", markersize=4)
    left.set(yscale="log", xticks=range(10), xlabel="predicted class", ylabel="mean probability")
    left.legend()
    shown = np.where(np.eye(10, dtype=bool), np.nan, last * 100)
    sns.heatmap(shown, ax=right, cmap="mako_r", annot=True, fmt=".1f", annot_kws={"size": 6.5}, square=True)
    right.set(xlabel="predicted class", ylabel="true class", title="mean probability of a wrong class (%)")
    return fig


def digits_error_order(table: pd.DataFrame) -> Figure:
    """How the error of proposition 1 shrinks with the learning rate: slope 2, where the change has slope 1."""
    fig, ax = plt.subplots(figsize=(5.5, 3.6))
    _error_order(ax, table)
    return fig


def _error_order(ax, table: pd.DataFrame) -> None:
    rows = table[table.metric.isin(["first_order_error", "change_norm"])]
    rows = rows.assign(eta=rows.response_type.str.removeprefix("eta_").astype(float))
    for metric, color, label in (
        ("change_norm", BLUE, r"measured change $\|\Delta\log\pi\|$"),
        ("first_order_error", RED, r"error $\|\Delta\log\pi + \eta AKG\|$"),
    ):
        by_eta = rows[rows.metric == metric].groupby("eta").value
        middle = by_eta.median()
        ax.loglog(middle.index, middle, "o-", color=color, label=label, markersize=4)
        ax.fill_between(
            middle.index, by_eta.quantile(0.05), by_eta.quantile(0.95), color=color, alpha=0.15, linewidth=0
        )
    ax.set(xlabel=r"learning rate $\eta$", ylabel="nats (norm over classes)")
    ax.legend()


def digits_entk(table: pd.DataFrame) -> Figure:
    """Figure 7: ||K_uo|| of some pairs over training, its mean, and how stable the ranking is."""
    fig, (pairs, mean, rank) = plt.subplots(1, 3, figsize=(9.5, 3.1))
    for (o, u), color in (((4, 4), BLUE), ((9, 4), ORANGE), ((0, 4), GREY), ((8, 5), GREEN)):
        band(pairs, *_per_seed(table, "entk_norm", f"class_{o}", f"class_{u}"), color, f"{o} and {u}")
    pairs.set(xlabel="epoch", ylabel=r"$\|K(x_o, x_u)\|_F$", title="pairs of classes")
    pairs.legend()
    norms = {s: evidence._matrices(t, "entk_norm") for s, t in table.groupby("seed")}
    steps = next(iter(norms.values()))[0]
    band(mean, steps, np.array([m.mean((1, 2)) for _, m in norms.values()]), BLUE)
    mean.set(xlabel="epoch", ylabel=r"mean $\|K\|_F$", title="the norm changes")
    rho = np.array([evidence.rank_correlation_with_last(m) for _, m in norms.values()])
    band(rank, steps, rho, GREEN)
    rank.set(xlabel="epoch", ylabel="rank correlation with the end", title="the ranking settles", ylim=(None, 1.02))
    return fig


def digits_kernel_and_leak(table: pd.DataFrame) -> Figure:
    """Accumulated ||K|| of a pair of classes against the mean probability that leaks between them."""
    fig, ax = plt.subplots(figsize=(4.8, 3.6))
    _kernel_and_leak(ax, table)
    return fig


def _kernel_and_leak(ax, table: pd.DataFrame) -> None:
    kernel = np.mean([evidence.accumulated_entk(t) for _, t in table.groupby("seed")], axis=0)
    leak = _mean_matrix(table, "prob_mean", table[table.metric == "prob_mean"].step.max())
    for o in range(10):
        for v in range(10):
            if o != v:
                named = {o, v} in ({4, 9}, {3, 5}, {5, 8})
                ax.scatter(kernel[o, v], leak[o, v], s=14, color=RED if named else GREY, zorder=2 + named)
                if named:
                    ax.annotate(
                        f"{o}→{v}",
                        (kernel[o, v], leak[o, v]),
                        fontsize=8,
                        xytext=(3, 3),
                        textcoords="offset points",
                    )
    ax.set(yscale="log", xlabel=r"$\|K\|_F$ accumulated over training", ylabel="mean probability at the end")


def hero(table: pd.DataFrame) -> Figure:
    """The first page's figure: how exact the decomposition is, and what the similarity explains."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    _error_order(left, table)
    left.set_title("one step, predicted")
    _kernel_and_leak(right, table)
    right.set_title("a training run, explained")
    return fig


# --- chapter 3 ---------------------------------------------------------------------------------------------


def _curves(table: pd.DataFrame, kind: str, metric: str = "logp_sum", split: str = "train") -> tuple:
    """Steps and (seeds, steps): mean over prompts of a metric of one type, for each seed."""
    seeds = [evidence.curve(t, kind, metric, split) for _, t in table.groupby("seed")]
    return seeds[0].index.to_numpy(), np.array([s.to_numpy() for s in seeds])


def _change_panel(ax, table: pd.DataFrame, kinds, title: str, per_epoch: float, split: str = "train") -> None:
    for kind in kinds:
        color, line = STYLES[kind]
        steps, values = _curves(table, kind, split=split)
        band(ax, steps / per_epoch, values - values[:, :1], color, kind, linestyle=line)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_title(title)
    ax.legend(fontsize=7)


PANELS = {
    "the answer and its rephrases": ("chosen", "chosen_semantic", "chosen_format", "chosen_initial"),
    "the rejected answer": ("rejected", "rejected_semantic", "rejected_format"),
    "answers to other questions": ("other_train", "other_test"),
    "unrelated and shuffled text": ("unrelated", "chosen_shuffled", "test_shuffled"),
}


def response_curves(table: pd.DataFrame, per_epoch: float, split: str = "train") -> Figure:
    """Figures 3 and 4: change of log pi of all types of response since the start, nats summed over a response.

    `per_epoch`: optimiser steps in an epoch.
    """
    fig, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True)
    for ax, (title, kinds) in zip(axes.flat, PANELS.items(), strict=True):
        _change_panel(ax, table, kinds, title, per_epoch, split)
    for ax in axes[1]:
        ax.set_xlabel("epoch")
    for ax in axes[:, 0]:
        ax.set_ylabel("change of log π (nats)")
    return fig


def early_curves(table: pd.DataFrame, per_epoch: float, epochs: float = 3) -> Figure:
    """The first epochs of the types that turn: the left half of the bell."""
    fig, ax = plt.subplots(figsize=(6.5, 3.6))
    kinds = ("chosen_semantic", "chosen_format", "chosen_initial", "rejected", "other_test", "unrelated")
    _change_panel(ax, table[table.step <= epochs * per_epoch], kinds, "", per_epoch)
    ax.set(xlabel="epoch", ylabel="change of log π (nats)")
    return fig


def hallucination(table: pd.DataFrame, per_epoch: float) -> Figure:
    """Answers to other training questions against unseen ones, after trained and new prompts; and in generated text."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), width_ratios=[1, 1, 0.9])
    for ax, split, title in zip(axes, ("train", "test"), ("after trained prompts", "after new prompts"), strict=False):
        _change_panel(ax, table, ("other_train", "other_test"), title, per_epoch, split)
        ax.set_xlabel("epoch")
    axes[0].set_ylabel("change of log π (nats)")
    rows = table[table.response_type == "greedy"]
    shares = rows.groupby(["metric", "step", "seed"], observed=True).value.mean().unstack("seed") * 100
    labels = {"prob_reuse_train": "training answers", "prob_reuse_control": "unseen answers"}
    for n, (metric, label) in enumerate(labels.items()):
        values = shares.loc[metric].to_numpy()  # (before and after, seeds)
        spread = [values.mean(1) - values.min(1), values.max(1) - values.mean(1)]
        color = RED if n == 0 else GREY
        axes[2].bar(np.arange(2) + 0.38 * n, values.mean(1), 0.36, yerr=spread, color=color, label=label, capsize=3)
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


def peakiness_and_rest(table: pd.DataFrame, per_epoch: float) -> Figure:
    """Figure 9: ||A||_F of some types, and log pi(y*) against the mass outside it, along chosen and rejected."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.1))
    for kind in ("chosen", "rejected", "other_test", "unrelated"):
        color, line = STYLES[kind]
        steps, values = _curves(table, kind, "a_norm_mean")
        band(axes[0], steps / per_epoch, values, color, kind, linestyle=line)
        for ax, metric in ((axes[1], "argmax_logp_sum"), (axes[2], "rest_logp_sum")):
            steps, values = _curves(table, kind, metric)
            band(ax, steps / per_epoch, values, color, kind, linestyle=line)
    titles = (r"peakiness $\|A\|_F$", "log π(y*) along the path", "log of the mass outside y*")
    for ax, title, unit in zip(axes, titles, ("", "nats", "nats"), strict=True):
        ax.set(xlabel="epoch", title=title, ylabel=unit)
    axes[0].legend(fontsize=7)
    return fig


def agreement_with_authors(ours: pd.Series, theirs: pd.Series) -> Figure:
    """End change of every type here against that in the authors' released log."""
    fig, ax = plt.subplots(figsize=(4.8, 3.8))
    for kind in ours.index:
        color, _ = STYLES[kind]
        ax.scatter(theirs[kind], ours[kind], color=color, s=22)
        ax.annotate(kind, (theirs[kind], ours[kind]), fontsize=7, xytext=(4, 2), textcoords="offset points")
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="the authors' log: change of log π (its s.d.)", ylabel="this companion (its s.d.)")
    return fig


# --- chapter 4 ---------------------------------------------------------------------------------------------


def before_and_after(panels: dict[str, tuple], changes: bool = True) -> Figure:
    """Distributions over ranked labels before and after a step, and the change of each log-probability (appendix E).

    panels: title -> (before, after, labels): (V,) probabilities twice, and the ranks that were pushed, 0 the likeliest.
    """
    rows = 2 if changes else 1
    size = (1.75 * len(panels) + 0.7, 2 * rows + 0.3)
    fig, axes = plt.subplots(rows, len(panels), figsize=size, sharey="row", sharex=True, squeeze=False)
    for n, (title, (before, after, labels)) in enumerate(panels.items()):
        rank = np.arange(1, len(before) + 1)
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


def squeezing_threshold(p: np.ndarray, changes: dict, thresholds: dict, first: float) -> Figure:
    """Who rises in a large vocabulary, and how the bar moves with the size of the step.

    p: (V,) without the pushed label; changes: |eta'| -> change of log p, (V,) nats; thresholds: |eta'| -> exact
    threshold; first: the threshold of the first-order law.
    """
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    for (strength, change), color in zip(changes.items(), (BLUE, ORANGE, RED), strict=True):
        left.plot(p, change, ".", color=color, markersize=3, label=f"$|\\eta'| = {strength:g}$")
    left.axhline(0, color="0.3", linewidth=0.8)
    left.set(xscale="log", xlabel="probability before", ylabel=r"$\Delta\log p$ (nats)")
    left.set_yscale("symlog", linthresh=0.01)
    left.legend(fontsize=8)
    right.semilogx(list(thresholds), list(thresholds.values()), color=BLUE, label="exact threshold")
    right.axhline(first, color=GREY, linestyle="--", label=r"first order, $\|p\|^2 - p_y$")
    right.axhline(p.max(), color=GREEN, linestyle="--", label="$p_{y^*}$")
    right.set(xlabel=r"size of the step $|\eta'|$", ylabel="a label rises above this probability", ylim=(0, None))
    right.legend(fontsize=8)
    return fig


def squeezing_domain(table: pd.DataFrame, strengths) -> Figure:
    """Where the first-order law holds: its relative error, and the share of labels whose direction it gets right."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for ax, metric, color in ((left, "ladder_law_error", RED), (right, "prob_law_direction", BLUE)):
        by_rung = table[table.metric == metric].groupby("step").value
        ax.semilogx(strengths, by_rung.mean(), "o-", color=color, markersize=4)
        ax.fill_between(strengths, by_rung.quantile(0.05), by_rung.quantile(0.95), color=color, alpha=0.15, linewidth=0)
        ax.set_xlabel(r"size of the step $|\eta'|$")
    left.set(yscale="log", ylabel="error of the law / size of the change")
    right.set(ylabel="labels whose direction is right", ylim=(0, 1.03))
    return fig


def squeezing_pushed_label(table: pd.DataFrame, pushed) -> Figure:
    """Claim 4: the same shape and step, with the pushed label less and less likely."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    lines = (
        (left, "pushed_top", GREEN, r"$y^*$"),
        (left, "pushed_others", RED, "other labels, mean"),
        (right, "prob_share_from_others", ORANGE, None),
    )
    for ax, metric, color, label in lines:
        wide = table[table.metric == metric].groupby(["seed", "step"]).value.mean().unstack()
        band(ax, pushed, wide.to_numpy(), color, label, marker="o", markersize=4)
    for ax in (left, right):
        ax.set(xscale="log", xlabel="probability of the pushed label, $p_y$")
        ax.invert_xaxis()
    left.axhline(0, color="0.3", linewidth=0.8)
    left.set_ylabel(r"$\Delta\log p$ (nats)")
    left.legend(fontsize=8)
    right.set(ylabel="share of $y^*$'s gain taken from labels\nthat nobody pushed", ylim=(0, 1.03))
    return fig


def residual_forces(margins: np.ndarray, forces: dict[str, tuple]) -> Figure:
    """Figure 2 as numbers: the force of every loss on chosen and on rejected against the margin, on the same axes.

    forces: name -> (on chosen, on rejected), (margins,) each. Drawn in units of the larger of the two at margin 0.
    """
    fig, axes = plt.subplots(3, 4, figsize=(9.5, 6), sharex=True, sharey=True)
    start = np.abs(margins).argmin()
    for ax, (name, (chosen, rejected)) in zip(axes.flat, forces.items(), strict=True):
        unit = max(abs(chosen[start]), abs(rejected[start]))
        ax.plot(margins, chosen / unit, color=BLUE, label="on chosen")
        ax.plot(margins, rejected / unit, color=RED, label="on rejected")
        ax.axhline(0, color="0.3", linewidth=0.8)
        ax.axvline(0, color="0.3", linewidth=0.5, linestyle=":")
        ax.set(title=f"{name}  (unit {unit:.2g})", ylim=(-2.4, 2.4))
    axes[0, 0].legend(fontsize=8, loc="lower left")
    fig.supxlabel("margin between chosen and rejected, relative to the start (nats)", fontsize=10)
    fig.supylabel("force: up on the response (+), down (-)", fontsize=10)
    return fig
