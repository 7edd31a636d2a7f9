"""Chapter 7: SFT on both answers before DPO, and what it wins (section 4.3, appendix F, figures 5 and 17, table 1)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from lddyn import InputError, unknown
from lddyn.chapters.extend import judging
from lddyn.chapters.extend.design import ARMS, WORLD
from lddyn.data import preferences, world
from lddyn.engine import models, recipe, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import ProbeSet
from lddyn.engine.training import Training, dpo_rows, log_rows, sft_rows, train

KINDS = ("chosen", "chosen_semantic", "chosen_initial", "rejected", "rejected_semantic", "other_test", "unrelated")
SCALES = {
    "smoke": {
        "n_train": 16, "n_probe": 4, "n_probe_test": 2, "sft_epochs": 1, "sft_evaluations": 2,
        "epochs": 1.0, "evaluations": 4, "batch_size": 8, "lr": 1e-3, "beta": 0.1,
        "world_size": "tiny", "world_seeds": 2, "world_n_train": 8, "world_lr": 1e-3, "world_batch_size": 8,
        "world_epochs": 6, "judged": 4, "world_max_response": 24, "designs": 1,
    },
    "laptop": {
        "n_train": 160, "n_probe": 14, "n_probe_test": 4, "sft_epochs": 2, "sft_evaluations": 4,
        "epochs": 2.0, "evaluations": 9, "batch_size": 8, "lr": 4e-4, "beta": 0.1,
        "world_size": "world", "world_seeds": 5, "world_n_train": 128, "world_lr": 2e-4, "world_batch_size": 16,
        "world_epochs": 6, "judged": 64, "world_max_response": 64, "designs": 4,
    },
    "paper": {
        "n_train": 5000, "n_probe": 500, "n_probe_test": 500, "sft_epochs": 2, "sft_evaluations": 50,
        "epochs": 6.0, "evaluations": 150, "batch_size": 4, "lr": 5e-7, "beta": 0.1,
        "world_size": "world", "world_seeds": 20, "world_n_train": 640, "world_lr": 5e-5, "world_batch_size": 16,
        "world_epochs": 6, "judged": 400, "world_max_response": 64, "designs": 4,
    },
}  # fmt: skip


def settings(scale: str, **overrides) -> dict:
    """What a scale stands for in this chapter, with the values that are not None put in its place.

    `world_*` belong to the runs in the closed world, `sft_*` to the SFT before; `judged` prompts of its test split are
    answered after 0, 2, 4 and 6 epochs of DPO; `designs` is the number of other designs of the world. Raises
    `InputError` for an unknown scale.
    """
    return (
        recipe.after_sft(scale)
        | SCALES[scale]
        | {name: value for name, value in overrides.items() if value is not None}
    )


def natural_grid(chosen: dict, seeds: Sequence[int], device: str, dtype: str) -> tuple[list[dict], dict[str, Path]]:
    """The runs on natural text, every arm for each seed, and the files they read. `chosen` comes from `settings`."""
    names = ("data", "n_train", "n_probe", "n_probe_test", "sft_epochs", "sft_evaluations", "sft_lr", "sft_batch_size")
    names += ("epochs", "evaluations", "lr", "batch_size", "beta", "optimizer", "warmup", "max_prompt", "max_response")
    model = recipe.base_model(chosen)
    common = {name: chosen[name] for name in names} | {"model": model, "design": "natural", "judged": 0}
    common |= {"judgements": 0, "clip": 10.0, "device": device, "dtype": dtype}
    runs = [common | {"seed": seed, "arm": arm} for seed in seeds for arm in ARMS]
    return runs, {**models.inputs(model), **preferences.inputs(chosen["data"])}


def world_grid(chosen: dict, seeds: Sequence[int], device: str, dtype: str) -> tuple[list[dict], dict[str, Path]]:
    """The runs in the closed world: every arm for each seed, and on the first seed the other designs."""
    model = str(models.builtin(chosen["world_size"]))
    epochs, rate = chosen["world_epochs"], chosen["world_lr"]
    common = {
        "model": model, "data": "world", "n_train": chosen["world_n_train"], "n_probe": chosen["n_probe"],
        "n_probe_test": chosen["n_probe_test"], "sft_epochs": 2, "sft_evaluations": 3, "sft_lr": 5e-4,
        "sft_batch_size": chosen["world_batch_size"], "epochs": epochs, "evaluations": 7, "lr": rate,
        "batch_size": chosen["world_batch_size"], "beta": chosen["beta"], "optimizer": "adamw", "warmup": 0,
        "max_prompt": 48, "max_response": chosen["world_max_response"], "judged": chosen["judged"],
        "judgements": 4, "clip": 10.0, "device": device, "dtype": dtype,
    }  # fmt: skip
    runs = [common | {"design": "main", "seed": seed, "arm": arm} for seed in seeds for arm in ARMS]
    for name, changed in list(WORLD.items())[: chosen["designs"]]:
        changed = common | changed | {"lr": rate * changed.get("lr", 1), "evaluations": 2, "seed": seeds[0]}
        runs += [changed | {"design": name, "arm": arm} for arm in ("baseline", "extended")]
    return runs, models.inputs(model)


# --- the runs ----------------------------------------------------------------------------------------------


class Answering(ProbeCallback):
    """Also answers prompts after some optimiser steps, greedily and by one sample, into `folder`."""

    def __init__(
        self, probe_set: ProbeSet, examples: Sequence[dict], at_judged: set[int], folder: Path, seed: int, **how
    ):
        super().__init__(probe_set, **how)
        self.examples, self.at_judged, self.folder, self.seed = examples, at_judged, folder, seed

    def on_train_begin(self, args, state, control, model=None, processing_class=None, **_):
        self.tokenizer = processing_class
        super().on_train_begin(args, state, control, model=model, processing_class=processing_class)

    def _measure(self, args, state, model) -> None:
        super()._measure(args, state, model)
        if self.examples and state.global_step in self.at_judged:
            written = recipe.respond(model, self.tokenizer, self.examples, 1, self.seed, self.lengths)
            store.write_json(self.folder / f"answers-{state.global_step}.json", written)


@dataclass(frozen=True)
class Follow:
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
    clip: float
    max_prompt: int
    max_response: int
    judged: int
    judgements: int
    device: str
    dtype: str


def follow(work: Path, s: Follow):
    """SFT, then DPO from where it ends, measured all along (section 4.3); returns a long table.

    `arm` is one of ARMS: what SFT trains on, and how long; DPO is the same for all. Step 0 is the start of DPO, and
    steps of SFT count up to it from below. At so many even `judgements` of DPO, the first before it and the last at its
    end, `judged` test prompts (other ones for each seed) are answered; the answers are in `answers.json`, and in the
    closed world what the exact judge finds in them (`world.Score`) is in the table, under `greedy` and `sampled`.
    `design` is a label. An interrupted run continues from its last checkpoint.
    """
    if s.arm not in ARMS:
        raise unknown("arm", s.arm, ARMS)
    lengths, common = {"max_prompt": s.max_prompt, "max_response": s.max_response}, {"seed": s.seed, "clip": s.clip}
    common |= {"optimizer": s.optimizer, "warmup": s.warmup}
    lm, tokenizer = models.read(s.model, device=s.device, dtype=s.dtype)
    examples, test = preferences.load(s.data, "train", limit=s.n_train), preferences.load(s.data, "test")
    probed = recipe.probe_set(lm, tokenizer, examples, test, s.n_probe, s.n_probe_test, s.seed, lengths, KINDS)
    asked = [test[i] for i in np.random.default_rng(s.seed).permutation(len(test))[: s.judged]]
    prompts = [e["prompt"] for e in examples]
    targets = ARMS[s.arm].targets
    rows = sft_rows(tokenizer, prompts * len(targets), [e[kind] for kind in targets for e in examples], **lengths)
    before = -(-len(rows) // s.sft_batch_size) * s.sft_epochs * ARMS[s.arm].epochs
    at = {round(before * n / (s.sft_evaluations - 1)) for n in range(s.sft_evaluations)}
    tuned = ProbeCallback(probed, at=at, **lengths)
    train(
        work / "sft", lm, tokenizer, rows, tuned, Training(lr=s.sft_lr, epochs=s.sft_epochs * ARMS[s.arm].epochs, batch_size=s.sft_batch_size, checkpoints=1, **common))  # fmt: skip
    pairs = dpo_rows(tokenizer, prompts, *([e[kind] for e in examples] for kind in ("chosen", "rejected")), **lengths)
    per_epoch = -(-len(pairs) // s.batch_size)
    due = [s.epochs * n / max(s.judgements - 1, 1) for n in range(s.judgements)]
    answered = {round(per_epoch * epoch): epoch for epoch in due}
    at = {*store.dense_early(int(per_epoch * s.epochs), s.evaluations), *answered}
    callback = Answering(probed, asked, set(answered), work, s.seed, at=at, **lengths)
    log = train(
        work / "dpo", lm, tokenizer, pairs, callback, Training(method="dpo", loss="sigmoid", beta=s.beta, lr=s.lr, epochs=s.epochs, batch_size=s.batch_size, checkpoints=1, **common))  # fmt: skip
    rising = tuned.table()
    rising = rising[rising.step < before].assign(step=lambda t: t.step - before)
    table = [rising, callback.table(), log_rows(log, s.batch_size)]
    if s.judged:
        files = {step: json.loads((work / f"answers-{step}.json").read_text()) for step in answered}
        written = [{"step": step, "epoch": answered[step], **row} for step, rows in files.items() for row in rows]
        store.write_json(work.parent / "answers.json", written)
        if s.data in world.DESIGNS:
            table.append(score_rows(written, s.batch_size))
    return store.compact(pd.concat(table, ignore_index=True))


def score_rows(written: Sequence[dict], batch_size: int) -> pd.DataFrame:
    """What the exact judge finds in each answer, one row of a long table a field of `world.Score`."""
    return store.long(
        (a["step"], a["step"] * batch_size, a["prompt_id"], a["decoding"], field, float(value))
        for a in written
        for field, value in world.judge(a["prompt"], a["text"])._asdict().items()
    )


# --- judging -----------------------------------------------------------------------------------------------


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


def compare(
    answers: pd.DataFrame, judge: judging.Judge, ours: str = "extended", theirs: str = "baseline"
) -> pd.DataFrame:
    """Each answer of the arm `ours` against that of the arm `theirs` to the same prompt.

    Returns the columns of `judging.compare` and `seed, design, epoch, decoding, prompt_id`.
    """
    key = ["seed", "design", "epoch", "decoding", "prompt_id"]
    both = answers[answers.arm == ours].merge(answers[answers.arm == theirs], on=key, suffixes=("", "_theirs"))
    found = judging.compare(judge, list(both.prompt), list(both.text), list(both.text_theirs))
    return pd.concat([both[key], found], axis=1)


def win_rates(outcomes: pd.DataFrame, by: Sequence[str] = ("design", "decoding", "epoch")) -> pd.DataFrame:
    """`judging.rate` for each group of the result of `compare`."""
    rows = [dict(zip(by, key, strict=True)) | judging.rate(part) for key, part in outcomes.groupby(list(by))]
    return pd.DataFrame(rows)
