"""Figures of chapter 2."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from lddyn.chapters.decomposition import evidence
from lddyn.chapters.style import BLACK, BLUE, GREEN, GREY, MARKS, ORANGE, PURPLE, RED, STYLES, band

RUN_COLORS = {"SFT": BLUE, "DPO": ORANGE, "RMSprop": GREEN, "SGD": RED, "LoRA": PURPLE, "AdamW": GREY}
FROZEN_COLORS = {"A K G": BLACK, "A at the start": GREEN, "K at the start": BLUE, "G at the start": RED}


def predicted_against_measured(table: pd.DataFrame, etas: tuple[float, float]) -> Figure:
    """One point a response: the change of log pi by one gradient step against its prediction; SFT above, DPO below.

    Columns: two learning rates. Both axes are linear near zero and logarithmic beyond; the unit is nats.
    """
    fig, axes = plt.subplots(2, len(etas), figsize=(8, 6.6))
    for row, name in zip(axes, evidence.MAIN.values(), strict=True):
        single = evidence.single_steps(evidence.followed(table)[name])
        for ax, eta in zip(row, etas, strict=True):
            part = single[np.isclose(single.eta, eta)]
            limit = max(part.predicted.abs().max(), part.measured.abs().max()) * 1.5
            ax.plot([-limit, limit], [-limit, limit], color="0.7", linewidth=0.8, zorder=0, label="_equal")
            for kind, (color, line) in STYLES.items():
                points = part[part.response_type == kind]
                face = color if line == "-" else "none"
                mark = {"marker": MARKS[color], "edgecolor": color, "facecolor": face}
                ax.scatter(points.predicted, points.measured, s=14, label=kind, **mark)
            for set_scale in (ax.set_xscale, ax.set_yscale):
                set_scale("symlog", linthresh=limit / 100)
            share = evidence.explained(part.predicted.to_numpy(), part.measured.to_numpy())
            ax.set_title(f"{name}, η = {eta:g}: share explained {share:.4f}", fontsize=9)
            ax.tick_params(labelsize=7)
        row[0].set_ylabel("measured Δ log π (nats)")
    for ax in axes[-1]:
        ax.set_xlabel("predicted Δ log π (nats)")
    axes[0, 0].legend(fontsize=6, ncols=2)
    return fig


def step_error_order(table: pd.DataFrame, marked: dict[str, float]) -> Figure:
    """Change and error of one gradient step over the learning rate, SFT and DPO; `marked` names learning rates."""
    fig, axes = plt.subplots(1, 2, figsize=(8.5, 3.5), sharey=True)
    for ax, name in zip(axes, evidence.MAIN.values(), strict=True):
        errors = evidence.step_errors(evidence.single_steps(evidence.followed(table)[name]))
        for column, color, label in (("change", BLUE, "measured change"), ("error", RED, "error of the prediction")):
            by_eta = errors.groupby("eta")[column]
            middle = by_eta.median()
            ax.loglog(middle.index, middle, color=color, label=label, marker=MARKS[color], markersize=4)
            ax.fill_between(middle.index, by_eta.min(), by_eta.max(), color=color, alpha=0.15, linewidth=0)
        for text, eta in marked.items():
            ax.axvline(eta, color="0.5", linewidth=0.8, linestyle=":")
            ax.annotate(
                text, (eta, 0.02), xycoords=("data", "axes fraction"), fontsize=7, rotation=90, va="bottom", ha="right"
            )
        ax.set(xlabel=r"learning rate $\eta$ of one gradient step", title=name)
    axes[0].set_ylabel("nats (norm over responses)")
    axes[0].legend(fontsize=8)
    return fig


def summed_predictions(
    table: pd.DataFrame, kinds=("chosen", "chosen_semantic", "rejected", "other_train", "unrelated")
) -> Figure:
    """Changes of log pi along SFT and DPO (lines) and the running sum of one-step predictions (dots)."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    for ax, name in zip(axes, evidence.MAIN.values(), strict=True):
        each = evidence.predictions(evidence.followed(table)[name])
        for kind in kinds:
            color, line = STYLES[kind]
            mean = each[each.response_type == kind].groupby(["seed", "step"])[["measured", "predicted"]].mean()
            sums = mean.groupby("seed").cumsum()
            wide = {column: sums[column].unstack("seed").T for column in sums}
            band(ax, wide["measured"].columns, wide["measured"].to_numpy(), color, kind, linestyle=line)
            shown = wide["predicted"].mean().iloc[:: max(1, len(wide["predicted"].columns) // 16)]
            ax.plot(shown.index, shown, ".", color=color, markersize=5, label=f"_{kind}, predicted")
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set(title=name, xlabel="step")
    axes[0].set_ylabel("change of log π (nats)")
    axes[0].legend(fontsize=7)
    return fig


def explained_by_length(table: pd.DataFrame) -> Figure:
    """Share of the change over one step, over a block of steps and over the run that one prediction explains."""
    parts = evidence.followed(table)
    fig, ax = plt.subplots(figsize=(6.5, 3.4))
    for place, (name, rows) in enumerate(parts.items()):
        lengths = ("1", evidence.block_length(rows), "all")
        steps = int(rows.step.max())
        values = np.array(
            [[evidence.step_explained(one, n) for n in lengths] for _, one in rows.groupby("seed")]
        )  # (seeds, lengths)
        x = [1, int(lengths[1]), steps]
        color = RUN_COLORS[name]
        ax.plot(x, values.mean(0), color=color, label=name, marker=MARKS[color], markersize=4)
        for column, at in zip(values.T, x, strict=True):
            label = f"_{name}, single seeds"
            ax.plot([at * 1.03**place] * len(column), column, "_", color=color, markersize=5, label=label)
    ax.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    ax.set(
        xscale="log",
        xlabel="steps that one prediction covers",
        ylabel="share of the change explained",
        ylim=(min(0, ax.get_ylim()[0]), 1.05),
    )
    ax.legend(fontsize=7)
    return fig


def frozen_factors(table: pd.DataFrame, kinds=("chosen", "rejected", "chosen_semantic", "other_train")) -> Figure:
    """How fast SFT moves four kinds of response, with A, K and G of the time and with one of them as at the start."""
    rows = evidence.followed(table)["SFT"]
    seeds = [evidence.rates(one) for _, one in rows.groupby("seed")]
    fig, axes = plt.subplots(1, len(kinds), figsize=(10, 3))
    for ax, kind in zip(axes, kinds, strict=True):
        for name, color in FROZEN_COLORS.items():
            values = np.array([wide[name][kind] for wide in seeds])
            band(ax, seeds[0][name].index, values, color, name, linewidth=1.4)
        ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        ax.set(title=kind, xlabel="step")
    axes[0].set_ylabel("d log π / dη (nats)")
    axes[0].legend(fontsize=7)
    return fig


def kernel_over_training(table: pd.DataFrame) -> Figure:
    """||K|| of every type over SFT and DPO, and how alike its order over types is to the last one, for all runs."""
    parts = evidence.followed(table)
    fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.4))
    for ax, name in zip(axes, evidence.MAIN.values(), strict=False):
        seeds = [evidence.by_type(one, "kernel_norm") for _, one in parts[name].groupby("seed")]
        for kind in seeds[0]:
            color, line = STYLES[kind]
            mean = np.mean([wide[kind] for wide in seeds], axis=0, keepdims=True)
            band(ax, seeds[0].index, mean, color, kind, linestyle=line)
        ax.set(
            title=f"{name}: ‖K‖ with the chosen answer" if name == "SFT" else f"{name}: ‖K‖ with the pair",
            xlabel="step",
            yscale="log",
        )
    axes[0].legend(fontsize=5.5, ncols=2)
    for name, rows in parts.items():
        seeds = [evidence.stability(evidence.by_type(one, "kernel_norm")) for _, one in rows.groupby("seed")]
        x = seeds[0].index / seeds[0].index[-1]
        band(axes[2], x, np.array(seeds), RUN_COLORS[name], name)
    axes[2].set(
        title="order of ‖K‖ against its last", xlabel="share of training", ylabel="rank correlation", ylim=(None, 1.02)
    )
    axes[2].legend(fontsize=7)
    return fig


