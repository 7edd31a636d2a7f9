"""The statistics behind the verdicts: one function each, from the long table of one run (one seed) to one number.

`book/claims.yml` names them; `claims` collects them over seeds. Chapter 1's tables have the observed class in
`prompt_id` and the predicted class, or the class of the update, in `response_type`.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import rankdata, spearmanr, t

from lddyn import InputError
from lddyn.preferences import RESPONSE_TYPES

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


# --- chapter 3 ---------------------------------------------------------------------------------------------

BELLS = ("chosen_semantic", "chosen_format", "rejected", "rejected_semantic", "rejected_format")


def curve(table: pd.DataFrame, kind: str, metric: str = "logp_sum", split: str = "train", target: str = "chosen"):
    """Mean over the probed prompts of a metric of one type of response, as a Series over steps.

    `split` says whether the prompts are trained on; `target` which runs, where a table holds several.
    """
    rows = table[(table.response_type == kind) & (table.metric == metric)]
    rows = rows[rows.prompt_id.astype(str).str.startswith(f"{split}/")]
    if "target" in rows:
        rows = rows[rows.target == target]
    if "n_train" in rows:  # the run on all prompts, not the small ones for the heat map
        rows = rows[rows.n_train == rows.n_train.max()]
    return rows.groupby("step").value.mean()


def _change(table: pd.DataFrame, kind: str, **which) -> float:
    values = curve(table, kind, **which)
    return float(values.iloc[-1] - values.iloc[0])


def sft_chosen_order(table: pd.DataFrame) -> float:
    """Rank correlation of log pi(chosen) with the step: 1 where it rises throughout."""
    values = curve(table, "chosen")
    return float(spearmanr(values.index, values).statistic)


def sft_chosen_change(table: pd.DataFrame) -> float:
    """Change of log pi(chosen) over SFT, nats summed over the response."""
    return _change(table, "chosen")


def _rise(table: pd.DataFrame, kind: str) -> float:
    values = curve(table, kind)
    return float(values.max() - values.iloc[0])


def _fall(table: pd.DataFrame, kind: str) -> float:
    values = curve(table, kind)
    return float(values.max() - values.iloc[-1])


def bell_rise(table: pd.DataFrame) -> float:
    """Smallest rise from the start to the peak among the rejected answer and all rephrases, nats."""
    return min(_rise(table, kind) for kind in BELLS)


def bell_fall(table: pd.DataFrame) -> float:
    """Smallest fall from the peak to the end among the rejected answer and all rephrases, nats."""
    return min(_fall(table, kind) for kind in BELLS)


def initial_rise(table: pd.DataFrame) -> float:
    """Rise of the initial sample from the start to its peak, nats."""
    return _rise(table, "chosen_initial")


def other_train_peak(table: pd.DataFrame) -> float:
    """When log pi of answers to other training questions peaks, as a share of the steps."""
    values = curve(table, "other_train")
    return float(values.idxmax() / values.index[-1])


def other_train_over_other_test(table: pd.DataFrame) -> float:
    """Largest rise of answers to other training questions minus that of unseen answers, nats."""
    return _rise(table, "other_train") - _rise(table, "other_test")


def reuse_gap(table: pd.DataFrame) -> float:
    """End change of answers to other training questions minus that of unseen answers, nats."""
    return _change(table, "other_train") - _change(table, "other_test")


def reuse_gap_unseen_prompts(table: pd.DataFrame) -> float:
    """The same gap after prompts that were never trained on."""
    return _change(table, "other_train", split="test") - _change(table, "other_test", split="test")


def generated_reuse(table: pd.DataFrame) -> float:
    """Change over SFT of the share of greedy 4-grams found in training answers to other questions, less the control's.

    The control is the share found in as many answers that were never trained on; both splits of prompts.
    """
    rows = table[table.response_type == "greedy"]
    share = rows.pivot_table(index="step", columns="metric", values="value", observed=True)
    change = share.iloc[-1] - share.iloc[0]
    return float(change["prob_reuse_train"] - change["prob_reuse_control"])


def unrelated_change(table: pd.DataFrame) -> float:
    """Change of log pi of unrelated human sentences over SFT, nats."""
    return _change(table, "unrelated")


def shuffled_change(table: pd.DataFrame) -> float:
    """Larger of the changes of log pi of the two shuffled types over SFT, nats."""
    return max(_change(table, kind) for kind in ("chosen_shuffled", "test_shuffled"))


def format_like_semantic(table: pd.DataFrame) -> float:
    """Correlation over steps of the curves of the two rephrases of chosen, first tenth of training."""
    semantic, form = curve(table, "chosen_semantic"), curve(table, "chosen_format")
    early = semantic.index <= semantic.index[-1] / 10
    return float(np.corrcoef(semantic[early], form[early])[0, 1])


def format_minus_semantic(table: pd.DataFrame) -> float:
    """End change of the format-keeping rephrase minus that of the meaning-keeping one, nats."""
    return _change(table, "chosen_format") - _change(table, "chosen_semantic")


def sign_delta(table: pd.DataFrame, target: str) -> pd.Series:
    """Accumulated SignDelta of every type when `target` is trained, as in the authors' released code (appendix C.2).

    Between evaluations, the mean change of the summed log pi over sqrt(||A||_F) of the observed type and over
    ||pi - y|| of the trained one; smoothed (0.9) and summed over time.
    """
    trained = "chosen" if target == "extended" else target
    residual = curve(table, trained, "residual_norm_mean", target=target)
    sums = {}
    for kind in table.response_type.cat.categories:
        logp = curve(table, kind, target=target)
        if len(logp):
            a_norm = curve(table, kind, "a_norm_mean", target=target)
            change = logp.diff() / np.sqrt(a_norm.shift()) / residual.shift()
            sums[kind] = change.iloc[1:].ewm(alpha=0.1, adjust=False).mean().sum()
    return pd.Series(sums)


HEAT_MAP = ("chosen", "rejected", "chosen_semantic", "rejected_semantic", "unrelated", "test_shuffled")


def heat_map(table: pd.DataFrame) -> pd.DataFrame:
    """The last panel of figure 3: SignDelta of every observed type (rows) for every trained type (columns).

    Each column is divided by its range. Uses the runs on the probed prompts only (`n_train` equal to the probes).
    """
    used = ("logp_sum", "a_norm_mean", "residual_norm_mean")
    small = table[(table.n_train == table.n_train.min()) & table.metric.isin(used)]
    parts = dict(list(small.groupby("target")))
    columns = {target: sign_delta(parts[target], target) for target in HEAT_MAP if target in parts}
    whole = pd.DataFrame(columns)
    return whole / (whole.max() - whole.min())


def fingerprint(table: pd.DataFrame) -> float:
    """Trained on one answer's rephrase, the SignDelta of the other answer's rephrase minus that of the other answer."""
    cells = heat_map(table)
    return float(
        np.mean(
            [
                cells.loc["rejected_semantic", "chosen_semantic"] - cells.loc["rejected", "chosen_semantic"],
                cells.loc["chosen_semantic", "rejected_semantic"] - cells.loc["chosen", "rejected_semantic"],
            ]
        )
    )


def heat_map_diagonal(table: pd.DataFrame) -> float:
    """Share of the trained types that are themselves their column's maximum."""
    cells = heat_map(table)
    return float(np.mean([cells[target].idxmax() == target for target in cells]))


