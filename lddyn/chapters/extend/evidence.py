"""Chapter 7: the extended method."""

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lddyn.chapters.extend import judging
from lddyn.chapters.statistics import bounded, curve, mean_interval, needed, share_won
from lddyn.data import preferences, world

# --- what is compared: the arms, and other designs of the closed world ---------------------------------------


class Arm(NamedTuple):
    """The SFT before DPO: on which answers, and how many times as many epochs as the baseline."""

    targets: tuple[str, ...]
    epochs: int = 1


ARMS = {
    "baseline": Arm(("chosen",)),
    "extended": Arm(("chosen", "rejected")),
    "equal steps": Arm(("chosen",), epochs=2),  # the baseline with as many steps of SFT as extended
}


class Design(NamedTuple):
    """A closed world (`world.DESIGNS`), and how it is trained on."""

    data: str = "world"
    sft_epochs: int = 2
    rate: float = 1.0  # times the chapter's learning rate of DPO


MAIN = Design()
OTHER_DESIGNS = {
    "true but casual": Design(data="world:register"),
    "wrong but polite": Design(data="world:facts"),
    "a third of the rate": Design(rate=1 / 3),
    "twice the SFT": Design(sft_epochs=4),
}


# --- curves of the arms --------------------------------------------------------------------------------------

OTHERS = ("chosen_semantic", "chosen_initial", "other_test")  # natural responses that DPO does not train on
JUDGED = (0, 2, 4, 6)  # epochs of DPO after which answers are judged, in the paper and here
TABLE_1 = {"GPT-3.5": (0.4729, 0.6518, 0.6928, 0.6667), "Claude 3 Haiku": (0.4679, 0.5151, 0.6045, 0.5432)}


def of_arm(table: pd.DataFrame, arm: str, design: str = "natural") -> pd.DataFrame:
    """The runs of one arm and one design, out of a table where either may not vary."""
    for name, value in (("arm", arm), ("design", design)):
        if name in table:
            table = table[table[name] == value]
    return table


def changes(table: pd.DataFrame, arm: str, kind: str, metric: str = "logp_sum", design: str = "natural") -> pd.Series:
    """Changes of the mean of a metric since the start of DPO, as a Series over steps; steps of SFT are below 0."""
    values = curve(of_arm(table, arm, design), kind, metric)
    return values - needed(values, 0)[0]


def growth(table: pd.DataFrame, arm: str, design: str = "natural") -> pd.Series:
    """Growth of log pi(chosen) - log pi(rejected) since the start of DPO, nats, over its steps."""
    gap = changes(table, arm, "chosen", design=design) - changes(table, arm, "rejected", design=design)
    return gap[gap.index >= 0]


# --- claims 43 to 48, on natural text


def sft_rise(table: pd.DataFrame, arm: str, kind: str) -> float:
    """Rise of log pi over the SFT of an arm, nats."""
    return -float(changes(table, arm, kind).iloc[0])


def sft_rise_share(table: pd.DataFrame, kind: str) -> float:
    """Rise of log pi(kind) over SFT under extended, over that of log pi(chosen) under the baseline, equal epochs."""
    return sft_rise(table, "extended", kind) / sft_rise(table, "baseline", "chosen")


def sft_rejected(table: pd.DataFrame, than: str = "baseline") -> float:
    """log pi(rejected) at the start of DPO under extended minus that under another arm, nats."""
    return sft_rise(table, "extended", "rejected") - sft_rise(table, than, "rejected")


def falls_less(
    table: pd.DataFrame, kind: str, metric: str = "logp_sum", at: str = "steps", than: str = "baseline"
) -> float:
    """Change over DPO under extended minus that under another arm, nats: above 0 where extended falls less.

    At equal `steps`: at the end. At equal `margin`: where the growth of the gap between chosen and rejected first
    reaches the largest that both arms reach.
    """
    arms, ends = ("extended", than), []
    gaps = {arm: growth(table, arm) for arm in arms}
    common = min(gap.max() for gap in gaps.values())
    for arm in arms:
        values = changes(table, arm, kind, metric)
        values = values[values.index >= 0]
        reached = np.maximum.accumulate(gaps[arm].to_numpy())
        ends.append(values.iloc[-1] if at == "steps" else np.interp(common, reached, values))
    return float(ends[0] - ends[1])


