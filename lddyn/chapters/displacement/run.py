"""Chapter 8: likelihood displacement outside of DPO: policy gradients, unlearning, outputs that are not a softmax."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from lddyn import unknown
from lddyn.data import world
from lddyn.engine import models, pool, probes, store
from lddyn.engine.probe_set import Model, ProbeSet, Tokenizer
from lddyn.engine.settings import choose, derive
from lddyn.theory import losses, policy, softmax

SCALES = {
    "smoke": {"seeds": 2, "size": "world", "updates": 4, "prompts": 2, "samples": 4, "asked": 2, "probed": 2,
              "forgotten": 4, "unlearning_updates": 4, "draws": 20},
    "laptop": {"seeds": 5, "size": "world", "updates": 12, "prompts": 6, "samples": 8, "asked": 12, "probed": 12,
               "forgotten": 16, "unlearning_updates": 16, "draws": 200},
    "paper": {"seeds": 20, "size": "world", "updates": 96, "prompts": 16, "samples": 16, "asked": 128, "probed": 64,
              "forgotten": 128, "unlearning_updates": 96, "draws": 2000},
}  # fmt: skip
ARMS = {  # of policy gradients: which answers move, whether samples are used again, the clip of PPO, the mask
    "right": ("right", False, None, 0.0),
    "wrong": ("wrong", False, None, 0.0),
    "both": ("both", False, None, 0.0),
    "right, stale": ("right", True, None, 0.0),
    "wrong, stale": ("wrong", True, None, 0.0),
    "wrong, stale, clip": ("wrong", True, 0.2, 0.0),
    "wrong, stale, mask": ("wrong", True, None, 0.05),
}
UNLEARNING = ("ascent", "npo", "npo, kept")  # the last one also pulls on answers about other people
MAX_PROMPT, MAX_RESPONSE = 48, 40
FORGOTTEN = world.NAMES[::8]  # the people who are to be forgotten

Texts = Sequence[tuple[list[int], list[int]]]  # token ids of prompts and responses


@dataclass(frozen=True)
class Chapter:
    """The settings of chapter 8; see the notebook's parameters for what they mean."""

    seeds: int
    size: str
    updates: int
    prompts: int
    samples: int
    asked: int
    probed: int
    forgotten: int
    unlearning_updates: int
    draws: int
    first_seed: int = 0
    reuse: int = 6
    lr: float = 0.02
    unlearning_lr: float = 0.01
    beta: float = 0.1
    clip: float = 10.0


@dataclass(frozen=True)
class Reinforce:
    """One run of `reinforce`."""

    seed: int
    arm: str
    size: str
    updates: int
    prompts: int  # in a batch
    samples: int  # of each of its prompts
    reuse: int  # updates on the same samples, where they are stale
    lr: float
    clip: float  # norm that gradients are cut to
    asked: int
    probed: int


@dataclass(frozen=True)
class Unlearn:
    """One run of `unlearn`."""

    seed: int
    arm: str
    size: str
    unlearning_updates: int
    forgotten: int  # answers to be forgotten, and as many to be kept
    unlearning_lr: float
    beta: float
    clip: float
    asked: int
    samples: int


@dataclass(frozen=True)
class Outputs:
    """One run of `outputs`."""

    seed: int
    draws: int


def settings(scale: str, given: Mapping[str, object]) -> Chapter:
    """What a scale stands for in this chapter, with what is given in its place (`settings.choose`)."""
    return choose(Chapter, SCALES, scale, given)


def runs(c: Chapter, **how) -> list[store.Run]:
    """The runs of the chapter; how: as for `pool.run_all`."""
    seeds, files = range(c.first_seed, c.first_seed + c.seeds), models.inputs(size=c.size)
    rewarded = [derive(Reinforce, c, seed=seed, arm=arm) for seed in seeds for arm in ARMS]
    unlearned = [derive(Unlearn, c, seed=seed, arm=arm) for seed in seeds for arm in UNLEARNING]
    exact = [derive(Outputs, c, seed=seed) for seed in seeds]
    found = pool.run_all(reinforce, rewarded, files, **how) + pool.run_all(unlearn, unlearned, files, **how)
    return found + pool.run_all(outputs, exact, **({"workers": 1} | how))


# --- one update ----------------------------------------------------------------------------------------------


