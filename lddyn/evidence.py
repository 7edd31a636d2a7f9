"""The statistics behind the verdicts: one function each, from the long table of one run (one seed) to one number.

`book/claims.yml` names them; `claims` collects them over seeds. Chapter 1's tables have the observed class in
`prompt_id` and the predicted class, or the class of the update, in `response_type`.
"""

import numpy as np
import pandas as pd
from scipy.stats import rankdata, spearmanr

PAIRS = np.triu_indices(10, 1)


def _matrices(table: pd.DataFrame, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Evaluations of a 10 x 10 metric: (steps,), (steps, observed, predicted or updated)."""
    rows = table[table.metric == metric].sort_values(["step", "prompt_id", "response_type"])
    return rows.step.unique(), rows.value.to_numpy().reshape(-1, 10, 10)


def _off_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix[~np.eye(10, dtype=bool)]


def _settled(steps: np.ndarray) -> np.ndarray:
    """Evaluations after the first tenth of training, where the early phase is over."""
    return steps >= steps[-1] / 10


# --- chapter 1 ---------------------------------------------------------------------------------------------


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
    return float(_matrices(table, "change_of_prob")[1][:, 4, 4].mean())


def step_similar_minus_dissimilar(table: pd.DataFrame) -> float:
    """The change of p(4) on 9s minus that on 0s after one step on a 4, mean over training."""
    changes = _matrices(table, "change_of_prob")[1]
    return float((changes[:, 9, 4] - changes[:, 0, 4]).mean())


def step_follows_similarity(table: pd.DataFrame) -> float:
    """Rank correlation over the 90 pairs of ||K_ou|| with the change of p(u) on o; mean over training."""
    norms, changes = (_matrices(table, m)[1] for m in ("entk_norm", "change_of_prob"))
    rho = [spearmanr(_off_diagonal(k), _off_diagonal(c)).statistic for k, c in zip(norms, changes, strict=True)]
    return float(np.mean(rho))


def leak_4_9(table: pd.DataFrame) -> float:
    """Mean of p(9 | true 4) and p(4 | true 9) at the end, over the median off-diagonal mean prediction."""
    last = _matrices(table, "prob_mean")[1][-1]
    return float((last[4, 9] + last[9, 4]) / 2 / np.median(_off_diagonal(last)))


def named_pairs_rank(table: pd.DataFrame) -> float:
    """Mean rank, 0 to 1, of the pairs 4-9, 3-5 and 5-8 by leak in either direction among the 45 pairs, at the end."""
    last = _matrices(table, "prob_mean")[1][-1]
    leak = (last + last.T)[PAIRS]
    rank = (rankdata(leak) - 1) / (len(leak) - 1)
    named = [(4, 9), (3, 5), (5, 8)]
    return float(np.mean([r for r, *pair in zip(rank, *PAIRS, strict=True) if tuple(pair) in named]))


def entk_rank_stability(table: pd.DataFrame) -> float:
    """Rank correlation of ||K_uo|| over o with its final order; mean over u and settled evaluations."""
    steps, norms = _matrices(table, "entk_norm")
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
    steps, norms = _matrices(table, "entk_norm")
    mean = norms.mean((1, 2))[_settled(steps)]
    return float(np.log2(mean.max() / mean.min()))


def accumulated_entk(table: pd.DataFrame) -> np.ndarray:
    """||K_uo||_F integrated over training epochs (trapezoids), (10, 10)."""
    steps, norms = _matrices(table, "entk_norm")
    return np.trapezoid(norms, steps, axis=0)


def entk_explains_leak(table: pd.DataFrame) -> float:
    """Rank correlation of accumulated ||K|| with the final mean prediction over the 90 off-diagonal cells."""
    last = _matrices(table, "prob_mean")[1][-1]
    return float(spearmanr(_off_diagonal(accumulated_entk(table)), _off_diagonal(last)).statistic)


def partner_rank_symmetry(table: pd.DataFrame) -> float:
    """Rank correlation between 'rank of o among the partners of u' and 'rank of u among the partners of o'.

    ||K_uo|| itself is symmetric (K_uo is the transpose of K_ou); the ranking of partners need not be.
    """
    total = accumulated_entk(table)
    np.fill_diagonal(total, np.nan)
    ranks = np.apply_along_axis(lambda c: rankdata(c, nan_policy="omit"), 0, total)
    return float(spearmanr(_off_diagonal(ranks), _off_diagonal(ranks.T)).statistic)


# --- chapter 4 ---------------------------------------------------------------------------------------------


def _values(table: pd.DataFrame, metric: str, *kinds: str) -> pd.Series:
    """Values of a metric, of the named response types only where some are named."""
    rows = table[table.metric == metric]
    return rows[rows.response_type.isin(kinds)].value if kinds else rows.value


def _ladder(table: pd.DataFrame, metric: str) -> np.ndarray:
    """A metric of the same draws on every rung of a ladder, (rungs, draws)."""
    return table[table.metric == metric].pivot(index="step", columns="prompt_id", values="value").to_numpy()


def residual_error_sft_dpo(table: pd.DataFrame) -> float:
    """Largest difference between the closed form of G and automatic differentiation, SFT and DPO."""
    return float(_values(table, "residual_error", "SFT", "DPO").max())


def residual_error(table: pd.DataFrame) -> float:
    """The same over all losses of `residuals`."""
    return float(_values(table, "residual_error").max())


def lemma_error(table: pd.DataFrame) -> float:
    """Largest difference in nats between Lemma 1's log alpha and the step itself."""
    return float(_values(table, "lemma_error").max())


def pushed_log_odds(table: pd.DataFrame) -> float:
    """Largest change of the pushed label's log-odds over all vocabularies, distributions and step sizes."""
    return float(_values(table, "log_odds_of_pushed").max())


def top_log_odds(table: pd.DataFrame) -> float:
    """Smallest change of the log-odds of y*."""
    return float(_values(table, "log_odds_of_top").min())


def uniform_not_rising(table: pd.DataFrame) -> float:
    """From the uniform distribution: the most labels, other than the pushed one, that do not rise."""
    return float(_values(table, "uniform_not_rising").max())


def peaky_rising(table: pd.DataFrame) -> float:
    """From peaky distributions, an unlikely label pushed: the most labels that rise."""
    return float(_values(table, "peaky_rising").max())


def between_both(table: pd.DataFrame) -> float:
    """Share of uneven distributions without a peak where some labels rise and some fall."""
    return float(_values(table, "between_both").mean())


def between_ordered(table: pd.DataFrame) -> float:
    """Share of them where every label that rises is likelier than every one that falls; the lowest possible is 0."""
    return float(_values(table, "between_ordered").mean())


def threshold_right(table: pd.DataFrame) -> float:
    """Share of labels whose direction the exact threshold predicts, worst draw."""
    return float(_values(table, "prob_threshold_right").min())


def others_fall_more(table: pd.DataFrame) -> float:
    """Share of draws and rungs where the others' mean log-probability falls more for a less likely pushed label."""
    return float((np.diff(_ladder(table, "pushed_others"), axis=0) < 0).mean())


def top_rises_more(table: pd.DataFrame) -> float:
    """Rise of log pi(y*) when the pushed label has probability 1e-5 minus the rise when it has 0.4, mean, nats."""
    rise = _ladder(table, "pushed_top")
    return float((rise[-1] - rise[0]).mean())


def top_gains_more(table: pd.DataFrame) -> float:
    """The same for the probability of y* instead of its logarithm."""
    gain = _ladder(table, "pushed_top_gain")
    return float((gain[-1] - gain[0]).mean())


def step_amplifies_pair(table: pd.DataFrame) -> float:
    """Share of draws and rungs where a larger step moves both the pushed label and y* further."""
    pushed, top = (np.diff(_ladder(table, m), axis=0) for m in ("ladder_pushed", "ladder_top"))
    return float(((pushed < 0) & (top > 0)).mean())


def step_amplifies_others(table: pd.DataFrame) -> float:
    """Share of labels other than the pushed one whose log-probability changes more under a larger step."""
    return float(_values(table, "prob_grew").mean())


def dpo_force_grows(table: pd.DataFrame) -> float:
    """Share of a grid of margins, -60 to 60 nats, along which DPO's force grows."""
    return float(_values(table, "force_grows", "DPO").max())


def dpo_force_left(table: pd.DataFrame) -> float:
    """DPO's force at a margin of 60 nats over that at -60."""
    return float(_values(table, "force_left", "DPO").max())


def ipo_force_wrong_way(table: pd.DataFrame) -> float:
    """Share of the grid where IPO's force points away from the margin 1 / (2 beta)."""
    return float(_values(table, "force_wrong_way", "IPO").max())


def slic_force_beyond(table: pd.DataFrame) -> float:
    """Largest force of SLiC on the pair at margins above delta."""
    return float(_values(table, "force_beyond", "SLiC").max())


def sppo_force_ratio(table: pd.DataFrame) -> float:
    """SPPO at the start: force on rejected over force on chosen; negative where rejected is pushed down."""
    return float(_values(table, "force_ratio", "SPPO").mean())


def sppo_change_of_top(table: pd.DataFrame) -> float:
    """Change of log pi(y*) in the context of the rejected label when SPPO has come to rest, nats."""
    return float(_values(table, "change_of_top", "SPPO").mean())


def third_labels_spread(table: pd.DataFrame) -> float:
    """Equal force on two labels of one context: largest difference in log-change between two third labels, nats."""
    return float(_values(table, "spread_of_third", "both").max())


def third_labels_spread_negative(table: pd.DataFrame) -> float:
    """The same difference when only the negative half acts, mean over draws."""
    return float(_values(table, "spread_of_third", "negative").mean())
