"""What is made of the runs of several chapters, at every build. A notebook reaches those of its own chapter alone."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lddyn.chapters.decomposition import evidence as decomposition
from lddyn.chapters.digits import evidence as digits
from lddyn.chapters.digits.figures import error_order
from lddyn.chapters.extend import evidence as extend
from lddyn.chapters.style import band, change_panel, curves
from lddyn.chapters.variants import evidence as variants
from lddyn.engine.store import Run, frame


def hero(of_digits: pd.DataFrame, sft: pd.DataFrame, real_sft: pd.DataFrame, real_dpo: pd.DataFrame) -> Figure:
    """The first page's figure: a predicted step of chapter 1, SFT of both language models, and DPO of the real one."""
    fig, axes = plt.subplots(2, 2, figsize=(9, 6.6))
    error_order(axes[0, 0], of_digits)
    axes[0, 0].set_title("one gradient step, predicted")
    learned = ("chosen", "other_train", "rejected", "other_test", "unrelated")
    runs = {
        "SFT on one answer a question, small model": (axes[0, 1], sft, learned),
        "the same, SmolLM2-135M": (axes[1, 0], real_sft, learned),
        "DPO after it, SmolLM2-135M": (axes[1, 1], real_dpo, ("chosen", "rejected", "other_test", "unrelated")),
    }
    for title, (ax, table, kinds) in runs.items():
        change_panel(ax, table, kinds, title, per_epoch=1)
        ax.set(xlabel="step", ylabel="change of log π (nats)")
    steps, top = curves(real_dpo, "chosen", "argmax_logp_sum")
    band(axes[1, 1], steps, top - top[:, :1], "black", "y* along chosen")
    axes[1, 1].legend(fontsize=7)
    return fig


CARRIED = {  # what is compared: the statistic on digits, on the language model
    "order of the error in η": (digits.first_order_slope, decomposition.first_order_slope),
    "rank stability of ‖K‖ after the first tenth": (digits.entk_rank_stability, decomposition.kernel_rank_stability),
    "doublings of ‖K‖ after the first tenth": (digits.entk_norm_change, decomposition.kernel_norm_change),
    "rank correlation of accumulated ‖K‖ with where it led": (
        digits.entk_explains_leak,
        decomposition.kernel_explains_change,
    ),
    "symmetry of partner ranks": (digits.partner_rank_symmetry, decomposition.partner_rank_symmetry),
}


def carried_over(language: pd.DataFrame, of_digits: pd.DataFrame) -> pd.DataFrame:
    """The same five numbers for the digits of chapter 1 and for the language model, means over the seeds."""
    rows = {}
    for name, (on_digits, on_language) in CARRIED.items():
        rows[name] = {
            "digits": np.mean([on_digits(one) for _, one in of_digits.groupby("seed")]),
            "language model": np.mean([on_language(one) for _, one in language.groupby("seed")]),
        }
    return pd.DataFrame(rows).T


def ways_to_soften(of_variants: Sequence[Run], of_extend: Sequence[Run]) -> pd.DataFrame:
    """The ends of chapter 6's losses and of chapter 7's arms, which are marked (7), in one table: `name, seed, ...`."""
    main = [run for run in of_extend if run.manifest["parameters"]["design"] == "main"]
    ends = variants.variant_ends(variants.loss_runs(frame(of_variants)))
    return pd.concat([ends, extend.softening(frame(main))], ignore_index=True)