def stand_ins(table: pd.DataFrame) -> Figure:
    """LBK and SignDelta, as printed and as released, and ||K||: stability of the order, and agreement with ||K||."""
    parts = {name: rows for name, rows in evidence.followed(table).items() if name in evidence.MAIN.values()}
    fig, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
    for shift, (name, rows) in zip((-0.18, 0.18), parts.items(), strict=True):
        stable, agreement = [], []
        for _, one in rows.groupby("seed"):
            measures = evidence.similarity_measures(one)
            stable.append({key: evidence.stability(wide).iloc[:-1].mean() for key, wide in measures.items()})
            agreement.append({"‖K‖": 1.0} | evidence.agreement_with_kernel(one).to_dict())
        for ax, found in zip(axes, (stable, agreement), strict=True):
            frame = pd.DataFrame(found)
            places = np.arange(len(frame.columns)) + shift
            ax.barh(places, frame.mean(), height=0.34, color=RUN_COLORS[name], label=name)
            for values in frame.to_numpy():
                ax.plot(values, places, ".", color="0.25", markersize=3, label=f"_{name}, single seeds")
            ax.set_yticks(range(len(frame.columns)), frame.columns)
    for ax, title in zip(
        axes, ("order over types against its last", "order over types against that of ‖K‖"), strict=True
    ):
        ax.axvline(0, color="0.4", linewidth=0.8)
        ax.set(title=title, xlabel="rank correlation")
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=7)
    return fig


