"""Chapter 6: other losses than DPO's, and pushing samples of the model itself (abstract, figure 2, appendix B)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd

from lddyn import InputError, unknown
from lddyn.chapters.variants import design
from lddyn.data import preferences, world
from lddyn.engine import decode, models, pool, probes, recipe, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import Encoded, ProbeSet
from lddyn.engine.training import Training, dpo_rows, train
from lddyn.theory import first_order

PUSHED = ("greedy", "sampled", "rejected", "rejected_semantic", "other_train", "unrelated")
WATCHED = ("chosen", "chosen_semantic", "other_test")
KINDS = ("chosen", "chosen_semantic", "rejected", "rejected_semantic", "other_train", "other_test", "unrelated")
SCALES = {
    "smoke": {
        "seeds": 1, "size": "tiny", "data": "world", "n_train": 64, "n_probe": 4, "n_probe_test": 4, "sft_epochs": 2,
        "n_pairs": 16, "epochs": 1.0, "evaluations": 3, "batch_size": 4, "lr": 1e-3, "beta": 0.1,
        "judged": 4, "samples": 1, "max_prompt": 48, "max_response": 40, "rounds": 2, "candidates": 2,
        "source_lr": 1e-3, "pushes": 2, "push_lr": 1e-3,
    },
    "laptop": {
        "size": "world", "data": "world", "n_train": 320, "n_probe": 16, "n_probe_test": 8, "sft_epochs": 2,
        "n_pairs": 192, "epochs": 1.0, "evaluations": 5, "batch_size": 4, "lr": 2e-4, "beta": 0.1,
        "judged": 40, "samples": 3, "max_prompt": 48, "max_response": 64, "rounds": 4, "candidates": 3,
        "source_lr": 2e-4, "pushes": 12, "push_lr": 3e-3,
    },
    "paper": {
        "model": "EleutherAI/pythia-410m-deduped", "data": "world", "n_train": 3600, "n_probe": 200,
        "n_probe_test": 100, "sft_epochs": 4,
        "n_pairs": 3600, "epochs": 2.0, "evaluations": 40, "batch_size": 4, "lr": 5e-7, "beta": 0.1,
        "judged": 500, "samples": 1, "max_prompt": 64, "max_response": 96, "rounds": 8, "candidates": 4,
        "source_lr": 5e-7, "pushes": 100, "push_lr": 1e-5,
    },
}  # fmt: skip


def settings(scale: str, **overrides) -> dict:
    """What a scale stands for in this chapter, with the values that are not None put in its place.

    `n_train` examples and `sft_*` belong to the SFT before, `n_pairs` to each run after it. `rounds` and `candidates`
    are how often the samples of the on-policy runs are drawn anew, and how many the judge ranks for each prompt;
    `judged` test prompts are answered at the end. Raises `InputError` for an unknown scale.
    """
    chosen = recipe.after_sft(scale) | SCALES[scale] | {k: v for k, v in overrides.items() if v is not None}
    return chosen | dict.fromkeys(("sft_short", "sft_long"), chosen["sft_epochs"])


def make_pairs(source: str, policy, tokenizer, examples, candidates: int, seed: int, lengths: dict):
    """Pairs to train on, as (prompts, chosen, rejected), and the share of prompts that gave one.

    With both answers sampled, `candidates` are drawn for each prompt, and the best and the worst by the exact judge
    make the pair; a prompt whose candidates all score the same gives none, and others come twice in its place.
    Raises `InputError` where the judge does not know the prompts, or no prompt gives a pair.
    """
    from_data = design.SOURCES[source]
    prompts = [e["prompt"] for e in examples]
    if from_data.rejected_from_data:
        return prompts, [e["chosen"] for e in examples], [e["rejected"] for e in examples], 1.0
    count = 1 if from_data.chosen_from_data else candidates
    repeated = [p for p in prompts for _ in range(count)]
    drawn = decode.sample(
        policy, tokenizer, repeated, lengths["max_response"], seed, lengths["max_prompt"], batch_size=128
    )
    texts = [answer.text.strip() or "." for answer in drawn]  # an empty answer cannot be encoded
    if from_data.chosen_from_data:
        return prompts, [e["chosen"] for e in examples], texts, 1.0
    scores = [world.judge(p, t).score for p, t in zip(repeated, texts, strict=True)]
    found = []
    for n, prompt in enumerate(prompts):
        ranked = sorted(range(n * count, (n + 1) * count), key=scores.__getitem__)
        if scores[ranked[0]] < scores[ranked[-1]]:
            found.append((prompt, texts[ranked[-1]], texts[ranked[0]]))
    if not found:
        raise InputError(f"all {count} samples to each of {len(prompts)} prompts score the same: more candidates?")
    whole = (found * -(-len(prompts) // len(found)))[: len(prompts)]
    return *map(list, zip(*whole, strict=True)), len(found) / len(prompts)


# --- the runs ----------------------------------------------------------------------------------------------


def loss_grid(chosen: dict, stage: store.Run, device: str, dtype: str) -> list[dict]:
    """The runs of one seed that compare the losses, from an SFT run (`recipe.stages`).

    The first is not trained: it tells where all others start, and holds the single pushes (`push`).
    """
    whole = _common(chosen, stage, device, dtype) | {"source": "data", "rounds": 1}
    untrained = whole | {"variant": "DPO", "epochs": 0.0, "pushes": chosen["pushes"]}
    return [untrained, *(whole | {"variant": name} for name in design.VARIANTS)]


def source_grid(chosen: dict, stage: store.Run, device: str, dtype: str) -> list[dict]:
    """The runs of one seed that compare whose answers are pushed, all with DPO's loss and equally many pairs."""
    whole = _common(chosen, stage, device, dtype) | {"variant": "DPO", "rounds": chosen["rounds"], "epochs": 1.0}
    whole |= {"lr": chosen["source_lr"], "evaluations": 2}
    return [whole | {"source": name} for name in design.SOURCES]


