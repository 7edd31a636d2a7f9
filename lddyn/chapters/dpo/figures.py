"""Figures of chapter 5."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lddyn.chapters import statistics
from lddyn.chapters.dpo import evidence
from lddyn.chapters.style import BLUE, GREEN, GREY, MARKS, ORANGE, RED, STYLES, band, curves

PATH_STYLES = {"chosen": (BLUE, "-"), "rejected": (ORANGE, "-"), "never trained": (RED, "--")}


def _epochs_of(ax, per_epoch: float, steps: np.ndarray, values: np.ndarray, color: str, label: str, line: str) -> None:
    band(ax, steps / per_epoch, values - values[:, :1], color, label, linestyle=line)


def squeezed_paths(table: pd.DataFrame, per_epoch: float) -> Figure:
    """Figure 4, last panel: change of log pi(y*) along three paths, and how far the response falls behind it."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharex=True)
    for path, (kind, split) in statistics.PATHS.items():
        steps, top = curves(table, kind, "argmax_logp_sum", split)
        _, own = curves(table, kind, "logp_sum", split)
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
        margins = [statistics.margins(t, beta, split) for _, t in table.groupby("seed")]
        steps = margins[0].index.to_numpy() / per_epoch
        band(axes[0], steps, np.array([m.mean(axis=1) for m in margins]), color, f"{split} prompts", linestyle=line)
        right = np.array([(m > 0).mean(axis=1) for m in margins])
        band(axes[1], steps[1:], 100 * right[:, 1:], color, f"{split} prompts", linestyle=line)
    for kind in ("chosen", "rejected"):
        steps, values = curves(table, kind)
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
            wide = statistics.wide(t, split=split)
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
            look = {"color": color, "hatch": "///" * n, "edgecolor": "white", "capsize": 3}
            ax.bar(place, values.mean(1), 0.36, yerr=spread, label=f"{split} prompts", **look)
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
    """End changes in the same short DPO after no, short and long SFT. ends: rows of `evidence.ends`."""
    fig, ax = plt.subplots(figsize=(6.5, 3.6))
    for kind, (color, line) in END_STYLES.items():
        wide = ends.pivot(index="seed", columns="sft_epochs", values=kind)
        band(ax, wide.columns, wide.to_numpy(), color, kind, linestyle=line)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(xlabel="epochs of SFT before DPO", ylabel="end change in DPO (nats)")
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))  # the lines fill the panel
    return fig


def rate_and_beta(ends: pd.DataFrame) -> Figure:
    """End changes in short DPO over the learning rate, one panel a beta. ends: rows of `evidence.ends`."""
    betas = sorted(ends.beta.unique())
    fig, axes = plt.subplots(1, len(betas), figsize=(9, 3.4), sharey=True)
    for ax, beta in zip(axes, betas, strict=True):
        for kind, (color, line) in END_STYLES.items():
            wide = ends[ends.beta == beta].pivot(index="seed", columns="lr", values=kind)
            band(ax, wide.columns, wide.to_numpy(), color, kind, linestyle=line)
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set(xscale="log", xlabel="learning rate", title=f"β = {beta:g}")
        ax.minorticks_off()
        ax.set_xticks(wide.columns, [f"{rate:g}" for rate in wide.columns])
    axes[0].set_ylabel("end change in DPO (nats)")
    axes[0].legend(fontsize=7)
    return fig


def when_top_rises(ends: pd.DataFrame) -> Figure:
    """End change of y* along three paths, by kind of pairs and length of SFT. ends: rows of `evidence.ends`."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.6), sharey=True, sharex=True)
    kinds = [kind for kind in ("as_written", "swapped", "rephrase", "style") if (ends.pairs == kind).any()]
    lengths = sorted(ends.sft_epochs.unique())
    shades = sns.color_palette("crest", len(lengths))
    rates = sorted(ends.lr.unique())
    for ax, path in zip(axes, statistics.PATHS, strict=True):
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
    ax.scatter(fit["x"], fit["y"], s=12, color=GREY, alpha=0.7, label="_prompts")
    ends = np.array([fit["x"].min(), fit["x"].max()])
    ax.plot(ends, fit["slope"] * ends, color=BLUE, label="_regression")
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
                label = f"_{split} prompts, seed {seed}" if n else f"{split} prompts"
                ax.plot([0, 1], mean[seed], color=color, marker=MARKS[color], label=label)
        ax.set(xticks=[0, 1], xticklabels=["before", "after"], xlim=(-0.3, 1.3))
    axes[0].set(title="repeated 4-grams (%)")
    axes[1].set(title="log π of the greedy answer (nats)")
    axes[0].legend(fontsize=7)
    return fig


def overwritten_top(table: pd.DataFrame, per_epoch: float) -> Figure:
    """The arg-max metric along the chosen answer, and as it comes out when the last type overwrites it."""
    fig, ax = plt.subplots(figsize=(6, 3.2))
    for kind, label in (("chosen", "along chosen"), ("test_shuffled", "overwritten by the last type, test_shuffled")):
        steps, values = curves(table, kind, "argmax_logp_sum")
        color, line = STYLES[kind]
        band(ax, steps / per_epoch, values, color, label, linestyle=line)
    ax.set(xlabel="epoch", ylabel="log π(y*) (nats)")
    ax.legend(fontsize=7)
    return fig


def sign_delta_bars(table: pd.DataFrame) -> Figure:
    """Figure 8, DPO: accumulated SignDelta of every type, mean and range of the seeds."""
    sums = pd.DataFrame({seed: statistics.sign_delta(t, "chosen") for seed, t in table.groupby("seed")})
    values = sums.loc[[kind for kind in STYLES if kind in sums.index]]
    spread = [values.mean(axis=1) - values.min(axis=1), values.max(axis=1) - values.mean(axis=1)]
    fig, ax = plt.subplots(figsize=(6.5, 3.4))
    ax.barh(values.index, values.mean(axis=1), xerr=spread, color=[STYLES[k][0] for k in values.index], capsize=2)
    ax.axvline(0, color="0.4", linewidth=0.8)
    ax.invert_yaxis()
    ax.set(xlabel="accumulated SignDelta")
    return fig
