"""What `preflight` is worth: forecasts beside what training did, pair by pair, on settings of the built-in model.

A setting is a kind of pairs, from the base model or after a short SFT. On each, DPO is run for one epoch from the same
start in several random orders of the pairs, and the mean change of each chosen answer over the orders is what a
forecast can know: it does not know the order. What each order shares with the others says how much there is to know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from lddyn.chapters.dpo import run as dpo
from lddyn.chapters.dpo.evidence import PAIRS, paired
from lddyn.data import preferences
from lddyn.engine import models, pool, recipe, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import ProbeSet
from lddyn.engine.settings import derive, lengths
from lddyn.engine.training import Training, dpo_rows, train
from lddyn.theory import influences, kernels
from lddyn.theory.first_order import Text
from lddyn.workshop import forecast
from lddyn.workshop.forecast import How, Pairs

RECORDED = store.BOOK / "recorded" / "preflight.json"
SEEDS = (400,)  # of the SFT and of the pairs that are drawn; no other run has it
GOAL = 0.7  # a correlation from which a forecast is called useful
ORDERS = (0, 1, 2, 3)  # seeds of the order of the pairs in training
# each with its sign: what should rank with the change of the chosen answer
RIVALS = {
    "ches": "CHES",
    "normalised_ches": "CHES by length",
    "entanglement": "own gradients",
    "length": "length",
    "logp": "log π(chosen)",
    "overlap": "overlap",
}


@dataclass(frozen=True)
class Worth:
    """One setting: pairs that `seed` draws, trained on from `sft_epochs` of the run in `stage`, once an order."""

    seed: int
    model: str
    stage: str
    sft_epochs: int
    data: str
    pairs: str
    n_train: int
    orders: tuple[int, ...]
    lr: float
    beta: float
    optimizer: str
    batch_size: int
    max_prompt: int
    max_response: int
    device: str
    dtype: str
    format: str = "auto"
    loss: str = "sigmoid"
    epochs: float = 1.0
    clip: float = 10.0


def compare(work: Path, s: Worth) -> pd.DataFrame:
    """Forecast and measured change of every pair of a setting, and what rivals say of it; returns a long table.

    `change`: over one epoch, mean over the orders, of `chosen`, `rejected`, y* along chosen (`top`) and answers to
    prompts that are not trained on (`unpushed`); `change_0` and so on: in each order; `forecast`: of the same, at the
    measured margin; `slope`: the first order alone; `RIVALS` (higher where the chosen answer should rise more). In nats
    summed over a response.
    """
    start = str(Path(s.stage) / f"model-{s.sft_epochs}") if s.sft_epochs else s.model
    lm, tokenizer = models.read(start, device=s.device, dtype=s.dtype)
    pool_of_pairs = preferences.load(s.data, "train")
    drawn = np.random.default_rng(s.seed).permutation(len(pool_of_pairs))[: s.n_train]
    examples = paired([pool_of_pairs[i] for i in drawn], s.pairs)
    others = preferences.load(s.data, "test", 16)
    kept = ProbeSet([e["prompt"] for e in examples], {k: [e[k] for e in examples] for k in ("chosen", "rejected")})
    ids, unseen = (
        probes.encode(tokenizer, **lengths(s))
        for probes in (kept, ProbeSet([e["prompt"] for e in others], {"chosen": [e["chosen"] for e in others]}))
    )
    pairs = Pairs(*(list(zip(ids.prompts, ids.responses[k], strict=True)) for k in ("chosen", "rejected")))
    unpushed = list(zip(unseen.prompts, unseen.responses["chosen"], strict=True))

    before, after = _logps(lm, pairs, unpushed), []
    rows = dpo_rows(tokenizer, kept.prompts, kept.responses["chosen"], kept.responses["rejected"], **lengths(s))
    for order in s.orders:
        trained = models.snapshot(lm).requires_grad_(True)
        callback = ProbeCallback(
            ProbeSet(kept.prompts[:1], {"chosen": kept.responses["chosen"][:1]}), at=[0], thresholds=None
        )
        how = derive(Training, s, seed=order, method="dpo", checkpoints=1)
        train(work / f"{order}", trained, tokenizer, rows, callback, how)
        after.append(_logps(trained.eval(), pairs, unpushed))
    changes = [{kind: one[kind] - before[kind] for kind in before} for one in after]
    mean = {kind: torch.stack([c[kind] for c in changes]).mean(0) for kind in before}
    margin = (mean["chosen"] - mean["rejected"]).mean().item()
    said = forecast.forecast(lm, pairs, unpushed, margin, derive(How, s, loss="dpo"))

    names = {kind: [e["id"] for e in (others if kind == "unpushed" else examples)] for kind in mean}
    columns = {("change", kind): values for kind, values in mean.items()}
    columns |= {("forecast", kind): getattr(said, kind) for kind in mean}
    columns |= {(f"change_{n}", "chosen"): change["chosen"] for n, change in enumerate(changes)}
    columns |= {(name, "chosen"): values for name, values in rivals(lm, pairs, before["chosen"]).items()}
    columns["slope", "chosen"] = said.slopes
    return store.long(
        (0, 0, name, kind, metric, float(value))
        for (metric, kind), values in columns.items()
        for name, value in zip(names[kind], values, strict=True)
    )


def _logps(model: Any, pairs: Pairs, unpushed: Sequence[Text]) -> dict[str, torch.Tensor]:
    chosen = forecast.stats(model, pairs.chosen)
    return {
        "chosen": forecast.sums(chosen),
        "rejected": forecast.sums(forecast.stats(model, pairs.rejected)),
        "top": forecast.sums(chosen, "argmax_logp"),
        "unpushed": forecast.sums(forecast.stats(model, unpushed)),
    }


def rivals(model: Any, pairs: Pairs, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """What else is said to tell which chosen answers rise, each so that more means a rise. (pairs,) each."""
    n = len(pairs.chosen)
    products = influences.products(model, pairs.chosen, [*pairs.chosen, *pairs.rejected]).products
    alike = [SequenceMatcher(None, a[1], b[1], autojunk=False).ratio() for a, b in zip(*pairs, strict=True)]
    return {
        "ches": -kernels.ches(model, *pairs),
        "normalised_ches": -kernels.ches(model, *pairs, normalised=True),
        "entanglement": products[:, :n].diagonal() - products[:, n:].diagonal(),
        "length": -torch.tensor([float(len(y)) for _, y in pairs.chosen]),
        "logp": logps,
        "overlap": -torch.tensor(alike),
    }


# --- the record ------------------------------------------------------------------------------------------------


def record(given: Mapping[str, Any] | None = None, seeds: Sequence[int] = SEEDS) -> str:
    """Compute all settings, or read them from the cache, and write their table; returns one line.

    `given`: settings of `Worth`, and of the SFT before, in place of those of chapter 5 at laptop scale.
    """
    chapter = dpo.settings("laptop", given or {})
    stages = recipe.stage_grid(chapter, [chapter.sft_short], seeds)
    once = {"n_train": chapter.few, "lr": chapter.few_lr / 4, "epochs": 1.0, "orders": ORDERS} | dict(given or {})
    doses = (once["lr"], 4 * once["lr"])  # both are rates of chapter 5; at the larger one chosen answers fall there

    def grid(stage: store.Run) -> list[Worth]:
        start = {
            "seed": stage.manifest["parameters"]["seed"],
            "model": recipe.base_model(chapter),
            "pairs": "as_written",
        }
        base = derive(Worth, chapter, **start, stage="", sft_epochs=0, **once)
        tuned = replace(base, stage=str(stage.folder), sft_epochs=chapter.sft_short)
        return [replace(how, pairs=kind, lr=lr) for lr in doses for how in (base, tuned) for kind in PAIRS]

    runs = pool.run_then(recipe.stages, stages, compare, grid, recipe.files(chapter), workers=1)
    rows = [measured(run) for run in runs]
    store.keep(RECORDED, rows, runs)
    return f"{len(rows)} settings: {RECORDED.relative_to(store.SOURCES)}"


def measured(run: store.Run) -> dict[str, Any]:
    """A row of the table: rank correlations with the measured change of the chosen answers, and means in nats."""
    wide = run.table.pivot(index="prompt_id", columns=["response_type", "metric"], values="value")
    chosen, p = wide["chosen"].dropna(), run.manifest["parameters"]
    orders = [chosen[name] for name in chosen if name.startswith("change_")]
    one_by_one = [spearmanr(a, b)[0] for n, a in enumerate(orders) for b in orders[:n]]
    return {
        "pairs": p["pairs"],
        "start": f"{p['sft_epochs']} epochs of SFT" if p["sft_epochs"] else "base",
        "seed": p["seed"],
        "lr": p["lr"],
        "trained": len(chosen),
        "orders": len(orders),
        "between_orders": float(np.mean(one_by_one)),
        "attainable": attainable(float(np.mean(one_by_one)), len(orders)),
        **{name: float(spearmanr(chosen[name], chosen.change)[0]) for name in ("forecast", "slope", *RIVALS)},
        "margin": float((chosen.change - wide["rejected"].change.dropna()).mean()),
        **{f"{kind}_{metric}": float(wide[kind][metric].mean())
           for kind in ("chosen", "top", "unpushed") for metric in ("change", "forecast")},
        "chosen_slope": float(chosen.slope.mean()),
    }  # fmt: skip


def attainable(between: float, orders: int) -> float:
    """The correlation that the expected change itself would have with the mean of so many orders.

    From the correlation between two of them, by the formula of Spearman and Brown; 0 where they do not agree at all.
    """
    shared = max(between, 0.0)
    return float(np.sqrt(orders * shared / (1 + (orders - 1) * shared)))


def sentence() -> str:
    """How far a forecast can be trusted, out of the record."""
    if not RECORDED.exists():
        return "How well such forecasts come true has not been recorded."
    table = store.kept("recorded/preflight")[0]
    rank, error = table.forecast, (table.chosen_forecast - table.chosen_change).abs()
    return (
        f"On {len(table)} recorded settings of the built-in model such forecasts ranked the changes of chosen answers "
        f"with a Spearman correlation of {rank.median():.2f} ({rank.min():.2f} to {rank.max():.2f}), and missed their "
        f"mean by {error.median():.1f} nats (at most {error.max():.1f}) at margins of {table.margin.min():.0f} to "
        f"{table.margin.max():.0f}."
    )


def verdict(table: pd.DataFrame) -> str:
    """Whether forecasts rank pairs better than the rivals, and by how much: of a recorded table, in words."""
    n, rivals = len(table), table[list(RIVALS)]
    ahead = {name: int((table.forecast > table[name]).sum()) for name in RIVALS}
    told = [
        f"The forecast's correlation with what training did is {table.forecast.median():.2f} in the median, from "
        f"{table.forecast.min():.2f} to {table.forecast.max():.2f}; it is at least {GOAL} on "
        f"{int((table.forecast >= GOAL).sum())} of {n} settings. As the orders differ among themselves, about "
        f"{table.attainable.median():.2f} is attainable in the median, from {table.attainable.min():.2f}.",
        "It ranks the pairs better than " + ", ".join(f"{RIVALS[name]} on {ahead[name]}" for name in RIVALS) + ".",
    ]
    lost = rivals[rivals.max(axis=1) >= table.forecast].idxmax(axis=1)
    told += [
        f"On {table.pairs[i]} pairs from {table.start[i]} at {table.lr[i]:g}, {RIVALS[name]} ranks them better."
        for i, name in lost.items()
    ]
    best = rivals.median().idxmax()
    told.append(f"Best of the others is {RIVALS[best]} with {rivals[best].median():.2f} in the median.")
    return " ".join(told)


def calibration(table: pd.DataFrame) -> str:
    """How far the mean forecast was from the measured mean, and how often it had its sign: in words."""
    told = []
    for kind, name in (("chosen", "chosen answers"), ("top", "y*"), ("unpushed", "text that is not pushed")):
        said, was = table[f"{kind}_forecast"], table[f"{kind}_change"]
        told.append(
            f"for {name} by {(said - was).abs().median():.1f} (at most {(said - was).abs().max():.1f}), "
            f"with the right sign on {int((said * was > 0).sum())} of {len(table)}"
        )
    alone = (table.chosen_slope - table.chosen_change).abs().median()
    return (
        f"The mean is missed, in nats, {'; '.join(told)}. The first order alone misses that of chosen answers by "
        f"{alone:.1f} in the median. Chosen answers fell on {int((table.chosen_change < 0).sum())} of these settings."
    )
