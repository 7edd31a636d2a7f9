"""Chapter 6: other losses, and whose answers are pushed."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lddyn.chapters.statistics import (
    PATHS,
    bootstrapped_slope,
    change,
    curve,
    margins,
    needed,
    partial_slope,
    share_won,
    top_change,
    wide,
)
from lddyn.data import preferences, world
from lddyn.engine.store import Run
from lddyn.theory import losses

# --- what is compared: losses --------------------------------------------------------------------------------


class Variant(NamedTuple):
    """A way to train on pairs: a loss, by its name in `losses.LOSSES`, and the settings that the chapter gives it."""

    loss: str
    options: Mapping = MappingProxyType({})  # keywords of the loss
    beta: float | None = None  # none: the chapter's
    rate: float = 1.0  # times the chapter's learning rate
    stop: float = 0.0  # the margin, in nats, at which training stops; 0: never


VARIANTS = {
    "DPO": Variant("dpo"),
    "IPO": Variant("ipo", beta=1.0),
    "SLiC": Variant("hinge"),
    "smoothed": Variant("cdpo", {"label_smoothing": 0.2}),
    "robust": Variant("robust", {"label_smoothing": 0.2}),
    "SPPO": Variant("sppo"),
    "KTO": Variant("kto"),
    "SimPO": Variant("simpo", beta=2.0),
    "ORPO": Variant("orpo"),
    "DPO + NLL": Variant("rpo"),
    "DPOP": Variant("dpop"),
    "gated": Variant("gated"),
    "low rate": Variant("dpo", rate=0.25),
    "early stop": Variant("dpo", stop=1.0),
}


def forces(variant: str, chosen: Tensor, rejected: Tensor, reference: tuple, lengths: tuple, beta: float):
    """The force of a variant's loss on chosen and rejected, -dL / dlog pi (`losses`): two tensors like `chosen`.

    chosen, rejected: (n,) log-probabilities in nats, summed over tokens; reference: the two of the reference model;
    lengths: tokens of the two answers. `beta` is the chapter's; a variant may have its own.
    """
    which = VARIANTS[variant]
    chosen, rejected = (x.detach().double().requires_grad_() for x in (chosen, rejected))
    given = {"beta": which.beta or beta, "chosen_length": lengths[0], "rejected_length": lengths[1], **which.options}
    loss = losses.value(losses.LOSSES[which.loss].function, chosen, rejected, *reference, **given)
    gradients = torch.autograd.grad(loss.sum(), (chosen, rejected), allow_unused=True)
    return tuple(torch.zeros_like(chosen) if g is None else -which.rate * g for g in gradients)


# --- what is compared: whose answers are pushed --------------------------------------------------------------


class Source(NamedTuple):
    """Where the two answers of a pair come from: the data, or samples of a policy."""

    chosen_from_data: bool
    rejected_from_data: bool
    refresh: bool  # samples of the policy as it is at the start of each round, not of the SFT model
    follow: bool = False  # that policy is also the reference


SOURCES = {
    "data": Source(True, True, refresh=False),
    "own rejected": Source(True, False, refresh=True),
    "SPIN": Source(True, False, refresh=True, follow=True),
    "both own, once": Source(False, False, refresh=False),
    "both own": Source(False, False, refresh=True),
}


# --- the ends of the runs ------------------------------------------------------------------------------------

UNPUSHED = ("chosen_semantic", "other_train", "other_test", "unrelated")  # in no pair that is trained on


def loss_runs(table: pd.DataFrame) -> pd.DataFrame:
    """The runs that compare losses, with a column `name`: the variant, or SFT for the model that all start from."""
    for name, value in {"source": "data", "rounds": 1}.items():
        if name in table:  # in a table of these runs alone it is the same in all
            table = table[table[name] == value]
    return table.assign(name=table.variant.where(table.epochs > 0, "SFT"))


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


def loss_end(table: pd.DataFrame, loss: str, column: str, over: str = "") -> float:
    """A column of `variant_ends` for one of VARIANTS, or its difference to that of another one (`over`)."""
    return _end(loss_runs(table), loss, column) - (_end(loss_runs(table), over, column) if over else 0.0)


def source_end(table: pd.DataFrame, source: str, column: str, over: str = "") -> float:
    """The same for one of SOURCES."""
    return _end(source_runs(table), source, column) - (_end(source_runs(table), over, column) if over else 0.0)


def _end(named: pd.DataFrame, name: str, column: str) -> float:
    found = variant_ends(named[named.name.isin([name, "SFT"])]).set_index("name")
    return float(needed(found, column)[column][name])


def best_won(table: pd.DataFrame, over: str) -> float:
    """The largest share of sampled answers that beat the SFT model's under any of VARIANTS, minus that under one."""
    won = needed(variant_ends(loss_runs(table)).set_index("name"), "won").won.drop("SFT")
    return float(won.max() - won[over])


