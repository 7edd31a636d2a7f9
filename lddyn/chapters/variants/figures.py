"""Figures of chapter 6."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.figure import Figure

from lddyn.chapters.style import BLUE, BROWN, GREEN, GREY, MARKS, ORANGE, PURPLE, RED, TEAL, band, curves
from lddyn.chapters.variants import evidence

OUTCOMES = {"chosen": BLUE, "rejected": ORANGE, "y* along chosen": GREEN, "unpushed": RED}
PUSHED_COLORS = {
    "greedy": GREEN, "sampled": PURPLE, "rejected": ORANGE, "rejected_semantic": BROWN, "other_train": RED,
    "unrelated": GREY,
}  # fmt: skip


def _shorter(values: np.ndarray) -> np.ndarray:
    """Symmetric log scale: linear up to 1 nat, then logarithmic."""
    return np.sign(values) * np.log1p(np.abs(values))


def _longer(values: np.ndarray) -> np.ndarray:
    return np.sign(values) * np.expm1(np.abs(values))


def forces_and_outcomes(ends: pd.DataFrame, table: pd.DataFrame, beta: float) -> Figure:
    """Figure 2 as a measurement: the force of each loss along the margin, beside what the loss did.

    ends: `evidence.variant_ends`, one row a loss and seed; table: `evidence.loss_runs`, for the likelihoods and
    lengths from which the forces start. Forces are in units of the larger one at margin 0, half of the margin on each
    answer; the line ends where the run ended (mean of the seeds).
    """
    names = [name for name in evidence.VARIANTS if name in set(ends.name)]
    start = table[(table.step == 0) & (table.name == "SFT") & table.prompt_id.astype(str).str.startswith("train/")]
    mean = start.groupby(["metric", "response_type"], observed=True).value.mean()
    logps, lengths = ([mean[m, kind] for kind in ("chosen", "rejected")] for m in ("logp_sum", "tokens"))
    fig, axes = plt.subplots(len(names), 2, figsize=(9, 0.95 * len(names) + 0.6), sharex="col", width_ratios=[1, 1.5])
    for (left, right), name in zip(axes, names, strict=True):
        rows = ends[ends.name == name]
        h = torch.linspace(0, max(float(rows.margin.mean()), 1.0), 60, dtype=torch.float64)
        reference = tuple(torch.full_like(h, value) for value in logps)
        up, down = evidence.forces(name, reference[0] + h / 2, reference[1] - h / 2, reference, lengths, beta)
        unit = max(abs(up[0]), abs(down[0]))
        for force, color, line, label in ((up, BLUE, "-", "_on chosen"), (down, ORANGE, "--", "_on rejected")):
            left.plot(h, force / unit, color=color, linestyle=line, label=label)
            left.plot(h[-1:], force[-1:] / unit, MARKS[color], color=color, markersize=4, label=f"{label}, at the end")
        left.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        left.set(ylim=(-1.25, 1.25), yticks=[-1, 0, 1])
        left.set_ylabel(name, rotation=0, ha="right", va="center")
        for place, (kind, color) in enumerate(OUTCOMES.items()):
            values = rows[kind].to_numpy()
            right.barh(place, values.mean(), color=color, height=0.75, label="_mean")
            right.plot(values, [place] * len(values), ".", color="0.25", markersize=3, label="_single seeds")
            right.text(
                1.02, place, f"{values.mean():+.1f}", transform=right.get_yaxis_transform(), fontsize=7, va="center"
            )
        right.axvline(0, color="0.4", linewidth=0.8)
        right.set(yticks=range(len(OUTCOMES)), ylim=(len(OUTCOMES) - 0.5, -0.5))
        right.set_yticklabels(OUTCOMES, fontsize=7)
        right.set_xscale("function", functions=(_shorter, _longer))
        right.set_xticks(ticks := [-100, -30, -10, -3, -1, 0, 1, 3], ticks)
    axes[-1, 0].set_xlabel("margin of the log-ratios (nats)")
    axes[-1, 1].set_xlabel("end change of log π (nats, logarithmic)")
    axes[0, 0].set_title("force on chosen and rejected")
    axes[0, 1].set_title("what the run did")
    return fig


def margins_over_steps(table: pd.DataFrame, names) -> Figure:
    """Margin of the log-ratios, chosen and rejected over the steps, for some losses. table: `evidence.loss_runs`."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), sharex=True)
    for name, color in zip(names, (BLUE, ORANGE, GREEN, PURPLE, RED), strict=False):
        rows = table[table.name == name]
        steps, chosen = curves(rows, "chosen")
        _, rejected = curves(rows, "rejected")
        for ax, values in zip(axes, (chosen - rejected, chosen, rejected), strict=True):
            band(ax, steps, values - values[:, :1], color, name)
    for ax, title in zip(axes, ("margin", "chosen", "rejected"), strict=True):
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set(title=title, xlabel="step")
    axes[0].set_ylabel("change (nats)")
    axes[0].legend(fontsize=7)
    return fig


