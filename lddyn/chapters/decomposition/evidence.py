"""Chapter 2: A, K and G on a language model."""

import numpy as np
import pandas as pd
from scipy.stats import rankdata, spearmanr

from lddyn.chapters.digits import evidence as digits_evidence
from lddyn.chapters.statistics import BELLS, curve
from lddyn.data.responses import RESPONSE_TYPES

MAIN = {"sft": "SFT", "dpo": "DPO"}  # what the two whole runs are called; the others go by their variant


def followed(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each kind of run: SFT and DPO, and the variants of SFT by name."""
    parts = {MAIN[method]: rows for method, rows in table[table.whole].groupby("method", sort=False)}
    return parts | dict(list(table[~table.whole].groupby("variant", sort=False)))


def variants_of(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The variants among `followed`."""
    return {name: rows for name, rows in followed(table).items() if name not in MAIN.values()}


def by_type(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Mean over prompts of a metric at each evaluation: steps x response types, in the order of the types."""
    mean = rows[rows.metric == metric].groupby(["step", "response_type"], observed=True).value.mean().unstack()
    return mean[[kind for kind in RESPONSE_TYPES if kind in mean]]


# --- predicted against measured ----------------------------------------------------------------------------


def single_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """One row for each single step, learning rate and response: `eta, step, update, response_type, own, predicted,
    measured` (nats); `own` where the response belongs to the prompt of the step."""
    used = rows[rows.metric.str.startswith("single_")]
    keys = ["step", "prompt_id", "response_type"]
    wide = used.pivot_table(
        index=[*keys, *(["seed"] if "seed" in used else [])], columns="metric", values="value", observed=True
    )
    rate, parts = wide.pop("single_rate"), []
    for name, measured in wide.items():
        eta = float(name.removeprefix("single_"))
        parts.append(pd.DataFrame({"eta": eta, "predicted": eta * rate, "measured": measured}).reset_index())
    whole = pd.concat(parts, ignore_index=True)
    pair = whole.prompt_id.astype(str).str.split(">")
    return whole.assign(update=pair.str[0], own=pair.str[0] == pair.str[1])


def step_errors(single: pd.DataFrame) -> pd.DataFrame:
    """Of each single step and learning rate: norm over responses of the `error` and of the `change`, nats."""
    squares = single.assign(error=(single.measured - single.predicted) ** 2, change=single.measured**2)
    keys = [key for key in ("seed", "step", "update", "eta") if key in squares]
    return squares.groupby(keys)[["error", "change"]].sum().pow(0.5).reset_index()


def lm_first_order_slope(table: pd.DataFrame) -> float:
    """Median over single steps of SFT and DPO of the log-log slope of the error against eta, 5e-8 to 5e-5."""
    slopes = []
    for name in MAIN.values():
        errors = step_errors(single_steps(followed(table)[name]))
        small = errors[errors.eta < 1e-4]
        for _, one in small.groupby(["step", "update"]):
            slopes.append(np.polyfit(np.log10(one.eta), np.log10(one.error), 1)[0])
    return float(np.median(slopes))


def predictions(rows: pd.DataFrame, over: str = "1") -> pd.DataFrame:
    """Predicted and measured change of every response over some number of steps, of the steps that were applied.

    over: "1", the length of a block, or "all". One row for each response and end of the steps.
    """
    used = rows[rows.metric.isin([f"predicted_{over}", f"measured_{over}"])]
    keys = [key for key in ("seed", "step", "prompt_id", "response_type") if key in used]
    wide = used.pivot_table(index=keys, columns="metric", values="value", observed=True)
    return wide.rename(columns=lambda name: name.rsplit("_", 1)[0]).reset_index()


def block_length(rows: pd.DataFrame) -> str:
    """The number of steps of a block, as it stands in the names of the metrics."""
    names = {name.rsplit("_", 1)[1] for name in rows.metric.unique() if name.startswith("predicted_")}
    return next((name for name in sorted(names) if name not in ("1", "all")), "1")


def explained(predicted: np.ndarray, measured: np.ndarray) -> float:
    """Share of the squared change that a prediction accounts for; 1 is all, below 0 worse than predicting nothing."""
    return float(1 - ((measured - predicted) ** 2).sum() / (measured**2).sum())


def run_explained(rows: pd.DataFrame, over: str = "1") -> float:
    """Share of the change of all responses over a whole run that summed predictions explain, from steps of one length.

    Only where every step of the run was predicted.
    """
    sums = (
        predictions(rows, over).groupby(["prompt_id", "response_type"], observed=True)[["predicted", "measured"]].sum()
    )
    return explained(sums.predicted.to_numpy(), sums.measured.to_numpy())


def step_explained(rows: pd.DataFrame, over: str = "1") -> float:
    """Share of the change of single steps (or blocks) that their own predictions explain."""
    each = predictions(rows, over)
    return explained(each.predicted.to_numpy(), each.measured.to_numpy())


# --- identities --------------------------------------------------------------------------------------------


def lm_residual_error(table: pd.DataFrame) -> float:
    """Largest relative difference between J^T G with the closed form of G and the gradient by autograd."""
    return float(table[table.metric == "g_error"].value.max())


def lm_peakiness_error(table: pd.DataFrame) -> float:
    """Largest relative difference between the explicit ||A||_F^2 and V - 2 + V ||pi||^2."""
    return float(table[table.metric == "peakiness_error"].value.max())


def lm_lbk_share(table: pd.DataFrame) -> float:
    """Largest LBK / ||K||_F^2 between two tokens, with the explicit K; at most 1."""
    return float(table[table.metric == "lbk_share"].value.max())


def lm_g_energy_left(table: pd.DataFrame) -> float:
    """||G|| of DPO at the end over that at the start, mean over the probed pairs."""
    rows = followed(table)["DPO"]
    energy = rows[rows.metric == "g_norm"].groupby("step").value.mean()
    return float(energy.iloc[-1] / energy.iloc[0])


# --- how stable is K ---------------------------------------------------------------------------------------


def stability(wide: pd.DataFrame, without=("chosen",)) -> pd.Series:
    """Rank correlation over types of response of a metric (steps x types) with its last evaluation, by step."""
    kinds = [kind for kind in wide if kind not in without]
    last = wide[kinds].iloc[-1]
    return wide[kinds].apply(lambda now: spearmanr(now, last).statistic, axis=1)


def released_lbk(rows: pd.DataFrame) -> pd.DataFrame:
    """LBK as the authors' released code has it: steps x types, between evaluations.

    Norm over prompts of the change of the summed log pi, over sqrt(||A||_F) of the observed type and ||pi - y|| of
    chosen.
    """
    residual = curve(rows, "chosen", "residual_norm_mean")
    found = {}
    for kind in by_type(rows, "kernel_norm"):
        of_kind = rows[(rows.metric == "logp_sum") & (rows.response_type == kind)]
        logp = of_kind.pivot_table(index="step", columns="prompt_id", values="value", observed=True)
        size = np.sqrt((logp.diff() ** 2).sum(axis=1))
        found[kind] = (size / np.sqrt(curve(rows, kind, "a_norm_mean").shift()) / residual.shift()).iloc[1:]
    return pd.DataFrame(found)


def released_sign_delta(rows: pd.DataFrame) -> pd.DataFrame:
    """SignDelta as the authors' released code has it: steps x types, between evaluations."""
    residual = curve(rows, "chosen", "residual_norm_mean")
    found = {}
    for kind in by_type(rows, "kernel_norm"):
        scale = np.sqrt(curve(rows, kind, "a_norm_mean").shift()) * residual.shift()
        found[kind] = (curve(rows, kind).diff() / scale).iloc[1:]
    return pd.DataFrame(found)


def similarity_measures(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """||K|| itself, and the four measures that stand in for it: steps x types each."""
    return {
        "‖K‖": by_type(rows, "kernel_norm"),
        "LBK, eq. 26": by_type(rows, "lbk"),
        "LBK, released": released_lbk(rows),
        "SignDelta, printed": by_type(rows, "sign_delta"),
        "SignDelta, released": released_sign_delta(rows),
    }


def agreement_with_kernel(rows: pd.DataFrame) -> pd.Series:
    """Rank correlation over types of each stand-in with ||K||, mean over the evaluations that both have."""
    measures = similarity_measures(rows)
    kernel = measures.pop("‖K‖").drop(columns="chosen")
    found = {}
    for name, wide in measures.items():
        steps = wide.index.intersection(kernel.index)
        rho = [spearmanr(wide.loc[step, kernel.columns], kernel.loc[step]).statistic for step in steps]
        found[name] = float(np.mean(rho))
    return pd.Series(found)


def _settled(wide: pd.DataFrame) -> pd.Series:
    """Evaluations after the first tenth of training; all of them where only the last one is."""
    settled = wide.index >= wide.index[-1] / 10
    return settled if settled.sum() > 1 else np.ones(len(wide), dtype=bool)


def kernel_rank_stability(rows: pd.DataFrame) -> float:
    """Rank correlation of ||K_uo|| over types with its final order, mean over the evaluations after the first tenth."""
    wide = by_type(rows, "kernel_norm")
    return float(stability(wide)[_settled(wide)].iloc[:-1].mean())


def lm_kernel_rank_stability(table: pd.DataFrame) -> float:
    """`kernel_rank_stability`, the smaller of SFT's and DPO's."""
    return min(kernel_rank_stability(followed(table)[name]) for name in MAIN.values())


def lm_kernel_rank_stability_variants(table: pd.DataFrame) -> float:
    """`kernel_rank_stability`, the smallest of the variants': other optimisers, and LoRA."""
    return min(kernel_rank_stability(rows) for rows in variants_of(table).values())


def lm_kernel_norm_change(table: pd.DataFrame) -> float:
    """Doublings between the smallest and the largest mean ||K|| of SFT after the first tenth."""
    wide = by_type(followed(table)["SFT"], "kernel_norm")
    mean = wide.mean(axis=1)[_settled(wide)]
    return float(np.log2(mean.max() / mean.min()))


def lm_kernel_explains_change(table: pd.DataFrame) -> float:
    """Rank correlation over types but chosen of accumulated ||K|| with the end change of log pi a token in SFT."""
    rows = followed(table)["SFT"]
    wide = by_type(rows, "kernel_norm").drop(columns="chosen")
    total = np.trapezoid(wide.to_numpy(), wide.index, axis=0)
    change = [curve(rows, kind, "logp_mean").iloc[-1] - curve(rows, kind, "logp_mean").iloc[0] for kind in wide]
    return float(spearmanr(total, change).statistic)


# --- heat maps ---------------------------------------------------------------------------------------------


def step_heat(rows: pd.DataFrame, metric: str = "heat", evaluation: int = 0) -> pd.DataFrame:
    """Observed types (rows) x types that one SFT step is taken on: change of log pi per unit of eta, or ||K|| where
    `metric` is "kernel"; at the first (0) or the last (-1) evaluation."""
    kinds = [kind for kind in RESPONSE_TYPES if (rows.metric == f"heat_{kind}").any()]
    used = rows[rows.metric.isin([f"{metric}_{kind}" for kind in kinds])]
    used = used[used.step == sorted(used.step.unique())[evaluation]]
    wide = used.pivot_table(index="response_type", columns="metric", values="value", observed=True)
    return wide.rename(columns=lambda name: name.removeprefix(f"{metric}_")).loc[kinds, kinds]


def lm_step_diagonal(table: pd.DataFrame) -> float:
    """Share of types that gain most themselves by a step on them, of both evaluations."""
    maps = [step_heat(followed(table)["SFT"], evaluation=n) for n in (0, -1)]
    return float(np.mean([heat[kind].idxmax() == kind for heat in maps for kind in heat]))


def lm_shuffled_raises_others(table: pd.DataFrame) -> float:
    """Number of other types that a step on shuffled words of an unseen answer raises, mean of both evaluations."""
    maps = [step_heat(followed(table)["SFT"], evaluation=n)["test_shuffled"] for n in (0, -1)]
    return float(np.mean([(column.drop("test_shuffled") > 0).sum() for column in maps]))


def lm_fingerprint(table: pd.DataFrame) -> float:
    """A step on one answer's meaning-keeping rephrase: rise of the other answer's rephrase minus that of the other
    answer, as a share of the rise of what is trained; mean of both answers and evaluations."""
    found = []
    for evaluation in (0, -1):
        heat = step_heat(followed(table)["SFT"], evaluation=evaluation)
        for trained, other in (("chosen", "rejected"), ("rejected", "chosen")):
            column = heat[f"{trained}_semantic"]
            found.append((column[f"{other}_semantic"] - column[other]) / column[f"{trained}_semantic"])
    return float(np.mean(found))


def lm_partner_symmetry(table: pd.DataFrame) -> float:
    """Rank correlation between 'rank of o among the partners of u' and 'rank of u among those of o', by ||K||."""
    sizes = step_heat(followed(table)["SFT"], "kernel").to_numpy()
    sizes = (sizes + sizes.T) / 2  # both are estimates of one number: K_uo is the transpose of K_ou
    np.fill_diagonal(sizes, np.nan)
    ranks = np.apply_along_axis(lambda column: rankdata(column, nan_policy="omit"), 0, sizes)
    off = ~np.eye(len(sizes), dtype=bool)
    return float(spearmanr(ranks[off], ranks.T[off]).statistic)


# --- which factor makes the bells --------------------------------------------------------------------------

FROZEN = {"rate_all": "A K G"} | {f"rate_without_{factor}": f"{factor.upper()} at the start" for factor in "akg"}


def rates(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """How fast SFT moves every type, per unit of eta, with all factors of now and with one of the start.

    Name of `FROZEN` -> steps x types, mean over prompts.
    """
    return {name: by_type(rows, metric) for metric, name in FROZEN.items()}


def bell_turns(rows: pd.DataFrame) -> pd.Series:
    """Mean rate of the five kinds that make bells (rejected and the rephrases) in the second half of SFT.

    One number for each name of `FROZEN`, as a share of the mean rate at the start: below 0 they are pushed down.
    """
    found = {}
    for name, wide in rates(rows).items():
        bells = wide[[kind for kind in BELLS if kind in wide]].mean(axis=1)
        found[name] = bells[bells.index > bells.index[-1] / 2].mean() / bells.iloc[0]
    return pd.Series(found)


# --- SignDelta of DPO --------------------------------------------------------------------------------------


def printed_sign_delta(rows: pd.DataFrame) -> pd.Series:
    """SignDelta as printed, of every type: mean over evaluations, per unit of eta."""
    return by_type(rows, "sign_delta").mean()


def lm_sign_delta_chosen(table: pd.DataFrame) -> float:
    """SignDelta as printed of chosen under DPO, over the largest of any type in size; mean of evaluations."""
    values = printed_sign_delta(followed(table)["DPO"])
    return float(values["chosen"] / values.abs().max())


def lm_sign_delta_others(table: pd.DataFrame) -> float:
    """Largest SignDelta as printed of any other type under DPO, over the largest of any type in size."""
    values = printed_sign_delta(followed(table)["DPO"])
    return float(values.drop("chosen").max() / values.abs().max())


# --- beside chapter 1 --------------------------------------------------------------------------------------

CARRIED = {  # what is compared: the statistic on digits, on the language model
    "order of the error in η": ("first_order_slope", lm_first_order_slope),
    "rank stability of ‖K‖ after the first tenth": ("entk_rank_stability", lm_kernel_rank_stability),
    "doublings of ‖K‖ after the first tenth": ("entk_norm_change", lm_kernel_norm_change),
    "rank correlation of accumulated ‖K‖ with where it led": ("entk_explains_leak", lm_kernel_explains_change),
    "symmetry of partner ranks": ("partner_rank_symmetry", lm_partner_symmetry),
}


def carried_over(table: pd.DataFrame, digits: pd.DataFrame) -> pd.DataFrame:
    """The same five numbers for the digits of chapter 1 and for the language model, means over the seeds."""
    rows = {}
    for name, (on_digits, on_language) in CARRIED.items():
        rows[name] = {
            "digits": np.mean([getattr(digits_evidence, on_digits)(one) for _, one in digits.groupby("seed")]),
            "language model": np.mean([on_language(one) for _, one in table.groupby("seed")]),
        }
    return pd.DataFrame(rows).T
