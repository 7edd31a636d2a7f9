"""What the advice of `preflight` is worth: DPO as asked beside DPO as advised, after the same number of steps.

Filters keep half of the pairs, which are then trained on for two epochs. A half may be easier than the whole, whatever
is trained: so the same pairs are also looked at where all are trained on, and pairs that nobody trains on in each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lddyn.chapters.dpo import run as dpo
from lddyn.chapters.dpo.evidence import PAIRS
from lddyn.chapters.statistics import in_interval, mean_interval
from lddyn.data import preferences
from lddyn.engine import cache, recipe, store
from lddyn.engine.probe_set import Model
from lddyn.engine.settings import derive
from lddyn.theory import kernels
from lddyn.workshop import forecast, preflight_worth
from lddyn.workshop.forecast import How, Pairs
from lddyn.workshop.preflight_worth import Worth

RECORDED = preflight_worth.RECORDED / "advice.json"
HELD_OUT = 32  # pairs that nobody trains on
TRAINED = {
    "all": "training as asked",
    "random": "a random half",
    "forecast": "the half that the forecast keeps",
    "ches": "the half with the lowest CHES",
    "normalised_ches": "the half with the lowest CHES by length",
    "anchor": "the loss with an anchor (rpo)",
    "half_rate": "half the rate",
}
FILTERS = ("forecast", "ches", "normalised_ches")
MEASURED = {
    "held_out_chosen": "chosen, held out",
    "held_out_margin": "margin, held out",
    "unpushed": "not pushed",
    "chosen": "chosen, trained on",
    "chosen_with_all": "the same pairs, all trained on",
    "rejected": "rejected",
    "top": "y*",
    "margin": "margin",
}


def halves(model: Model, pairs: Pairs, s: Worth) -> dict[str, list[int]]:
    """The numbers of the pairs that each filter keeps: half of them, where it expects chosen answers to fall least.

    The forecast's are those whose parts in the mean change of all chosen answers are the largest (`forecast.parts`).
    """
    n = len(pairs.chosen)
    towards = forecast.direction(model, pairs, derive(How, s, loss="dpo"))
    scores = {
        "random": torch.rand(n, generator=torch.Generator().manual_seed(s.seed)),
        "forecast": forecast.parts(model, pairs, pairs.chosen, towards, s.beta),
        "ches": -kernels.ches(model, *pairs),
        "normalised_ches": -kernels.ches(model, *pairs, normalised=True),
    }
    return {name: sorted(score.argsort()[n - n // 2 :].tolist()) for name, score in scores.items()}


def compare(work: Path, s: Worth) -> pd.DataFrame:
    """Train in each of the ways of `TRAINED`, once an order, and measure all pairs; returns a long table.

    Metrics are the ways: change of `chosen`, `rejected`, y* along chosen (`top`), of the same of pairs that are held
    out (`held_out_chosen` and so on) and of `unpushed` answers, mean over the orders, in nats summed over a response.
    `kept_all` and so on: 1 for a chosen answer that is trained on, else 0.
    """
    lm, tokenizer = preflight_worth.start(s)
    examples, others = preflight_worth.drawn(s, s.n_train + HELD_OUT), preferences.load(s.data, "test", 16)
    pairs = preflight_worth.encoded(tokenizer, examples, s)
    unpushed = preflight_worth.encoded(tokenizer, others, s).chosen
    before = preflight_worth.logps(lm, pairs, unpushed)
    everything, twice = list(range(s.n_train)), replace(s, epochs=2 * s.epochs)
    ways = {name: (kept, twice) for name, kept in halves(lm, pairs.only(everything), s).items()} | {
        "all": (everything, s),
        "anchor": (everything, replace(s, loss="rpo")),
        "half_rate": (everything, replace(s, lr=s.lr / 2)),
    }
    rows: list[tuple[object, ...]] = []
    for way, (kept, how) in ways.items():
        mine = [examples[i] for i in kept]
        after = [
            preflight_worth.logps(
                preflight_worth.trained(work / f"{way}-{order}", lm, tokenizer, mine, how, order), pairs, unpushed
            )
            for order in s.orders
        ]
        for kind, was in before.items():
            change = torch.stack([one[kind] for one in after]).mean(0) - was
            for n, value in enumerate(change.tolist()):
                name = (others if kind == "unpushed" else examples)[n]["id"]
                held_out = "held_out_" if kind != "unpushed" and n >= s.n_train else ""
                rows.append((0, 0, name, held_out + kind, way, value))
        rows += [(0, 0, examples[n]["id"], "chosen", f"kept_{way}", float(n in kept)) for n in everything]
    return store.long(rows)


def measured(run: store.Run) -> list[dict[str, Any]]:
    """Rows of the table, one for each way of training: means in nats."""
    wide = run.table.pivot(index="prompt_id", columns=["response_type", "metric"], values="value")
    of, p = {kind: wide[kind].dropna() for kind in wide.columns.levels[0]}, run.manifest["parameters"]
    rows = []
    for way in TRAINED:
        kept = of["chosen"].index[of["chosen"][f"kept_{way}"] == 1]
        chosen, rejected, top = (of[kind].loc[kept, way].mean() for kind in ("chosen", "rejected", "top"))
        held_out = {kind: of[f"held_out_{kind}"][way].mean() for kind in ("chosen", "rejected")}
        values = {
            "held_out_chosen": held_out["chosen"],
            "held_out_margin": held_out["chosen"] - held_out["rejected"],
            "unpushed": of["unpushed"][way].mean(),
            "chosen": chosen,
            "chosen_with_all": of["chosen"].loc[kept, "all"].mean(),
            "rejected": rejected,
            "top": top,
            "margin": chosen - rejected,
        }
        setting = {"pairs": p["pairs"], "seed": p["seed"], "lr": p["lr"], "orders": len(p["orders"])}
        rows.append(setting | {"way": way, "trained": len(kept)} | {name: float(v) for name, v in values.items()})
    return rows


def record(seeds: Sequence[int] = preflight_worth.SEEDS, given: Mapping[str, Any] | None = None) -> str:
    """Train on all kinds of pairs of the built-in data and write the table, again after each setting; returns one line.

    From the built-in model at the larger rate of `preflight_worth`. `given`: settings of `Worth` in place of those of
    chapter 5.
    """
    given = dict(given or {})
    chapter = dpo.settings("laptop", given)
    files, runs = recipe.files(chapter), []
    for seed in seeds:
        for s in preflight_worth.grid(chapter, seed, list(PAIRS), [chapter.few_lr], given):
            runs.append(cache.run(compare, s, files))
            store.keep(RECORDED, [row for run in runs for row in measured(run)], runs)
    return f"{len(runs)} settings: {RECORDED.relative_to(store.SOURCES)}"


# --- in words --------------------------------------------------------------------------------------------------


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means of each way of training over the settings, with intervals."""
    rows = {TRAINED[way]: of.agg({name: in_interval for name in MEASURED}) for way, of in table.groupby("way")}
    return pd.DataFrame(rows).T.loc[list(TRAINED.values())].rename(columns=MEASURED)


