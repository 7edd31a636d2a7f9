"""Chapter 6: other losses, and whose answers are pushed."""

import numpy as np
import pandas as pd

from lddyn.chapters.statistics import (
    PATHS,
    bootstrapped_slope,
    change,
    curve,
    margins,
    partial_slope,
    share_won,
    top_change,
    wide,
)

UNPUSHED = ("chosen_semantic", "other_train", "other_test", "unrelated")  # in no pair that is trained on


def variant_runs(table: pd.DataFrame, **settings) -> pd.DataFrame:
    """The rows of runs with these values of `variant`, `source`, `rounds`; of a table where some may not vary."""
    keep = np.ones(len(table), dtype=bool)
    for name, value in settings.items():
        if name in table:
            keep &= (table[name] == value).to_numpy()
    return table[keep]


def loss_runs(table: pd.DataFrame) -> pd.DataFrame:
    """The runs that compare losses, with a column `name`: the variant, or SFT for the model that all start from."""
    rows = variant_runs(table, source="data", rounds=1)
    return rows.assign(name=rows.variant.where(rows.epochs > 0, "SFT"))


def source_runs(table: pd.DataFrame) -> pd.DataFrame:
    """The runs that compare whose answers are pushed, with a column `name`: the source, or SFT."""
    rows = table[(table.rounds > 1) | (table.epochs == 0)]
    return rows.assign(name=rows.source.where(rows.epochs > 0, "SFT"))


def variant_ends(named: pd.DataFrame) -> pd.DataFrame:
    """The end of every run: a row for each `name` and seed, from `loss_runs` or `source_runs`.

    Changes of log pi from the start in nats, summed over a response: chosen, rejected, `unpushed` (the mean of
    UNPUSHED) and y* along PATHS; the margin of the log-ratios; scores of greedy and sampled answers; and how often a
    sampled answer scores better than the SFT model's to the same prompt (a tie counts half).
    """
    rows = []
    for seed, of_seed in named.groupby("seed"):
        before = _scores(of_seed[of_seed.name == "SFT"])
        for name, run in of_seed.groupby("name"):
            end = {kind: change(run, kind) for kind in ("chosen", "rejected")}
            end |= {"margin": end["chosen"] - end["rejected"], "unpushed": unpushed_change(run)}
            end |= {f"y* along {path}": top_change(run, path) for path in PATHS}
            after = _scores(run)
            end |= {decoding: after[decoding].mean() for decoding in after}
            if "sampled" in after and "sampled" in before:
                gain = after.sampled - before.sampled
                end["won"] = share_won(gain)
            rows.append({"name": name, "seed": seed} | end)
    return pd.DataFrame(rows)


def _scores(run: pd.DataFrame) -> pd.DataFrame:
    rows = run[run.metric == "judge_score"]
    return rows.pivot_table(index="prompt_id", columns="response_type", values="value", observed=True)


def unpushed_change(run: pd.DataFrame) -> float:
    """End change of log pi of what is in no trained pair, mean over UNPUSHED, nats."""
    return float(np.mean([change(run, kind) for kind in UNPUSHED if (run.response_type == kind).any()]))


def _loss(table: pd.DataFrame, name: str) -> pd.DataFrame:
    rows = loss_runs(table)
    return rows[rows.name == name]


def _source(table: pd.DataFrame, name: str) -> pd.DataFrame:
    rows = source_runs(table)
    return rows[rows.name == name]


# --- claims 13 and 14 on a language model


def lm_dpo_force_left(table: pd.DataFrame) -> float:
    """DPO's force on the probed training pairs at the end over that at the start, mean."""
    margin = margins(_loss(table, "DPO"), 0.1)
    return float((2 / (1 + np.exp(margin.iloc[-1]))).mean())


def lm_ipo_margin(table: pd.DataFrame) -> float:
    """Margin per token of the probed training pairs at the end of IPO, nats; its target is 1 / (2 beta)."""
    gap = wide(_loss(table, "IPO"), "chosen", "rejected", metric="logp_mean")
    gap = (gap.chosen - gap.rejected).unstack()
    return float((gap.iloc[-1] - gap.iloc[0]).mean())


