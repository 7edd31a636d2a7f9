"""Sweeps: what holds in all cells of a recorded table. One seed's rows; columns are statistics of single runs."""

import pandas as pd


def everywhere_chosen(cells: pd.DataFrame) -> float:
    """Smallest end change of the trained answer over all cells, nats."""
    return float(cells.sft_chosen_change.min())


def everywhere_bell_rise(cells: pd.DataFrame) -> float:
    """Smallest over all cells of `bell_rise`, nats."""
    return float(cells.bell_rise.min())


def everywhere_bell_fall(cells: pd.DataFrame) -> float:
    """Smallest over all cells of `bell_fall`, nats."""
    return float(cells.bell_fall.min())


def everywhere_other_train(cells: pd.DataFrame) -> float:
    """Smallest over all cells of the largest rise of answers to other training questions minus that of unseen ones."""
    return float(cells.other_train_over_other_test.min())


def everywhere_unrelated(cells: pd.DataFrame) -> float:
    """Largest over all cells of the end change of unrelated human sentences, nats."""
    return float(cells.unrelated_change.max())
