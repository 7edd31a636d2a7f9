"""Chapter 7: SFT on both answers before DPO, and what it wins (section 4.3, appendix F, figures 5 and 17, table 1)."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lddyn import InputError, unknown
from lddyn.chapters.extend.evidence import ARMS, MAIN, OTHER_DESIGNS
from lddyn.data import world
from lddyn.engine import models, pool, recipe, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import ProbeSet
from lddyn.engine.settings import choose, derive, lengths
from lddyn.engine.training import Training, dpo_rows, log_rows, sft_rows, train

KINDS = ("chosen", "chosen_semantic", "chosen_initial", "rejected", "rejected_semantic", "other_test", "unrelated")
SCALES = {
    "smoke": recipe.AFTER_SFT["smoke"] | {
        "n_train": 16, "n_probe": 4, "n_probe_test": 2, "sft_epochs": 1, "sft_evaluations": 2,
        "epochs": 1.0, "evaluations": 4, "batch_size": 8, "lr": 1e-3, "beta": 0.1,
        "world_size": "tiny", "world_seeds": 2, "world_n_train": 8, "world_lr": 1e-3, "world_batch_size": 8,
        "world_epochs": 6, "judged": 4, "world_max_response": 24, "designs": 1,
    },
    "laptop": recipe.AFTER_SFT["laptop"] | {
        "n_train": 160, "n_probe": 14, "n_probe_test": 4, "sft_epochs": 2, "sft_evaluations": 4,
        "epochs": 2.0, "evaluations": 9, "batch_size": 8, "lr": 4e-4, "beta": 0.1,
        "world_size": "world", "world_seeds": 5, "world_n_train": 128, "world_lr": 2e-4, "world_batch_size": 16,
        "world_epochs": 6, "judged": 64, "world_max_response": 64, "designs": 4,
    },
    "pretrained": recipe.AFTER_SFT["pretrained"] | {
        "n_train": 64, "n_probe": 8, "n_probe_test": 2, "sft_epochs": 2, "sft_evaluations": 2,
        "epochs": 2.0, "evaluations": 6, "batch_size": 4, "lr": 1e-5, "beta": 0.1,
        "world_size": "world", "world_seeds": 5, "world_n_train": 128, "world_lr": 2e-4, "world_batch_size": 16,
        "world_epochs": 6, "judged": 64, "world_max_response": 64, "designs": 4,
    },
    "paper": recipe.AFTER_SFT["paper"] | {
        "n_train": 5000, "n_probe": 500, "n_probe_test": 500, "sft_epochs": 2, "sft_evaluations": 50,
        "epochs": 6.0, "evaluations": 150, "batch_size": 4, "lr": 5e-7, "beta": 0.1,
        "world_size": "world", "world_seeds": 20, "world_n_train": 640, "world_lr": 5e-5, "world_batch_size": 16,
        "world_epochs": 6, "judged": 400, "world_max_response": 64, "designs": 4,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Chapter:
    """The settings of chapter 7, chosen by scale; see the notebook's parameters for what they mean.

    `sft_*` belong to the SFT before, `world_*` to the runs in the closed world; `judged` prompts of its test split are
    answered after 0, 2, 4 and 6 epochs of DPO; `designs` is the number of other designs of the world.
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
    sft_epochs: int
    sft_evaluations: int
    sft_lr: float
    sft_batch_size: int
    epochs: float
    evaluations: int
    batch_size: int
    lr: float
    beta: float
    optimizer: str
    warmup: int
    world_seeds: int
    world_size: str
    world_n_train: int
    world_max_response: int
    world_epochs: int
    world_batch_size: int
    world_lr: float
    judged: int
    designs: int
    first_seed: int = 20
    first_world_seed: int = 30
    device: str = "cpu"
    dtype: str = "float32"
    format: str = "auto"
    skip_bad_rows: str = "no"


