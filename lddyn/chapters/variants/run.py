"""Chapter 6: other losses than DPO's, and pushing samples of the model itself (abstract, figure 2, appendix B)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from lddyn import InputError, unknown
from lddyn.chapters.variants import evidence
from lddyn.data import preferences, world
from lddyn.engine import models, pool, probes, recipe, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import Encoded, ProbeSet
from lddyn.engine.settings import choose, derive, lengths
from lddyn.engine.training import Training, dpo_rows, train
from lddyn.theory import first_order

PUSHED = ("greedy", "sampled", "rejected", "rejected_semantic", "other_train", "unrelated")
WATCHED = ("chosen", "chosen_semantic", "other_test")
KINDS = ("chosen", "chosen_semantic", "rejected", "rejected_semantic", "other_train", "other_test", "unrelated")
SCALES = {
    "smoke": recipe.AFTER_SFT["smoke"] | {
        "seeds": 1, "size": "tiny", "data": "world", "n_train": 64, "n_probe": 4, "n_probe_test": 4, "sft_epochs": 2,
        "n_pairs": 16, "epochs": 1.0, "evaluations": 3, "batch_size": 4, "lr": 1e-3, "beta": 0.1,
        "judged": 4, "samples": 1, "max_prompt": 48, "max_response": 40, "rounds": 2, "candidates": 2,
        "source_lr": 1e-3, "pushes": 2, "push_lr": 1e-3,
    },
    "laptop": recipe.AFTER_SFT["laptop"] | {
        "size": "world", "data": "world", "n_train": 320, "n_probe": 16, "n_probe_test": 8, "sft_epochs": 2,
        "n_pairs": 192, "epochs": 1.0, "evaluations": 5, "batch_size": 4, "lr": 2e-4, "beta": 0.1,
        "judged": 40, "samples": 3, "max_prompt": 48, "max_response": 64, "rounds": 4, "candidates": 3,
        "source_lr": 2e-4, "pushes": 12, "push_lr": 3e-3,
    },
    "paper": recipe.AFTER_SFT["paper"] | {
        "model": "EleutherAI/pythia-410m-deduped", "data": "world", "n_train": 3600, "n_probe": 200,
        "n_probe_test": 100, "sft_epochs": 4,
        "n_pairs": 3600, "epochs": 2.0, "evaluations": 40, "batch_size": 4, "lr": 5e-7, "beta": 0.1,
        "judged": 500, "samples": 1, "max_prompt": 64, "max_response": 96, "rounds": 8, "candidates": 4,
        "source_lr": 5e-7, "pushes": 100, "push_lr": 1e-5,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Chapter:
    """The settings of chapter 6, chosen by scale; see the notebook's parameters for what they mean.

    `n_train` examples and `sft_*` belong to the SFT before, `n_pairs` to each run after it.
    """

    seeds: int
    model: str
    size: str
    data: str
    n_train: int
    n_pairs: int
    n_probe: int
    n_probe_test: int
    max_prompt: int
    max_response: int
    sft_epochs: int
    sft_lr: float
    sft_batch_size: int
    epochs: float
    evaluations: int
    batch_size: int
    lr: float
    source_lr: float
    beta: float
    optimizer: str
    warmup: int
    rounds: int
    candidates: int
    judged: int
    samples: int
    pushes: int
    push_lr: float
    first_seed: int = 40
    device: str = "cpu"
    dtype: str = "float32"
    format: str = "auto"


@dataclass(frozen=True)
class Vary:
    """One run: `variant` and `source` are names in `evidence`, `stage` is the folder of the SFT run before it."""

    seed: int
    variant: str
    source: str
    stage: str
    sft_epochs: int
    data: str
    n_pairs: int
    n_probe: int
    n_probe_test: int
    epochs: float
    evaluations: int
    rounds: int
    candidates: int
    judged: int
    samples: int
    pushes: int
    push_lr: float
    batch_size: int
    lr: float
    beta: float
    optimizer: str
    warmup: int
    max_prompt: int
    max_response: int
    device: str
    dtype: str
    format: str = "auto"
    clip: float = 10.0


def settings(scale: str, given: Mapping[str, object]) -> Chapter:
    """What a scale stands for in this chapter, with what is given in its place (`settings.choose`)."""
    return choose(Chapter, SCALES, scale, given)


def loss_grid(c: Chapter, stage: store.Run) -> list[Vary]:
    """The runs of one seed that compare the losses, from an SFT run (`recipe.stages`).

    The first is not trained: it tells where all others start, and holds the single pushes (`push`).
    """
    seed = stage.manifest["parameters"]["seed"]
    whole = derive(Vary, c, seed=seed, stage=str(stage.folder), variant="DPO", source="data", rounds=1, pushes=0)
    untrained = replace(whole, epochs=0.0, pushes=c.pushes)
    return [untrained, *(replace(whole, variant=name) for name in evidence.VARIANTS)]


def source_grid(c: Chapter, stage: store.Run) -> list[Vary]:
    """The runs of one seed that compare whose answers are pushed, all with DPO's loss and equally many pairs."""
    seed, how = stage.manifest["parameters"]["seed"], {"lr": c.source_lr, "epochs": 1.0, "evaluations": 2, "pushes": 0}
    whole = derive(Vary, c, seed=seed, stage=str(stage.folder), variant="DPO", source="data", **how)
    return [replace(whole, source=name) for name in evidence.SOURCES]


