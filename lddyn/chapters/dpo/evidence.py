"""Chapter 5: DPO."""

import numpy as np
import pandas as pd

from lddyn.chapters.statistics import (
    AUTHORS_KEYS,
    BELLS,
    NATURAL,
    bootstrapped_slope,
    change,
    curve,
    fall,
    mean_interval,
    order,
    rise,
    sign_delta,
    wide,
)

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


def dpo_margins(table: pd.DataFrame, beta: float, split: str = "train") -> pd.DataFrame:
    """The margin beta ((log pi - log pi_ref)(chosen) - (same)(rejected)) in nats: rows steps, columns prompts."""
    gap = wide(table, split=split)
    gap = (gap.chosen - gap.rejected).unstack()
    return beta * (gap - gap.iloc[0])


def dpo_rejected_order(table: pd.DataFrame) -> float:
    """Rank correlation of log pi(rejected) with the step: -1 where it falls throughout."""
    return order(curve(dpo_baseline(table), "rejected"))


def dpo_rejected_minus_next(table: pd.DataFrame) -> float:
    """End change of log pi(rejected) minus that of the natural type that falls most beside it, nats."""
    table = dpo_baseline(table)
    return change(table, "rejected") - min(change(table, kind) for kind in NATURAL if kind != "rejected")


def dpo_chosen_rise(table: pd.DataFrame) -> float:
    """Rise of log pi(chosen) from the start of DPO to its peak, nats."""
    return rise(dpo_baseline(table), "chosen")


def dpo_chosen_fall(table: pd.DataFrame) -> float:
    """Fall of log pi(chosen) from its peak to the end of DPO, nats."""
    return fall(dpo_baseline(table), "chosen")


def dpo_chosen_change(table: pd.DataFrame) -> float:
    """Change of log pi(chosen) over DPO, nats."""
    return change(dpo_baseline(table), "chosen")


def dpo_chosen_over_rejected(table: pd.DataFrame) -> float:
    """Smallest of three: end change of chosen minus that of rejected, for the answers and both kinds of rephrase."""
    table = dpo_baseline(table)
    kinds = ("chosen", "chosen_semantic", "chosen_format")
    return min(change(table, kind) - change(table, kind.replace("chosen", "rejected")) for kind in kinds)


def dpo_rephrases_where_chosen_is_up(table: pd.DataFrame) -> float:
    """Mean change of chosen_semantic wherever (prompt, evaluation) the chosen answer is above its start, nats."""
    logps = wide(dpo_baseline(table))[["chosen", "chosen_semantic"]].unstack()
    since = (logps - logps.iloc[0]).stack(future_stack=True)
    return float(since.chosen_semantic[since.chosen > 0].mean())


def dpo_rephrases_change(table: pd.DataFrame) -> float:
    """Larger of the end changes of the two rephrases of the chosen answer, nats."""
    return max(change(dpo_baseline(table), kind) for kind in BELLS[:2])


def dpo_others_change(table: pd.DataFrame) -> float:
    """Largest end change among answers to other questions, unrelated and shuffled text, nats."""
    kinds = ("other_train", "other_test", "unrelated", "chosen_shuffled", "test_shuffled")
    return max(change(dpo_baseline(table), kind) for kind in kinds)


def top_change(table: pd.DataFrame, path: str) -> float:
    """End change of log pi(y*) along one of PATHS, nats."""
    kind, split = PATHS[path]
    return change(table, kind, metric="argmax_logp_sum", split=split)


def dpo_top_order(table: pd.DataFrame) -> float:
    """Rank correlation of log pi(y*) along chosen with the step: 1 where it rises throughout."""
    return order(curve(dpo_baseline(table), "chosen", "argmax_logp_sum"))


def dpo_top_chosen(table: pd.DataFrame) -> float:
    """End change of log pi(y*) along the chosen answers, nats."""
    return top_change(dpo_baseline(table), "chosen")


def dpo_top_rejected(table: pd.DataFrame) -> float:
    """End change of log pi(y*) along the rejected answers, nats."""
    return top_change(dpo_baseline(table), "rejected")


def dpo_top_never_trained(table: pd.DataFrame) -> float:
    """End change of log pi(y*) along chosen answers to prompts that were never trained on, nats."""
    return top_change(dpo_baseline(table), "never trained")


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
    return order(dpo_margins(dpo_baseline(table), 1.0).mean(axis=1))


def dpo_late_change(table: pd.DataFrame) -> float:
    """Larger of the changes of log pi(chosen) and log pi(rejected) over the second half of DPO, nats."""
    halves = [curve(dpo_baseline(table), kind) for kind in ("chosen", "rejected")]
    return max(float(c.iloc[-1] - c[c.index >= c.index[-1] / 2].iloc[0]) for c in halves)


def dpo_sft_effect(table: pd.DataFrame, *kinds: str) -> float:
    """End change of types after the longest SFT minus that after the shortest one, in the same short DPO, nats."""
    by_length = dpo_vary(table, "sft_epochs").groupby("sft_epochs")
    ends = {n: np.mean([change(run, kind) for kind in kinds or ["chosen"]]) for n, run in by_length if n}
    return float(ends[max(ends)] - ends[min(ends)])


def dpo_sft_effect_on_rest(table: pd.DataFrame) -> float:
    """The same for the mean of the rephrase and of unseen answers."""
    return dpo_sft_effect(table, "chosen_semantic", "other_test")


def dpo_peakiness(table: pd.DataFrame) -> float:
    """Change of ||A||_F along the chosen answers over DPO."""
    return change(dpo_baseline(table), "chosen", metric="a_norm_mean")


def dpo_rest(table: pd.DataFrame) -> float:
    """Change of the summed log of the mass outside the arg max along the chosen answers over DPO, nats."""
    return change(dpo_baseline(table), "chosen", metric="rest_logp_sum")


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
    return change(large, "chosen") - change(small, "chosen")


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
    return bootstrapped_slope(data, draws)


def below_start(table: pd.DataFrame, split: str = "train") -> pd.Series:
    """Share of chosen answers that end below where they started, for each seed."""
    rows = dpo_baseline(table)
    return pd.Series({seed: _below(part, split) for seed, part in rows.groupby("seed")})


def _below(table: pd.DataFrame, split: str) -> float:
    chosen = wide(table, split=split).chosen.unstack()
    return float((chosen.iloc[-1] < chosen.iloc[0]).mean())


def dpo_ends(table: pd.DataFrame, kinds=("chosen", "rejected", "chosen_semantic", "other_test")) -> pd.DataFrame:
    """The end of every short run: a row with its settings, the end changes of types and of y* along PATHS, in nats."""
    settings = [name for name in ("pairs", "sft_epochs", "lr", "beta") if name in table]
    rows = []
    for names, run in table[table.measure != "all"].groupby([*settings, "seed"], observed=True):
        ends = {kind: change(run, kind) for kind in kinds}
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


def repetition_change(table: pd.DataFrame) -> tuple[float, float, float]:
    """Change over DPO of the share of repeated 4-grams in greedy answers, with a 95% interval over prompts."""
    rows = table[table.metric == "rep4"]
    wide = rows.pivot_table(index=["seed", "prompt_id"], columns="step", values="value", observed=True)
    return mean_interval(wide.iloc[:, -1] - wide.iloc[:, 0])
