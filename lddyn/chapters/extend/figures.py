"""Figures of chapter 7."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lddyn.chapters import statistics
from lddyn.chapters.extend import evidence, judging
from lddyn.chapters.extend.evidence import ARMS, OTHER_DESIGNS
from lddyn.chapters.style import BLUE, GREEN, GREY, MARKS, ORANGE, PURPLE, RED, TEAL, band

ARM_STYLES = {"baseline": (GREY, "-"), "extended": (BLUE, "-"), "equal steps": (GREY, "--")}
FOUND = {"right": BLUE, "missing": GREY, "wrong": RED, "casual": ORANGE, "garbled": PURPLE, "off_topic": GREEN}


def two_stages(table: pd.DataFrame, sft_epochs: float, epochs: float) -> Figure:
    """Figure 5: SFT and DPO of all arms on one axis, the seeds moved to a common start; lengths in epochs.

    table: the runs on natural text.
    """
    panels = (
        ("chosen", "chosen", "logp_sum"),
        ("rejected", "rejected", "logp_sum"),
        ("y* along chosen", "chosen", "argmax_logp_sum"),
        ("rephrase of chosen", "chosen_semantic", "logp_sum"),
        ("initial sample", "chosen_initial", "logp_sum"),
        ("answers never trained on", "other_test", "logp_sum"),
    )
    fig, axes = plt.subplots(2, 3, figsize=(10, 5.6), sharex=True)
    for ax, (title, kind, metric) in zip(axes.flat, panels, strict=True):
        for arm, (color, line) in ARM_STYLES.items():
            steps, values = _of_arm(table, arm, kind, metric)
            if len(steps):
                before, after = ARMS[arm].epochs * sft_epochs / -steps.min(), epochs / steps.max()
                x = np.where(steps < 0, steps * before, steps * after)
                common = values - values[:, :1] + values[:, 0].mean()
                band(ax, x, common, color, arm, linestyle=line)
        ax.axvline(0, color="0.4", linewidth=0.8, linestyle=":")
        ax.set_title(title)
    for ax in axes[1]:
        ax.set_xlabel("epochs; DPO starts at 0")
    for ax in axes[:, 0]:
        ax.set_ylabel("log π (nats)")
    axes[0, 0].legend(fontsize=8)
    return fig


def _of_arm(table: pd.DataFrame, arm: str, kind: str, metric: str = "logp_sum", design: str = "natural"):
    """Steps and (seeds, steps) of the mean of a metric, as `style.curves`."""
    runs = evidence.of_arm(table, arm, design)
    seeds = [statistics.mean_over_prompts(run, kind, metric) for _, run in runs.groupby("seed")]
    seeds = [values for values in seeds if len(values)]
    return (seeds[0].index.to_numpy(), np.array([s.to_numpy() for s in seeds])) if seeds else (np.array([]), None)


def start_of_dpo(table: pd.DataFrame, epochs: float) -> Figure:
    """The first half of DPO: change of log pi(y*) along the chosen answers, every seed a line."""
    fig, axes = plt.subplots(1, len(ARM_STYLES), figsize=(9.5, 2.9), sharey=True)
    for ax, (arm, (color, _)) in zip(axes, ARM_STYLES.items(), strict=True):
        steps, values = _of_arm(table, arm, "chosen", "argmax_logp_sum")
        here = (steps >= 0) & (steps <= steps.max() / 2)
        x = steps[here] / steps.max() * epochs
        for n, line in enumerate(values, 1):
            look = {"color": color, "marker": "o", "markersize": 3, "linewidth": 1.2, "label": f"_run {n}"}
            ax.plot(x, line[here] - line[steps == 0], **look)
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.axvspan(0, epochs / 4, color="0.93", zorder=-1)
        ax.set(title=arm, xlabel="epochs of DPO")
    axes[0].set_ylabel("change of log π(y*) (nats)")
    return fig


def at_equal_margin(table: pd.DataFrame) -> Figure:
    """Changes over DPO against the growth of the gap between chosen and rejected: equal margin, not equal steps."""
    panels = {"chosen": "logp_sum", "chosen_semantic": "logp_sum", "other_test": "logp_sum", "y* along chosen": ""}
    fig, axes = plt.subplots(1, len(panels), figsize=(10, 3), sharex=True)
    for ax, (kind, metric) in zip(axes, panels.items(), strict=True):
        for arm, (color, line) in ARM_STYLES.items():
            for n, (_, run) in enumerate(evidence.of_arm(table, arm).groupby("seed")):
                gap = evidence.growth(run, arm)
                which = (kind, metric) if metric else ("chosen", "argmax_logp_sum")
                values = evidence.changes(run, arm, *which)
                label = f"_{arm}, run {n + 1}" if n else arm
                look = {"color": color, "linestyle": line, "linewidth": 1.2, "marker": MARKS[color], "markersize": 3}
                ax.plot(gap, values[values.index >= 0], label=label, **look)
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set(title=kind, xlabel="growth of the gap (nats)")
    axes[0].set_ylabel("change of log π since\nthe start of DPO (nats)")
    axes[0].legend(fontsize=7)
    return fig


def win_rates_over_epochs(rates: pd.DataFrame, control: pd.DataFrame) -> Figure:
    """Table 1 beside ours: win rate of extended among decided pairs, with 95% intervals, over epochs of DPO.

    rates, control: `evidence.win_rates` against the baseline and against the baseline with as many steps of SFT.
    """
    fig, axes = plt.subplots(1, 3, figsize=(10, 3.3), sharey=True)
    for (judge, shares), color in zip(evidence.TABLE_1.items(), (GREEN, PURPLE), strict=True):
        ends = np.array([judging.binomial_interval(share, 1000) for share in shares])
        _points(axes[0], evidence.JUDGED, np.array(shares), ends, color, judge)
    axes[0].set_title("the paper, one order")
    for ax, (title, table) in zip(axes[1:], (("baseline", rates), ("equal steps of SFT", control)), strict=True):
        for decoding, color in (("sampled", BLUE), ("greedy", ORANGE)):
            rows = table[table.decoding == decoding]
            _points(ax, rows.epoch, rows.win_rate.to_numpy(), rows[["low", "high"]].to_numpy(), color, decoding)
        ax.set_title(f"ours, against {title}")
    for ax in axes:
        ax.axhline(0.5, color="0.6", linewidth=0.8, zorder=0)
        ax.set(xlabel="epochs of DPO", ylim=(0, 1))
        ax.legend(fontsize=7)
    axes[0].set_ylabel("win rate of extended")
    return fig


def _points(ax, x, y: np.ndarray, ends: np.ndarray, color: str, label: str) -> None:
    away = np.clip(np.abs(ends.T - y), 0, None)
    look = {"color": color, "marker": MARKS[color], "markersize": 4, "capsize": 3, "linewidth": 1.4}
    ax.errorbar(x, y, yerr=away, label=label, **look)


def won_tied_lost(rates: pd.DataFrame) -> Figure:
    """All pairs, the tied ones too, for each epoch: shares won, tied, lost and malformed by extended."""
    parts = {"won": BLUE, "tied": "0.85", "malformed": "0.4", "lost": ORANGE}
    decodings = ("sampled", "greedy")
    fig, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
    for ax, decoding in zip(axes, decodings, strict=True):
        rows, left = rates[rates.decoding == decoding], 0.0
        for name, color in parts.items():
            shares = rows[name].to_numpy()
            ax.barh(np.arange(len(rows)), shares, left=left, color=color, label=name)
            left = left + shares
        ax.set(title=f"{decoding} answers", xlabel="share of pairs", xlim=(0, 1))
        ax.set_yticks(range(len(rows)), [f"{epoch:g} epochs" for epoch in rows.epoch])
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return fig


def what_the_judge_found(table: pd.DataFrame, epochs: float) -> Figure:
    """Sentences of each kind in a sampled answer, and its score, over epochs of DPO. table: the closed world's runs."""
    fig, axes = plt.subplots(1, len(ARM_STYLES) + 1, figsize=(11, 3.1))
    for ax, arm in zip(axes, ARM_STYLES, strict=False):
        for field, color in FOUND.items():
            steps, values = _found(table, arm, field)
            band(ax, steps / steps.max() * epochs, values, color, field, markersize=3)
        ax.set(title=arm, xlabel="epochs of DPO", ylim=(-0.05, 2.05))
    for arm, (color, line) in ARM_STYLES.items():
        steps, values = _found(table, arm, "score")
        band(axes[-1], steps / steps.max() * epochs, values, color, arm, linestyle=line, markersize=3)
    axes[0].set_ylabel("in a sampled answer")
    axes[0].legend(fontsize=7)
    axes[-1].set(title="score", xlabel="epochs of DPO")
    axes[-1].legend(fontsize=7)
    return fig


