"""`lddyn preflight pairs.jsonl --model NAME`: what can be said about DPO on these pairs before it runs.

The data; what the model makes of it; and a forecast (`forecast`) of what one epoch does to chosen and rejected answers,
to y* and to text that nobody pushes, with the pairs that do most of it, and the same under other choices. How well such
forecasts come true was measured (`preflight_worth`).
"""

import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lddyn import Caution, InputError
from lddyn.chapters.dpo.run import LIKELY
from lddyn.data import preferences, responses
from lddyn.engine import models, pool, probes
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import Encoded, Model, ProbeSet, Tokenizer
from lddyn.engine.settings import derive, lengths
from lddyn.engine.training import Training, sft_rows, train
from lddyn.theory import influences, kernels
from lddyn.theory.first_order import Text
from lddyn.theory.logprobs import TokenStats
from lddyn.workshop.forecast import Direction, Forecast, How, Pairs, direction, forecast, parts, stats, sums

KINDS = ("chosen", "rejected", "top", "unpushed")  # what is forecast; top: y* along chosen
STAGES = {  # and the share of each in the time, as measured on the built-in pairs and model
    "reading pairs and model": 0.1,
    "the forecast": 0.2,
    "what each pair adds": 0.2,
    "other choices": 0.3,
    "what the model makes of the answers": 0.2,
}
ROWS = 5000  # of the data, at most, that are looked at
FEWEST = 5  # pairs; the bag of words needs as many


@dataclass(frozen=True)
class Preflight:
    """What is asked about: `pairs` to train on, of which one epoch of DPO raises the mean margin by `margin` nats.

    `unpushed`: how many answers to test prompts stand for text that is not trained on; `sft_first`: epochs of SFT on
    both answers that are tried before; `most`: how many pairs are named.
    """

    data: str
    model: str = "builtin"
    size: str = "small"
    pairs: int = 64
    unpushed: int = 16
    margin: float = 10.0
    beta: float = 0.1
    optimizer: str = "adamw"
    batch_size: int = 4
    sft_first: int = 0
    sft_lr: float = 5e-4
    most: int = 12
    max_prompt: int = 256
    max_response: int = 256
    format: str = "auto"
    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


class Material(NamedTuple):
    """Pairs and unpushed answers, as they are written and as token ids."""

    examples: list[responses.Example]  # of the pairs
    pairs: Pairs
    unpushed: list[Text]


def preflight(s: Preflight) -> dict[str, Any]:
    """All that the page says, as JSON can hold it; log-probabilities in nats, summed over a response unless per token.

    `data` and `model`: see `of_data` and `of_model`; `pairs`: a row each, with its forecast, its `part` in the mean
    change of chosen answers and what the literature measures; `choices`: the mean forecast as asked, and otherwise.
    Raises `InputError` where there are too few pairs or they cannot be used.
    """
    begins = pool.stages(STAGES)
    next(begins)
    pushed, others, cautions = read(s)
    lm, tokenizer = models.read(models.located(s.model, s.size), device=s.device, dtype=s.dtype)
    uncut = encode(pushed, ("chosen", "rejected"), tokenizer, 2**30, 2**30, s.format)
    there = material(pushed, others, uncut, tokenizer, s)
    check_room(lm, there)
    how, (pairs, n) = derive(How, s), (there.pairs, len(there.examples))
    next(begins)
    towards = direction(lm, pairs, how)
    expected = forecast(lm, pairs, there.unpushed, s.margin, how, towards)
    next(begins)
    part = parts(lm, pairs, pairs.chosen, towards, s.beta)
    part *= expected.slopes.mean() / part.sum()  # at the margin
    products = influences.products(lm, pairs.chosen, pairs.rejected).products
    columns = {
        "chosen": expected.chosen,
        "rejected": expected.rejected,
        "top": expected.top,
        "part": part,
        "ches": kernels.ches(lm, *pairs),
        "normalised_ches": kernels.ches(lm, *pairs, normalised=True),
        "product": products.diagonal(),
    }
    rows = [
        {"id": e["id"], "prompt": e["prompt"][-80:], **{name: values[i].item() for name, values in columns.items()}}
        for i, e in enumerate(there.examples)
    ]
    next(begins)
    choices = [means("as asked", expected, n), *otherwise(lm, tokenizer, there, part, towards, s)]
    next(begins)
    return {
        "settings": asdict(s),
        "cautions": cautions,
        "data": of_data(pushed, uncut, s),
        "model": of_model(lm, tokenizer, there, s),
        "pairs": rows,
        "choices": choices,
    }


