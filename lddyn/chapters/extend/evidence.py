"""Chapter 7: the extended method. A statistic that the runs of a seed do not measure is not a number."""

import math

import numpy as np
import pandas as pd

from lddyn.chapters.statistics import curve, share_won

OTHERS = ("chosen_semantic", "chosen_initial", "other_test")  # natural responses that DPO does not train on


def extend_arm(table: pd.DataFrame, arm: str, design: str = "natural") -> pd.DataFrame:
    """The runs of one arm and one design, out of a table where either may not vary."""
    for name, value in (("arm", arm), ("design", design)):
        if name in table:
            table = table[table[name] == value]
    return table


def extend_changes(table: pd.DataFrame, arm: str, kind: str, metric: str = "logp_sum", design: str = "natural"):
    """Changes of the mean of a metric since the start of DPO, as a Series over steps; steps of SFT are below 0."""
    values = curve(extend_arm(table, arm, design), kind, metric)
    return values - values.get(0, math.nan)


def extend_growth(table: pd.DataFrame, arm: str, design: str = "natural") -> pd.Series:
    """Growth of log pi(chosen) - log pi(rejected) since the start of DPO, nats, over its steps."""
    gap = extend_changes(table, arm, "chosen", design=design) - extend_changes(table, arm, "rejected", design=design)
    return gap[gap.index >= 0]


def extend_less(table: pd.DataFrame, kind: str, metric: str = "logp_sum", at: str = "steps", than: str = "baseline"):
    """Change over DPO under extended minus that under another arm, nats: above 0 where extended falls less.

    At equal `steps`: at the end. At equal `margin`: where the growth of the gap between chosen and rejected first
    reaches the largest that both arms reach.
    """
    arms, ends = ("extended", than), []
    growth = {arm: extend_growth(table, arm) for arm in arms}
    if not all(map(len, growth.values())):
        return math.nan
    common = min(g.max() for g in growth.values())
    for arm in arms:
        values = extend_changes(table, arm, kind, metric)
        values = values[values.index >= 0]
        reached = np.maximum.accumulate(growth[arm].to_numpy())
        ends.append(values.iloc[-1] if at == "steps" else np.interp(common, reached, values))
    return float(ends[0] - ends[1])


def extend_end(table: pd.DataFrame, kind: str) -> float:
    """log pi at the end of DPO under extended minus that under the baseline, nats."""
    ends = [curve(extend_arm(table, arm), kind) for arm in ("extended", "baseline")]
    return float(ends[0].iloc[-1] - ends[1].iloc[-1])


# --- claims 43 to 48, on natural text


def extend_sft_chosen(table: pd.DataFrame) -> float:
    """Rise of log pi(chosen) over SFT under extended, over that under the baseline, at equal epochs."""
    return _sft_rise(table, "extended", "chosen") / _sft_rise(table, "baseline", "chosen")


def extend_sft_rejected(table: pd.DataFrame) -> float:
    """log pi(rejected) at the start of DPO under extended minus that under the baseline, nats."""
    return _sft_rise(table, "extended", "rejected") - _sft_rise(table, "baseline", "rejected")


def extend_sft_rejected_steps(table: pd.DataFrame) -> float:
    """The same against the baseline with as many steps of SFT, nats."""
    return _sft_rise(table, "extended", "rejected") - _sft_rise(table, "equal steps", "rejected")


def extend_sft_rejected_share(table: pd.DataFrame) -> float:
    """Rise of log pi(rejected) over extended SFT, over the rise of log pi(chosen) over the baseline's."""
    return _sft_rise(table, "extended", "rejected") / _sft_rise(table, "baseline", "chosen")


def _sft_rise(table: pd.DataFrame, arm: str, kind: str) -> float:
    values = extend_changes(table, arm, kind)
    return -float(values.iloc[0]) if len(values) else math.nan


def extend_others(table: pd.DataFrame) -> float:
    """Smallest over OTHERS of the change in DPO under extended minus that under the baseline, nats."""
    return min(extend_less(table, kind) for kind in OTHERS)