def dpo_change(table: pd.DataFrame, arm: str, kind: str) -> float:
    """Change of log pi over DPO under one arm, nats."""
    return float(changes(table, arm, kind).iloc[-1])


def others_fall_less(table: pd.DataFrame, at: str = "steps") -> float:
    """Smallest over OTHERS of `falls_less`, nats."""
    return min(falls_less(table, kind, at=at) for kind in OTHERS)


def top_at_start(table: pd.DataFrame) -> float:
    """log pi(y*) along chosen under extended, mean over the first quarter of DPO, minus its start, nats."""
    values = changes(table, "extended", "chosen", "argmax_logp_sum")
    early = values[(values.index > 0) & (values.index <= values.index.max() / 4)]
    return float(early.mean())


def end_lead(table: pd.DataFrame, kind: str) -> float:
    """log pi at the end of DPO under extended minus that under the baseline, nats."""
    ends = [curve(of_arm(table, arm), kind) for arm in ("extended", "baseline")]
    return float(ends[0].iloc[-1] - ends[1].iloc[-1])


# --- claim 49, in the closed world


def scores(table: pd.DataFrame, arm: str, field: str = "score", decoding: str = "sampled", design: str = "main"):
    """What the exact judge finds in the answers: rows prompts, columns steps of DPO."""
    rows = of_arm(table, arm, design)
    rows = rows[(rows.response_type == decoding) & (rows.metric == field)]
    return rows.pivot_table(
        index=["seed", "prompt_id"] if "seed" in rows else "prompt_id", columns="step", values="value", observed=True
    )


@bounded(-1, 1)
def lead(table: pd.DataFrame, epoch: int, over: Collection[int] = ()) -> float:
    """Share of prompts won minus share lost by extended against the baseline, after one of JUDGED epochs of DPO.

    Where `over` names other epochs, minus the largest lead after these.
    """
    ours, theirs = (needed(scores(table, arm), what=f"scores of {arm}") for arm in ("extended", "baseline"))
    leads = dict(zip(JUDGED, np.sign(ours - theirs).mean(), strict=True))
    return float(leads[epoch] - max((leads[other] for other in over), default=0.0))


def compare(
    answers: pd.DataFrame, judge: judging.Judge, ours: str = "extended", theirs: str = "baseline"
) -> pd.DataFrame:
    """Each answer of the arm `ours` against that of the arm `theirs` to the same prompt.

    Returns the columns of `judging.compare` and `seed, design, epoch, decoding, prompt_id`.
    """
    key = ["seed", "design", "epoch", "decoding", "prompt_id"]
    both = answers[answers.arm == ours].merge(answers[answers.arm == theirs], on=key, suffixes=("", "_theirs"))
    found = judging.compare(judge, list(both.prompt), list(both.text), list(both.text_theirs))
    return pd.concat([both[key], found], axis=1)


def win_rates(outcomes: pd.DataFrame, by: Sequence[str] = ("design", "decoding", "epoch")) -> pd.DataFrame:
    """`judging.rate` for each group of the result of `compare`."""
    rows = [dict(zip(by, key, strict=True)) | judging.rate(part) for key, part in outcomes.groupby(list(by))]
    return pd.DataFrame(rows)


def designs_ahead(table: pd.DataFrame) -> float:
    """Of all designs of the closed world, those in which extended leads at the end of DPO: the 95% interval over
    prompts of its lead is above 0. Not a number for a seed without the other designs."""
    found = []
    for design in ("main", *OTHER_DESIGNS):
        ours, theirs = (scores(table, arm, design=design) for arm in ("extended", "baseline"))
        found += [mean_interval(np.sign(ours - theirs).iloc[:, -1])[1] > 0] if len(ours) and len(theirs) else []
    return float(sum(found)) if len(found) > 1 else float("nan")


def score_change(table: pd.DataFrame, arm: str) -> float:
    """Change of the mean score of a sampled answer over DPO."""
    mean = needed(scores(table, arm), what=f"scores of {arm}").mean()
    return float(mean.iloc[-1] - mean.iloc[0])