@dataclass(frozen=True)
class Follow:
    """One run: `arm` is one of `ARMS`, `design` a label, `model` a folder or hub id."""

    seed: int
    design: str
    arm: str
    model: str
    data: str
    n_train: int
    n_probe: int
    n_probe_test: int
    sft_epochs: int
    sft_evaluations: int
    sft_lr: float
    sft_batch_size: int
    epochs: float
    evaluations: int
    lr: float
    batch_size: int
    beta: float
    optimizer: str
    warmup: int
    max_prompt: int
    max_response: int
    judged: int
    judgements: int
    device: str
    dtype: str
    format: str = "auto"
    skip_bad_rows: str = "no"
    clip: float = 10.0


def settings(scale: str, given: Mapping[str, object]) -> Chapter:
    """What a scale stands for in this chapter, with what is given in its place (`settings.choose`)."""
    return choose(Chapter, SCALES, scale, given)


def in_world(c: Chapter) -> Chapter:
    """The settings of the runs in the closed world."""
    return replace(
        c, seeds=c.world_seeds, first_seed=c.first_world_seed, model="builtin", size=c.world_size, data=MAIN.data,
        n_train=c.world_n_train, max_prompt=48, max_response=c.world_max_response,
        sft_epochs=MAIN.sft_epochs, sft_evaluations=3, sft_lr=5e-4, sft_batch_size=c.world_batch_size,
        epochs=c.world_epochs, evaluations=7, batch_size=c.world_batch_size, lr=c.world_lr, optimizer="adamw", warmup=0,
        format="auto",
    )  # fmt: skip


def natural_grid(c: Chapter) -> list[Follow]:
    """The runs on natural text: every arm for each seed, and nothing is judged."""
    return _every_arm(c, design="natural", judged=0, judgements=0)


def world_grid(c: Chapter) -> list[Follow]:
    """The runs with the settings of `in_world`: every arm for each seed, and on the first seed the other designs."""
    runs = _every_arm(c, design="main", judgements=4)
    first = [run for run in runs if run.seed == c.first_seed and run.arm != "equal steps"]
    for name, d in list(OTHER_DESIGNS.items())[: c.designs]:
        changed = {"data": d.data, "sft_epochs": d.sft_epochs, "lr": c.lr * d.rate, "evaluations": 2}
        runs += [replace(run, design=name, **changed) for run in first]
    return runs


def natural_runs(c: Chapter, **how) -> list[store.Run]:
    """The runs on natural text; how: as for `pool.run_all`."""
    return pool.run_all(follow, natural_grid(c), recipe.files(c), **how)


def world_runs(c: Chapter, **how) -> list[store.Run]:
    """The runs in the closed world (`in_world`)."""
    return pool.run_all(follow, world_grid(in_world(c)), recipe.files(in_world(c)), **how)


def runs(c: Chapter, **how) -> list[store.Run]:
    """The runs of the chapter."""
    return natural_runs(c, **how) + world_runs(c, **how)


def _every_arm(c: Chapter, **values) -> list[Follow]:
    seeds = range(c.first_seed, c.first_seed + c.seeds)
    common = values | {"model": recipe.base_model(c)}
    return [derive(Follow, c, seed=seed, arm=arm, **common) for seed in seeds for arm in ARMS]


# --- the runs ----------------------------------------------------------------------------------------------


class Answering(ProbeCallback):
    """Also answers prompts after some optimiser steps, greedily and by one sample, into `folder`."""

    def __init__(
        self, probe_set: ProbeSet, tokenizer, examples: Sequence[dict], steps: Collection[int], folder: Path, s, at
    ):
        super().__init__(probe_set, at=at, thresholds=None, **lengths(s))
        self.tokenizer, self.examples, self.steps, self.folder, self.s = tokenizer, examples, steps, folder, s

    def _measure(self, args, state, model) -> None:
        super()._measure(args, state, model)
        if self.examples and state.global_step in self.steps:
            written = recipe.respond(model, self.tokenizer, self.examples, 1, self.s)
            store.write_json(self.folder / f"answers-{state.global_step}.json", written)