def softening(ends: pd.DataFrame) -> Figure:
    """What each way to soften the squeeze keeps and wins. ends: `evidence.variant_ends` of `evidence.loss_runs`.

    Left: change of log pi(chosen) against the margin; right: against how often a sampled answer to a test prompt
    scores better than the SFT model's. Crosses span the seeds.
    """
    trained = ends[ends.name != "SFT"]
    mean, low, high = (
        getattr(trained.groupby("name")[["margin", "chosen", "won"]], f)() for f in ("mean", "min", "max")
    )
    colors = dict(zip(mean.index, sns.color_palette("husl", len(mean)), strict=True))
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), sharey=True)
    axes[0].set_yscale("symlog", linthresh=0.5)  # most losses keep chosen within a nat, a few lose many
    for ax, x in zip(axes, ("margin", "won"), strict=True):
        for name in mean.index:
            place = mean.loc[name, [x, "chosen"]].to_numpy(dtype=float)
            for axis, column in enumerate((x, "chosen")):
                ends_of = np.tile(place, (2, 1))
                ends_of[:, axis] = low.loc[name, column], high.loc[name, column]
                ax.plot(*ends_of.T, color=colors[name], linewidth=1, alpha=0.6, label=f"_{name}, range of the seeds")
            ax.plot(*place, "o", color=colors[name], markersize=5)
        ax.margins(x=0.14)
        _label(ax, mean[[x, "chosen"]])
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes[1].axvline(0.5, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes[0].set(xlabel="margin of the log-ratios (nats)", ylabel="change of log π(chosen) (nats)")
    axes[1].set(xlabel="share of sampled answers that beat the SFT model's")
    return fig


def _label(ax, places: pd.DataFrame) -> None:
    """Write the name of each point beside it, where it covers the fewest of the names and points before it."""
    ax.figure.canvas.draw()
    points = ax.transData.transform(places.to_numpy())
    taken = [(x, y, 4.0, 4.0) for x, y in points]  # centre and half size of a box, in pixels
    for (x, y), name, place in zip(points, places.index, places.to_numpy(), strict=True):
        half = 2.6 * len(name), 5.0
        sides = [(6 + half[0], 0), (-6 - half[0], 0), (0, 10), (0, -10), (4 + half[0], 10), (4 + half[0], -10)]
        sides += [(-4 - half[0], 10), (-4 - half[0], -10), (4 + half[0], 20), (4 + half[0], -20)]

        def covered(side, x=x, y=y, half=half):
            dx, dy = side
            return sum(abs(x + dx - u) < half[0] + a and abs(y + dy - v) < half[1] + b for u, v, a, b in taken)

        dx, dy = min(sides, key=covered)
        taken.append((x + dx, y + dy, *half))
        scale = 72 / ax.figure.dpi
        ax.annotate(
            name,
            place,
            xytext=(dx * scale, dy * scale),
            textcoords="offset points",
            fontsize=7,
            ha="center",
            va="center",
        )


def pushed_sources(ends: pd.DataFrame) -> Figure:
    """What training on pairs from each source did: changes of log pi, and the scores. ends: of `source_runs`."""
    names = [name for name in ("SFT", *evidence.SOURCES) if name in set(ends.name)]
    panels = {"chosen": BLUE, "unpushed": RED, "y* along chosen": GREEN, "sampled": PURPLE}
    titles = {"unpushed": "what nobody pushed", "sampled": "score of sampled answers"}
    fig, axes = plt.subplots(1, len(panels), figsize=(9.5, 3.2), sharey=True)
    for ax, (kind, color) in zip(axes, panels.items(), strict=True):
        for place, name in enumerate(names):
            values = ends.loc[ends.name == name, kind].to_numpy()
            ax.plot(values, [place] * len(values), "o", color=color, alpha=0.45, markersize=4, label="_single seeds")
            ax.plot(values.mean(), place, "|", color=color, markersize=16, markeredgewidth=2.5, label="_mean")
        ax.set(title=titles.get(kind, kind), yticks=range(len(names)), yticklabels=names)
        if kind == "sampled":
            ax.axvline(ends.loc[ends.name == "SFT", kind].mean(), color="0.6", linewidth=0.8, zorder=0)
        else:
            ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
            ax.set_xlabel("change (nats)")
    axes[-1].set_xlabel("of 2")
    axes[0].invert_yaxis()
    return fig


def pushed_over_rounds(table: pd.DataFrame) -> Figure:
    """How likely the policy finds the pairs of each round before it trains on them. table: `evidence.source_runs`."""
    rows = table[table.metric == "pushed_before"]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, sharex=True)
    names = [name for name in evidence.SOURCES if name in set(rows.name)]
    colors = dict(zip(names, (ORANGE, BROWN, PURPLE, GREY, TEAL, BLUE), strict=False))
    for ax, kind in zip(axes, ("chosen", "rejected"), strict=True):
        for name in names:
            part = rows[(rows.name == name) & (rows.response_type == kind)]
            values = part.pivot(index="seed", columns="step", values="value")
            band(ax, np.arange(1, values.shape[1] + 1), values.to_numpy(), colors[name], name)
        ax.set(title=f"{kind} of the round", xlabel="round", xticks=range(1, values.shape[1] + 1))
    axes[0].set_ylabel("log π per token before the round (nats)")
    axes[1].legend(fontsize=7)
    return fig


def push_scatter(fit: dict) -> Figure:
    """One push at a time: what nobody pushed against how likely the pushed response was (`evidence.push_fit`)."""
    fig, ax = plt.subplots(figsize=(6.5, 3.8))
    for kind, color in PUSHED_COLORS.items():
        part = fit["kind"] == kind
        ax.scatter(fit["x"][part], fit["y"][part], s=14, color=color, marker=MARKS[color], alpha=0.7, label=kind)
    ends = np.array([fit["x"].min(), fit["x"].max()])
    ax.plot(ends, fit["slope"] * ends, color=BLUE, label="_regression")
    ax.fill_between(ends, fit["interval"][0] * ends, fit["interval"][1] * ends, color=BLUE, alpha=0.18, linewidth=0)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set(
        xlabel="log π of the pushed response per token, prompt and length fixed (nats)",
        ylabel="change of what nobody pushed\n(nats per token)",
    )
    ax.legend(fontsize=7, title="pushed", title_fontsize=7)
    return fig