def _found(table: pd.DataFrame, arm: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    found = evidence.scores(table, arm, field)
    return found.columns.to_numpy(dtype=float), found.groupby("seed").mean().to_numpy()


def lead_by_design(rates: pd.DataFrame) -> Figure:
    """Lead of extended, won minus lost over all pairs, in each design of the world. rates: `evidence.win_rates`."""
    rows = rates[rates.decoding == "sampled"]
    designs, colors = [d for d in ("main", *OTHER_DESIGNS) if d in set(rows.design)], (GREY, TEAL, BLUE, PURPLE)
    fig, ax = plt.subplots(figsize=(7, 0.55 * len(designs) + 1.2))
    for shift, (epoch, color) in enumerate(zip(sorted(rows.epoch.unique()), colors, strict=False)):
        part = rows[rows.epoch == epoch].set_index("design").loc[designs]
        places = np.arange(len(designs)) + 0.18 * (shift - 1.5)
        away = np.abs(part[["lead_low", "lead_high"]].to_numpy().T - part.lead.to_numpy())
        look = {"fmt": MARKS[color], "color": color, "markersize": 4, "capsize": 2}
        ax.errorbar(part.lead, places, xerr=away, label=f"{epoch:g} epochs", **look)
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(designs)), designs)
    ax.set(xlabel="share won minus share lost by extended", xlim=(-1, 1))
    ax.invert_yaxis()
    ax.legend(fontsize=7)
    return fig
