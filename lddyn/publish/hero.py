"""The figure of the first page."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lddyn.chapters.digits.figures import error_order
from lddyn.chapters.style import change_panel


def hero(digits: pd.DataFrame, sft: pd.DataFrame) -> Figure:
    """The first page's figure: one predicted step of chapter 1, and what a whole SFT run of chapter 3 does."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4))
    error_order(left, digits)
    left.set_title("one gradient step, predicted")
    change_panel(right, sft, ("chosen", "other_train", "rejected", "other_test", "unrelated"), "", per_epoch=1)
    right.set(title="finetuning on one answer per question", xlabel="step", ylabel="change of log π (nats)")
    return fig
