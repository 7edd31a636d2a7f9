"""Chapter 5: DPO, measured on all kinds of response, and where the probability goes (sections 3.2, 4.2)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from lddyn import unknown
from lddyn.chapters.dpo.evidence import PAIRS, paired
from lddyn.data import preferences, responses, reuse
from lddyn.engine import models, recipe, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import Encoded, first_difference
from lddyn.engine.settings import choose, derive, lengths
from lddyn.engine.training import Training, dpo_rows, log_rows, train

LIKELY = 0.05  # probability from which on a pushed token does not lie in the valley
# what a run measures: everything, or only what tells how y* moves along trained and untrained paths
MEASURE = {"all": responses.RESPONSE_TYPES, "paths": ("chosen", "rejected", "chosen_semantic", "other_test")}
SCALES = {
    "smoke": recipe.AFTER_SFT["smoke"] | {
        "n_train": 32, "n_probe": 8, "n_probe_test": 4, "sft_short": 1, "sft_epochs": 2, "sft_long": 4,
        "epochs": 2.0, "evaluations": 5, "batch_size": 4, "lr": 1e-3, "beta": 0.1,
        "few": 8, "few_lr": 4e-3, "few_evaluations": 2, "generate": 2, "account": 2,
    },
    "laptop": recipe.AFTER_SFT["laptop"] | {
        "n_train": 528, "n_probe": 24, "n_probe_test": 12, "sft_short": 2, "sft_epochs": 4, "sft_long": 8,
        "epochs": 1.5, "evaluations": 21, "batch_size": 4, "lr": 1.5e-4, "beta": 0.1,
        "few": 64, "few_lr": 1.6e-3, "few_evaluations": 2, "generate": 12, "account": 12, "more_rates": (4.0, 16.0),
    },
    "pretrained": recipe.AFTER_SFT["pretrained"] | {
        "n_train": 64, "n_probe": 12, "n_probe_test": 4, "sft_short": 1, "sft_epochs": 4, "sft_long": 4,
        "epochs": 2.0, "evaluations": 8, "batch_size": 4, "lr": 1e-5, "beta": 0.1,
        "few": 32, "few_lr": 2e-5, "few_evaluations": 2, "generate": 4, "account": 4, "more_rates": (0.1, 10.0),
    },
    "paper": recipe.AFTER_SFT["paper"] | {
        "n_train": 5000, "n_probe": 500, "n_probe_test": 500, "sft_short": 2, "sft_epochs": 4, "sft_long": 8,
        "epochs": 4.0, "evaluations": 200, "batch_size": 4, "lr": 5e-7, "beta": 0.1,
        "few": 5000, "few_lr": 1e-6, "few_evaluations": 20, "generate": 100, "account": 100,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Chapter:
    """The settings of chapter 5, chosen by scale; see the notebook's parameters for what they mean.

    `sft_*` belong to the SFT before: its learning rate and batch, as in chapter 3, and its lengths in epochs. `few` is
    the number of pairs in the short runs, one epoch each, at the learning rate `few_lr` and `more_rates` times it.
    """

    seeds: int
    model: str
    size: str
    data: str
    n_train: int
    n_probe: int
    n_probe_test: int
    max_prompt: int
    max_response: int
    sft_lr: float
    sft_batch_size: int
    sft_short: int
    sft_epochs: int
    sft_long: int
    epochs: float
    evaluations: int
    batch_size: int
    lr: float
    beta: float
    optimizer: str
    warmup: int
    few: int
    few_lr: float
    few_evaluations: int
    generate: int
    account: int
    more_rates: tuple[float, ...] = ()
    first_seed: int = 10
    loss: str = "sigmoid"
    device: str = "cpu"
    dtype: str = "float32"
    format: str = "auto"
    skip_bad_rows: str = "no"


@dataclass(frozen=True)
class Align:
    """One run from `sft_epochs` of the SFT run in the folder `stage`; `pairs` and `measure`: see `align`."""

    seed: int
    model: str
    stage: str
    sft_epochs: int
    data: str
    pairs: str
    measure: str
    n_train: int
    n_probe: int
    n_probe_test: int
    epochs: float
    evaluations: int
    batch_size: int
    lr: float
    beta: float
    loss: str
    optimizer: str
    warmup: int
    max_prompt: int
    max_response: int
    generate: int
    account: int
    device: str
    dtype: str
    format: str = "auto"
    skip_bad_rows: str = "no"
    clip: float = 10.0


def settings(scale: str, given: Mapping[str, object]) -> Chapter:
    """What a scale stands for in this chapter, with what is given in its place (`settings.choose`)."""
    return choose(Chapter, SCALES, scale, given)


def stage_grid(c: Chapter) -> list[recipe.Stages]:
    """One SFT run a seed, which keeps the weights that DPO starts from."""
    return recipe.stage_grid(c, (c.sft_short, c.sft_epochs, c.sft_long), range(c.first_seed, c.first_seed + c.seeds))


def grid(c: Chapter, stage: store.Run) -> list[Align]:
    """The DPO runs of this chapter from one SFT run: the baseline that measures everything, and the short ones.

    The short ones train on `few` pairs once, after the shortest SFT. They vary the length of the SFT; learning rate and
    beta; and, for the question when y* rises, kind of pairs x length of SFT and kind of pairs x learning rate.
    """
    start = {"seed": stage.manifest["parameters"]["seed"], "model": recipe.base_model(c), "stage": str(stage.folder)}
    whole = derive(Align, c, **start, pairs="as_written", measure="all")
    once = {"n_train": min(c.few, c.n_train), "epochs": 1, "evaluations": c.few_evaluations}
    short = replace(whole, **once, lr=c.few_lr, sft_epochs=c.sft_short, measure="paths", generate=0, account=0)
    slow = {"lr": c.few_lr / 4}
    (first,) = preferences.load(c.data, "train", 1, c.skip_bad_rows)
    kinds = [kind for kind, source in PAIRS.items() if source in first]
    cells = [{"pairs": kind} | cell for kind in kinds for cell in ({}, {"sft_epochs": c.sft_long}, slow)]
    cells += [{"sft_epochs": 0}, {"beta": c.beta * 5}, {"beta": c.beta * 5} | slow]
    cells += [{"lr": c.few_lr * factor} for factor in c.more_rates]
    return [whole, *(replace(short, **cell) for cell in cells)]


def sft_like_dpo(c: Chapter) -> list[recipe.Stages]:
    """SFT of the untouched model on the same examples at DPO's learning rate and batch, one run a seed (claim 35)."""
    whole = replace(c, sft_lr=c.lr, sft_batch_size=c.batch_size)
    return recipe.stage_grid(whole, [math.ceil(c.epochs)], range(c.first_seed, c.first_seed + c.seeds))


