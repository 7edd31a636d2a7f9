"""What `preflight` is worth: forecasts beside what training did, pair by pair, on settings of several models and data.

A setting is a kind of pairs, a learning rate, and a start: the model itself, or a short SFT of it. On each, DPO is run
for one epoch in several random orders of the pairs, and the mean change of each chosen answer over the orders is what a
forecast can know: it does not know the order. What each order shares with the others says how much there is to know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from lddyn.chapters.dpo import run as dpo
from lddyn.chapters.dpo.evidence import PAIRS, paired
from lddyn.data import preferences, responses
from lddyn.engine import cache, models, pool, recipe, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import Model, ProbeSet, Tokenizer
from lddyn.engine.settings import derive, lengths
from lddyn.engine.training import Training, dpo_rows, train
from lddyn.theory import influences, kernels
from lddyn.theory.first_order import Text
from lddyn.workshop import forecast
from lddyn.workshop.forecast import How, Pairs

RECORDED = store.BOOK / "recorded" / "preflight"  # a file for each model, data and seed
SEEDS = (400, 401)  # of the SFT and of the pairs that are drawn; no other run has them
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
    lm, tokenizer = start(s)
    examples, others = drawn(s, s.n_train), preferences.load(s.data, "test", 16)
    pairs, unpushed = encoded(tokenizer, examples, s), encoded(tokenizer, others, s).chosen
    before = logps(lm, pairs, unpushed)
    after = [
        logps(trained(work / f"{order}", lm, tokenizer, examples, s, order), pairs, unpushed) for order in s.orders
    ]
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


def start(s: Worth) -> tuple[Model, Tokenizer]:
    """The model that a setting starts from, and its tokenizer."""
    source = str(Path(s.stage) / f"model-{s.sft_epochs}") if s.sft_epochs else s.model
    return models.read(source, device=s.device, dtype=s.dtype)


def drawn(s: Worth, count: int) -> list[responses.Example]:
    """The first `count` training examples in the order that the seed draws, with the pairs of the setting."""
    examples = preferences.load(s.data, "train")
    order = np.random.default_rng(s.seed).permutation(len(examples))
    return paired([examples[i] for i in order[:count]], s.pairs)


def _probes(examples: Sequence[responses.Example]) -> ProbeSet:
    return ProbeSet([e["prompt"] for e in examples], {k: [e[k] for e in examples] for k in ("chosen", "rejected")})


def encoded(tokenizer: Tokenizer, examples: Sequence[responses.Example], s: Worth) -> Pairs:
    """Examples as token ids, cut at the limits of the setting."""
    ids = _probes(examples).encode(tokenizer, **lengths(s))
    return Pairs(*(list(zip(ids.prompts, ids.responses[k], strict=True)) for k in ("chosen", "rejected")))


def trained(
    work: Path, model: Model, tokenizer: Tokenizer, examples: Sequence[responses.Example], s: Worth, order: int
) -> Model:
    """A copy of the model after DPO on the examples, in the random order of the seed `order`."""
    copy, probes = models.snapshot(model).requires_grad_(True), _probes(examples)
    rows = dpo_rows(tokenizer, probes.prompts, probes.responses["chosen"], probes.responses["rejected"], **lengths(s))
    callback = ProbeCallback(_probes(examples[:1]), at=[0], thresholds=None, **lengths(s))
    how = derive(Training, s, seed=order, method="dpo", checkpoints=1)
    train(work, copy, tokenizer, rows, callback, how)
    return copy.eval()


def logps(model: Model, pairs: Pairs, unpushed: Sequence[Text]) -> dict[str, torch.Tensor]:
    """log pi of both answers of the pairs, of y* along chosen (`top`) and of unpushed texts, (texts,) each."""
    chosen = forecast.stats(model, pairs.chosen)
    return {
        "chosen": forecast.sums(chosen),
        "rejected": forecast.sums(forecast.stats(model, pairs.rejected)),
        "top": forecast.sums(chosen, "argmax_logp"),
        "unpushed": forecast.sums(forecast.stats(model, unpushed)),
    }


def rivals(model: Model, pairs: Pairs, logps: torch.Tensor) -> dict[str, torch.Tensor]:
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


def record(
    data: str = "builtin",
    model: str = "builtin",
    seeds: Sequence[int] | None = None,
    given: Mapping[str, Any] | None = None,
) -> str:
    """Compute all settings of a model and data, or read them from the cache, and write a table for each seed.

    A table is written again after each setting. The built-in model is trained at two rates, on the built-in data also
    after SFT and with both of `SEEDS`; other models at one rate, in one order. `given`: settings of `Worth`, and of the
    SFT before, in place of those of chapter 5. Returns one line.
    """
    small, given = model == "builtin", dict(given or {})
    own = small and data == "builtin"
    chapter = dpo.settings("laptop" if small else "pretrained", {"data": data, "model": model} | given)
    files, (first,) = recipe.files(chapter), preferences.load(data, "train", 1)
    kinds = [kind for kind, source in PAIRS.items() if source in first]
    rates = (chapter.few_lr / 4, chapter.few_lr) if small else (chapter.few_lr,)  # chosen falls at the larger one
    names = {"model": Path(model).name, "data": Path(data).stem}
    written = []
    for seed in seeds or SEEDS[: 1 + own]:
        settings = grid(chapter, seed, kinds, rates, given)
        if own:
            (stage,) = pool.run_all(recipe.stages, recipe.stage_grid(chapter, [chapter.sft_short], [seed]), files)
            tuned = {"stage": str(stage.folder), "sft_epochs": chapter.sft_short}
            settings += [replace(s, **tuned) for s in settings]
        path, runs = RECORDED / f"{'-'.join(names.values())}-{seed}.json", []
        for s in settings:
            runs.append(cache.run(compare, s, files))
            store.keep(path, [names | measured(run) for run in runs], runs)
        written.append(f"{len(runs)} settings: {path.relative_to(store.SOURCES)}")
    return "\n".join(written)


def grid(
    chapter: dpo.Chapter, seed: int, kinds: Sequence[str], rates: Sequence[float], given: Mapping[str, Any]
) -> list[Worth]:
    """The settings of one seed that start from the model itself: each kind of pairs at each rate."""
    orders = ORDERS if chapter.model == "builtin" else ORDERS[:1]
    once = {"n_train": chapter.few, "epochs": 1.0, "orders": orders} | dict(given)
    start = {"seed": seed, "model": recipe.base_model(chapter), "stage": "", "sft_epochs": 0}
    return [derive(Worth, chapter, **once | start | {"lr": lr, "pairs": kind}) for lr in rates for kind in kinds]


def measured(run: store.Run) -> dict[str, Any]:
    """A row of the table: rank correlations with the measured change of the chosen answers, and means in nats."""
    wide = run.table.pivot(index="prompt_id", columns=["response_type", "metric"], values="value")
    chosen, p = wide["chosen"].dropna(), run.manifest["parameters"]
    orders = [chosen[name] for name in chosen if name.startswith("change_")]
    one_by_one = [spearmanr(a, b)[0] for n, a in enumerate(orders) for b in orders[:n]]
    between = float(np.mean(one_by_one)) if one_by_one else None
    return {
        "pairs": p["pairs"],
        "start": f"{p['sft_epochs']} epochs of SFT" if p["sft_epochs"] else "base",
        "seed": p["seed"],
        "lr": p["lr"],
        "trained": len(chosen),
        "orders": len(orders),
        "between_orders": between,
        "attainable": None if between is None else attainable(between, len(orders)),
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


# --- in words --------------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """What is recorded of a model and data."""

    model: str
    data: str
    table: pd.DataFrame  # a row a setting, of all seeds
    made: list[dict[str, Any]]  # the origin of each seed's


def recorded() -> list[Recorded]:
    """All that is recorded, the built-in model and data first."""
    found: dict[tuple[str, str], list[tuple[pd.DataFrame, dict[str, Any]]]] = {}
    for path in sorted(RECORDED.glob("*-*-*.json")):
        table, made = store.kept(str(path.relative_to(store.BOOK).with_suffix("")))
        found.setdefault((table.model[0], table.data[0]), []).append((table, made))
    return [
        Recorded(*of, pd.concat([table for table, _ in parts], ignore_index=True), [made for _, made in parts])
        for of, parts in sorted(found.items(), key=lambda item: item[0] != ("builtin", "builtin"))
    ]


def sentence() -> str:
    """How far a forecast can be trusted, out of the record."""
    told = []
    for model, data, table, _ in recorded():
        rank, error = table.forecast, (table.chosen_forecast - table.chosen_change).abs()
        told.append(
            f"On {len(table)} recorded settings (model {model}, data {data}) such forecasts ranked the changes of "
            f"chosen answers with a Spearman correlation of {rank.median():.2f} ({rank.min():.2f} to {rank.max():.2f}),"
            f" and missed their mean by {error.median():.1f} nats (at most {error.max():.1f}) at margins of "
            f"{table.margin.min():.0f} to {table.margin.max():.0f}."
        )
    return " ".join(told) or "How well such forecasts come true has not been recorded."


def verdict(table: pd.DataFrame) -> str:
    """Whether forecasts rank pairs better than the rivals, and what does where they do not: of a table, in words."""
    n, rivals = len(table), table[list(RIVALS)]
    ahead = {name: int((table.forecast > table[name]).sum()) for name in RIVALS}
    seeds = table.groupby("seed").forecast.median()
    told = [
        f"The forecast's correlation with what training did is {table.forecast.median():.2f} in the median, from "
        f"{table.forecast.min():.2f} to {table.forecast.max():.2f}; it is at least {GOAL} on "
        f"{int((table.forecast >= GOAL).sum())} of {n} settings."
    ]
    if len(seeds) > 1:
        told.append(f"Medians by seed: {', '.join(f'{rank:.2f} ({seed})' for seed, rank in seeds.items())}.")
    if table.attainable.notna().all():
        told.append(
            f"As the orders differ among themselves, about {table.attainable.median():.2f} is attainable in the "
            f"median, from {table.attainable.min():.2f}."
        )
    told.append(
        "It ranks the pairs better than " + ", ".join(f"{RIVALS[name]} on {ahead[name]}" for name in RIVALS) + "."
    )
    lost = rivals.idxmax(axis=1)[rivals.max(axis=1) >= table.forecast]
    for name, where in table.loc[lost.index].groupby(lost, sort=False):
        settings = [f"{row.pairs} pairs from {row.start} at {row.lr:g} (seed {row.seed})" for row in where.itertuples()]
        told.append(f"Where it does not, {RIVALS[name]} ranks best on {len(where)}: {', '.join(settings)}.")
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
