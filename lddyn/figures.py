"""Figures: one style, one colour per family of responses, one function per figure.

Every function takes a table with a `seed` column (`records.frame`) and returns a matplotlib figure.
Lines are means over seeds, bands the range of the seeds.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from scipy.stats import spearmanr

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


def hero(digits: pd.DataFrame, sft: pd.DataFrame) -> Figure:
    """The first page's figure: one predicted step of chapter 1, and what a whole SFT run of chapter 3 does."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    _error_order(left, digits)
    left.set_title("one gradient step, predicted")
    _change_panel(right, sft, ("chosen", "other_train", "rejected", "other_test", "unrelated"), "", per_epoch=1)
    right.set(title="finetuning on one answer per question", xlabel="step", ylabel="change of log π (nats)")
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


# --- chapter 5 ---------------------------------------------------------------------------------------------

PATH_STYLES = {"chosen": (BLUE, "-"), "rejected": (ORANGE, "-"), "never trained": (RED, "--")}


def _epochs_of(ax, per_epoch: float, steps: np.ndarray, values: np.ndarray, color: str, label: str, line: str) -> None:
    band(ax, steps / per_epoch, values - values[:, :1], color, label, linestyle=line)


def squeezed_paths(table: pd.DataFrame, per_epoch: float) -> Figure:
    """Figure 4, last panel: change of log pi(y*) along three paths, and how far the response falls behind it."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    for path, (kind, split) in evidence.PATHS.items():
        steps, top = _curves(table, kind, "argmax_logp_sum", split)
        _, own = _curves(table, kind, "logp_sum", split)
        color, line = PATH_STYLES[path]
        _epochs_of(axes[0], per_epoch, steps, top, color, f"along {path}", line)
        _epochs_of(axes[1], per_epoch, steps, top - own, color, f"along {path}", line)
    axes[0].set(title="log π(y*)", ylabel="change (nats)", xlabel="epoch")
    axes[1].set(title="log π(y*) - log π(response)", xlabel="epoch")
    for ax in axes:
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.legend(fontsize=7)
    return fig


def margin_and_likelihood(table: pd.DataFrame, beta: float, per_epoch: float) -> Figure:
    """What a DPO log shows (margin, accuracy) beside what it does not (the likelihoods)."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.1), sharex=True)
    for split, color, line in (("train", BLUE, "-"), ("test", RED, "--")):
        margins = [evidence.dpo_margins(t, beta, split) for _, t in table.groupby("seed")]
        steps = margins[0].index.to_numpy() / per_epoch
        band(axes[0], steps, np.array([m.mean(axis=1) for m in margins]), color, f"{split} prompts", linestyle=line)
        right = np.array([(m > 0).mean(axis=1) for m in margins])
        band(axes[1], steps[1:], 100 * right[:, 1:], color, f"{split} prompts", linestyle=line)
    for kind in ("chosen", "rejected"):
        steps, values = _curves(table, kind)
        _epochs_of(axes[2], per_epoch, steps, values, STYLES[kind][0], kind, "-")
    axes[0].set(title="margin (nats)", xlabel="epoch")
    axes[1].set(title="accuracy (%)", xlabel="epoch", ylim=(0, 103))
    axes[2].set(title="change of log π (nats)", xlabel="epoch")
    for ax in axes:
        ax.legend(fontsize=7)
    return fig


