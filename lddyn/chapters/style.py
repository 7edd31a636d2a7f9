"""One style, one colour per family of responses, and curves of seeds with their range."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

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
    seeds = [statistics.curve(t, kind, metric, split) for _, t in table.groupby("seed")]
    return seeds[0].index.to_numpy(), np.array([s.to_numpy() for s in seeds])


def change_panel(ax, table: pd.DataFrame, kinds, title: str, per_epoch: float, split: str = "train") -> None:
    for kind in kinds:
        color, line = STYLES[kind]
        steps, values = curves(table, kind, split=split)
        band(ax, steps / per_epoch, values - values[:, :1], color, kind, linestyle=line)
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.set_title(title)
    ax.legend(fontsize=7)