def _common(chosen: dict, stage: store.Run, device: str, dtype: str) -> dict:
    names = ("data", "n_probe", "n_probe_test", "sft_epochs", "n_pairs", "epochs", "evaluations", "batch_size", "lr")
    names += ("beta", "optimizer", "warmup", "max_prompt", "max_response", "judged", "samples", "candidates", "push_lr")
    common = {name: chosen[name] for name in names}
    common |= {"stage": str(stage.folder), "seed": stage.manifest["parameters"]["seed"]}
    return common | {"pushes": 0, "clip": 10.0, "device": device, "dtype": dtype}


def runs(chosen: dict, seeds: Sequence[int], grid: Callable, device: str, dtype: str, **how) -> list[store.Run]:
    """The runs of this chapter: `grid` is `loss_grid` or `source_grid`, `chosen` comes from `settings`.

    Chapter 7 shows some of them too, and reads them from the cache. `how` goes to `records.run_then`.
    """
    stages, files = recipe.stage_grid(chosen, seeds, device, dtype)
    return pool.run_then(recipe.stages, stages, vary, partial(grid, chosen, device=device, dtype=dtype), files, **how)


class StopAtMargin(ProbeCallback):
    """Ends training at the first evaluation at which the mean margin of the training prompts has reached `stop`."""

    def __init__(self, probe_set: ProbeSet, stop: float, beta: float, **how):
        super().__init__(probe_set, **how)
        self.stop, self.beta = stop, beta

    def _measure(self, args, state, model) -> None:
        super()._measure(args, state, model)
        self.reached = self.beta * (_gap(self.parts[-1]) - _gap(self.parts[0])) >= self.stop > 0

    def on_step_end(self, args, state, control, **_):
        super().on_step_end(args, state, control, **_)
        if self.reached:
            control.should_training_stop = True


def _gap(part: pd.DataFrame) -> float:
    rows = part[(part.metric == "logp_sum") & part.prompt_id.astype(str).str.startswith("train/")]
    mean = rows.groupby("response_type").value.mean()
    return mean["chosen"] - mean["rejected"]


@dataclass(frozen=True)
class Vary:
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
    clip: float
    max_prompt: int
    max_response: int
    device: str
    dtype: str


