"""One style, one colour and mark per family of responses, curves of seeds with their range, and what a figure draws."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.category import StrCategoryFormatter
from matplotlib.collections import PathCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import AxLine, Line2D
from matplotlib.text import Annotation
from matplotlib.ticker import FixedFormatter, FuncFormatter
from scipy.stats import spearmanr

from lddyn.chapters import statistics

BLUE, ORANGE, GREEN, RED, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#c53030", "#718096"
PURPLE, TEAL, BROWN, BLACK = "#6b46c1", "#2c7a7b", "#975a16", "#1a202c"
# no line is told by its colour alone
MARKS = {BLUE: "o", ORANGE: "s", GREEN: "v", RED: "^", GREY: "X", PURPLE: "D", TEAL: "*", BROWN: "P", BLACK: "h"}
# one colour and mark a family, one line a member of it; also the order of legends and heat maps
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
        from IPython import get_ipython
        from matplotlib_inline.backend_inline import set_matplotlib_formats

        set_matplotlib_formats("svg", metadata={"Date": None}, bbox_inches="tight")
        get_ipython().display_formatter.mimebundle_formatter.for_type(Figure, lambda fig: {DRAWN: panels(fig)})
    except (ImportError, AttributeError):  # not in a notebook
        pass


def band(ax, x, values: np.ndarray, color: str, label: str | None = None, **line) -> None:
    """Mean over seeds, marked by its colour, with the range of the seeds behind it. values: (seeds, points)."""
    marks = {"marker": MARKS[color], "markersize": 4, "markevery": -(-len(x) // 12)}
    ax.plot(x, values.mean(0), color=color, label=label, **marks | line)
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
            ax.set_label(f"{name}: {title}")
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
        ax.scatter(theirs[kind], ours[kind], color=color, marker=MARKS[color], s=22)
        ax.annotate(kind, (theirs[kind], ours[kind]), fontsize=7, xytext=(4, 2), textcoords="offset points")
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    name = {"logp_sum": "log π (nats)", "a_norm_mean": "$\\|A\\|_F$"}[metric]
    rank = spearmanr(ours, theirs).statistic
    ax.set(xlabel=f"the authors' log: change of {name}", ylabel=f"this companion: change of {name}")
    ax.set_title(f"same sign in {(ours * theirs > 0).sum()} of {len(ours)}, rank correlation {rank:.2f}")
    return fig


# --- what a figure draws, read back from its axes ----------------------------------------------------------------

DRAWN = "application/vnd.lddyn.figure+json"  # stands beside the image in an executed notebook
SIGNS = {r"\Delta": "Δ", r"\eta": "η", r"\pi": "π", r"\|": "‖", r"\mathcal": "", "\\": "", "$": "", "{": "", "}": ""}


def panels(fig: Figure) -> list[dict[str, Any]]:
    """What a figure draws, one entry a panel: `title, x, y, scales, row, column, marks, series`, as JSON takes it.

    `x` and `y` are the labels of the axes, `marks` where lines stand upright across the panel. Each of `series` has
    `name`, `kind` (line, points, bars or cells), numbers or words `x`, numbers `y`, `low` and `high` (None without a
    band or whiskers), and `color, dash, mark`. A panel is named by its label or title; a series by its label, also by
    one with a leading underscore, which no legend shows; a point without one by what is written at it. Where words or
    whiskers stand along the y axis, the panel is turned, so that `y` is the value. Level lines across the panel, such
    as the one at zero, count if they have a label; series without a finite value do not.
    """
    return [panel for ax in fig.axes if ax.get_label() != "<colorbar>" and (panel := _panel(ax))["series"]]


def plain(label: object) -> str:
    """A label in one line, without mathematical markup."""
    text = str(label)
    for sign, letters in SIGNS.items():
        text = text.replace(sign, letters)
    return " ".join(text.split())


def _panel(ax: Axes) -> dict[str, Any]:
    at = {other: spec for other in ax.figure.axes if (spec := other.get_subplotspec())}
    row, column = at[ax].rowspan.start, at[ax].colspan.start
    beside = [o for o, spec in at.items() if spec.rowspan.start == row and spec.colspan.start <= column][::-1]
    above = [o for o, spec in at.items() if spec.colspan.start == column and spec.rowspan.start <= row][::-1]
    below = [o for o, spec in at.items() if spec.colspan.start == column and spec.rowspan.start >= row]

    def first(*texts: str) -> str:
        return plain(next(filter(None, texts), ""))

    title = first(ax.get_label(), *(o.get_title() for o in above))
    axes = [
        (first(*(o.get_xlabel() for o in below), ax.figure.get_supxlabel()), ax.get_xscale(), _words(ax.xaxis)),
        (first(*(o.get_ylabel() for o in beside), ax.figure.get_supylabel()), ax.get_yscale(), _words(ax.yaxis)),
    ]
    series = _series(ax)
    cells = [one["kind"] for one in series][:1] == ["cells"]
    if any(one["turned"] for one in series) or (axes[1][2] and not axes[0][2] and not cells):
        axes = axes[::-1]
        for one in series:
            one["x"], one["y"] = one["y"], one["x"]
    (x, x_scale, words), (y, y_scale, _) = axes
    if cells:
        y, words = title, {}
    upright = [line.get_xdata() for line in ax.lines if line.get_transform() == ax.get_xaxis_transform(which="grid")]
    return {"title": title, "x": x, "y": y, "scales": [x_scale, y_scale], "row": row, "column": column} | {
        "marks": [float(ends[0]) for ends in upright],
        "series": [found for one in series if (found := _readable(one, words))["y"]],
    }


def _words(axis) -> dict[float, str]:
    """Places on an axis and the words that stand there, where it has words instead of numbers."""
    if not isinstance(axis.get_major_formatter(), (FixedFormatter, FuncFormatter, StrCategoryFormatter)):
        return {}
    texts = [plain(text) for text in axis.get_major_formatter().format_ticks(axis.get_majorticklocs())]
    numbers = all(re.fullmatch(r"[-+−]?[\d.]+(e[-+−]?\d+)?|", text) for text in texts)
    return {} if numbers else dict(zip(axis.get_majorticklocs(), texts, strict=True))


def _readable(one: dict[str, Any], words: Mapping[float, str]) -> dict[str, Any]:
    """A series with finite values alone, of six digits each, and with the word at the nearest tick as its x."""
    kept = np.flatnonzero(np.isfinite(np.array(one["y"], dtype=float)))

    def digits(key: str) -> list | None:
        if one[key] is None:
            return None
        return [value if value is None or isinstance(value, str) else float(f"{value:.6g}") for value in one[key][kept]]

    one |= {key: np.array(one[key], dtype=object) for key in ("x", "y", "low", "high") if one[key] is not None}
    if words:
        one["x"] = np.array([words[min(words, key=lambda place: abs(place - value))] for value in one["x"]])
    return {key: digits(key) if key in ("x", "y", "low", "high") else one[key] for key in one if key != "turned"}


def _series(ax: Axes) -> list[dict[str, Any]]:
    """The series of a panel, drawn as they are."""
    errorbars = [held for held in ax.containers if isinstance(held, ErrorbarContainer)]
    caps = {cap for held in errorbars for cap in held.lines[1]}
    of_line = {held.lines[0]: held for held in errorbars}
    found: list[dict[str, Any]] = []
    for artist in ax.get_children():
        if isinstance(artist, Line2D) and artist not in caps and not isinstance(artist, AxLine):
            found += _line(ax, artist, of_line.get(artist))
        elif isinstance(artist, PolyCollection) and found:
            _band(found[-1], artist)
        elif isinstance(artist, PathCollection) and len(artist.get_offsets()):
            color = to_hex([*artist.get_facecolor(), *artist.get_edgecolor()][0])
            x, y = artist.get_offsets().T
            found.append(_entry(artist, "points", x, y, color, mark="o"))
        elif isinstance(artist, (QuadMesh, AxesImage)):
            found += _cells(ax, artist)
    found += [_bars(held) for held in ax.containers if isinstance(held, BarContainer)]
    written = {tuple(note.xy): plain(note.get_text()) for note in ax.texts if isinstance(note, Annotation)}
    joined: dict[object, dict[str, Any]] = {}
    for n, one in enumerate(one for one in found if len(one["x"])):
        one["name"] = one["name"] or written.get((one["x"][0], one["y"][0]), "")
        scattered = one["kind"] == "points" and one["low"] is None
        first = joined.setdefault((one["name"], one["color"], one["mark"]) if scattered else n, one)
        if first is not one:
            first["x"], first["y"] = [*first["x"], *one["x"]], [*first["y"], *one["y"]]
    return list(joined.values())


def _entry(artist, kind: str, x, y, color: str = "", dash: str = "", mark: str = "") -> dict[str, Any]:
    label = artist if isinstance(artist, str) else str(artist.get_label())
    name = "" if re.match("_child|_container|_nolegend_", label) else plain(label.removeprefix("_"))
    ends = {"low": None, "high": None, "turned": False}
    return {"name": name, "kind": kind, "x": x, "y": y, "color": color, "dash": dash, "mark": mark} | ends


def _whiskers(held: ErrorbarContainer, along: int) -> dict[str, Any]:
    ends = np.array(held.lines[2][0].get_segments())[:, :, along]  # (points, 2)
    return {"low": ends.min(1), "high": ends.max(1), "turned": along == 0}


def _line(ax: Axes, line: Line2D, errorbar: ErrorbarContainer | None) -> Iterator[dict[str, Any]]:
    x, y = line.get_data(orig=False)
    if line.get_transform() != ax.transData:  # across the panel
        if str(line.get_label()).startswith("_child") or x[0] == x[-1]:
            return
        x, y = [None], y[:1]
    dash, mark = (str(shape).replace("None", "") for shape in (line.get_linestyle(), line.get_marker()))
    one = _entry(errorbar or line, "line" if dash else "points", x, y, to_hex(line.get_color()), dash, mark)
    yield one | (_whiskers(errorbar, int(errorbar.has_yerr)) if errorbar else {})


def _band(one: dict[str, Any], band: PolyCollection) -> None:
    """The outline of a band as low and high of the line that was drawn before it."""
    outline = pd.DataFrame(np.concatenate([path.vertices for path in band.get_paths()])).groupby(0)[1]
    if set(one["x"]) <= set(outline.groups):
        one["low"], one["high"] = (getattr(outline, end)().loc[one["x"]].to_numpy() for end in ("min", "max"))


def _bars(held: BarContainer) -> dict[str, Any]:
    boxes = [bar.get_bbox() for bar in held]
    turned = held.orientation == "horizontal"
    if turned:
        x, y = [bar.get_width() for bar in held], [(box.y0 + box.y1) / 2 for box in boxes]
    else:
        x, y = [(box.x0 + box.x1) / 2 for box in boxes], [bar.get_height() for bar in held]
    one = _entry(held, "bars", x, y, to_hex(held[0].get_facecolor()))
    return one | {"turned": turned} | (_whiskers(held.errorbar, 1 - turned) if held.errorbar else {})


def _cells(ax: Axes, cells: QuadMesh | AxesImage) -> Iterator[dict[str, Any]]:
    values = np.ma.filled(np.ma.asarray(cells.get_array(), dtype=float).reshape(cells.get_array().shape), np.nan)
    names = []
    for axis, size in ((ax.xaxis, values.shape[1]), (ax.yaxis, values.shape[0])):
        texts = map(plain, axis.get_major_formatter().format_ticks(axis.get_majorticklocs()))
        at = dict(zip(axis.get_majorticklocs(), texts, strict=True))
        names.append([at.get(n + 0.5) or str(n) for n in range(size)])
    for name, row in zip(names[1], values, strict=True):
        yield _entry(name, "cells", names[0], row)