def both_grids(c: Chapter, stage: store.Run) -> list[Vary]:
    """The runs of one seed."""
    return [*loss_grid(c, stage), *source_grid(c, stage)]


def runs(c: Chapter, **how) -> list[store.Run]:
    """The runs of the chapter; how: as for `pool.run_all`."""
    seeds = range(c.first_seed, c.first_seed + c.seeds)
    stages = recipe.stage_grid(c, [c.sft_epochs], seeds)
    return pool.run_then(recipe.stages, stages, vary, partial(both_grids, c), recipe.files(c), **how)


# --- pairs -------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """Pairs to train on, and the share of prompts that gave one."""

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]
    share: float = 1.0


def make_pairs(policy, tokenizer, examples: Sequence[dict], draw: int, s: Vary) -> Pairs:
    """The pairs of a round, from `source`; `draw` is the seed of what is sampled from the policy.

    With both answers sampled, `candidates` are drawn for each prompt, and the best and the worst by the exact judge
    make the pair; a prompt whose candidates all score the same gives none, and others come twice in its place.
    Raises `InputError` where the judge does not know the prompts, or no prompt gives a pair.
    """
    source = evidence.SOURCES[s.source]
    prompts, chosen, rejected = ([e[field] for e in examples] for field in ("prompt", "chosen", "rejected"))
    if source.rejected_from_data:
        return Pairs(prompts, chosen, rejected)
    count = 1 if source.chosen_from_data else s.candidates
    repeated = [p for p in prompts for _ in range(count)]
    drawn = probes.sample(policy, tokenizer, repeated, s.max_response, draw, s.max_prompt, batch_size=128)
    texts = [answer.text.strip() or "." for answer in drawn]  # an empty answer cannot be encoded
    if source.chosen_from_data:
        return Pairs(prompts, chosen, texts)
    scores = [world.judge(p, t).score for p, t in zip(repeated, texts, strict=True)]
    found = []
    for n, prompt in enumerate(prompts):
        ranked = sorted(range(n * count, (n + 1) * count), key=scores.__getitem__)
        if scores[ranked[0]] < scores[ranked[-1]]:
            found.append((prompt, texts[ranked[-1]], texts[ranked[0]]))
    if not found:
        raise InputError(f"all {count} samples to each of {len(prompts)} prompts score the same: more candidates?")
    whole = (found * -(-len(prompts) // len(found)))[: len(prompts)]
    return Pairs(*map(list, zip(*whole, strict=True)), share=len(found) / len(prompts))


# --- the run -----------------------------------------------------------------------------------------------


class StopAtMargin(ProbeCallback):
    """Ends training at the first evaluation at which the mean margin of the training prompts has reached `stop`."""

    def __init__(self, probe_set: ProbeSet, stop: float, beta: float, **how):
        super().__init__(probe_set, thresholds=None, **how)
        self.stop, self.beta = stop, beta

    def on_step_end(self, args, state, control, **others):
        super().on_step_end(args, state, control, **others)
        if self.stop and not self.stopped and self.beta * self.margin() >= self.stop:
            control.should_training_stop = True

    def margin(self) -> float:
        """Growth of log pi(chosen) - log pi(rejected) up to the last evaluation, nats."""
        table = self.table()
        rows = table[(table.metric == "logp_sum") & table.prompt_id.astype(str).str.startswith("train/")]
        mean = rows.groupby(["step", "response_type"]).value.mean().unstack()
        gap = mean.chosen - mean.rejected
        return gap.iloc[-1] - gap.iloc[0]


def vary(work: Path, s: Vary) -> pd.DataFrame:
    """Train on pairs with one of `VARIANTS` and measure what nobody pushed along the way; returns a long table.

    Starts from the SFT run in the folder `stage` (`recipe.stages`), which is also the reference. The first `n_pairs`
    training prompts are divided over `rounds` (`train_round`). At the end `judged` test prompts are answered
    greedily and by `samples` samples; the answers are in `answers.json`, their mean scores by the exact judge in the
    table (`judge_score`), where `data` is the closed world. With `pushes`, single responses to so many prompts are
    pushed down alone before any training (`push`). Continues after an interruption.
    """
    for kind, name, allowed in (("variant", s.variant, evidence.VARIANTS), ("source", s.source, evidence.SOURCES)):
        if name not in allowed:
            raise unknown(kind, name, allowed)
    where = Path(s.stage) / f"model-{s.sft_epochs}"
    reference, tokenizer = models.read(str(where), device=s.device, dtype=s.dtype)
    examples, test_set = preferences.load(s.data, "train", limit=s.n_pairs), preferences.load(s.data, "test")
    probed = recipe.probe_set(reference, tokenizer, examples, test_set, s, KINDS)
    parts = [push(reference, tokenizer, probed, s)] if s.pushes else []
    size, steps = -(-len(examples) // s.rounds), 0
    for number in range(s.rounds):
        folder = work / f"round-{number}"
        if not (folder / "table.parquet").exists():
            lm, _ = models.read(str(where), device=s.device, dtype=s.dtype)
            mine, draw = examples[number * size : (number + 1) * size], 1000 * s.seed + number
            train_round(folder, lm, reference, tokenizer, probed, mine, draw, s)
        part = pd.read_parquet(folder / "table.parquet")
        part = part[(part.step > 0) | (part.prompt_id == "pairs") | (number == 0)]
        parts.append(part.assign(step=part.step + steps, examples=part.examples + steps * s.batch_size))
        steps, where = int(parts[-1].step.max()), folder / "model"
    if s.data in world.DESIGNS and s.judged:
        lm, _ = models.read(str(where), device=s.device, dtype=s.dtype)
        said = recipe.respond(lm, tokenizer, test_set[: s.judged], s.samples, s)
        written = [answer | {"score": world.judge(answer["prompt"], answer["text"]).score} for answer in said]
        store.write_json(work.parent / "answers.json", written)
        scores = pd.DataFrame(written).groupby(["prompt_id", "decoding"]).score.mean()
        rows = ((steps, steps * s.batch_size, *names, "judge_score", value) for names, value in scores.items())
        parts.append(store.long(rows))
    return store.compact(pd.concat(parts, ignore_index=True))


def train_round(folder: Path, lm, reference, tokenizer, probed: ProbeSet, examples: list, draw: int, s: Vary) -> None:
    """One round: pairs for these examples, seen `epochs` times; leaves its table and the model in `folder`.

    The pairs come from `source` (`make_pairs`), and are measured under the policy before and after (`pushed_rows`).
    """
    which, source = evidence.VARIANTS[s.variant], evidence.SOURCES[s.source]
    pairs = make_pairs(lm if source.refresh else reference, tokenizer, examples, draw, s)
    parts = [pushed_rows(lm, tokenizer, pairs, s, "before")]
    if s.epochs:
        times = store.dense_early(round(-(-len(examples) // s.batch_size) * s.epochs), s.evaluations)
        callback = StopAtMargin(probed, which.stop, s.beta, at=times, **lengths(s))
        own = {"loss": which.loss, "options": which.options, "beta": which.beta or s.beta, "lr": s.lr * which.rate}
        how = derive(Training, s, method="dpo", seed=draw, checkpoints=1, **own)
        rows = dpo_rows(tokenizer, pairs.prompts, pairs.chosen, pairs.rejected, **lengths(s))
        start = models.snapshot(lm if source.follow else reference)
        train(folder, lm, tokenizer, rows, callback, how, reference=start)
        parts.append(callback.table())
    else:
        parts.append(probes.measure(lm, probed.encode(tokenizer, **lengths(s))).assign(step=0, examples=0))
    parts.append(pushed_rows(lm, tokenizer, pairs, s, "after", step=int(parts[-1].step.max())))
    models.save(lm, tokenizer, folder / "model")
    whole = store.compact(pd.concat(parts, ignore_index=True))
    store.write_atomically(folder / "table.parquet", partial(whole.to_parquet, index=False))


def pushed_rows(policy, tokenizer, pairs: Pairs, s: Vary, when: str, step: int = 0) -> pd.DataFrame:
    """How likely the policy finds the pairs of a round, before or after it is trained on them; rows of a long table.

    `pushed_before` and `pushed_after`: log pi per token, mean over the first 32 pairs, nats; `prob_pairs`: the share of
    prompts whose samples differ in score.
    """
    texts = {"chosen": pairs.chosen[:32], "rejected": pairs.rejected[:32]}
    encoded = ProbeSet(pairs.prompts[:32], texts).encode(tokenizer, **lengths(s))
    measured = probes.measure(policy, encoded)
    mean = measured[measured.metric == "logp_mean"].groupby("response_type").value.mean()
    rows = [(step, 0, "pairs", kind, f"pushed_{when}", value) for kind, value in mean.items()]
    return store.long([*rows, (step, 0, "pairs", "all", "prob_pairs", pairs.share)])


# --- one push at a time ------------------------------------------------------------------------------------


def push(lm, tokenizer, probed: ProbeSet, s: Vary) -> pd.DataFrame:
    """One step down on one response to one prompt, from the same weights each time (section 3.3); rows of a long table.

    Each of PUSHED is pushed alone, for the first `pushes` prompts, with one gradient step of rate `push_lr` on its
    summed log pi; then the responses of WATCHED to that prompt are measured, and the weights put back. With the pushed
    kind as `response_type`: `pushed_start`, its log pi per token before; `pushed_change`, by how much that falls;
    `watched_change` and `watched_top_change`, the mean change per token of what nobody pushed and of y* along it, nats;
    `pushed_tokens`.
    """
    how, prompts = {"max_prompt": s.max_prompt, "batch_size": 128}, probed.prompts[: s.pushes]
    own = {
        "greedy": probes.greedy(lm, tokenizer, prompts, s.max_response, **how),
        "sampled": probes.sample(lm, tokenizer, prompts, s.max_response, s.seed, **how),
    }
    encoded = probed.encode(tokenizer, **lengths(s))
    watched = encoded._replace(responses={kind: encoded.responses[kind] for kind in WATCHED})
    pushed = encoded.responses | {kind: [answer.tokens for answer in answers] for kind, answers in own.items()}
    before, weights = _means(lm, watched), first_order.parameters(lm)
    rows = []
    for n, prompt_id in enumerate(encoded.prompt_ids[: s.pushes]):
        for kind in (kind for kind in PUSHED if kind in pushed):
            alone = Encoded([prompt_id], [encoded.prompts[n]], {kind: [pushed[kind][n]]})
            start = _means(lm, alone)["logp_mean"].iloc[0]
            down = first_order.step(lm, -s.push_lr, [(encoded.prompts[n], pushed[kind][n])])
            lm.load_state_dict(first_order.stepped(lm, down), strict=False)
            now, after = _means(lm, alone)["logp_mean"].iloc[0], _means(lm, watched.only(prompt_id))
            lm.load_state_dict(weights, strict=False)
            change = (after - before.loc[after.index]).groupby("metric").mean()
            values = {
                "pushed_start": start,
                "pushed_change": now - start,
                "pushed_tokens": len(pushed[kind][n]),
                "watched_change": change["logp_mean"],
                "watched_top_change": change["argmax_logp_mean"],
            }
            rows += [(0, 0, prompt_id, kind, metric, value) for metric, value in values.items()]
    return store.long(rows)


def _means(lm, encoded: Encoded) -> pd.Series:
    """Metrics of every response, by (metric, prompt, type)."""
    return probes.measure(lm, encoded).set_index(["metric", "prompt_id", "response_type"]).value