def from_base(c: Chapter) -> list[Align]:
    """The baseline without the SFT before it: DPO from the model itself, one run a seed."""
    start = {"model": recipe.base_model(c), "stage": "", "sft_epochs": 0}
    whole = derive(Align, c, seed=c.first_seed, **start, pairs="as_written", measure="all")
    return [replace(whole, seed=c.first_seed + n) for n in range(c.seeds)]


def write_pairs(path: Path, s: Align) -> str:
    """Write training and test examples with these pairs to a JSON Lines file that `preferences.load` reads."""
    splits = dict(zip(("train", "test"), recipe.examples(s), strict=True))
    rows = pd.DataFrame([e | {"split": split} for split, part in splits.items() for e in paired(part, s.pairs)])
    store.write_atomically(path, lambda p: rows.to_json(p, orient="records", lines=True))
    return str(path)


# --- where the probability goes ----------------------------------------------------------------------------


class Mass(NamedTuple):
    """Changes of probability at each token, (tokens,) each; the four of them sum to zero."""

    pushed: Tensor  # of the token itself
    top: Tensor  # of y*, the likeliest other token before
    top10: Tensor  # of the nine that follow it
    tail: Tensor  # of all the rest


def mass(before: Tensor, after: Tensor, tokens: Tensor) -> Mass:
    """Where the probability of pushed tokens goes (section 3.3). before, after: log pi (tokens, V).

    tokens: (tokens,) ids of the pushed tokens. Where a pushed token is itself the likeliest, y* is the next one.
    """
    p, change = before.exp(), after.exp() - before.exp()  # (tokens, V)
    pushed = change.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    others = p.scatter(-1, tokens.unsqueeze(-1), -1.0)
    best = change.gather(-1, others.topk(10).indices)  # (tokens, 10)
    top, top10 = best[:, 0], best[:, 1:].sum(-1)
    return Mass(pushed, top, top10, -(pushed + top + top10))