def logps(model: Model, texts: Texts) -> tuple[Tensor, Tensor]:
    """log pi of every token of the responses, nats, 0 where there is none, and where there is one: (texts, tokens)."""
    ids, mask = probes.padded([prompt + response for prompt, response in texts], model.device)
    z = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # (texts, tokens, V)
    found = z.log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)  # (texts, tokens)
    starts = torch.tensor([[len(prompt) - 1] for prompt, _ in texts], device=model.device)
    inside = mask[:, 1:].bool() & (torch.arange(found.shape[1], device=model.device) >= starts)
    return torch.where(inside, found, 0.0), inside


def move(model: Model, optimizer, texts: Texts, force: Callable[[Tensor], Tensor], count: int, clip: float) -> None:
    """One update by J^T G / count, where G is force * (pi - y) at every token of the texts.

    force: from the log-probabilities of the tokens as they are now, (texts, tokens), to what each is pulled with.
    """
    now, _ = logps(model, texts)
    loss = -(force(now.detach()) * now).sum() / count
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(model.parameters(), clip)
    optimizer.step()


def answered(model: Model, tokenizer: Tokenizer, prompts: Sequence[str], samples: int, seed: int) -> list:
    """So many sampled answers to each prompt, one after the other."""
    rows = [prompt for prompt in prompts for _ in range(samples)]
    return probes.sample(model, tokenizer, rows, MAX_RESPONSE, seed, MAX_PROMPT, batch_size=256)


def reward(prompt: str, answer: str) -> float:
    """1 for an answer that states both facts rightly and says nothing false, besides the point or garbled; else 0."""
    found = world.judge(prompt, answer)
    return float(not (found.missing or found.wrong or found.repeated or found.off_topic or found.garbled))


# --- what is measured ------------------------------------------------------------------------------------------


class Measuring:
    """The rows of a run's long table, of its probes and of the answers to prompts that are asked."""

    def __init__(self, model: Model, tokenizer: Tokenizer, probed: ProbeSet, asked: Mapping[str, list], s):
        self.model, self.tokenizer, self.asked, self.s = model, tokenizer, asked, s
        self.encoded = probed.encode(tokenizer, MAX_PROMPT, MAX_RESPONSE)
        self.parts: list[pd.DataFrame] = []

    def __call__(self, step: int) -> None:
        """Measure as many updates into the run."""
        found = probes.measure(self.model, self.encoded)
        kept = found.metric.isin(["logp_sum", "argmax_logp_sum", "entropy_mean"])
        self.parts.append(found[kept].assign(step=step, examples=step))
        self.parts += [self.judged(step, split, asked) for split, asked in self.asked.items()]

    def judged(self, step: int, split: str, asked: list) -> pd.DataFrame:
        """Whether answers are right: the greedy one, the share of the samples, and any of them (pass@k)."""
        prompts = [e["prompt"] for e in asked]
        greedy = probes.greedy(self.model, self.tokenizer, prompts, MAX_RESPONSE, MAX_PROMPT, batch_size=256)
        sampled = answered(self.model, self.tokenizer, prompts, self.s.samples, 10_000 + self.s.seed)
        rows = []
        for n, (e, answer) in enumerate(zip(asked, greedy, strict=True)):
            group = sampled[n * self.s.samples : (n + 1) * self.s.samples]
            right = [reward(e["prompt"], one.text) for one in group]
            values = ("greedy", reward(e["prompt"], answer.text)), ("sampled", np.mean(right)), ("any", max(right))
            rows += [(step, step, f"{split}/{e['id']}", kind, "prob_right", float(value)) for kind, value in values]
        return store.long(rows)

    def table(self) -> pd.DataFrame:
        return store.compact(pd.concat(self.parts, ignore_index=True))


def short(answer: str) -> str:
    """An answer of the world without its filler: the sentences on the two facts that were asked."""
    return ". ".join(answer.split(". ")[:2]) + "."


def probe_set(examples: Mapping[str, Sequence[dict]]) -> ProbeSet:
    """A right answer (`chosen`), the same with other values (`chosen_format`) and unrelated text, by split."""
    named = [(f"{split}/{e['id']}", e) for split, each in examples.items() for e in each]
    texts = {kind: [short(e[kind]) for _, e in named] for kind in ("chosen", "chosen_format")}
    texts["unrelated"] = [e["unrelated"] for _, e in named]
    return ProbeSet([e["prompt"] for _, e in named], texts, [name for name, _ in named])