def each_pair(table: pd.DataFrame) -> Figure:
    """Change of chosen against change of rejected, one point a prompt and seed; shaded where the chosen answer fell."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharex=True, sharey=True)
    for ax, split in zip(axes, ("train", "test"), strict=True):
        for _, t in table.groupby("seed"):
            wide = evidence.dpo_wide(t, split=split)
            first, last = (wide.loc[step] for step in (t.step.min(), wide.index[-1][0]))
            change = last - first
            ax.scatter(change.rejected, change.chosen, s=12, color=BLUE if split == "train" else RED, alpha=0.6)
        share = evidence.below_start(table, split).mean()
        ax.set_title(f"{split} prompts: {share:.0%} of chosen below their start")
        ax.set_xlabel("rejected: change of log π (nats)")
        ax.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
    for ax in axes:
        low = min(ax.get_ylim()[0], -1)
        ax.axhspan(low, 0, color=ORANGE, alpha=0.07, zorder=0)
        ax.set_ylim(low, None)
    axes[0].set_ylabel("chosen: change of log π (nats)")
    return fig


ACCOUNT = {"pushed": "the pushed token", "top": "y*", "top10": "the next nine", "tail": "all others"}


def mass_account(table: pd.DataFrame) -> Figure:
    """Where the probability of rejected tokens goes: at the first token that differs from chosen, and after it."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.6))
    titles = {
        "rejected_first": "first token that differs",
        "rejected_likely": "after it, a likely token",
        "rejected_unlikely": "after it, an unlikely token",
    }
    for ax, (kind, title) in zip(axes, titles.items(), strict=True):
        for n, (split, color) in enumerate((("train", BLUE), ("test", RED))):
            rows = table[(table.response_type == kind) & table.prompt_id.astype(str).str.startswith(split)]
            rows = rows[rows.metric.astype(str).str.startswith("mass_")]
            mean = rows.groupby(["metric", "seed"], observed=True).value.mean().unstack("seed") * 100
            values = mean.loc[[f"mass_{group}" for group in ACCOUNT]].to_numpy()  # (groups, seeds)
            spread = [values.mean(1) - values.min(1), values.max(1) - values.mean(1)]
            place = np.arange(len(ACCOUNT)) + 0.38 * n
            ax.bar(place, values.mean(1), 0.36, yerr=spread, color=color, capsize=3, label=f"{split} prompts")
        ax.axhline(0, color="0.4", linewidth=0.8)
        ax.set(title=title, xticks=np.arange(len(ACCOUNT)) + 0.19)
        ax.set_xticklabels(ACCOUNT.values(), rotation=20)
    axes[0].set_ylabel("change of probability (points)")
    axes[0].legend(fontsize=7)
    return fig


END_STYLES = {
    "chosen": (BLUE, "-"), "rejected": (ORANGE, "-"), "chosen_semantic": (BLUE, "--"), "other_test": (RED, "--"),
    "y* along chosen": (GREEN, "-"),
}  # fmt: skip


def sft_before_dpo(ends: pd.DataFrame) -> Figure:
    """End changes in the same short DPO after no, short and long SFT. ends: rows of `evidence.dpo_ends`."""
    fig, ax = plt.subplots(figsize=(6.5, 3.6))
    for kind, (color, line) in END_STYLES.items():
        wide = ends.pivot(index="seed", columns="sft_epochs", values=kind)
        band(ax, wide.columns, wide.to_numpy(), color, kind, linestyle=line, marker="o", markersize=4)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="epochs of SFT before DPO", ylabel="end change in DPO (nats)")
    ax.legend(fontsize=7)
    return fig


def rate_and_beta(ends: pd.DataFrame) -> Figure:
    """End changes in short DPO over the learning rate, one panel a beta. ends: rows of `evidence.dpo_ends`."""
    betas = sorted(ends.beta.unique())
    fig, axes = plt.subplots(1, len(betas), figsize=(9, 3.4), sharey=True)
    for ax, beta in zip(axes, betas, strict=True):
        for kind, (color, line) in END_STYLES.items():
            wide = ends[ends.beta == beta].pivot(index="seed", columns="lr", values=kind)
            band(ax, wide.columns, wide.to_numpy(), color, kind, linestyle=line, marker="o", markersize=4)
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set(xscale="log", xlabel="learning rate", title=f"β = {beta:g}")
        ax.minorticks_off()
        ax.set_xticks(wide.columns, [f"{rate:g}" for rate in wide.columns])
    axes[0].set_ylabel("end change in DPO (nats)")
    axes[0].legend(fontsize=7)
    return fig