def shuffled_raises_others(table: pd.DataFrame) -> float:
    """Number of other types with a positive SignDelta when shuffled words are trained."""
    column = heat_map(table)["test_shuffled"].drop("test_shuffled")
    return float((column > 0).sum())


AUTHORS_KEYS = {kind: (names or (kind,))[0] for kind, names in RESPONSE_TYPES.items()}


def authors_log(path: Path | str, metric: str = "logp_sum") -> pd.DataFrame:
    """The authors' `prob_train_metrics.json`, one JSON object an evaluation: a metric of each type, types as columns.

    `logp_sum` (nats, mean over prompts) or `a_norm_mean`; some of their logs have the one for all types, some the
    other. Raises `InputError` naming the file when it is not such a log.
    """
    try:
        entries = pd.DataFrame([json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()])
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a log of the authors' training ({type(error).__name__}: {error})") from error
    template = {"logp_sum": "logps_eval_prob_train/{}", "a_norm_mean": "{}_A_o"}[metric]
    columns = {template.format(key): kind for kind, key in AUTHORS_KEYS.items()}
    found = entries[[c for c in columns if c in entries]].rename(columns=columns)
    if "logps_eval_prob_train/chosen" not in entries:
        raise InputError(f"{path} is not a log of the authors' training (no logps_eval_prob_train/chosen)")
    return found