# --- the data --------------------------------------------------------------------------------------------------


def read(s: Preflight) -> tuple[list[responses.Example], list[responses.Example], list[str]]:
    """The first rows to train on and of the test split, without the bad ones; and what was wrong with these."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", Caution)
        try:
            pushed = preferences.load(s.data, "train", ROWS, skip_bad_rows="rows")
        except InputError as error:
            raise InputError("; ".join([str(error), *(str(w.message) for w in said)])) from error
        try:
            others = preferences.load(s.data, "test", s.unpushed, skip_bad_rows="rows")
        except InputError:  # fewer than six rows, and no split
            others = []
    return pushed, others, list(dict.fromkeys(str(w.message) for w in said if issubclass(w.category, Caution)))


def encode(
    some: Sequence[responses.Example], kinds: Sequence[str], tokenizer: Tokenizer, *limits: int | str
) -> Encoded:
    """Examples as token ids, with the limits of `ProbeSet.encode`."""
    texts = {kind: [e[kind] for e in some] for kind in kinds}
    return ProbeSet([e["prompt"] for e in some], texts).encode(tokenizer, *limits)


def differ(uncut: Encoded, s: Preflight) -> list[int]:
    """The numbers of the pairs whose answers differ within the limit."""
    both = enumerate(zip(uncut.responses["chosen"], uncut.responses["rejected"], strict=True))
    return [i for i, (a, b) in both if a[: s.max_response] != b[: s.max_response]]


def material(
    pushed: Sequence[responses.Example],
    others: Sequence[responses.Example],
    uncut: Encoded,
    tokenizer: Tokenizer,
    s: Preflight,
) -> Material:
    """The first pairs that differ within the limits, and the answers that are not pushed."""
    limits = lengths(s).values()
    examples = [pushed[i] for i in differ(uncut, s)[: s.pairs]]
    if len(examples) < FEWEST:
        raise InputError(f"{s.data}: {len(examples)} pairs that differ; preflight needs at least {FEWEST}")
    ids = encode(examples, ("chosen", "rejected"), tokenizer, *limits)
    pairs = Pairs(*(list(zip(ids.prompts, ids.responses[kind], strict=True)) for kind in ("chosen", "rejected")))
    unseen = encode(others, ("chosen",), tokenizer, *limits) if others else Encoded([], [], {"chosen": []})
    return Material(examples, pairs, list(zip(unseen.prompts, unseen.responses["chosen"], strict=True)))


def check_room(model: Model, there: Material) -> None:
    """Raise `InputError` when a text is longer than the model's positions."""
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(x) + len(y) for x, y in (*there.pairs.chosen, *there.pairs.rejected, *there.unpushed))
    if room and longest > room:
        raise InputError(f"a text has {longest} tokens, the model takes {room}: lower max_prompt or max_response")


def of_data(pushed: Sequence[responses.Example], uncut: Encoded, s: Preflight) -> dict[str, Any]:
    """Duplicates, lengths in tokens, what the limits cut, and how well a bag of words tells chosen from rejected."""
    whole = [(e["prompt"], e["chosen"], e["rejected"]) for e in pushed]
    prompts = Counter(e["prompt"] for e in pushed)
    tokens = {"prompt": uncut.prompts, **uncut.responses}
    count = {name: np.array([len(ids) for ids in each]) for name, each in tokens.items()}
    limit = {"prompt": s.max_prompt, "chosen": s.max_response, "rejected": s.max_response}
    return {
        "pairs": len(pushed),
        "duplicates": len(whole) - len(set(whole)),
        "repeated_prompts": len(pushed) - len(prompts),
        "equal_within_limit": len(pushed) - len(differ(uncut, s)),
        "median_tokens": {name: float(np.median(n)) for name, n in count.items()},
        "most_tokens": {name: int(n.max()) for name, n in count.items()},
        "cut": {name: float((n > limit[name]).mean()) for name, n in count.items()},
        "style": responses.style_accuracy(*([e[kind] for e in pushed] for kind in ("chosen", "rejected"))),
    }