def when_top_rises(ends: pd.DataFrame) -> Figure:
    """End change of y* along three paths, by kind of pairs and length of SFT. ends: rows of `evidence.dpo_ends`."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.6), sharey=True, sharex=True)
    kinds = [kind for kind in ("as_written", "swapped", "rephrase", "style") if (ends.pairs == kind).any()]
    lengths = sorted(ends.sft_epochs.unique())
    shades = sns.color_palette("crest", len(lengths))
    rates = sorted(ends.lr.unique())
    for ax, path in zip(axes, evidence.PATHS, strict=True):
        for n, length in enumerate(lengths):
            for rate, marker in zip(rates, "o^sD", strict=False):
                rows = ends[(ends.sft_epochs == length) & (ends.lr == rate)]
                place = [kinds.index(k) + 0.18 * (n - (len(lengths) - 1) / 2) for k in rows.pairs]
                label = f"SFT {length}, lr {rate:g}" if len(rows) else None
                ax.scatter(rows[f"y* along {path}"], place, color=shades[n], marker=marker, s=22, label=label)
        ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set(title=f"along {path}", xlabel="change of log π(y*) (nats)")
    axes[0].set(yticks=range(len(kinds)), yticklabels=[k.replace("_", " ") for k in kinds])
    axes[0].invert_yaxis()
    axes[-1].legend(fontsize=7)
    return fig


def valley_slope(fit: dict) -> Figure:
    """What nobody pushes against how likely the rejected answer was, the rest held fixed (`evidence.valley`)."""
    fig, ax = plt.subplots(figsize=(5.6, 3.4))
    ax.scatter(fit["x"], fit["y"], s=12, color=GREY, alpha=0.7)
    ends = np.array([fit["x"].min(), fit["x"].max()])
    ax.plot(ends, fit["slope"] * ends, color=BLUE)
    ax.fill_between(ends, fit["interval"][0] * ends, fit["interval"][1] * ends, color=BLUE, alpha=0.18, linewidth=0)
    ax.set(
        xlabel="log π(rejected) per token at the start, rest fixed (nats)",
        ylabel="change of what nobody pushes\n(nats per token)",
    )
    return fig


def repeated(table: pd.DataFrame) -> Figure:
    """Repeated 4-grams and log pi of greedy answers before and after DPO, one line a seed, for both splits."""
    fig, axes = plt.subplots(1, 2, figsize=(8, 3.1))
    for ax, metric, scale in ((axes[0], "rep4", 100), (axes[1], "logp_sum", 1)):
        rows = table[(table.response_type == "greedy") & (table.metric == metric)]
        for split, color in (("train", BLUE), ("test", RED)):
            part = rows[rows.prompt_id.astype(str).str.startswith(split)]
            mean = part.groupby(["step", "seed"]).value.mean().unstack("seed") * scale
            for n, seed in enumerate(mean):
                ax.plot([0, 1], mean[seed], color=color, marker="o", label=None if n else f"{split} prompts")
        ax.set(xticks=[0, 1], xticklabels=["before", "after"], xlim=(-0.3, 1.3))
    axes[0].set(title="repeated 4-grams (%)")
    axes[1].set(title="log π of the greedy answer (nats)")
    axes[0].legend(fontsize=7)
    return fig


def overwritten_top(table: pd.DataFrame, per_epoch: float) -> Figure:
    """The arg-max metric along the chosen answer, and as it comes out when the last type overwrites it."""
    fig, ax = plt.subplots(figsize=(6, 3.2))
    for kind, label in (("chosen", "along chosen"), ("test_shuffled", "overwritten by the last type, test_shuffled")):
        steps, values = _curves(table, kind, "argmax_logp_sum")
        color, line = STYLES[kind]
        band(ax, steps / per_epoch, values, color, label, linestyle=line)
    ax.set(xlabel="epoch", ylabel="log π(y*) (nats)")
    ax.legend(fontsize=7)
    return fig


def sign_delta_bars(table: pd.DataFrame) -> Figure:
    """Figure 8, DPO: accumulated SignDelta of every type, mean and range of the seeds."""
    sums = pd.DataFrame({seed: evidence.sign_delta(t, "chosen") for seed, t in table.groupby("seed")})
    values = sums.loc[[kind for kind in STYLES if kind in sums.index]]
    spread = [values.mean(axis=1) - values.min(axis=1), values.max(axis=1) - values.mean(axis=1)]
    fig, ax = plt.subplots(figsize=(6.5, 3.4))
    ax.barh(values.index, values.mean(axis=1), xerr=spread, color=[STYLES[k][0] for k in values.index], capsize=2)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.invert_yaxis()
    ax.set(xlabel="accumulated SignDelta")
    return fig