# --- claims 13 and 14 on a language model


def dpo_force_left(table: pd.DataFrame) -> float:
    """DPO's force on the probed training pairs at the end over that at the start, mean."""
    margin = margins(_loss(table, "DPO"), 0.1)
    return float((2 / (1 + np.exp(margin.iloc[-1]))).mean())


def ipo_margin(table: pd.DataFrame) -> float:
    """Margin per token of the probed training pairs at the end of IPO, nats; its target is 1 / (2 beta)."""
    gap = wide(_loss(table, "IPO"), "chosen", "rejected", metric="logp_mean")
    gap = (gap.chosen - gap.rejected).unstack()
    return float((gap.iloc[-1] - gap.iloc[0]).mean())


def slic_late_growth(table: pd.DataFrame) -> float:
    """Growth of the margin over the second half of training under SLiC's hinge, over that under DPO.

    Not a number where too few evaluations lie in that half.
    """
    slic, dpo = (_late_growth(_loss(table, name)) for name in ("SLiC", "DPO"))
    return slic / dpo if dpo else float("nan")


def _late_growth(run: pd.DataFrame) -> float:
    margin = curve(run, "chosen") - curve(run, "rejected")
    return float(margin.iloc[-1] - margin[margin.index >= margin.index[-1] / 2].iloc[0])


def sppo_rejected_share(table: pd.DataFrame) -> float:
    """Fall of log pi(rejected) under SPPO over that under DPO."""
    return change(_loss(table, "SPPO"), "rejected") / change(_loss(table, "DPO"), "rejected")


def sppo_chosen(table: pd.DataFrame) -> float:
    """End change of log pi(chosen) under SPPO minus that under DPO, nats."""
    return change(_loss(table, "SPPO"), "chosen") - change(_loss(table, "DPO"), "chosen")


# --- claim 42


def source_effect(table: pd.DataFrame, source: str, of: str) -> float:
    """End change of log pi with the pairs of a source minus that with the data's pairs, nats.

    `of` what: "chosen"; "unpushed", the mean of UNPUSHED, which are in no pair; or "top", y* along the chosen answers.
    """
    return _moved(_source(table, source), of) - _moved(_source(table, "data"), of)


def _moved(run: pd.DataFrame, of: str) -> float:
    if of == "unpushed":
        return unpushed_change(run)
    return top_change(run, "chosen") if of == "top" else change(run, of)


def source_per_nat(table: pd.DataFrame, source: str, of: str) -> float:
    """The same per nat that the pushed answers fall, a token: equal pushed nats, whatever the pairs.

    The fall is that of the rejected answers of each round under the policy before and after it, summed over the rounds.
    """

    def per_nat(name: str) -> float:
        run = _source(table, name)
        pushed = run[(run.prompt_id == "pairs") & (run.response_type == "rejected")].groupby("metric").value.sum()
        fallen = pushed["pushed_before"] - pushed["pushed_after"]
        return _moved(run, of) / fallen if fallen > 0 else float("nan")

    return per_nat(source) - per_nat("data")


def push_per_nat(table: pd.DataFrame, of: str) -> float:
    """Single pushes: change per nat that the pushed answer falls (both a token), own answers minus the data's rejected.

    `of` what nobody pushed ("watched"), or of y* along it ("watched_top").
    """
    means = pushes(table).groupby("response_type", observed=True)[["pushed_change", f"{of}_change"]].mean()
    cost = means[f"{of}_change"] / -means.pushed_change
    return float(needed(cost, "greedy", "sampled", "rejected")[["greedy", "sampled"]].mean() - cost["rejected"])