def gain(table: pd.DataFrame, way: str, beside: str, measure: str = "held_out_chosen") -> pd.Series:
    """What one way of training does to a mean more than another, nats; one value a setting."""
    one, other = (table[table.way == name].set_index(["pairs", "seed", "lr"])[measure] for name in (way, beside))
    return one - other


def beside(table: pd.DataFrame, way: str, other: str) -> str:
    """Where a way of training leaves chosen answers of held-out pairs, and their margin, beside another: a sentence."""
    more, margin = gain(table, way, other), gain(table, way, other, "held_out_margin")
    _, low, high = mean_interval(more)
    found = "higher" if low > 0 else "lower" if high < 0 else "no difference that these settings show"
    return (
        f"Beside {TRAINED[other]}, {TRAINED[way]}: {in_interval(more)}, more on {int((more > 0).sum())} of {len(more)} "
        f"settings, {found}; their margin {in_interval(margin)}."
    )


def verdict(table: pd.DataFrame) -> list[str]:
    """What each advice did, in sentences."""
    means = table.groupby("way")[list(MEASURED)].mean()
    best = means.held_out_chosen.drop("all").idxmax()
    filters = [way for way in FILTERS if mean_interval(gain(table, way, "random"))[1] > 0]
    return [
        f"Filters that leave chosen answers of held-out pairs higher than a random half does: {len(filters)} of "
        f"{len(FILTERS)}{''.join(f', {TRAINED[way]}' for way in filters)}.",
        *(beside(table, way, "random") for way in FILTERS),
        *(beside(table, way, "all") for way in ("random", "anchor", "half_rate")),
        f"They end highest with {TRAINED[best]}: at {means.held_out_chosen[best]:+.1f}; with {TRAINED['all']} at "
        f"{means.held_out_chosen['all']:+.1f}.",
        *(
            f"The chosen answers of {TRAINED[way]} themselves change by {means.chosen[way]:+.1f}, and where all pairs "
            f"are trained on by {means.chosen_with_all[way]:+.1f}."
            for way in ("random", *FILTERS)
        ),
    ]


def sentence() -> str:
    """What became of the advice to filter, out of the record."""
    if not RECORDED.exists():
        return "What the filter does has not been recorded."
    table, _ = store.kept("recorded/preflight/advice")
    told = [beside(table, "forecast", "random"), *(beside(table, way, "all") for way in ("anchor", "half_rate"))]
    return " ".join(["Measured on the built-in model, by chosen answers of held-out pairs in nats.", *told])