# --- the model on it -------------------------------------------------------------------------------------------


def of_model(model: Model, tokenizer: Tokenizer, there: Material, s: Preflight) -> dict[str, dict[str, float]]:
    """How likely both answers are, and the model's `own`, which are sampled: log pi of an answer, mean.

    Over all tokens: mean log pi, that of y*, the share in the valley (below 5%), median rank (0: y*), mean ||pi||^2.
    """
    prompts = [e["prompt"] for e in there.examples]
    said = probes.sample(model, tokenizer, prompts, s.max_response, s.seed, s.max_prompt, format=s.format)
    own = [(x, answer.tokens) for (x, _), answer in zip(there.pairs.chosen, said, strict=True)]
    found = {}
    for name, texts in (("chosen", there.pairs.chosen), ("rejected", there.pairs.rejected), ("own", own)):
        of_texts = stats(model, texts)
        tokens = TokenStats(*(torch.cat(each).double() for each in zip(*of_texts, strict=True)))
        found[name] = {
            "logp": sums(of_texts).mean().item(),
            "logp_per_token": tokens.logp.mean().item(),
            "top_per_token": tokens.argmax_logp.mean().item(),
            "valley": (tokens.logp.exp() < LIKELY).double().mean().item(),
            "rank": tokens.rank.median().item(),
            "peakiness": tokens.sq_norm.mean().item(),
        }
    return found


# --- the forecast under other choices --------------------------------------------------------------------------


def means(name: str, expected: Forecast, pairs: int) -> dict[str, Any]:
    """A line of the table of choices: means in nats, and how many chosen answers are expected to fall."""
    values = {kind: getattr(expected, kind) for kind in KINDS}
    return {
        "choice": name,
        "pairs": pairs,
        "margin": expected.margin,
        **{kind: v.mean().item() if len(v) else None for kind, v in values.items()},
        "fall": int((expected.chosen < 0).sum()),
    }


def otherwise(
    model: Model, tokenizer: Tokenizer, there: Material, part: torch.Tensor, towards: Direction, s: Preflight
) -> list[dict[str, Any]]:
    """What is expected without the pairs that lower chosen answers most, with an anchor, at half the dose, after SFT.

    The other anchor, `dpop`, pulls only once a chosen answer has fallen: the first order does not see it.
    """
    (_, pairs, unpushed), n, how = there, len(there.examples), derive(How, s)
    kept = sorted(part.argsort()[min(s.most, n // 2) :].tolist())
    found = [
        means(f"without {n - len(kept)} pairs", forecast(model, pairs.only(kept), unpushed, s.margin, how), len(kept)),
        means("loss with an anchor (rpo)", forecast(model, pairs, unpushed, s.margin, replace(how, loss="rpo")), n),
        means("half the dose", forecast(model, pairs, unpushed, s.margin / 2, how, towards), n),
    ]
    if s.sft_first:
        tuned = after_sft(model, tokenizer, there, s)
        expected = forecast(tuned, pairs, unpushed, s.margin, how)
        found.append(means(f"after SFT on both answers ({s.sft_first} epochs)", expected, n))
    return found


def after_sft(model: Model, tokenizer: Tokenizer, there: Material, s: Preflight) -> Model:
    """A copy of the model after SFT on both answers of every pair."""
    tuned = models.snapshot(model).requires_grad_(True)
    prompts = [e["prompt"] for e in there.examples]
    answers = [e[kind] for kind in ("chosen", "rejected") for e in there.examples]
    rows = sft_rows(tokenizer, prompts * 2, answers, **lengths(s))
    callback = ProbeCallback(ProbeSet(prompts[:1], {"chosen": answers[:1]}), at=[0], thresholds=None, **lengths(s))
    how = derive(Training, s, lr=s.sft_lr, epochs=s.sft_first, checkpoints=1)
    with tempfile.TemporaryDirectory() as work:
        train(Path(work), tuned, tokenizer, rows, callback, how)
    return tuned.eval()