def compare_with_authors(table: pd.DataFrame, path: Path | str) -> tuple[pd.Series, pd.Series, str]:
    """End change of every type that the authors' log has, here (mean over seeds) and there, and of which metric.

    The metric is log pi where their log has it for several types, and ||A||_F where it has only that.
    """
    metric = "logp_sum" if authors_log(path).shape[1] > 1 else "a_norm_mean"
    theirs = authors_log(path, metric)
    kinds = [kind for kind in theirs if (table.response_type == kind).any()]
    ours = pd.Series({kind: _change(table, kind, metric=metric) for kind in kinds})
    return ours, (theirs.iloc[-1] - theirs.iloc[0])[kinds], metric


# --- chapter 5 ---------------------------------------------------------------------------------------------

NATURAL = ("chosen", *BELLS[:2], "chosen_initial", *BELLS[2:], "other_train", "other_test", "unrelated")
PATHS = {  # where y* is measured: type of response, prompts
    "chosen": ("chosen", "train"),
    "rejected": ("rejected", "train"),
    "never trained": ("chosen", "test"),
}


def dpo_baseline(table: pd.DataFrame) -> pd.DataFrame:
    """The runs of chapter 5 that measure everything, out of a table that may also hold the short ones."""
    return table[table.measure == "all"] if "measure" in table else table


def dpo_vary(table: pd.DataFrame, *free: str) -> pd.DataFrame:
    """The short runs, out of a table or of `dpo_ends`, that differ from their centre in the settings `free` alone.

    The centre has the commonest value of each setting: the designs cross there.
    """
    short = table[table.measure != "all"] if "measure" in table else table
    keep = np.ones(len(short), dtype=bool)
    for name in ("pairs", "sft_epochs", "lr", "beta"):
        if name in short and name not in free:
            keep &= (short[name] == short[name].mode()[0]).to_numpy()
    return short[keep]


def _order(values: pd.Series) -> float:
    return float(spearmanr(values.index, values).statistic)


def dpo_wide(table: pd.DataFrame, metric: str = "logp_sum", split: str = "train") -> pd.DataFrame:
    """A metric of every prompt: rows (step, prompt), columns types of response."""
    rows = table[(table.metric == metric) & table.prompt_id.astype(str).str.startswith(f"{split}/")]
    return rows.pivot_table(index=["step", "prompt_id"], columns="response_type", values="value", observed=True)


def dpo_margins(table: pd.DataFrame, beta: float, split: str = "train") -> pd.DataFrame:
    """The margin beta ((log pi - log pi_ref)(chosen) - (same)(rejected)) in nats: rows steps, columns prompts."""
    gap = dpo_wide(table, split=split)
    gap = (gap.chosen - gap.rejected).unstack()
    return beta * (gap - gap.iloc[0])


def dpo_rejected_order(table: pd.DataFrame) -> float:
    """Rank correlation of log pi(rejected) with the step: -1 where it falls throughout."""
    return _order(curve(dpo_baseline(table), "rejected"))


def dpo_rejected_minus_next(table: pd.DataFrame) -> float:
    """End change of log pi(rejected) minus that of the natural type that falls most beside it, nats."""
    table = dpo_baseline(table)
    return _change(table, "rejected") - min(_change(table, kind) for kind in NATURAL if kind != "rejected")


def dpo_chosen_rise(table: pd.DataFrame) -> float:
    """Rise of log pi(chosen) from the start of DPO to its peak, nats."""
    return _rise(dpo_baseline(table), "chosen")


def dpo_chosen_fall(table: pd.DataFrame) -> float:
    """Fall of log pi(chosen) from its peak to the end of DPO, nats."""
    return _fall(dpo_baseline(table), "chosen")


def dpo_chosen_change(table: pd.DataFrame) -> float:
    """Change of log pi(chosen) over DPO, nats."""
    return _change(dpo_baseline(table), "chosen")


