"""Chapter 4: squeezing and residuals."""

import numpy as np
import pandas as pd


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
    """The same over all losses of chapter 4."""
    return float(_values(table, "residual_error").max())


def lemma_error(table: pd.DataFrame) -> float:
    """Largest difference in nats between Lemma 1's log alpha and the step itself."""
    return float(_values(table, "lemma_error").max())


def law_error(table: pd.DataFrame, rung: int) -> float:
    """Median relative error of the first-order law at one of the step sizes `run.STRENGTHS` (2: 0.1; 4: 1)."""
    return float(np.median(_ladder(table, "ladder_law_error")[rung]))


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
