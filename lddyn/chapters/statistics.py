"""What the statistics of several chapters share: curves over steps, their changes, SignDelta, intervals.

A statistic takes the table of one seed. What it needs and the table lacks it says with `NotMeasured`.
"""

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata, spearmanr, t

from lddyn import InputError
from lddyn.data.responses import RESPONSE_TYPES

BELLS = ("chosen_semantic", "chosen_format", "rejected", "rejected_semantic", "rejected_format")
NATURAL = ("chosen", *BELLS[:2], "chosen_initial", *BELLS[2:], "other_train", "other_test", "unrelated")
AUTHORS_KEYS = {kind: (names or (kind,))[0] for kind, names in RESPONSE_TYPES.items()}


class NotMeasured(InputError):
    """A table lacks what is computed from it: a type of response, a metric, prompts of a split, runs of a setting.

    `claims` and `report` show such a statistic as not measured. Any other error in a statistic is a mistake in it.
    """


def needed(rows, *columns: str, what: str = "rows"):
    """A table, curve or mapping as it is; raises `NotMeasured` where it is empty or lacks a column (or key)."""
    lacking = [name for name in columns if name not in rows]
    if lacking or not len(rows):
        raise NotMeasured(f"the table has no {', '.join(lacking) or what}")
    return rows


def by_setting(table: pd.DataFrame, name: str) -> dict[Any, pd.DataFrame]:
    """The rows of the runs with each value of a setting; raises `NotMeasured` where they do not differ in it."""
    groups = dict(list(table.groupby(name, observed=True))) if name in table else {}
    return needed(groups if len(groups) > 1 else {}, what=f"runs that differ in {name}")


def mean_over_prompts(
    table: pd.DataFrame, kind: str, metric: str = "logp_sum", split: str = "train", target: str = "chosen"
) -> pd.Series:
    """Mean over the probed prompts of a metric of one type of response, over steps; empty where it is not measured.

    `split` says whether the prompts are trained on; `target` which runs, where a table holds several.
    """
    rows = table[(table.response_type == kind) & (table.metric == metric)]
    rows = rows[rows.prompt_id.astype(str).str.startswith(f"{split}/")]
    if "target" in rows:
        rows = rows[rows.target == target]
    if "n_train" in rows:  # the run on all prompts, not the small ones for the heat map
        rows = rows[rows.n_train == rows.n_train.max()]
    return rows.groupby("step").value.mean()


def curve(table: pd.DataFrame, kind: str, metric: str = "logp_sum", split: str = "train", target: str = "chosen"):
    """`mean_over_prompts`; raises `NotMeasured` where it is empty."""
    return needed(mean_over_prompts(table, kind, metric, split, target), what=f"{metric} of {kind} ({split})")


def change(table: pd.DataFrame, kind: str, **which) -> float:
    """End of `curve` minus its start."""
    values = curve(table, kind, **which)
    return float(values.iloc[-1] - values.iloc[0])


def rise(table: pd.DataFrame, kind: str) -> float:
    """From the start of the curve of log pi to its peak, nats summed over the response."""
    values = curve(table, kind)
    return float(values.max() - values.iloc[0])


def fall(table: pd.DataFrame, kind: str) -> float:
    """From the peak of the curve of log pi to its end, nats summed over the response."""
    values = curve(table, kind)
    return float(values.max() - values.iloc[-1])


def order(values: pd.Series) -> float:
    """Rank correlation of a curve with the step: 1 where it rises throughout, -1 where it falls."""
    return float(spearmanr(values.index, values).statistic)


def wide(table: pd.DataFrame, *kinds: str, metric: str = "logp_sum", split: str = "train") -> pd.DataFrame:
    """A metric of every prompt: rows (step, prompt), columns types of response, `NotMeasured` without those named."""
    rows = table[(table.metric == metric) & table.prompt_id.astype(str).str.startswith(f"{split}/")]
    found = rows.pivot_table(index=["step", "prompt_id"], columns="response_type", values="value", observed=True)
    return needed(found, *kinds, what=f"{metric} ({split})")


def sign_delta(table: pd.DataFrame, target: str, smoothed: bool = False) -> pd.Series:
    """Accumulated SignDelta of every type when `target` is trained (appendix C.2): a sum over all evaluations.

    Between two evaluations, the mean change of the summed log pi over sqrt(||A||_F) of the observed type and over
    ||pi - y|| of the trained one. `smoothed`: by a running mean (0.9) before the sum, as in the authors' released code;
    over few evaluations the first one then outweighs the others.
    """
    trained = "chosen" if target == "extended" else target
    residual = curve(table, trained, "residual_norm_mean", target=target)
    sums = {}
    for kind in table.response_type.astype("category").cat.categories:
        logp, a_norm = (mean_over_prompts(table, kind, m, target=target) for m in ("logp_sum", "a_norm_mean"))
        if len(logp) and len(a_norm):  # a greedy answer has no peakiness
            delta = logp.diff() / np.sqrt(a_norm.shift()) / residual.shift()
            changes = delta.iloc[1:]
            sums[kind] = (changes.ewm(alpha=0.1, adjust=False).mean() if smoothed else changes).sum()
    return pd.Series(sums)


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
    ours = pd.Series({kind: change(table, kind, metric=metric) for kind in kinds})
    return ours, (theirs.iloc[-1] - theirs.iloc[0])[kinds], metric


