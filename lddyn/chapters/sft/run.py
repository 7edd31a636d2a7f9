"""Chapter 3: supervised finetuning, measured on all kinds of response (section 4.1, figure 3, appendix D)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from lddyn import unknown
from lddyn.data import preferences, responses, reuse
from lddyn.engine import models, pool, probes, recipe, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import Model, ProbeSet, Tokenizer
from lddyn.engine.settings import choose, derive, lengths
from lddyn.engine.training import Training, log_rows, sft_rows, train

HEAT_MAP_TARGETS = ("chosen", "rejected", "chosen_semantic", "rejected_semantic", "unrelated", "test_shuffled")


@dataclass(frozen=True)
class Chapter:
    """The settings of chapter 3, chosen by scale; see the notebook's parameters for what they mean."""

    seeds: int
    model: str
    size: str
    data: str
    n_train: int
    n_probe: int
    n_probe_test: int
    max_prompt: int
    max_response: int
    epochs: int
    evaluations: int
    batch_size: int
    lr: float
    optimizer: str
    warmup: int
    generate: int
    map_epochs: int
    map_evaluations: int
    first_seed: int = 0
    loss: str = "sequence_sum"
    device: str = "cpu"
    dtype: str = "float32"
    format: str = "auto"
    skip_bad_rows: str = "no"


@dataclass(frozen=True)
class Finetune:
    """One run: `target` is the type of response that is trained on, `model` a folder or hub id."""

    seed: int
    model: str
    data: str
    target: str
    n_train: int
    n_probe: int
    n_probe_test: int
    epochs: int
    evaluations: int
    batch_size: int
    lr: float
    loss: str
    optimizer: str
    warmup: int
    max_prompt: int
    max_response: int
    generate: int
    device: str
    dtype: str
    format: str = "auto"
    skip_bad_rows: str = "no"
    clip: float = 10.0


def settings(scale: str, given: Mapping[str, object]) -> Chapter:
    """What a scale stands for in this chapter, with what is given in its place (`settings.choose`)."""
    return choose(Chapter, recipe.SCALES, scale, given)


def grid(c: Chapter) -> list[Finetune]:
    """The runs of chapter 3: SFT on all prompts, and on the probed ones for each target of the heat map."""
    whole = derive(Finetune, c, seed=c.first_seed, model=recipe.base_model(c), target="chosen")
    small = replace(whole, n_train=c.n_probe, n_probe_test=0, generate=0)
    small = replace(small, epochs=c.map_epochs, evaluations=c.map_evaluations)
    seeds = range(c.first_seed, c.first_seed + c.seeds)
    runs = [replace(whole, seed=seed) for seed in seeds]
    return runs + [replace(small, seed=seed, target=target) for seed in seeds for target in HEAT_MAP_TARGETS]


def runs(c: Chapter, **how) -> list[store.Run]:
    """The runs of the chapter; how: as for `pool.run_all`."""
    return pool.run_all(finetune, grid(c), files(c), **how)


def files(c: Chapter) -> dict[str, Path]:
    """The files that the runs of the chapter read."""
    return recipe.files(c) | ({"plausible": preferences.PLAUSIBLE} if c.data == "builtin" else {})


def finetune(work: Path, s: Finetune) -> pd.DataFrame:
    """Finetune a model on one kind of response and measure all kinds along the way (section 4.1); returns a long table.

    `target` is a type of response (`chosen` is the paper's SFT; the others are the columns of figure 3's heat map).
    The first `n_train` training prompts are trained on; `n_probe` of them and `n_probe_test` prompts of the test
    split are probed. With `generate`, so many prompts of each split are answered greedily before and after, and
    the answers are compared with what was trained on (`reuse`); answers in the form of chosen that could be meant
    (`preferences.plausible`) are measured before and after. The finished weights stay in `model/` beside the
    table, the answers in `answers.json`. An interrupted run continues from its last checkpoint.
    """
    lm, tokenizer = models.read(s.model, device=s.device, dtype=s.dtype)
    examples, test_set = recipe.examples(s)
    probed = recipe.probe_set(lm, tokenizer, examples, test_set, s)
    texts = responses.response_types(examples, test_set, seed=s.seed)
    if s.target not in texts:
        raise unknown("target", s.target, texts)
    rows = sft_rows(tokenizer, [e["prompt"] for e in examples], texts[s.target], **lengths(s))
    steps = -(-len(rows) // s.batch_size) * s.epochs
    callback = ProbeCallback(probed, at=store.dense_early(steps, s.evaluations), thresholds=None, **lengths(s))
    before = recipe.answers(lm, tokenizer, probed, s.generate, s)
    table = [plausible_rows(lm, tokenizer, examples, s, 0)] if s.generate else []
    log = train(work, lm, tokenizer, rows, callback, derive(Training, s))
    after = recipe.answers(lm, tokenizer, probed, s.generate, s)
    models.save(lm, tokenizer, work.parent / "model")
    table += [callback.table(), log_rows(log, s.batch_size)]
    if s.generate:
        table.append(plausible_rows(lm, tokenizer, examples, s, steps))
        written = [{"step": step, **answer} for step, part in ((0, before), (steps, after)) for answer in part]
        store.write_json(work.parent / "answers.json", written)
        table.append(reuse_rows(written, examples, test_set, s.batch_size))
    return store.compact(pd.concat(table, ignore_index=True))


def plausible_rows(lm: Model, tokenizer: Tokenizer, examples: list, s: Finetune, step: int) -> pd.DataFrame:
    """Log pi of `preferences.plausible` after the probed prompts, as `chosen_plausible`; empty without any."""
    texts = preferences.plausible(s.data)
    probed = [e for e in examples[: s.n_probe] if e["id"] in texts]
    if not probed:
        return store.long([])
    prompts, ids = [e["prompt"] for e in probed], [f"train/{e['id']}" for e in probed]
    forms = ProbeSet(prompts, {"chosen_format": [texts[e["id"]] for e in probed]}, ids)
    found = probes.measure(lm, forms.encode(tokenizer, **lengths(s)))
    found = found[found.metric.isin(["logp_sum", "logp_mean", "tokens"])]
    return found.assign(response_type="chosen_plausible", step=step, examples=step * s.batch_size)[store.COLUMNS]


def read_answers(folder: Path) -> pd.DataFrame:
    """The greedy answers of a run: `step, prompt_id, prompt, text, logp`; the text is the model's own, so escape it."""
    return pd.read_json(folder / "answers.json", orient="records")


def reuse_rows(written: list[dict], trained_on: list, control: list, batch_size: int) -> pd.DataFrame:
    """How much of each greedy answer is made of spans from answers to other questions, as rows of a long table.

    `prob_reuse_train`: share of the answer's word 4-grams found in training answers to other questions;
    `prob_reuse_control`: the same for as many answers that were never trained on.
    """
    sources = {"prob_reuse_train": trained_on[: len(control)], "prob_reuse_control": control[: len(trained_on)]}
    of_source = {
        metric: [(e["prompt"], reuse.ngrams(e["chosen"])) for e in source] for metric, source in sources.items()
    }
    own = {e["prompt"]: reuse.ngrams(e["prompt"] + e["chosen"]) for e in [*trained_on, *control]}
    rows = []
    for answer in written:
        for metric, each in of_source.items():
            others = set().union(*(grams for prompt, grams in each if prompt != answer["prompt"]))
            share = reuse.share(answer["text"], others - own.get(answer["prompt"], set()))
            examples = answer["step"] * batch_size
            rows.append((answer["step"], examples, answer["prompt_id"], "greedy", metric, share))
    return store.long(rows)