def dpo_chosen_over_rejected(table: pd.DataFrame) -> float:
    """Smallest of three: end change of chosen minus that of rejected, for the answers and both kinds of rephrase."""
    table = dpo_baseline(table)
    kinds = ("chosen", "chosen_semantic", "chosen_format")
    return min(_change(table, kind) - _change(table, kind.replace("chosen", "rejected")) for kind in kinds)


def dpo_rephrases_where_chosen_is_up(table: pd.DataFrame) -> float:
    """Mean change of chosen_semantic wherever (prompt, evaluation) the chosen answer is above its start, nats."""
    wide = dpo_wide(dpo_baseline(table))[["chosen", "chosen_semantic"]].unstack()
    change = (wide - wide.iloc[0]).stack(future_stack=True)
    return float(change.chosen_semantic[change.chosen > 0].mean())


def dpo_rephrases_change(table: pd.DataFrame) -> float:
    """Larger of the end changes of the two rephrases of the chosen answer, nats."""
    return max(_change(dpo_baseline(table), kind) for kind in BELLS[:2])


def dpo_others_change(table: pd.DataFrame) -> float:
    """Largest end change among answers to other questions, unrelated and shuffled text, nats."""
    kinds = ("other_train", "other_test", "unrelated", "chosen_shuffled", "test_shuffled")
    return max(_change(dpo_baseline(table), kind) for kind in kinds)


def top_change(table: pd.DataFrame, path: str) -> float:
    """End change of log pi(y*) along one of PATHS, nats."""
    kind, split = PATHS[path]
    return _change(table, kind, metric="argmax_logp_sum", split=split)


def dpo_top_order(table: pd.DataFrame) -> float:
    """Rank correlation of log pi(y*) along chosen with the step: 1 where it rises throughout."""
    return _order(curve(dpo_baseline(table), "chosen", "argmax_logp_sum"))


def dpo_top_chosen(table: pd.DataFrame) -> float:
    """End change of log pi(y*) along the chosen answers, nats."""
    return top_change(dpo_baseline(table), "chosen")


def dpo_top_rejected(table: pd.DataFrame) -> float:
    """End change of log pi(y*) along the rejected answers, nats."""
    return top_change(dpo_baseline(table), "rejected")


def dpo_top_never_trained(table: pd.DataFrame) -> float:
    """End change of log pi(y*) along chosen answers to prompts that were never trained on, nats."""
    return top_change(dpo_baseline(table), "never trained")


def dpo_gap(table: pd.DataFrame) -> float:
    """Growth of log pi(y*) - log pi(chosen) along the chosen answers, nats."""
    return dpo_top_chosen(table) - dpo_chosen_change(table)


def dpo_top_minus_sft_chosen(table: pd.DataFrame) -> float:
    """Rise of log pi(y*) per epoch of DPO minus rise of log pi(chosen) per epoch of SFT, nats.

    The SFT is that between the starts of two short runs: from no SFT, and from the shortest.
    """
    starts = {n: curve(run, "chosen").iloc[0] for n, run in dpo_vary(table, "sft_epochs").groupby("sft_epochs")}
    none, short = sorted(starts)[:2]
    epochs = dpo_baseline(table).epochs.iloc[0] if "epochs" in table else 1
    return float(dpo_top_chosen(table) / epochs - (starts[short] - starts[none]) / (short - none))


def dpo_margin_order(table: pd.DataFrame) -> float:
    """Rank correlation of the mean DPO margin with the step (beta plays no part)."""
    return _order(dpo_margins(dpo_baseline(table), 1.0).mean(axis=1))


def dpo_late_change(table: pd.DataFrame) -> float:
    """Larger of the changes of log pi(chosen) and log pi(rejected) over the second half of DPO, nats."""
    halves = [curve(dpo_baseline(table), kind) for kind in ("chosen", "rejected")]
    return max(float(c.iloc[-1] - c[c.index >= c.index[-1] / 2].iloc[0]) for c in halves)


def dpo_sft_effect(table: pd.DataFrame, *kinds: str) -> float:
    """End change of types after the longest SFT minus that after the shortest one, in the same short DPO, nats."""
    by_length = dpo_vary(table, "sft_epochs").groupby("sft_epochs")
    ends = {n: np.mean([_change(run, kind) for kind in kinds or ["chosen"]]) for n, run in by_length if n}
    return float(ends[max(ends)] - ends[min(ends)])


