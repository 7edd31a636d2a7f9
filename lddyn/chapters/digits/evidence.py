"""Chapter 1. Tables have the observed class in `prompt_id`; predicted or updated classes in `response_type`."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata, spearmanr

from lddyn.chapters.statistics import at_most_as_symmetric, partner_symmetry

PAIRS = np.triu_indices(10, 1)


def class_matrices(table: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations of a 10 x 10 metric: (steps,), (steps, observed, predicted or updated)."""
    rows = table[table.metric == metric].sort_values(["step", "prompt_id", "response_type"])
    return rows.step.unique(), rows.value.to_numpy().reshape(-1, 10, 10)


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix[~np.eye(10, dtype=bool)]


def _settled(steps: np.ndarray) -> np.ndarray:
    """Evaluations after the first tenth of training, where the early phase is over."""
    return steps >= steps[-1] / 10


def first_order_slope(table: pd.DataFrame) -> float:
    """Median over pairs and times of the log-log slope of ||measured + eta A K G|| against eta, 1e-6 to 1e-1."""
    rows = table[table.metric == "first_order_error"]
    eta = rows.response_type.str.removeprefix("eta_").astype(float)
    rows = rows.assign(x=np.log10(eta), y=np.log10(rows.value))[eta <= 0.1]
    slopes = rows.groupby(["step", "prompt_id"])[["x", "y"]].apply(lambda g: np.polyfit(g.x, g.y, 1)[0])
    return float(slopes.median())


def peakiness_error(table: pd.DataFrame) -> float:
    """Largest relative difference between ||A||_F^2 and V - 2 + V ||pi||^2."""
    return float(table[table.metric == "peakiness_error"].value.max())


def lbk_share(table: pd.DataFrame) -> float:
    """Largest LBK / (eta^2 ||K||_F^2) over pairs and times; the paper's inequality says at most 1."""
    return float(table[table.metric == "lbk_share_max"].value.max())


def step_same_class(table: pd.DataFrame) -> float:
    """Mean over training of the change of p(4) on other 4s after one step on a 4."""
    return float(class_matrices(table, "change_of_prob")[1][:, 4, 4].mean())


def step_similar_minus_dissimilar(table: pd.DataFrame) -> float:
    """The change of p(4) on 9s minus that on 0s after one step on a 4, mean over training."""
    changes = class_matrices(table, "change_of_prob")[1]
    return float((changes[:, 9, 4] - changes[:, 0, 4]).mean())


def step_follows_similarity(table: pd.DataFrame) -> float:
    """Rank correlation over the 90 pairs of ||K_ou|| with the change of p(u) on o; mean over training."""
    norms, changes = (class_matrices(table, m)[1] for m in ("entk_norm", "change_of_prob"))
    rho = [spearmanr(off_diagonal(k), off_diagonal(c)).statistic for k, c in zip(norms, changes, strict=True)]
    return float(np.mean(rho))


def early_changes(table: pd.DataFrame, classes: Sequence[int]) -> dict[int, np.ndarray]:
    """What one step on a 4 does, a third of the evaluations into training: class of the image -> (10,) nats, means."""
    rows = table[table.metric == "change_of_logp_after_4"]
    steps = np.sort(rows.step.unique())
    early = rows[rows.step == steps[len(steps) // 3]]
    mean = early.pivot_table(index="prompt_id", columns="response_type", values="value")
    return {c: mean.loc[f"class_{c}"].to_numpy() for c in classes}


def leak_4_9(table: pd.DataFrame) -> float:
    """Mean of p(9 | true 4) and p(4 | true 9) at the end, over the median off-diagonal mean prediction."""
    last = class_matrices(table, "prob_mean")[1][-1]
    return float((last[4, 9] + last[9, 4]) / 2 / np.median(off_diagonal(last)))


def named_pairs_rank(table: pd.DataFrame) -> float:
    """Mean rank, 0 to 1, of the pairs 4-9, 3-5 and 5-8 by leak in either direction among the 45 pairs, at the end."""
    last = class_matrices(table, "prob_mean")[1][-1]
    leak = (last + last.T)[PAIRS]
    rank = (rankdata(leak) - 1) / (len(leak) - 1)
    named = [(4, 9), (3, 5), (5, 8)]
    return float(np.mean([r for r, *pair in zip(rank, *PAIRS, strict=True) if tuple(pair) in named]))


def entk_rank_stability(table: pd.DataFrame) -> float:
    """Rank correlation of ||K_uo|| over o with its final order; mean over u and settled evaluations."""
    steps, norms = class_matrices(table, "entk_norm")
    return float(rank_correlation_with_last(norms)[_settled(steps)][:-1].mean())


def rank_correlation_with_last(norms: np.ndarray) -> np.ndarray:
    """Rank correlation of each column (u) of ||K_uo||, own class left out, with the last evaluation. (steps,)"""
    rho = [
        [spearmanr(np.delete(now[:, u], u), np.delete(norms[-1][:, u], u)).statistic for u in range(10)]
        for now in norms
    ]
    return np.mean(rho, axis=1)


def entk_norm_change(table: pd.DataFrame) -> float:
    """Doublings between the smallest and the largest mean ||K||_F among settled evaluations."""
    steps, norms = class_matrices(table, "entk_norm")
    mean = norms.mean((1, 2))[_settled(steps)]
    return float(np.log2(mean.max() / mean.min()))


def accumulated_entk(table: pd.DataFrame) -> np.ndarray:
    """||K_uo||_F integrated over training epochs (trapezoids), (10, 10)."""
    steps, norms = class_matrices(table, "entk_norm")
    return np.trapezoid(norms, steps, axis=0)


def entk_explains_leak(table: pd.DataFrame) -> float:
    """Rank correlation of accumulated ||K|| with the final mean prediction over the 90 off-diagonal cells."""
    last = class_matrices(table, "prob_mean")[1][-1]
    return float(spearmanr(off_diagonal(accumulated_entk(table)), off_diagonal(last)).statistic)


def partner_rank_symmetry(table: pd.DataFrame) -> float:
    """Rank correlation between 'rank of o among the partners of u' and 'rank of u among the partners of o'.

    ||K_uo|| itself is symmetric (K_uo is the transpose of K_ou); the ranking of partners need not be.
    """
    return partner_symmetry(accumulated_entk(table))


def symmetric_by_chance(table: pd.DataFrame) -> float:
    """Share of random symmetric matrices whose ranking of partners is at most as symmetric as that of ||K||."""
    return at_most_as_symmetric(accumulated_entk(table))
