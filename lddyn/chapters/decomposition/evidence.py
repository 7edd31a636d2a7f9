"""Chapter 2: A, K and G on a language model."""

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from lddyn.chapters.statistics import BELLS, at_most_as_symmetric, curve, partner_symmetry
from lddyn.data.responses import RESPONSE_TYPES

MAIN = {"sft": "SFT", "dpo": "DPO"}  # what the two whole runs are called; the others go by their variant


def followed(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each kind of run: SFT and DPO, and the variants of SFT by name."""
    parts = {MAIN[method]: rows for method, rows in table[table.whole].groupby("method", sort=False)}
    return parts | dict(list(table[~table.whole].groupby("variant", sort=False)))


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


def first_order_slope(table: pd.DataFrame) -> float:
    """Median over single steps of SFT and DPO of the log-log slope of the error against eta, 5e-8 to 5e-5."""
    slopes = []
    for name in MAIN.values():
        errors = step_errors(single_steps(followed(table)[name]))
        small = errors[errors.eta < 1e-4]
        for _, one in small.groupby(["step", "update"]):
            slopes.append(np.polyfit(np.log10(one.eta), np.log10(one.error), 1)[0])
    return float(np.median(slopes))


def slope_sentence(table: pd.DataFrame) -> str:
    """The order of the error, and its share of the change (median over single steps) at three learning rates."""
    errors = {name: step_errors(single_steps(followed(table)[name])) for name in MAIN.values()}
    relative = pd.DataFrame({name: (e.error / e.change).groupby(e.eta).median() for name, e in errors.items()})
    papers, chapter_3, tenfold = (relative.loc[eta] for eta in (5e-7, 5e-4, 5e-3))
    return (
        f"The error has slope {first_order_slope(table):.3f} in the learning rate: proposition 1 holds for whole "
        "answers. As a share of the change, the error of one step on one example is "
        f"{papers.SFT:.1e} (SFT) and {papers.DPO:.1e} (DPO) at the paper's learning rate, "
        f"{chapter_3.SFT:.1%} and {chapter_3.DPO:.2%} at that of chapter 3, and "
        f"{tenfold.SFT:.0%} and {tenfold.DPO:.1%} ten times above it. The force of DPO, beta (1 - a), is at most a "
        "tenth of SFT's: its steps are smaller at the same rate."
    )


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


def left_unexplained(table: pd.DataFrame, of: str) -> float:
    """Share of the squared change over a whole run, SFT or DPO, that the sum of its one-step predictions leaves."""
    return 1 - run_explained(followed(table)[of])


def step_explained(rows: pd.DataFrame, over: str = "1") -> float:
    """Share of the change of single steps (or blocks) that their own predictions explain."""
    each = predictions(rows, over)
    return explained(each.predicted.to_numpy(), each.measured.to_numpy())


def shares_explained(table: pd.DataFrame) -> pd.DataFrame:
    """Of each kind of run its learning rate, steps, and `step_explained` of one step, a block and the whole run."""
    found = {}
    for name, rows in followed(table).items():
        block = block_length(rows)
        spans = {"one step": "1", f"{block} steps": block, "the whole run": "all"}
        size = {"learning rate": rows.lr.iloc[0], "steps": rows.step.max()}
        found[name] = size | {label: step_explained(rows, over) for label, over in spans.items()}
    return pd.DataFrame(found).T


def explained_sentence(table: pd.DataFrame) -> str:
    """How much of SFT and DPO the sum of one-step predictions explains, and one prediction for the whole run."""
    runs = [followed(table)[name] for name in MAIN.values()]
    sft, dpo = (run_explained(rows) for rows in runs)
    sft_at_once, dpo_at_once = (step_explained(rows, "all") for rows in runs)
    return (
        f"Summed over all steps, one-step predictions explain {sft:.2%} of the change of "
        f"SFT and {dpo:.2%} of that of DPO (share of the squared change over all "
        "responses). One single prediction for the whole run, made at its start, explains "
        f"{sft_at_once:.0%} and {dpo_at_once:.0%}: A, K and G move meanwhile."
    )


# --- identities --------------------------------------------------------------------------------------------


def largest(table: pd.DataFrame, metric: str) -> float:
    """Largest value of a metric that an identity bounds.

    `g_error`: relative difference between J^T G with the closed form of G and the gradient by autograd;
    `peakiness_error`: between the explicit ||A||_F^2 and V - 2 + V ||pi||^2; `lbk_share`: LBK / ||K||_F^2 between two
    tokens, with the explicit K.
    """
    return float(table[table.metric == metric].value.max())


def g_energy_left(table: pd.DataFrame) -> float:
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


def late_stability(rows: pd.DataFrame) -> float:
    """Rank correlation of ||K_uo|| over types with its final order, mean over the evaluations after the first tenth."""
    wide = by_type(rows, "kernel_norm")
    return float(stability(wide)[_settled(wide)].iloc[:-1].mean())


def kernel_rank_stability(table: pd.DataFrame, variants: bool = False) -> float:
    """`late_stability`, the smaller of SFT's and DPO's, or the smallest of the variants'."""
    parts = followed(table)
    return min(late_stability(rows) for name, rows in parts.items() if (name in MAIN.values()) != variants)


def kernel_norm_change(table: pd.DataFrame) -> float:
    """Doublings between the smallest and the largest mean ||K|| of SFT after the first tenth."""
    wide = by_type(followed(table)["SFT"], "kernel_norm")
    mean = wide.mean(axis=1)[_settled(wide)]
    return float(np.log2(mean.max() / mean.min()))


def stability_sentence(table: pd.DataFrame) -> str:
    """`late_stability` of every kind of run, and how far the norm moves in SFT."""
    late = ", ".join(f"{name} {late_stability(rows):.2f}" for name, rows in followed(table).items())
    return (
        f"Rank correlation of the order with its last, after the first tenth of training: {late}. The mean norm "
        f"itself moves by {kernel_norm_change(table):.2f} doublings after the first tenth "
        "of SFT. LoRA's kernel is another one, that of its adapters only."
    )


def stand_in_sentence(table: pd.DataFrame, f=None) -> str:
    """How well LBK and SignDelta order the responses, and with `f` (`kernels.Factors`) how loose the bound is."""
    sft, dpo = (agreement_with_kernel(followed(table)[name]) for name in MAIN.values())
    looseness = ""
    if f is not None:
        kg = f.k @ f.g
        looseness = (
            f"As a *bound* it is loose: between two single tokens at most {largest(table, 'lbk_share'):.0e} of the "
            "squared norm of the exact K (eq. 26 allows 1). In the example above, A has norm "
            f"{f.a.norm():.0f} but lengthens K G only {(f.a @ kg).norm() / kg.norm():.1f} times, and K "
            f"has norm {f.k.norm():.0f} but lengthens G only {kg.norm() / f.g.norm():.0f} times: the "
            "residual does not lie in the large directions of K. "
        )
    return (
        f"LBK as printed and K order the responses with rank correlation {sft['LBK, eq. 26']:.2f} "
        f"in SFT and {dpo['LBK, eq. 26']:.2f} in DPO. {looseness}The released LBK, a difference "
        f"over many steps on all answers, has {sft['LBK, released']:.2f} and {dpo['LBK, released']:.2f}. "
        f"SignDelta as printed has {sft['SignDelta, printed']:.2f} and {dpo['SignDelta, printed']:.2f}; it is a mean "
        "over the vocabulary, most of which nobody wrote."
    )


def bound_share(table: pd.DataFrame) -> float:
    """Largest LBK / ||K||_F^2 between whole answers, with the estimated ||K||: how loose the bound of eq. 26 is."""
    keys = ["method", "step", "prompt_id", "response_type"]
    rows = table[table.whole & table.metric.isin(["lbk", "kernel_norm"])]
    wide = rows.pivot_table(index=keys, columns="metric", values="value", observed=True)
    return float((wide.lbk / wide.kernel_norm**2).max())


def stand_in_follows(table: pd.DataFrame, name: str) -> float:
    """Rank correlation over types of a stand-in ("LBK, released") with ||K||, mean over evaluations and SFT and DPO."""
    return float(np.mean([agreement_with_kernel(followed(table)[run])[name] for run in MAIN.values()]))


def bells_with_first_g(table: pd.DataFrame) -> float:
    """`bell_turns` with G of the start minus with all factors as they are: above 0 where the shrinking G makes them."""
    turns = bell_turns(followed(table)["SFT"])
    return float(turns["G at the start"] - turns["A K G"])


def kernel_explains_change(table: pd.DataFrame) -> float:
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


def step_diagonal(table: pd.DataFrame) -> float:
    """Share of types that gain most themselves by a step on them, of both evaluations."""
    maps = [step_heat(followed(table)["SFT"], evaluation=n) for n in (0, -1)]
    return float(np.mean([heat[kind].idxmax() == kind for heat in maps for kind in heat]))


def shuffled_raises_others(table: pd.DataFrame) -> float:
    """Number of other types that a step on shuffled words of an unseen answer raises, mean of both evaluations."""
    maps = [step_heat(followed(table)["SFT"], evaluation=n)["test_shuffled"] for n in (0, -1)]
    return float(np.mean([(column.drop("test_shuffled") > 0).sum() for column in maps]))


def fingerprint(table: pd.DataFrame) -> float:
    """A step on one answer's meaning-keeping rephrase: rise of the other answer's rephrase minus that of the other
    answer, as a share of the rise of what is trained; mean of both answers and evaluations."""
    found = []
    for evaluation in (0, -1):
        heat = step_heat(followed(table)["SFT"], evaluation=evaluation)
        for trained, other in (("chosen", "rejected"), ("rejected", "chosen")):
            column = heat[f"{trained}_semantic"]
            found.append((column[f"{other}_semantic"] - column[other]) / column[f"{trained}_semantic"])
    return float(np.mean(found))


def _kernel_sizes(table: pd.DataFrame) -> np.ndarray:
    sizes = step_heat(followed(table)["SFT"], "kernel").to_numpy()
    return (sizes + sizes.T) / 2  # both are estimates of one number: K_uo is the transpose of K_ou


def partner_rank_symmetry(table: pd.DataFrame) -> float:
    """`statistics.partner_symmetry` of ||K|| between the twelve types."""
    return partner_symmetry(_kernel_sizes(table))


def symmetric_by_chance(table: pd.DataFrame) -> float:
    """Share of random symmetric matrices whose ranking of partners is at most as symmetric as that of ||K||."""
    return at_most_as_symmetric(_kernel_sizes(table))


def resemblance_sentence(table: pd.DataFrame) -> str:
    """What a step on the chosen answer raises most before training, and what steps on shuffles and rephrases do."""
    each = [step_heat(rows) for _, rows in followed(table)["SFT"].groupby("seed")]
    heat = sum(each) / len(each)
    rises = heat["chosen"].drop("chosen").sort_values(ascending=False) / heat.loc["chosen", "chosen"]
    first_three = ", ".join(f"`{kind}` ({value:+.0%})" for kind, value in rises.head(3).items())
    return (
        f"Before training, a step on the chosen answer raises {first_three} most, as shares of its own "
        f"rise. On average {shuffled_raises_others(table):.1f} of the eleven other kinds rise "
        "with a step on shuffled words. In figure 3 of the paper, summed over a run, only "
        "shuffled words themselves rise. A fingerprint: a step on a rephrase of one "
        f"answer raises the rephrase of the *other* answer by {fingerprint(table):+.1%} of its "
        "own rise more than it raises that other answer. Both rephrases here come from the same "
        "writers as the originals, so this is what similar wording does, not a foreign style."
    )


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


def frozen_sentence(table: pd.DataFrame) -> str:
    """How much more slowly the trained answers rise at the end of SFT, and `bell_turns`, with each factor frozen."""
    rows = followed(table)["SFT"]
    turns = pd.DataFrame({seed: bell_turns(one) for seed, one in rows.groupby("seed")}).mean(axis=1)
    own = {name: wide["chosen"] for name, wide in rates(rows).items()}
    slower = {name: 1 - rate.iloc[-1] / rate.iloc[0] for name, rate in own.items()}
    return (
        f"At the end of SFT the trained answers rise {slower['A K G']:.0%} more slowly than at the "
        f"start. With A of the start it would be {slower['A at the start']:.0%}, with K of the start "
        f"{slower['K at the start']:.0%}, with G of the start {slower['G at the start']:.0%}. For "
        "the rejected answer and the rephrases, the kinds that make bells in chapter 3, the mean rate in "
        f"the second half is {turns['A K G']:.0%} of that at the start; {turns['A at the start']:.0%} "
        f"with A, {turns['K at the start']:.0%} with K and {turns['G at the start']:.0%} with G of the "
        "start. If the shrinking residual alone made the bell, G of the start would keep them rising."
    )


# --- SignDelta of DPO --------------------------------------------------------------------------------------


def printed_sign_delta(rows: pd.DataFrame) -> pd.Series:
    """SignDelta as printed, of every type: mean over evaluations, per unit of eta."""
    return by_type(rows, "sign_delta").mean()


def sign_delta_share(table: pd.DataFrame, others: bool = False) -> float:
    """SignDelta as printed of chosen, or the largest of the `others`, under DPO, over that of any type in size."""
    values = printed_sign_delta(followed(table)["DPO"])
    return float((values.drop("chosen").max() if others else values["chosen"]) / values.abs().max())


# --- entangled gradients -----------------------------------------------------------------------------------


def entanglement(products: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What one step of DPO does to the chosen answer, per unit of eta and force, and the cosine of the two gradients.

    products: (pairs, 3) of `kernels.gradient_products`. Returns two arrays (pairs,); above zero the answer rises.
    """
    return products[:, 1] - products[:, 0], products[:, 0] / np.sqrt(products[:, 1] * products[:, 2])


def entanglement_sentence(products: np.ndarray, ches: np.ndarray) -> str:
    """On how many pairs a step lowers the chosen answer, and whether the CHES score, (pairs,), says on which."""
    change, cosine = entanglement(products)
    return (
        f"A single step of DPO lowers the chosen answer of {(change < 0).sum()} of {len(change)} pairs; the mean "
        f"cosine of the two gradients is {cosine.mean():.2f}. Rank correlation of CHES with the change: "
        f"{spearmanr(ches, change).statistic:+.2f} (the theory wants it below zero). Where a pair's own step raises "
        "its chosen answer, the fall that chapter 5 sees comes from the steps on all the others."
    )
