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
from lddyn.chapters.style import change_panel
from lddyn.chapters.variants import evidence as variants
from lddyn.engine.store import Run, frame


def hero(of_digits: pd.DataFrame, sft: pd.DataFrame) -> Figure:
    """The first page's figure: one predicted step of chapter 1, and what a whole SFT run of chapter 3 does."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    error_order(left, of_digits)
    left.set_title("one gradient step, predicted")
    change_panel(right, sft, ("chosen", "other_train", "rejected", "other_test", "unrelated"), "", per_epoch=1)
    right.set(title="finetuning on one answer per question", xlabel="step", ylabel="change of log π (nats)")
    return fig


CARRIED = {  # what is compared: the statistic on digits, on the language model
    "order of the error in η": (digits.first_order_slope, decomposition.first_order_slope),
    "rank stability of ‖K‖ after the first tenth": (digits.entk_rank_stability, decomposition.kernel_rank_stability),
    "doublings of ‖K‖ after the first tenth": (digits.entk_norm_change, decomposition.kernel_norm_change),
    "rank correlation of accumulated ‖K‖ with where it led": (
        digits.entk_explains_leak,
        decomposition.kernel_explains_change,
    ),
    "symmetry of partner ranks": (digits.partner_rank_symmetry, decomposition.partner_symmetry),
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