def step_heat_maps(table: pd.DataFrame, evaluation: int = 0) -> Figure:
    """What one SFT step on each type does to every other, as a share of its own rise, and ||K|| between them."""
    rows = evidence.followed(table)["SFT"]
    each = [one for _, one in rows.groupby("seed")]
    heat = sum((heat / np.diag(heat)) for heat in (evidence.step_heat(one, "heat", evaluation) for one in each)) / len(
        each
    )
    size = sum(evidence.step_heat(one, "kernel", evaluation) for one in each) / len(each)
    scale = np.sqrt(np.diag(size))
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.9), sharey=True)
    panels = (
        (heat, "change of log π by one step, own change = 1", "RdBu_r", 0.7),
        (size / np.outer(scale, scale), "‖K‖, relative", "mako_r", None),
    )
    for ax, (values, title, colors, limit) in zip(axes, panels, strict=True):
        shown = values.mask(np.eye(len(values), dtype=bool))
        limits = {"vmin": -limit, "vmax": limit} if limit else {}
        sns.heatmap(
            shown, ax=ax, cmap=colors, annot=True, fmt=".2f", annot_kws={"size": 5.5}, cbar=False, square=True, **limits
        )
        ax.set(title=title, xlabel="the step is on", ylabel="")
    axes[0].set_ylabel("observed")
    return fig


def printed_sign_deltas(table: pd.DataFrame) -> Figure:
    """SignDelta as printed (per unit of eta) and the change of the response itself, under SFT and DPO."""
    parts = evidence.followed(table)
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for ax, name in zip(axes, evidence.MAIN.values(), strict=True):
        seeds = pd.DataFrame([evidence.printed_sign_delta(one) for _, one in parts[name].groupby("seed")])
        ax.barh(seeds.columns, seeds.mean(), color=[STYLES[kind][0] for kind in seeds], alpha=0.85, label="_mean")
        for values in seeds.to_numpy():
            ax.plot(values, seeds.columns, ".", color="0.25", markersize=3, label="_single seeds")
        ax.axvline(0, color="0.4", linewidth=0.8)
        ax.set(title=name, xlabel="SignDelta as printed (nats per η)")
    axes[0].invert_yaxis()
    return fig


def gradient_entanglement(products: np.ndarray, ches: np.ndarray) -> Figure:
    """One step of DPO on each pair: what it does to the chosen answer, against the CHES score; above zero it rises.

    products: (pairs, 3) of `kernels.gradient_products`; ches: (pairs,).
    """
    change, cosine = evidence.entanglement(products)
    fig, axes = plt.subplots(1, 2, figsize=(8, 3))
    axes[0].hist(cosine, bins=12, color=BLUE)
    axes[0].set(xlabel="cosine of the gradients of log π⁺ and log π⁻", ylabel="pairs")
    axes[1].scatter(ches, change, s=14, color=ORANGE)
    axes[1].axhline(0, color="0.6", linewidth=0.8)
    axes[1].set(xlabel="CHES score", ylabel="d log π⁺ / dη over the force")
    return fig