def best_score(table: pd.DataFrame, arm: str) -> float:
    """The best mean score of a sampled answer that an arm has in DPO, minus that of the baseline's SFT."""
    start, later = (needed(scores(table, one), what=f"scores of {one}").mean() for one in ("baseline", arm))
    return float(later.iloc[1:].max() - start.iloc[0])


def best_lead(table: pd.DataFrame) -> float:
    """The best mean score of a sampled answer that extended reaches before or in DPO, minus that of the baseline."""
    return float(scores(table, "extended").mean().max() - scores(table, "baseline").mean().max())


# --- tables and sentences of the notebook


def differences(natural: pd.DataFrame) -> pd.DataFrame:
    """Extended minus baseline in what the chapter asks of natural text, nats: mean over seeds with its 95% interval."""
    chosen = {"kind": "chosen"}
    questions = {
        "log π(rejected) at the start of DPO": (sft_rejected, {}),
        "the same, against equal steps of SFT": (sft_rejected, {"than": "equal steps"}),
        "chosen in DPO": (falls_less, chosen),
        "chosen in DPO, equal margin": (falls_less, chosen | {"at": "margin"}),
        "chosen in DPO, against equal steps of SFT": (falls_less, chosen | {"than": "equal steps"}),
        "least of the other answers in DPO": (others_fall_less, {}),
        "the same, equal margin": (others_fall_less, {"at": "margin"}),
        "y* along chosen in DPO": (falls_less, chosen | {"metric": "argmax_logp_sum"}),
        "log π(chosen) at the end": (end_lead, chosen),
        "least of the others at the end": (lambda run: min(end_lead(run, kind) for kind in OTHERS), {}),
    }
    seeds = [run for _, run in natural.groupby("seed")]
    rows = {q: mean_interval(pd.Series([f(run, **how) for run in seeds])) for q, (f, how) in questions.items()}
    return pd.DataFrame(rows, index=["mean", "low", "high"]).T


def margin_sentence(natural: pd.DataFrame) -> str:
    """How far the gap grows and the chosen answers change in each arm, and what equal margin makes of it; Markdown."""
    seeds = [run for _, run in natural.groupby("seed")]
    grown = {arm: np.mean([growth(run, arm).iloc[-1] for run in seeds]) for arm in ARMS}
    chosen = {arm: np.mean([changes(run, arm, "chosen").iloc[-1] for run in seeds]) for arm in ARMS}
    less = {at: np.mean([falls_less(run, "chosen", at=at) for run in seeds]) for at in ("steps", "margin")}
    return (
        f"The gap grows by {grown['extended']:.1f} nats under extended, by {grown['baseline']:.1f} under the baseline "
        f"and by {grown['equal steps']:.1f} with equal steps of SFT; the chosen answers change by "
        f"{chosen['extended']:+.1f}, {chosen['baseline']:+.1f} and {chosen['equal steps']:+.1f}. The difference "
        f"between extended and baseline is {less['steps']:+.1f} nats at equal steps and {less['margin']:+.1f} at equal "
        "margin."
    )


def judged_example() -> tuple[str, pd.DataFrame]:
    """A training question of the closed world, and its answers with the scores that the exact judge gives them."""
    example = preferences.load("world", "train", limit=2)[1]
    kinds = [kind for kind in example if kind in ("chosen", "chosen_semantic", "rejected", "rejected_format")]
    rows = {kind: [example[kind].strip(), world.judge(example["prompt"], example[kind]).score] for kind in kinds}
    return example["prompt"].splitlines()[0], pd.DataFrame(rows, index=["answer", "score"]).T


def table_1(rates: pd.DataFrame, control: pd.DataFrame) -> pd.DataFrame:
    """Table 1 and ours: win rates with 95% intervals, rows judges and arms, columns epochs of DPO.

    rates, control: `win_rates` against the baseline and against the baseline with as many steps of SFT.
    """

    def ours(table: pd.DataFrame, decoding: str) -> list[str]:
        rows = table[table.decoding == decoding].sort_values("epoch")
        parts = zip(rows.win_rate, rows.low, rows.high, rows.tied, strict=True)
        return ["{:.2f} [{:.2f}, {:.2f}], {:.0%} tied".format(*part) for part in parts]

    rows = {
        judge: ["{:.2f} [{:.2f}, {:.2f}]".format(s, *judging.binomial_interval(s, 1000)) for s in shares]
        for judge, shares in TABLE_1.items()
    }
    rows |= {"ours, sampled": ours(rates, "sampled"), "ours, greedy": ours(rates, "greedy")}
    rows["ours, sampled, equal steps"] = ours(control, "sampled")
    return pd.DataFrame(rows, index=[f"DPO epoch {epoch}" for epoch in JUDGED]).T


