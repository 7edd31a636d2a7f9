"""Chapter 5: DPO. Statistics take the table of all runs; those of the long runs leave out the short ones themselves."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lddyn import InputError, unknown
from lddyn.chapters.statistics import (
    AUTHORS_KEYS,
    NATURAL,
    PATHS,
    bootstrapped_slope,
    bounded,
    by_setting,
    change,
    curve,
    fall,
    in_interval,
    margins,
    mean_interval,
    needed,
    order,
    rise,
    sign_delta,
    top_change,
    wide,
)
from lddyn.data import responses

# --- the pairs that are trained on ---------------------------------------------------------------------------

# the response that stands for the rejected one
PAIRS = {"as_written": "rejected", "style": "rejected_format", "swapped": "rejected", "rephrase": "chosen_semantic"}


def paired(examples: Sequence[dict], pairs: str) -> list[dict]:
    """The examples with `chosen` and `rejected` as they are trained on.

    as_written: as the data has them; style: against an off-topic text in the form of the rejected answer, which a bag
    of words tells apart; swapped: the roles of every second pair exchanged; rephrase: the chosen answer against its own
    rephrase that keeps the meaning. Raises `InputError` for another name, or when the data lacks what it needs.
    """
    if pairs not in PAIRS:
        raise unknown("pairs", pairs, PAIRS)
    if PAIRS[pairs] not in examples[0]:
        raise InputError(f"pairs={pairs!r} needs the response type {PAIRS[pairs]!r}, which the data lacks")
    result = [e | {"rejected": e[PAIRS[pairs]]} for e in examples]
    if pairs == "swapped":
        result[1::2] = [
            e | {_other_role(name): e[name] for name in e if name[:6] in ("chosen", "reject")} for e in result[1::2]
        ]
    return result


def _other_role(name: str) -> str:
    return name.replace("chosen", "rejected") if name.startswith("chosen") else name.replace("rejected", "chosen")


# --- the runs ------------------------------------------------------------------------------------------------

VARIED = ("pairs", "sft_epochs", "lr", "beta")  # in the short runs


def baseline(table: pd.DataFrame) -> pd.DataFrame:
    """The runs of chapter 5 that measure everything, out of a table that may also hold the short ones."""
    return table[table.measure == "all"] if "measure" in table else table


def vary(table: pd.DataFrame, *free: str) -> pd.DataFrame:
    """The short runs, out of a table or of `ends`, that differ from their centre in the settings `free` alone.

    The centre has the commonest value of each setting: the designs cross there.
    """
    short = needed(table[table.measure == "paths"] if "measure" in table else table, what="short runs")
    keep = np.ones(len(short), dtype=bool)
    for name in VARIED:
        if name in short and name not in free:
            keep &= (short[name] == short[name].mode()[0]).to_numpy()
    return short[keep]


# --- the long runs ----------------------------------------------------------------------------------------------


def end_change(table: pd.DataFrame, kind: str, metric: str = "logp_sum", split: str = "train") -> float:
    """Change over DPO of a metric of one type, mean over prompts; log-probabilities in nats."""
    return change(baseline(table), kind, metric=metric, split=split)


def largest_change(table: pd.DataFrame, kinds: Sequence[str]) -> float:
    """Largest end change of log pi among types, nats."""
    return max(end_change(table, kind) for kind in kinds)


@bounded(-1, 1)
def step_order(table: pd.DataFrame, kind: str, metric: str = "logp_sum") -> float:
    """Rank correlation of a metric of one type with the step: 1 where it rises throughout, -1 where it falls."""
    return order(curve(baseline(table), kind, metric))


def rejected_minus_next(table: pd.DataFrame) -> float:
    """End change of log pi(rejected) minus that of the natural type that falls most but its own rephrases, nats."""
    return end_change(table, "rejected") - min(end_change(table, k) for k in NATURAL if not k.startswith("rejected"))


def chosen_rise(table: pd.DataFrame) -> float:
    """Rise of log pi(chosen) from the start of DPO to its peak, nats."""
    return rise(baseline(table), "chosen")


def chosen_fall(table: pd.DataFrame) -> float:
    """Fall of log pi(chosen) from its peak to the end of DPO, nats."""
    return fall(baseline(table), "chosen")


def chosen_over_rejected(table: pd.DataFrame) -> float:
    """Smallest of three: end change of chosen minus that of rejected, for the answers and both kinds of rephrase."""
    kinds = ("chosen", "chosen_semantic", "chosen_format")
    return min(end_change(table, kind) - end_change(table, kind.replace("chosen", "rejected")) for kind in kinds)


def rephrases_where_chosen_is_up(table: pd.DataFrame) -> float:
    """Mean change of chosen_semantic wherever (prompt, evaluation) the chosen answer is above its start, nats."""
    kinds = ["chosen", "chosen_semantic"]
    logps = wide(baseline(table), *kinds)[kinds].unstack()
    since = (logps - logps.iloc[0]).stack(future_stack=True)
    return float(since.chosen_semantic[since.chosen > 0].mean())


@bounded(-1, 1)
def margin_order(table: pd.DataFrame) -> float:
    """Rank correlation of the mean DPO margin with the step (beta plays no part)."""
    return order(margins(baseline(table), 1.0).mean(axis=1))


def gap_growth(table: pd.DataFrame) -> float:
    """Growth of log pi(chosen) - log pi(rejected) over DPO, mean over prompts, nats: the dose."""
    return end_change(table, "chosen") - end_change(table, "rejected")


def late_change(table: pd.DataFrame) -> float:
    """Larger of the changes of log pi(chosen) and log pi(rejected) over the second half of DPO, nats."""
    halves = [curve(baseline(table), kind) for kind in ("chosen", "rejected")]
    return max(float(c.iloc[-1] - c[c.index >= c.index[-1] / 2].iloc[0]) for c in halves)


def sign_delta_of_chosen(table: pd.DataFrame, smoothed: bool = False) -> float:
    """Accumulated SignDelta of the chosen answer over DPO (`statistics.sign_delta`)."""
    return float(needed(sign_delta(baseline(table), "chosen", smoothed), "chosen")["chosen"])


def sign_delta_of_others(table: pd.DataFrame, smoothed: bool = False) -> float:
    """Largest accumulated SignDelta of any other type over DPO."""
    sums = sign_delta(baseline(table), "chosen", smoothed)
    return float(max(needed([value for kind, value in sums.items() if kind in AUTHORS_KEYS and kind != "chosen"])))


def below_start(table: pd.DataFrame, split: str = "train") -> pd.Series:
    """Share of chosen answers that end below where they started, for each seed."""
    chosen = {
        seed: wide(rows, "chosen", split=split).chosen.unstack() for seed, rows in baseline(table).groupby("seed")
    }
    return pd.Series({seed: float((logps.iloc[-1] < logps.iloc[0]).mean()) for seed, logps in chosen.items()})


def valley(table: pd.DataFrame, draws: int = 1000) -> dict:
    """Does what nobody pushes fall more where the rejected answer is less likely? A regression across prompts.

    Outcome: change over DPO of the mean log pi per token of unseen, unrelated and other training answers.
    Predictor: log pi per token of the rejected answer at the start. Held fixed: the start of the outcome, the
    start of the chosen answer, the rejected answer's length and its own fall, the seed. Returns the `slope` in nats per
    nat with a 95% `interval` from a bootstrap over prompts, and the residuals `x` and `y` of predictor and outcome.
    """
    table = baseline(table)
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
    return bootstrapped_slope(data, draws)


def valley_slope(table: pd.DataFrame) -> float:
    """The slope of `valley`, nats per nat."""
    needed(table[table.metric == "tokens"], what="log pi per token of each prompt")
    return float(valley(table, draws=1)["slope"])


def slope_sentence(fit: dict) -> str:
    """The slope of `valley`, in words."""
    return "slope {:+.3f} nats per nat, 95% interval [{:+.3f}, {:+.3f}]".format(fit["slope"], *fit["interval"])


def _repetition(table: pd.DataFrame) -> pd.Series:
    """Change over DPO of the share of repeated 4-grams in each greedy answer."""
    rows = baseline(table)
    rows = needed(rows[rows.metric == "rep4"], what="rep4")
    share = rows.pivot_table(index=["seed", "prompt_id"], columns="step", values="value", observed=True)
    return share.iloc[:, -1] - share.iloc[:, 0]


@bounded(-1, 1)
def repetition(table: pd.DataFrame) -> float:
    """Change over DPO of the share of repeated 4-grams in greedy answers, mean over prompts."""
    return float(_repetition(table).mean())


def repetition_sentence(table: pd.DataFrame) -> str:
    """`repetition`, in words."""
    words = "change of repeated 4-grams: {:+.1%} of an answer, 95% interval over prompts [{:+.1%}, {:+.1%}]"
    return words.format(*mean_interval(_repetition(table)))


# --- the short runs ---------------------------------------------------------------------------------------------


def top_minus_sft_chosen(table: pd.DataFrame) -> float:
    """Rise of log pi(y*) along chosen in DPO minus rise of log pi(chosen) in SFT, nats per hundred examples.

    At equal learning rate and batch, on the same examples: SFT of the untouched model (`run.sft_like_dpo`).
    """
    sft = needed(table[table.measure.isna()] if "measure" in table else table[:0], what="SFT at the rate of DPO")
    dpo = baseline(table)
    return float(top_change(dpo, "chosen") / dpo.examples.max() - change(sft, "chosen") / sft.examples.max()) * 100


def sft_effect(table: pd.DataFrame, kinds: Sequence[str]) -> float:
    """Mean end change of types after the longest SFT minus that after the shortest one, in the same short DPO, nats."""
    by_length = by_setting(vary(table, "sft_epochs"), "sft_epochs")
    changes = {n: np.mean([change(run, kind) for kind in kinds]) for n, run in by_length.items() if n}
    return float(changes[max(changes)] - changes[min(changes)])


def rate_effect(table: pd.DataFrame, metric: str = "logp_sum") -> float:
    """End change along chosen at the largest learning rate minus that at the smallest, in the same short DPO, nats."""
    by_rate = by_setting(vary(table, "lr"), "lr")
    large, small = (change(by_rate[rate], "chosen", metric=metric) for rate in (max(by_rate), min(by_rate)))
    return large - small


def ends(table: pd.DataFrame, kinds=("chosen", "rejected", "chosen_semantic", "other_test")) -> pd.DataFrame:
    """The end of every short run: a row with its settings, the end changes of types and of y* along PATHS, in nats."""
    names = [*(name for name in VARIED if name in table), "seed"]
    rows = []
    for values, run in table[table.measure == "paths"].groupby(names, observed=True):
        changes = {kind: change(run, kind) for kind in kinds}
        changes |= {f"y* along {path}": top_change(run, path) for path in PATHS}
        rows.append(dict(zip(names, values, strict=True)) | changes)
    return pd.DataFrame(rows)


def crossed(ends: pd.DataFrame) -> pd.DataFrame:
    """The design for the question when y* rises: kinds of pairs x length of SFT, and kinds of pairs x learning rate."""
    by_length, by_rate = vary(ends, "pairs", "sft_epochs"), _rates(ends)
    return pd.concat([by_length[by_length.sft_epochs > 0], by_rate[by_rate.lr == by_rate.lr.min()]])


def by_pairs(design: pd.DataFrame, examples: Sequence[dict]) -> pd.DataFrame:
    """Mean ends over seeds in each cell of a `crossed` design, and how often a bag of words tells its pairs apart.

    examples: what is trained on, for the accuracy of the bag of words (`responses.style_accuracy`).
    """
    told_apart = {}
    for pairs in design.pairs.unique():
        both = paired(examples, pairs)
        told_apart[pairs] = responses.style_accuracy(*([e[role] for e in both] for role in ("chosen", "rejected")))
    columns = ["chosen", "rejected", *(f"y* along {path}" for path in PATHS)]
    means = design.groupby(["pairs", "sft_epochs", "lr"])[columns].mean().reset_index(["sft_epochs", "lr"])
    means.insert(0, "told apart by a bag of words", means.index.map(told_apart))
    return means


def contrasts(ends: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What moves the end change of y*: of each contrast its difference along PATHS, nats, a row a seed.

    ends: rows of `ends`. A difference is taken within a seed; where other settings are crossed with it, it is
    their mean. The kinds of pairs are compared at the large learning rate, where all effects are larger.
    """
    lengths, rates = vary(ends, "pairs", "sft_epochs"), _rates(ends)
    lengths = lengths[lengths.sft_epochs > 0]
    small, large = rates.lr.min(), rates.lr.max()
    fast, style = _fast(ends), rates.pairs == "style"
    found = {
        f"{kind} pairs, not as written": (fast, "pairs", kind, "as_written")
        for kind in fast.pairs.unique()
        if kind != "as_written"
    }
    found["larger rate, style pairs"] = (rates[style], "lr", large, small)
    found["larger rate, all other pairs"] = (rates[~style], "lr", large, small)
    found["long SFT, not short"] = (lengths, "sft_epochs", lengths.sft_epochs.max(), lengths.sft_epochs.min())
    columns = [f"y* along {path}" for path in PATHS]
    means = {
        of: (runs.groupby(["seed", by])[columns].mean(), by, *ab) for of, (runs, by, *ab) in found.items() if len(runs)
    }
    return {of: mean.xs(high, level=by) - mean.xs(low, level=by) for of, (mean, by, high, low) in means.items()}