def follow(work: Path, s: Follow) -> pd.DataFrame:
    """SFT, then DPO from where it ends, measured all along (section 4.3); returns a long table.

    The arm says what SFT trains on, and how long; DPO is the same for all. Step 0 is the start of DPO, and steps of SFT
    count up to it from below. At so many even `judgements` of DPO, the first before it and the last at its end,
    `judged` test prompts (other ones for each seed) are answered; the answers are in `answers.json`, and in the closed
    world what the exact judge finds in them (`world.Score`) is in the table, under `greedy` and `sampled`. An
    interrupted run continues from its last checkpoint.
    """
    if s.arm not in ARMS:
        raise unknown("arm", s.arm, ARMS)
    lm, tokenizer = models.read(s.model, device=s.device, dtype=s.dtype)
    examples, test = recipe.examples(s)
    probed = recipe.probe_set(lm, tokenizer, examples, test, s, KINDS)
    rising = sft(work / "sft", lm, tokenizer, examples, probed, s)

    prompts, chosen, rejected = ([e[field] for e in examples] for field in ("prompt", "chosen", "rejected"))
    pairs = dpo_rows(tokenizer, prompts, chosen, rejected, **lengths(s))
    per_epoch = -(-len(pairs) // s.batch_size)
    due = [s.epochs * n / max(s.judgements - 1, 1) for n in range(s.judgements)]
    answered = {round(per_epoch * epoch): epoch for epoch in due}
    asked = [test[i] for i in np.random.default_rng(s.seed).permutation(len(test))[: s.judged]]
    at = {*store.dense_early(int(per_epoch * s.epochs), s.evaluations), *answered}
    callback = Answering(probed, tokenizer, asked, answered, work, s, at)
    how = derive(Training, s, method="dpo", loss="sigmoid", checkpoints=1)
    log = train(work / "dpo", lm, tokenizer, pairs, callback, how)

    table = [rising, callback.table(), log_rows(log, s.batch_size)]
    if s.judged:
        files = {step: json.loads((work / f"answers-{step}.json").read_text()) for step in answered}
        written = [{"step": step, "epoch": answered[step], **row} for step, rows in files.items() for row in rows]
        store.write_json(work.parent / "answers.json", written)
        if s.data in world.DESIGNS:
            table.append(score_rows(written, s.batch_size))
    return store.compact(pd.concat(table, ignore_index=True))


def sft(work: Path, lm, tokenizer, examples: Sequence[dict], probed: ProbeSet, s: Follow) -> pd.DataFrame:
    """The SFT of an arm, in place; what was measured before its last step, as a long table with steps below 0."""
    targets, times = ARMS[s.arm]
    prompts, answers = [e["prompt"] for e in examples] * len(targets), [e[kind] for kind in targets for e in examples]
    rows = sft_rows(tokenizer, prompts, answers, **lengths(s))
    steps = -(-len(rows) // s.sft_batch_size) * s.sft_epochs * times
    at = {round(steps * n / (s.sft_evaluations - 1)) for n in range(s.sft_evaluations)}
    callback = ProbeCallback(probed, at=at, thresholds=None, **lengths(s))
    of_sft = {"lr": s.sft_lr, "epochs": s.sft_epochs * times, "batch_size": s.sft_batch_size}
    train(work, lm, tokenizer, rows, callback, derive(Training, s, checkpoints=1, **of_sft))
    table = callback.table()
    return table[table.step < steps].assign(step=lambda t: t.step - steps)


def score_rows(written: Sequence[dict], batch_size: int) -> pd.DataFrame:
    """What the exact judge finds in each answer, one row of a long table a field of `world.Score`."""
    return store.long(
        (a["step"], a["step"] * batch_size, a["prompt_id"], a["decoding"], field, float(value))
        for a in written
        for field, value in world.judge(a["prompt"], a["text"])._asdict().items()
    )


def read_answers(runs: Sequence[store.Run]) -> pd.DataFrame:
    """The answers of runs: `seed, design, arm, epoch, prompt_id, prompt, decoding, text`; the text is a model's own."""
    parts = []
    for run in runs:
        if (run.folder / "answers.json").exists():
            given = {name: run.manifest["parameters"][name] for name in ("seed", "design", "arm")}
            parts.append(pd.DataFrame(json.loads((run.folder / "answers.json").read_text())).assign(**given))
    if not parts:
        raise InputError("no run has answers to compare")
    return pd.concat(parts, ignore_index=True)