def drawn(split: str, seed: int, count: int, where: Callable[[dict], bool] = lambda e: True) -> list[dict]:
    """So many examples of the world, in an order of the seed."""
    found = [e for e in world.examples(split) if where(e)]
    return [found[i] for i in np.random.default_rng([seed, len(split)]).permutation(len(found))[:count]]


# --- policy gradients ------------------------------------------------------------------------------------------


def reinforce(work: Path, s: Reinforce) -> pd.DataFrame:
    """Policy gradients in the closed world, where rewards are exact; returns a long table.

    Plain gradient descent on sums over tokens, from the pre-trained model. Every batch has new prompts and new
    samples; an arm whose samples are stale takes `reuse` updates on each batch, and as many in all. Measured are the
    probes (`train/`: prompts that may be trained on) and answers to prompts of the test split.
    """
    if s.arm not in ARMS:
        raise unknown("arm", s.arm, ARMS)
    sign, stale, clip, valley = ARMS[s.arm]
    model, tokenizer = models.load(size=s.size)
    examples, asked = drawn("train", s.seed, 512), drawn("test", s.seed, s.asked)
    measuring = Measuring(model, tokenizer, probe_set({"train": examples[: s.probed]}), {"test": asked}, s)
    optimizer, due = torch.optim.SGD(model.parameters(), lr=s.lr), {0, s.updates // 2, s.updates}
    texts: Texts = []
    for update in range(s.updates):
        if update in due:
            measuring(update)
        if update % (s.reuse if stale else 1) == 0:
            batch = [examples[(update * s.prompts + n) % len(examples)] for n in range(s.prompts)]
            texts, advantage = sampled_groups(model, tokenizer, batch, s, update)
            moving = policy.part(advantage, sign).flatten()
            texts = [text for text, a in zip(texts, moving, strict=True) if a]
            moving = moving[moving != 0].unsqueeze(1)  # (texts, 1)
            start = logps(model, texts)[0].detach() if texts else moving

        def force(now: Tensor, moving=moving, start=start) -> Tensor:
            pushed = policy.force(moving.expand_as(now), now - start, clip)
            return torch.where((pushed < 0) & (now.exp() < valley), 0.0, pushed)

        if texts:
            move(model, optimizer, texts, force, s.prompts * s.samples, s.clip)
    measuring(s.updates)
    return measuring.table()


def sampled_groups(model: Model, tokenizer: Tokenizer, batch: Sequence[dict], s: Reinforce, update: int):
    """A group of answers to each prompt, as token ids, and their advantages, (prompts, samples)."""
    prompts = [e["prompt"] for e in batch]
    answers = answered(model, tokenizer, prompts, s.samples, 1000 * s.seed + update)
    rows = [prompt for prompt in prompts for _ in range(s.samples)]
    rewards = torch.tensor([reward(prompt, one.text) for prompt, one in zip(rows, answers, strict=True)])
    ids = ProbeSet(prompts, {"chosen": prompts}).encode(tokenizer, MAX_PROMPT, MAX_RESPONSE).prompts
    texts = [(ids[n // s.samples], one.tokens) for n, one in enumerate(answers)]
    return texts, policy.advantages(rewards.view(s.prompts, s.samples))


# --- unlearning ------------------------------------------------------------------------------------------------


def unlearn(work: Path, s: Unlearn) -> pd.DataFrame:
    """Push down what the model knows of some people, and see what it forgets of others; returns a long table.

    Plain gradient descent, all answers in every update. `ascent`: with a force of -1; `npo`: with that of NPO; `npo,
    kept`: and answers about other people are pulled with a force of 1. `train/`: what is pushed; `test/`: questions
    about people who are not to be forgotten, of which those that are pulled are no part.
    """
    if s.arm not in UNLEARNING:
        raise unknown("arm", s.arm, UNLEARNING)
    model, tokenizer = models.load(size=s.size)
    pushed = drawn("train", s.seed, s.forgotten, about_forgotten)
    pulled = drawn("train", s.seed, s.forgotten, lambda e: not about_forgotten(e)) if s.arm == "npo, kept" else []
    kept = drawn("test", s.seed, s.asked, lambda e: not about_forgotten(e))
    asked = {"train": pushed[: s.asked], "test": kept}
    measuring = Measuring(model, tokenizer, probe_set(asked), asked, s)
    encoded = probe_set({"train": [*pushed, *pulled]}).encode(tokenizer, MAX_PROMPT, MAX_RESPONSE)
    texts = list(zip(encoded.prompts, encoded.responses["chosen"], strict=True))
    with torch.no_grad():
        start = logps(model, texts)[0].sum(1)  # (texts,)
    optimizer = torch.optim.SGD(model.parameters(), lr=s.unlearning_lr)

    def force(now: Tensor) -> Tensor:
        summed, zero = now.sum(1), torch.zeros(len(texts))
        name, given = ("unlearning", {}) if s.arm == "ascent" else ("npo", {"beta": s.beta})
        found = losses.value(losses.LOSSES[name].force, zero, summed, zero, start, **given)[1]  # (texts,)
        found[len(pushed) :] = 1.0
        return found.unsqueeze(1).expand_as(now)

    for update in range(s.unlearning_updates):
        if update in store.dense_early(s.unlearning_updates, 4):
            measuring(update)
        move(model, optimizer, texts, force, len(pushed), s.clip)
    measuring(s.unlearning_updates)
    return measuring.table()


def about_forgotten(example: dict) -> bool:
    """Whether a question is about one of the people who are to be forgotten."""
    return example["prompt"].split("?")[0].split()[-1] in FORGOTTEN


# --- outputs that are not a softmax ------------------------------------------------------------------------------


def outputs(work: Path, s: Outputs) -> pd.DataFrame:
    """A push in the valley through softmax, entmax and sparsemax, from the same distributions; returns a long table.

    Random distributions over 50 labels whose least likely label is pushed, by 100 steps of a hundredth of |eta'| = 1.
    `response_type` is the output; `step` 0 the first of the steps, 1 all of them.
    """
    random, rows = torch.Generator().manual_seed(s.seed), []
    scale = 0.5 + torch.rand(s.draws, 1, generator=random, dtype=torch.float64)
    p = (scale * torch.randn(s.draws, 50, generator=random, dtype=torch.float64)).softmax(-1)
    y = p.argmin(-1)
    top, others = softmax.top_other(p, y), ~torch.nn.functional.one_hot(y, 50).bool()
    for name, (alpha, output, logits) in softmax.OUTPUTS.items():
        z, before = logits(p), p
        gain_at_zero = torch.zeros(s.draws, dtype=torch.float64)
        for number in range(100):
            z = softmax.step(z, y, -0.01, output)
            after = output(z)
            if number == 0:
                small = output(softmax.step(logits(p), y, -1e-6, output)) - p
                rises = p > softmax.bar(p, y, alpha).unsqueeze(-1)
                right = ((small > 0) == rises)[others].view(s.draws, -1).double().mean(-1)
                rising = (small > 0)[others].view(s.draws, -1).double().mean(-1)
                rows += _rows(0, name, {"prob_bar_right": right, "prob_rising": rising})
            gain = (after - before).gather(-1, top.unsqueeze(-1)).squeeze(-1)
            reached = before.gather(-1, y.unsqueeze(-1)).squeeze(-1) == 0
            gain_at_zero += torch.where(reached, gain, 0.0)
            before = after
        balance = softmax.account(p, after, y)
        metrics = {
            "top": balance.gain,
            "pushed": -balance.from_pushed,
            "top_at_zero": gain_at_zero,
            "prob_share": balance.share,
            "prob_rising": (after > p)[others].view(s.draws, -1).double().mean(-1),
            "prob_zero": (after == 0)[others].view(s.draws, -1).double().mean(-1),
        }
        rows += _rows(1, name, metrics)
    p = torch.empty(s.draws, 20, dtype=torch.float64).exponential_(generator=random)
    p /= p.sum(-1, keepdim=True)  # uniform among distributions
    rewards = (torch.rand(s.draws, 20, generator=random) < 0.5).double()
    each = torch.stack([policy.expected_residual(p, rewards, sign) for sign in policy.SIGNS])
    return store.long(rows + _rows(0, "policy", {"signs_differ": (each - each[0]).abs().amax((0, 2))}))


def _rows(step: int, kind: str, metrics: Mapping[str, Tensor]) -> list[tuple]:
    return [(step, 0, str(n), kind, name, v) for name, values in metrics.items() for n, v in enumerate(values.tolist())]