def push_slope_of_kinds(table: pd.DataFrame) -> float:
    """Slope over the kinds of pushed response, one point a kind, of the mean change of what nobody pushed on the mean
    log pi per token of what was pushed, nats per nat."""
    means = pushes(table).groupby("response_type", observed=True)[["pushed_start", "watched_change"]].mean()
    return float(np.polyfit(means.pushed_start, means.watched_change, 1)[0])


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


# --- sentences and tables of the notebook


def judged_example(data: str) -> tuple[str, pd.DataFrame]:
    """The first training question, and its answers with the scores that the exact judge gives them."""
    example = preferences.load(data, "train", limit=1)[0]
    shown = {kind: example[kind] for kind in example if kind in ("chosen", "chosen_semantic", "rejected")}
    rows = {kind: (text.strip(), world.judge(example["prompt"], text).score) for kind, text in shown.items()}
    return example["prompt"].splitlines()[0], pd.DataFrame(rows, index=["answer", "score"]).T


def mean_ends(ends: pd.DataFrame) -> pd.DataFrame:
    """`variant_ends`, mean over the seeds: changes in nats, the margin, scores, and the share of answers that won."""
    columns = ["chosen", "rejected", "unpushed", "y* along chosen", "margin", "greedy", "sampled", "won"]
    return ends.groupby("name")[columns].mean()


def chosen_sentence(ends: pd.DataFrame) -> str:
    """What DPO and the robust loss do to the chosen answers, and which losses raise them; Markdown."""
    mean = mean_ends(ends)
    kept = mean[mean.chosen > 0].index.difference(["SFT"])
    return (
        f"Under DPO the chosen answers change by {mean.chosen['DPO']:+.1f} nats. Not all losses do that: they rise "
        f"under {', '.join(kept) or 'none'}. The robust loss ends at a margin of {mean.margin['robust']:.0f} nats, DPO "
        f"at {mean.margin['DPO']:.0f}: its force never fades to nothing. The chosen answers change under it by "
        f"{mean.chosen['robust']:+.1f} nats."
    )


def sources_list(ends: pd.DataFrame, sources: Iterable[str]) -> str:
    """What the pairs of each source did to the chosen answers, y* and the score of samples; a Markdown list."""
    mean = mean_ends(ends)
    return "\n".join(
        f"- *{name}*: chosen {mean.chosen[name]:+.1f} nats, y* {mean['y* along chosen'][name]:+.1f} nats, score of a "
        f"sampled answer {mean.sampled[name]:+.2f} (after SFT {mean.sampled['SFT']:+.2f})"
        for name in sources
    )


def said(runs: Sequence[Run]) -> pd.DataFrame:
    """Greedy answers to three test questions (rows) after SFT and after the pairs of three sources, first seed."""
    found = {}
    for run in runs:
        s = run.manifest["parameters"]
        trained = s["rounds"] > 1 and s["source"] in ("data", "SPIN", "both own")
        if s["seed"] == runs[0].manifest["parameters"]["seed"] and (trained or not s["epochs"]):
            answers = pd.read_json(run.folder / "answers.json", orient="records")
            greedy = answers[answers.decoding == "greedy"].head(3)
            name = s["source"] if trained else "after SFT"
            found[name] = greedy.set_index(greedy.prompt.str.split("?").str[0]).text
    return pd.DataFrame(found)


def mean_pushes(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the single pushes of each kind of response, the likeliest first; nats per token."""
    columns = {
        "pushed_start": "log π per token before",
        "pushed_change": "its own change",
        "watched_change": "change of what nobody pushed",
        "watched_top_change": "change of y* along it",
    }
    means = pushes(table).groupby("response_type", observed=True)[list(columns)].mean().rename(columns=columns)
    return means.sort_values("log π per token before", ascending=False)


def slope_sentence(fit: dict) -> str:
    """The slope of `push_fit` and its interval in words."""
    return "slope {:+.3f} nats per nat, 95% interval [{:+.3f}, {:+.3f}]".format(fit["slope"], *fit["interval"])