def _rates(ends: pd.DataFrame) -> pd.DataFrame:
    """The kinds of pairs at the learning rates that they are crossed with; pairs as written have more of these."""
    rates = vary(ends, "pairs", "lr")
    return rates[rates.lr.isin(rates.lr[rates.pairs != "as_written"])]


def _fast(ends: pd.DataFrame) -> pd.DataFrame:
    """The kinds of pairs at the larger of these learning rates."""
    rates = _rates(ends)
    return rates[rates.lr == rates.lr.max()]


def effects(ends: pd.DataFrame) -> pd.DataFrame:
    """`contrasts` as means over the seeds with 95% intervals."""
    return pd.DataFrame({of: moved.apply(in_interval) for of, moved in contrasts(ends).items()}).T


# --- what the text says of a larger design: statistics of one seed's `ends`


def effect(ends: pd.DataFrame, of: str, path: str = "chosen") -> float:
    """One of `contrasts`: difference of the end change of y* along a path, nats."""
    return float(needed(contrasts(ends), of)[of][f"y* along {path}"].iloc[0])


def end_effect(ends: pd.DataFrame, setting: str, columns: Sequence[str]) -> float:
    """Mean end change of some columns at the largest value of a setting minus that at the smallest but 0, nats."""
    by_value = vary(ends, setting).set_index(setting)[list(columns)].mean(axis=1)
    by_value = by_value[by_value.index > 0].sort_index()
    return float(by_value.iloc[-1] - by_value.iloc[0])