def win_rate_sentence(rates: pd.DataFrame) -> str:
    """When extended is behind and ahead of the baseline, and which win rates of table 1 are undecided; Markdown."""
    sampled = rates[rates.decoding == "sampled"].set_index("epoch")
    ahead, behind = sampled.index[sampled.lead_low > 0], sampled.index[sampled.lead_high < 0]
    overtakes = f"from epoch {ahead[0]:g} on" if len(ahead) else "at no epoch that was judged"
    undecided = []
    for share in [share for shares in TABLE_1.values() for share in shares]:
        low, high = judging.binomial_interval(share, 1000)
        undecided += [str(share)] if low < 0.5 < high else []
    return (
        f"Before DPO extended wins {sampled.won.iloc[0]:.0%} and loses {sampled.lost.iloc[0]:.0%} of all pairs of "
        f"sampled answers. It is ahead, with the whole interval, {overtakes}; it is behind at epoch "
        f"{', '.join(f'{e:g}' for e in behind) or 'none'}. Of the paper's eight win rates {len(undecided)} "
        f"({', '.join(undecided)}) have an interval that contains one half, before anything is said about prompts that "
        "resemble each other, about seeds or about the order of the answers."
    )


def score_sentence(in_world: pd.DataFrame) -> str:
    """The mean score of a sampled answer in each arm before and after DPO, and at its best; Markdown."""
    score = {arm: scores(in_world, arm).mean().to_numpy() for arm in ARMS}
    return (
        "Mean score of a sampled answer (2 is best) before and after DPO: "
        + "; ".join(f"{arm} {values[0]:.2f} to {values[-1]:.2f}" for arm, values in score.items())
        + ". The best that any stopping point gives: "
        + ", ".join(f"{arm} {values.max():.2f}" for arm, values in score.items())
        + "."
    )


def said(answers: pd.DataFrame) -> pd.DataFrame:
    """What each arm answers (columns) to three questions (rows) at the end: one sample, first seed, the main design."""
    last = answers[(answers.design == "main") & (answers.decoding == "sampled")]
    last = last[(last.epoch == last.epoch.max()) & (last.seed == last.seed.min())]
    shown = last.pivot(index="prompt", columns="arm", values="text").head(3)
    return shown.set_axis(shown.index.str.split("?").str[0])[list(ARMS)]


def design_leads(rates: pd.DataFrame) -> pd.DataFrame:
    """Sampled answers won and lost, and the lead with its interval, in each design and after each epoch."""
    columns = ["won", "lost", "lead", "lead_low", "lead_high"]
    return rates[rates.decoding == "sampled"].set_index(["design", "epoch"])[columns]


def softening(in_world: pd.DataFrame) -> pd.DataFrame:
    """The ends of the runs in the closed world as rows of chapter 6's table: `name, seed, margin, chosen, won`.

    won: how often a sampled answer scores better than one of the baseline's SFT model to the same prompt (a tie
    counts half).
    """
    rows = []
    for seed, runs in in_world.groupby("seed"):
        start = scores(runs, "baseline")
        for name, arm in (("DPO (7)", "baseline"), ("extended (7)", "extended"), ("more SFT (7)", "equal steps")):
            end = scores(runs, arm)
            if len(start) and len(end):
                gain = end.iloc[:, -1] - start.iloc[:, 0]
                chosen = changes(runs, arm, "chosen", design="main").iloc[-1]
                margin = growth(runs, arm, "main").iloc[-1]
                end = {"margin": margin, "chosen": chosen, "won": share_won(gain)}
                rows.append({"name": name, "seed": seed} | end)
    return pd.DataFrame(rows)


def places(rates: pd.DataFrame) -> pd.DataFrame:
    """What the judge said, ties and malformed replies too, and how often it chose the first place."""
    return rates.set_index(["decoding", "epoch"])[["won", "lost", "tied", "malformed", "first_place"]]