def dpo_sft_effect_on_rest(table: pd.DataFrame) -> float:
    """The same for the mean of the rephrase and of unseen answers."""
    return dpo_sft_effect(table, "chosen_semantic", "other_test")


def dpo_peakiness(table: pd.DataFrame) -> float:
    """Change of ||A||_F along the chosen answers over DPO."""
    return _change(dpo_baseline(table), "chosen", metric="a_norm_mean")


def dpo_rest(table: pd.DataFrame) -> float:
    """Change of the summed log of the mass outside the arg max along the chosen answers over DPO, nats."""
    return _change(dpo_baseline(table), "chosen", metric="rest_logp_sum")


def dpo_sign_delta(table: pd.DataFrame) -> float:
    """Accumulated SignDelta of the chosen answer over DPO."""
    return float(sign_delta(dpo_baseline(table), "chosen")["chosen"])


def dpo_sign_delta_others(table: pd.DataFrame) -> float:
    """Largest accumulated SignDelta of any other type over DPO."""
    sums = sign_delta(dpo_baseline(table), "chosen")
    return float(max(value for kind, value in sums.items() if kind in AUTHORS_KEYS and kind != "chosen"))


def _by_rate(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The short runs at the largest and at the smallest learning rate."""
    runs = dpo_vary(table, "lr")
    return runs[runs.lr == runs.lr.max()], runs[runs.lr == runs.lr.min()]


def dpo_lr_chosen(table: pd.DataFrame) -> float:
    """End change of chosen at the largest learning rate minus that at the smallest, short runs, nats."""
    large, small = _by_rate(table)
    return _change(large, "chosen") - _change(small, "chosen")


def dpo_lr_top(table: pd.DataFrame) -> float:
    """The same for log pi(y*) along chosen."""
    large, small = _by_rate(table)
    return top_change(large, "chosen") - top_change(small, "chosen")


def dpo_repetition(table: pd.DataFrame) -> float:
    """Change over DPO of the share of repeated 4-grams in greedy answers, mean over prompts."""
    rows = dpo_baseline(table)
    share = rows[rows.metric == "rep4"].groupby("step").value.mean()
    return float(share.iloc[-1] - share.iloc[0])


def valley(table: pd.DataFrame, draws: int = 1000) -> dict:
    """Does what nobody pushes fall more where the rejected answer is less likely? A regression across prompts.

    Outcome: change over DPO of the mean log pi per token of unseen, unrelated and other training answers.
    Predictor: log pi per token of the rejected answer at the start. Held fixed: the start of the outcome, the
    start of the chosen answer, the rejected answer's length and its own fall, the seed. Returns the `slope` in nats per
    nat with a 95% `interval` from a bootstrap over prompts, and the residuals `x` and `y` of predictor and outcome.
    """
    table = dpo_baseline(table)
    table = table[table.prompt_id.astype(str).str.startswith("train/") & table.response_type.isin(NATURAL)]
    parts = []
    for seed, rows in table.groupby("seed"):
        logp = rows[rows.metric == "logp_mean"].pivot_table(
            index="prompt_id", columns=["step", "response_type"], values="value", observed=True
        )
        tokens = rows[(rows.metric == "tokens") & (rows.response_type == "rejected") & (rows.step == 0)]
        first, last = (logp[step] for step in (rows.step.min(), rows.step.max()))
        others = ["other_train", "other_test", "unrelated"]
        part = {
            "y": (last - first)[others].mean(axis=1),
            "x": first.rejected,
            "start": first[others].mean(axis=1),
            "chosen": first.chosen,
            "fall": last.rejected - first.rejected,
            "length": tokens.set_index("prompt_id").value,
        }
        parts.append(pd.DataFrame(part).assign(**{f"seed_{seed}": 1.0}))
    data = pd.concat(parts).fillna(0.0).rename_axis("prompt_id").reset_index()
    prompts = data.groupby("prompt_id", observed=True).indices
    random, names = np.random.default_rng(0), list(prompts)
    slopes = []
    for _ in range(draws):
        drawn = np.concatenate([prompts[names[i]] for i in random.integers(len(names), size=len(names))])
        slopes.append(_partial(data.iloc[drawn])[0])
    slope, x, y = _partial(data)
    return {"slope": slope, "interval": tuple(np.quantile(slopes, [0.025, 0.975])), "x": x, "y": y}


def _partial(data: pd.DataFrame) -> tuple[float, np.ndarray, np.ndarray]:
    """Slope of y on x with all other columns held fixed, and the residuals of both."""
    controls = data.drop(columns=["prompt_id", "x", "y"]).to_numpy()
    x, y = (data[name] - controls @ np.linalg.lstsq(controls, data[name], rcond=None)[0] for name in ("x", "y"))
    return float(x @ y / (x @ x)), x.to_numpy(), y.to_numpy()


def below_start(table: pd.DataFrame, split: str = "train") -> pd.Series:
    """Share of chosen answers that end below where they started, for each seed."""
    rows = dpo_baseline(table)
    return pd.Series({seed: _below(part, split) for seed, part in rows.groupby("seed")})


def _below(table: pd.DataFrame, split: str) -> float:
    chosen = dpo_wide(table, split=split).chosen.unstack()
    return float((chosen.iloc[-1] < chosen.iloc[0]).mean())


def dpo_ends(table: pd.DataFrame, kinds=("chosen", "rejected", "chosen_semantic", "other_test")) -> pd.DataFrame:
    """The end of every short run: a row with its settings, the end changes of types and of y* along PATHS, in nats."""
    settings = [name for name in ("pairs", "sft_epochs", "lr", "beta") if name in table]
    rows = []
    for names, run in table[table.measure != "all"].groupby([*settings, "seed"], observed=True):
        ends = {kind: _change(run, kind) for kind in kinds}
        ends |= {f"y* along {path}": top_change(run, path) for path in PATHS}
        rows.append(dict(zip([*settings, "seed"], names, strict=True)) | ends)
    return pd.DataFrame(rows)


def dpo_effects(ends: pd.DataFrame) -> pd.DataFrame:
    """What moves the end change of y*: mean differences along PATHS in nats, with 95% intervals over seeds.

    ends: rows of `dpo_ends`. A difference is taken within a seed; where other settings are crossed with it, it is
    their mean. The kinds of pairs are compared at the large learning rate, where all effects are larger.
    """
    lengths, rates = dpo_vary(ends, "pairs", "sft_epochs"), dpo_vary(ends, "pairs", "lr")
    lengths = lengths[lengths.sft_epochs > 0]
    small, large = rates.lr.min(), rates.lr.max()
    fast, style = rates[rates.lr == large], rates.pairs == "style"
    contrasts = {
        f"{kind} pairs, not as written": (fast, "pairs", kind, "as_written")
        for kind in fast.pairs.unique()
        if kind != "as_written"
    }
    contrasts["larger rate, style pairs"] = (rates[style], "lr", large, small)
    contrasts["larger rate, all other pairs"] = (rates[~style], "lr", large, small)
    contrasts["long SFT, not short"] = (lengths, "sft_epochs", lengths.sft_epochs.max(), lengths.sft_epochs.min())
    rows = {}
    for name, (runs, setting, high, low) in contrasts.items():
        if len(runs):
            means = runs.groupby(["seed", setting])[[f"y* along {path}" for path in PATHS]].mean()
            change = means.xs(high, level=setting) - means.xs(low, level=setting)
            rows[name] = {path: "{:+.1f} [{:+.1f}, {:+.1f}]".format(*mean_interval(change[path])) for path in change}
    return pd.DataFrame(rows).T


def mean_interval(values: pd.Series) -> tuple[float, float, float]:
    """Mean with its 95% t-interval."""
    half = t.ppf(0.975, len(values) - 1) * values.std() / np.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def repetition_change(table: pd.DataFrame) -> tuple[float, float, float]:
    """Change over DPO of the share of repeated 4-grams in greedy answers, with a 95% interval over prompts."""
    rows = table[table.metric == "rep4"]
    wide = rows.pivot_table(index=["seed", "prompt_id"], columns="step", values="value", observed=True)
    return mean_interval(wide.iloc[:, -1] - wide.iloc[:, 0])