def top_end(ends: pd.DataFrame, pairs: str, end: str = "min") -> float:
    """Smallest or largest over PATHS of the end change of y* with one kind of pairs, at the larger rate, nats."""
    fast = _fast(ends)
    return float(needed(fast[fast.pairs == pairs])[[f"y* along {path}" for path in PATHS]].agg(end, axis=1).iloc[0])


def pairs_end(ends: pd.DataFrame, pairs: str, column: str, than: str) -> float:
    """End change of a column with one kind of pairs minus that with another, at the larger rate, nats."""
    at = needed(_fast(ends).set_index("pairs")[column], pairs, than)
    return float(at[pairs] - at[than])


def extreme_end(ends: pd.DataFrame, columns: Sequence[str], end: str = "max") -> float:
    """Largest (or smallest) end change over all settings and some columns, nats."""
    return float(ends[list(columns)].agg(end).agg(end))


@bounded(0, 1)
def share_falling(ends: pd.DataFrame, column: str) -> float:
    """Share of the settings with the larger learning rate in which a column ends below its start."""
    return float((ends[ends.lr == ends.lr.max()][column] < 0).mean())


def style_top(table: pd.DataFrame) -> float:
    """End change of y* along chosen in the short runs with style pairs, mean, nats."""
    return float(needed(ends(table).query("pairs == 'style'"))["y* along chosen"].mean())