def extend_others_margin(table: pd.DataFrame) -> float:
    """The same at equal margin."""
    return min(extend_less(table, kind, at="margin") for kind in OTHERS)


def extend_top(table: pd.DataFrame) -> float:
    """Change of log pi(y*) along chosen in DPO under extended minus that under the baseline, nats."""
    return extend_less(table, "chosen", "argmax_logp_sum")


def extend_chosen(table: pd.DataFrame) -> float:
    """Change of log pi(chosen) in DPO under extended minus that under the baseline, nats."""
    return extend_less(table, "chosen")


def extend_chosen_margin(table: pd.DataFrame) -> float:
    """The same at equal margin."""
    return extend_less(table, "chosen", at="margin")


def extend_chosen_steps(table: pd.DataFrame) -> float:
    """The same, at equal steps of DPO, against the baseline with as many steps of SFT as extended."""
    return extend_less(table, "chosen", than="equal steps")


def extend_top_start(table: pd.DataFrame) -> float:
    """log pi(y*) along chosen under extended, mean over the first quarter of DPO, minus its start, nats."""
    values = extend_changes(table, "extended", "chosen", "argmax_logp_sum")
    early = values[(values.index > 0) & (values.index <= values.index.max() / 4)]
    return float(early.mean())


# --- claim 49, in the closed world


def extend_scores(table: pd.DataFrame, arm: str, field: str = "score", decoding: str = "sampled", design: str = "main"):
    """What the exact judge finds in the answers: rows prompts, columns steps of DPO."""
    rows = extend_arm(table, arm, design)
    rows = rows[(rows.response_type == decoding) & (rows.metric == field)]
    return rows.pivot_table(
        index=["seed", "prompt_id"] if "seed" in rows else "prompt_id", columns="step", values="value", observed=True
    )


def extend_leads(
    table: pd.DataFrame, than: str = "baseline", decoding: str = "sampled", design: str = "main"
) -> np.ndarray:
    """Share of prompts where extended scores better minus share where it scores worse, after 0, 2, 4, 6 epochs."""
    ours, theirs = (extend_scores(table, arm, decoding=decoding, design=design) for arm in ("extended", than))
    leads = np.sign(ours - theirs).mean().to_numpy()
    return leads if len(leads) else np.full(4, math.nan)


def extend_lead_0(table: pd.DataFrame) -> float:
    """Share of prompts won minus share lost by extended against the baseline, before DPO."""
    return float(extend_leads(table)[0])


def extend_lead_2(table: pd.DataFrame) -> float:
    """The same after 2 epochs of DPO."""
    return float(extend_leads(table)[1])


def extend_lead_4(table: pd.DataFrame) -> float:
    """The same after 4 epochs."""
    return float(extend_leads(table)[2])


def extend_lead_6(table: pd.DataFrame) -> float:
    """The same after 6 epochs."""
    return float(extend_leads(table)[3])


def extend_best_at_4(table: pd.DataFrame) -> float:
    """The lead after 4 epochs minus the larger one of those after 2 and 6."""
    leads = extend_leads(table)
    return float(leads[2] - max(leads[1], leads[3]))


# --- tables for figures


def extend_softening(table: pd.DataFrame) -> pd.DataFrame:
    """The ends of the runs in the closed world as rows of `variant_ends`: `name, seed, margin, chosen, won`.

    won: how often a sampled answer scores better than one of the baseline's SFT model to the same prompt (a tie
    counts half).
    """
    rows = []
    for seed, runs in table.groupby("seed"):
        start = extend_scores(runs, "baseline")
        for name, arm in (("DPO (7)", "baseline"), ("extended (7)", "extended"), ("more SFT (7)", "equal steps")):
            end = extend_scores(runs, arm)
            if len(start) and len(end):
                gain = end.iloc[:, -1] - start.iloc[:, 0]
                chosen = extend_changes(runs, arm, "chosen", design="main").iloc[-1]
                margin = extend_growth(runs, arm, "main").iloc[-1]
                end = {"margin": margin, "chosen": chosen, "won": share_won(gain)}
                rows.append({"name": name, "seed": seed} | end)
    return pd.DataFrame(rows)