@torch.no_grad()
def log_probs(model, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """log pi of every token of the vocabulary at each place of a response, (tokens, V), in nats."""
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


def mass_rows(before, after, encoded: Encoded, count: int, step: int, batch_size: int) -> pd.DataFrame:
    """Mean account of the rejected answers to `count` prompts of each split, between two models; rows of a long table.

    Types: `rejected_first`, the first token that differs from the chosen answer, where both have one context and their
    forces cancel on all third tokens; of the tokens after it, `rejected_likely`, with at least `LIKELY` before, and
    `rejected_unlikely`, in the valley.
    """
    rows = []
    of_split = {split: [i for i in encoded.prompt_ids if i.startswith(split)] for split in ("train/", "test/")}
    for name in (name for names in of_split.values() for name in names[:count]):
        number = encoded.prompt_ids.index(name)
        chosen, rejected = (encoded.responses[role][number] for role in ("chosen", "rejected"))
        was, now = (log_probs(model, encoded.prompts[number], rejected) for model in (before, after))
        pushed = torch.tensor(rejected, device=was.device)
        account, likely = mass(was, now, pushed), was.gather(-1, pushed.unsqueeze(-1)).squeeze(-1).exp() >= LIKELY
        place = torch.arange(len(rejected), device=was.device) - first_difference(chosen, rejected)
        parts = {"first": place == 0, "likely": (place > 0) & likely, "unlikely": (place > 0) & ~likely}
        for kind, part in parts.items():
            for group, change in account._asdict().items():
                if part.any():
                    value = change[part].mean().item()
                    rows.append((step, step * batch_size, name, f"rejected_{kind}", f"mass_{group}", value))
    return store.long(rows)


def repetition(text: str, n: int = 4) -> float:
    """Share of the runs of `n` words that occurred before in the same text (rep-n), 0 to 1; 0 for a short text."""
    words = reuse.words(text)
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def repetition_rows(written: Sequence[dict], batch_size: int) -> pd.DataFrame:
    """`rep4` (`repetition`) and log pi of greedy answers, nats summed, as rows of a long table."""
    return store.long(
        (a["step"], a["step"] * batch_size, a["prompt_id"], "greedy", metric, value)
        for a in written
        for metric, value in (("rep4", repetition(a["text"])), ("logp_sum", min(a["logp"], 0.0)))
    )


def align(work: Path, s: Align) -> pd.DataFrame:
    """DPO from an SFT model, with all kinds of response measured along the way (section 4.2); returns a long table.

    Starts from `sft_epochs` of the SFT run in the folder `stage` (`recipe.stages`), or from `model` itself when that is
    0; where it starts is also the reference. `chosen` and `rejected` are the pair that is trained on (`paired`).
    `measure` is "all" or "paths". With `generate`, so many prompts of each split are answered greedily before and
    after, and repetition is measured (`rep4`); with `account`, where the probability of so many rejected answers goes
    (`mass_rows`), and the finished weights stay in `model/`. An interrupted run continues from its last checkpoint.
    """
    if s.measure not in MEASURE:
        raise unknown("measure", s.measure, MEASURE)
    data = s.data if s.pairs == "as_written" else write_pairs(work / "pairs.jsonl", s)
    examples, test_set = recipe.examples(replace(s, data=data))
    start = str(Path(s.stage) / f"model-{s.sft_epochs}") if s.sft_epochs else s.model
    lm, tokenizer = models.read(start, device=s.device, dtype=s.dtype)
    kinds = MEASURE[s.measure]
    initial = models.read(s.model, device=s.device, dtype=s.dtype)[0] if "chosen_initial" in kinds else None
    probed = recipe.probe_set(initial, tokenizer, examples, test_set, s, kinds)
    del initial  # as large as the model, and not needed in training
    texts = ([e[field] for e in examples] for field in ("prompt", "chosen", "rejected"))
    rows = dpo_rows(tokenizer, *texts, **lengths(s))
    steps = int(-(-len(rows) // s.batch_size) * s.epochs)
    callback = ProbeCallback(probed, at=store.dense_early(steps, s.evaluations), **lengths(s))
    before = recipe.answers(lm, tokenizer, probed, s.generate, s)
    how = derive(Training, s, method="dpo", checkpoints=4 if s.measure == "all" else 1)
    log = train(work, lm, tokenizer, rows, callback, how)
    table = [callback.table(), log_rows(log, s.batch_size)]
    if s.generate:
        after = recipe.answers(lm, tokenizer, probed, s.generate, s)
        written = [{"step": step, **answer} for step, part in ((0, before), (steps, after)) for answer in part]
        store.write_json(work.parent / "answers.json", written)
        table.append(repetition_rows(written, s.batch_size))
    if s.account:
        models.save(lm, tokenizer, work.parent / "model")
        reference, _ = models.read(start, device=s.device, dtype=s.dtype)
        encoded = probed.encode(tokenizer, **lengths(s))
        table.append(mass_rows(reference, lm.eval(), encoded, s.account, steps, s.batch_size))
    return store.compact(pd.concat(table, ignore_index=True))