def vary(work: Path, s: Vary):
    """Train on pairs with one of `VARIANTS` and measure what nobody pushed along the way; returns a long table.

    Starts from the SFT run in the folder `stage` (`recipe.stages`), which is also the reference. The first `n_pairs`
    training prompts are divided over `rounds`; in each the pairs come from `source` (one of `SOURCES`), are seen
    `epochs` times, and are measured under the policy before and after (`pushed_rows`). At the end
    `judged` test prompts are answered greedily and by `samples` samples; the answers are in `answers.json`, their mean
    scores by the exact judge in the table (`judge_score`), where `data` is the closed world. With `pushes`, single
    responses to so many prompts are pushed down alone before any training (`push`). Continues after an interruption.
    """
    for kind, name, allowed in (("variant", s.variant, design.VARIANTS), ("source", s.source, design.SOURCES)):
        if name not in allowed:
            raise unknown(kind, name, allowed)
    lengths = {"max_prompt": s.max_prompt, "max_response": s.max_response}
    which, whose = design.VARIANTS[s.variant], design.SOURCES[s.source]
    where = Path(s.stage) / f"model-{s.sft_epochs}"
    reference, tokenizer = models.read(str(where), device=s.device, dtype=s.dtype)
    examples, test_set = preferences.load(s.data, "train", limit=s.n_pairs), preferences.load(s.data, "test")
    probed = recipe.probe_set(
        reference, tokenizer, examples, test_set, s.n_probe, s.n_probe_test, s.seed, lengths, KINDS
    )
    size, steps = -(-len(examples) // s.rounds), 0
    parts = [push(reference, tokenizer, probed, s.pushes, s.push_lr, s.seed, lengths)] if s.pushes else []
    for number in range(s.rounds):
        folder, draw = work / f"round-{number}", 1000 * s.seed + number
        if not (folder / "table.parquet").exists():
            lm, _ = models.read(str(where), device=s.device, dtype=s.dtype)
            mine = examples[number * size : (number + 1) * size]
            policy = lm if whose.refresh else reference
            *pairs, share = make_pairs(s.source, policy, tokenizer, mine, s.candidates, draw, lengths)
            table, last = [pushed_rows(lm, tokenizer, pairs, share, lengths, "before")], 0
            times = store.dense_early(round(-(-len(mine) // s.batch_size) * s.epochs), s.evaluations)
            callback = StopAtMargin(probed, which.stop, s.beta, at=times, **lengths)
            if s.epochs:
                train(
                    folder, lm, tokenizer, dpo_rows(tokenizer, *pairs, **lengths), callback, Training(method="dpo", loss=which.loss, beta=which.beta or s.beta, options=which.options, seed=draw, lr=s.lr * which.rate, epochs=s.epochs, batch_size=s.batch_size, optimizer=s.optimizer, warmup=s.warmup, clip=s.clip, checkpoints=1), reference=models.snapshot(lm if whose.follow else reference))  # fmt: skip
                table.append(callback.table())
                last = int(callback.table().step.max())
            else:
                table.append(probes.measure(lm, probed.encode(tokenizer, **lengths)).assign(step=0, examples=0))
            table.append(pushed_rows(lm, tokenizer, pairs, share, lengths, "after", step=last))
            models.save(lm, tokenizer, folder / "model")
            whole = store.compact(pd.concat(table, ignore_index=True))
            store.write_atomically(folder / "table.parquet", partial(whole.to_parquet, index=False))
        part = pd.read_parquet(folder / "table.parquet")
        part = part[(part.step > 0) | (part.prompt_id == "pairs") | (number == 0)]
        parts.append(part.assign(step=part.step + steps, examples=part.examples + steps * s.batch_size))
        steps, where = int(parts[-1].step.max()), folder / "model"
    if s.data in world.DESIGNS and s.judged:
        lm, _ = models.read(str(where), device=s.device, dtype=s.dtype)
        said = recipe.respond(lm, tokenizer, test_set[: s.judged], s.samples, s.seed, lengths)
        written = [answer | {"score": world.judge(answer["prompt"], answer["text"]).score} for answer in said]
        store.write_json(work.parent / "answers.json", written)
        scores = pd.DataFrame(written).groupby(["prompt_id", "decoding"]).score.mean()
        parts.append(
            store.long((steps, steps * s.batch_size, *names, "judge_score", value) for names, value in scores.items())
        )
    return store.compact(pd.concat(parts, ignore_index=True))


def pushed_rows(policy, tokenizer, pairs, share: float, lengths: dict, when: str, step: int = 0) -> pd.DataFrame:
    """How likely the policy finds the pairs of a round, before or after it is trained on them; rows of a long table.

    `pushed_before` and `pushed_after`: log pi per token, mean over the first 32 pairs, nats; `prob_pairs`: the share of
    prompts whose samples differ in score.
    """
    prompts, chosen, rejected = (texts[:32] for texts in pairs)
    encoded = ProbeSet(prompts, {"chosen": chosen, "rejected": rejected}).encode(tokenizer, **lengths)
    measured = probes.measure(policy, encoded)
    mean = measured[measured.metric == "logp_mean"].groupby("response_type").value.mean()
    rows = [(step, 0, "pairs", kind, f"pushed_{when}", value) for kind, value in mean.items()]
    return store.long([*rows, (step, 0, "pairs", "all", "prob_pairs", share)])


# --- one push at a time ------------------------------------------------------------------------------------


def push(lm, tokenizer, probed: ProbeSet, count: int, lr: float, seed: int, lengths: dict) -> pd.DataFrame:
    """One step down on one response to one prompt, from the same weights each time (section 3.3); rows of a long table.

    Each of PUSHED is pushed alone, for the first `count` prompts, with one gradient step of rate `lr` on its summed
    log pi; then the responses of WATCHED to that prompt are measured, and the weights put back. With the pushed kind as
    `response_type`: `pushed_start`, its log pi per token before; `pushed_change`, by how much that falls;
    `watched_change` and `watched_top_change`, the mean change per token of what nobody pushed and of y* along it, nats;
    `pushed_tokens`.
    """
    how = {"max_new_tokens": lengths["max_response"], "max_prompt": lengths["max_prompt"], "batch_size": 128}
    own = {
        "greedy": decode.greedy(lm, tokenizer, probed.prompts[:count], **how),
        "sampled": decode.sample(lm, tokenizer, probed.prompts[:count], seed=seed, **how),
    }
    encoded = probed.encode(tokenizer, **lengths)
    watched = encoded._replace(responses={kind: encoded.responses[kind] for kind in WATCHED})
    pushed = encoded.responses | {kind: [answer.tokens for answer in answers] for kind, answers in own.items()}
    before, weights = _means(lm, watched), first_order.parameters(lm)
    rows = []
    for n, prompt_id in enumerate(encoded.prompt_ids[:count]):
        for kind in (kind for kind in PUSHED if kind in pushed):
            alone = Encoded([prompt_id], [encoded.prompts[n]], {kind: [pushed[kind][n]]})
            start = _means(lm, alone)["logp_mean"].iloc[0]
            down = first_order.step(lm, -lr, [(encoded.prompts[n], pushed[kind][n])])
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