def lm_slic_late_growth(table: pd.DataFrame) -> float:
    """Growth of the margin over the second half of training under SLiC's hinge, over that under DPO.

    Not a number where too few evaluations lie in that half.
    """
    slic, dpo = (_late_growth(_loss(table, name)) for name in ("SLiC", "DPO"))
    return slic / dpo if dpo else float("nan")


def _late_growth(run: pd.DataFrame) -> float:
    margin = curve(run, "chosen") - curve(run, "rejected")
    return float(margin.iloc[-1] - margin[margin.index >= margin.index[-1] / 2].iloc[0])


def lm_sppo_rejected(table: pd.DataFrame) -> float:
    """End change of log pi(rejected) under SPPO, nats; its target is -1 / (2 beta)."""
    return change(_loss(table, "SPPO"), "rejected")


def lm_sppo_rejected_share(table: pd.DataFrame) -> float:
    """Fall of log pi(rejected) under SPPO over that under DPO."""
    return lm_sppo_rejected(table) / change(_loss(table, "DPO"), "rejected")


def lm_sppo_chosen(table: pd.DataFrame) -> float:
    """End change of log pi(chosen) under SPPO minus that under DPO, nats."""
    return change(_loss(table, "SPPO"), "chosen") - change(_loss(table, "DPO"), "chosen")


# --- claim 42


def own_rejected_chosen(table: pd.DataFrame) -> float:
    """Change of log pi(chosen) when own samples are rejected, drawn anew, minus that with the data's pairs, nats."""
    return change(_source(table, "own rejected"), "chosen") - change(_source(table, "data"), "chosen")


def own_rejected_unpushed(table: pd.DataFrame) -> float:
    """The same for the mean of UNPUSHED, which are in no pair."""
    return unpushed_change(_source(table, "own rejected")) - unpushed_change(_source(table, "data"))


def own_rejected_top(table: pd.DataFrame) -> float:
    """The same for log pi(y*) along the chosen answers."""
    return top_change(_source(table, "own rejected"), "chosen") - top_change(_source(table, "data"), "chosen")


def on_policy_chosen(table: pd.DataFrame) -> float:
    """End change of log pi(chosen) under on-policy pairs, ranked and drawn anew, minus that with the data's pairs."""
    return change(_source(table, "both own"), "chosen") - change(_source(table, "data"), "chosen")


def pushes(table: pd.DataFrame) -> pd.DataFrame:
    """Every single push: a row for each seed, prompt and pushed kind, its metrics as columns."""
    rows = table[table.metric.astype(str).str.contains("^(?:pushed|watched)_(?:start|change|top_change|tokens)$")]
    index = ["seed", "prompt_id", "response_type"]
    return rows.pivot_table(index=index, columns="metric", values="value", observed=True).reset_index()


def _push_data(single: pd.DataFrame) -> pd.DataFrame:
    prompt = single.prompt_id.astype(str) + " " + single.seed.astype(str)
    data = pd.get_dummies(prompt, dtype=float)
    data["length"] = single.pushed_tokens
    data["prompt_id"], data["x"], data["y"] = single.prompt_id.astype(str), single.pushed_start, single.watched_change
    return data


def push_slope(table: pd.DataFrame) -> float:
    """Slope of the change of what nobody pushed on log pi per token of what was pushed, nats per nat.

    Across the responses to one prompt, with their length held fixed: above 0 where pushing what is less likely
    costs the others more.
    """
    return partial_slope(_push_data(pushes(table)))[0]


def push_fit(table: pd.DataFrame, draws: int = 500) -> dict:
    """`push_slope` over all seeds with a 95% bootstrap interval over prompts: `slope, interval, x, y` as in `valley`.

    `kind` names what was pushed in each row of the residuals `x` and `y`.
    """
    single = pushes(table)
    fit = bootstrapped_slope(_push_data(single), draws)
    return fit | {"kind": single.response_type.astype(str).to_numpy()}