def mean_interval(values) -> tuple[float, float, float]:
    """Mean over seeds (or prompts) with its 95% t-interval, which is infinitely wide for a single one."""
    values = np.asarray(values)
    mean, n = float(values.mean()), len(values)
    half = float(t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    return mean, mean - half, mean + half


def in_interval(values, digits: int = 1) -> str:
    """`mean_interval` as a cell of a table: "+4.1 [+2.0, +6.2]"; of a single value that value alone."""
    mean, low, high = mean_interval(values)
    spread = f" [{low:+.{digits}f}, {high:+.{digits}f}]" if math.isfinite(low) else ""
    return f"{mean:+.{digits}f}{spread}"


def end_changes(table: pd.DataFrame, split: str = "train") -> pd.Series:
    """End change of every type, and of y* along PATHS, in nats summed over a response: means and intervals over seeds.

    `split`: of the prompts; y* has its own (`PATHS`).
    """
    runs = [rows for _, rows in table.groupby("seed")]
    kinds = [kind for kind in RESPONSE_TYPES if len(mean_over_prompts(runs[0], kind, split=split))]
    found = {kind: in_interval([change(run, kind, split=split) for run in runs]) for kind in kinds}
    return pd.Series(
        found | {f"y* along {path}": in_interval([top_change(run, path) for run in runs]) for path in PATHS}
    )


def spill(table: pd.DataFrame) -> float:
    """End change of answers to other training questions as a share of that of the trained answers."""
    return change(table, "other_train") / change(table, "chosen")


def before_and_after(folder: Path, heads: tuple[str, str], split: str = "test", count: int = 4) -> pd.DataFrame:
    """Greedy answers of a run to the first prompts of a split, before and after. A model's own texts: escape them."""
    answers = pd.read_json(folder / "answers.json", orient="records")
    answers = answers[answers.prompt_id.str.startswith(f"{split}/")]
    asked = answers.prompt.str.removeprefix("Question: ").str.removesuffix("\nAnswer:")
    texts = answers.assign(prompt=asked).pivot(index="prompt", columns="step", values="text").head(count)
    return texts.set_axis(list(heads), axis=1)


def partner_symmetry(sizes: np.ndarray) -> float:
    """Rank correlation between 'rank of o among the partners of u' and 'rank of u among those of o'.

    sizes: (n, n), such as ||K_uo||, which is symmetric itself (K_uo is the transpose of K_ou); the ranking need not be.
    """
    off = ~np.eye(len(sizes), dtype=bool)
    ranks = np.apply_along_axis(lambda c: rankdata(c, nan_policy="omit"), 0, np.where(off, sizes, np.nan))
    return float(spearmanr(ranks[off], ranks.T[off]).statistic)


@cache
def _random_symmetry(size: int, draws: int = 1000) -> np.ndarray:
    """`partner_symmetry` of random symmetric matrices: what a ranking without structure would have."""
    noise = np.random.default_rng(0).random((draws, size, size))
    return np.array([partner_symmetry(one + one.T) for one in noise])


def at_most_as_symmetric(sizes: np.ndarray) -> float:
    """Share of random symmetric matrices of this size with at most its `partner_symmetry`: small where the ranking of
    partners is less symmetric than chance makes it."""
    return float((_random_symmetry(len(sizes)) <= partner_symmetry(sizes)).mean())


def partial_slope(data: pd.DataFrame) -> tuple[float, np.ndarray, np.ndarray]:
    """Slope of y on x with all other columns but `prompt_id` held fixed, and the residuals of both."""
    controls = data.drop(columns=["prompt_id", "x", "y"]).to_numpy()
    x, y = (data[name] - controls @ np.linalg.lstsq(controls, data[name], rcond=None)[0] for name in ("x", "y"))
    return float(x @ y / (x @ x)), x.to_numpy(), y.to_numpy()


def bootstrapped_slope(data: pd.DataFrame, draws: int) -> dict:
    """`partial_slope` with a 95% interval from a bootstrap over prompts: `slope, interval` and the residuals `x, y`."""
    prompts = data.groupby("prompt_id", observed=True).indices
    random, names = np.random.default_rng(0), list(prompts)
    slopes = []
    for _ in range(draws):
        drawn = np.concatenate([prompts[names[i]] for i in random.integers(len(names), size=len(names))])
        slopes.append(partial_slope(data.iloc[drawn])[0])
    slope, x, y = partial_slope(data)
    return {"slope": slope, "interval": tuple(np.quantile(slopes, [0.025, 0.975])), "x": x, "y": y}


def share_won(gain: pd.Series) -> float:
    """Share of prompts whose score has grown; where it has not changed a prompt counts half."""
    return float(((gain > 0) + 0.5 * (gain == 0)).mean())


PATHS = {  # where y* is measured: type of response, prompts
    "chosen": ("chosen", "train"),
    "rejected": ("rejected", "train"),
    "never trained": ("chosen", "test"),
}


def top_change(table: pd.DataFrame, path: str) -> float:
    """End change of log pi(y*) along one of PATHS, nats."""
    kind, split = PATHS[path]
    return change(table, kind, metric="argmax_logp_sum", split=split)


def margins(table: pd.DataFrame, beta: float, split: str = "train") -> pd.DataFrame:
    """The margin beta ((log pi - log pi_ref)(chosen) - (same)(rejected)) in nats: rows steps, columns prompts."""
    gap = wide(table, "chosen", "rejected", split=split)
    gap = (gap.chosen - gap.rejected).unstack()
    return beta * (gap - gap.iloc[0])
