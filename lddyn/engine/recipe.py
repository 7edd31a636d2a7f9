"""What chapters on language models share: scales, base model, probe set, answers, and the SFT before other training."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerControl, TrainerState, TrainingArguments

from lddyn.data import preferences, responses
from lddyn.engine import models, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import Model, ProbeSet, Tokenizer
from lddyn.engine.probes import greedy, sample
from lddyn.engine.settings import derive, lengths
from lddyn.engine.training import Training, sft_rows, train

SCALES = {
    "smoke": {
        "seeds": 2, "model": "builtin", "size": "tiny", "data": "builtin",
        "n_train": 32, "n_probe": 8, "n_probe_test": 4, "max_prompt": 64, "max_response": 96,
        "epochs": 4, "evaluations": 5, "batch_size": 8, "lr": 1e-3, "optimizer": "adamw", "warmup": 0,
        "generate": 4, "map_epochs": 3, "map_evaluations": 3,
    },
    "laptop": {
        "seeds": 3, "model": "builtin", "size": "small", "data": "builtin",
        "n_train": 528, "n_probe": 48, "n_probe_test": 24, "max_prompt": 64, "max_response": 96,
        "epochs": 16, "evaluations": 15, "batch_size": 8, "lr": 5e-4, "optimizer": "adamw", "warmup": 0,
        "generate": 30, "map_epochs": 6, "map_evaluations": 5,
    },
    "pretrained": {
        "seeds": 3, "first_seed": 10, "model": "smollm2", "size": "small", "data": "builtin", "format": "chat",
        "n_train": 64, "n_probe": 12, "n_probe_test": 4, "max_prompt": 96, "max_response": 96,
        "epochs": 4, "evaluations": 8, "batch_size": 4, "lr": 5e-6, "optimizer": "rmsprop", "warmup": 10,
        "generate": 4, "map_epochs": 3, "map_evaluations": 2,
    },
    "paper": {
        "seeds": 3, "model": "EleutherAI/pythia-410m-deduped", "size": "small", "data": "hh",
        "n_train": 5000, "n_probe": 500, "n_probe_test": 500, "max_prompt": 256, "max_response": 256,
        "epochs": 8, "evaluations": 400, "batch_size": 4, "lr": 5e-7, "optimizer": "rmsprop", "warmup": 150,
        "generate": 100, "map_epochs": 10, "map_evaluations": 50,
    },
}  # fmt: skip


# chapters that begin with SFT: its learning rate and batch are those of chapter 3
AFTER_SFT = {scale: s | {"sft_lr": s["lr"], "sft_batch_size": s["batch_size"]} for scale, s in SCALES.items()}


def base_model(chosen: Any) -> str:
    """The folder or hub id that finetuning starts from, of settings with `model` and `size`."""
    return models.located(chosen.model, chosen.size)


def files(chosen: Any) -> dict[str, Path]:
    """The files that runs with these settings (`model`, `size`, `data`) read."""
    return models.inputs(base_model(chosen)) | preferences.inputs(chosen.data)


def examples(s: Any) -> tuple[list[responses.Example], list[responses.Example]]:
    """Training and test examples, of settings with `data`, `n_train` and `skip_bad_rows`."""
    train_set = preferences.load(s.data, "train", s.n_train, s.skip_bad_rows)
    return train_set, preferences.load(s.data, "test", skip_bad_rows=s.skip_bad_rows)


def probe_set(
    model: Model,
    tokenizer: Tokenizer,
    train_set: Sequence[responses.Example],
    test_set: Sequence[responses.Example],
    s: Any,
    kinds: Collection[str] = responses.RESPONSE_TYPES,
) -> ProbeSet:
    """The probes of section 4: the first prompts that are trained on, and of those that are not, and their responses.

    `s`: settings with `n_probe`, `n_probe_test`, `seed`, `max_prompt`, `max_response`. Prompt ids start with `train/`
    or `test/`. Answers to other prompts come from anywhere in the two sets. The model is read only for
    `chosen_initial`, which is sampled from it as it is now.
    """
    of_train, of_test = train_set[: s.n_probe], test_set[: s.n_probe_test]
    examples = [*of_train, *of_test]
    prompts = [e["prompt"] for e in examples]
    texts = responses.response_types(examples, test_set, train_set, s.seed, kinds)
    if "chosen_initial" in kinds and "chosen_initial" not in texts:
        sampled = sample(model, tokenizer, prompts, seed=s.seed, **_how(s))
        texts["chosen_initial"] = [answer.text for answer in sampled]
    ids = [f"train/{e['id']}" for e in of_train] + [f"test/{e['id']}" for e in of_test]
    return ProbeSet(prompts, texts, ids)


# --- answers (section 4.2) -----------------------------------------------------------------------------------


def _how(s: Any) -> dict[str, Any]:
    """How answers are decoded, from settings with `max_prompt` and `max_response`."""
    cut = lengths(s)
    return {"max_new_tokens": cut["max_response"], "max_prompt": cut["max_prompt"], "format": cut["format"]}


def answers(model: Model, tokenizer: Tokenizer, probed: ProbeSet, count: int, s: Any) -> list[dict[str, Any]]:
    """Greedy answers to the first `count` prompts of each split: `prompt_id, prompt, text, logp` (nats, summed)."""
    ids = [i for split in ("train/", "test/") for i in [p for p in probed.prompt_ids if p.startswith(split)][:count]]
    if not ids:
        return []
    place = {name: n for n, name in enumerate(probed.prompt_ids)}
    prompts = [probed.prompts[place[i]] for i in ids]
    decoded = greedy(model, tokenizer, prompts, **_how(s))
    return [
        {"prompt_id": i, "prompt": prompt, "text": answer.text, "logp": answer.logp}
        for i, prompt, answer in zip(ids, prompts, decoded, strict=True)
    ]


def respond(
    model: Model, tokenizer: Tokenizer, examples: Sequence[responses.Example], samples: int, s: Any
) -> list[dict[str, str]]:
    """Answers to prompts of the test split, one greedy and `samples` sampled: `prompt_id, prompt, decoding, text`."""
    asked = {"greedy": list(examples), "sampled": [e for e in examples for _ in range(samples)]}
    prompts = {decoding: [e["prompt"] for e in each] for decoding, each in asked.items()}
    how = _how(s) | {"batch_size": 128}
    decoded = {
        "greedy": greedy(model, tokenizer, prompts["greedy"], **how),
        "sampled": sample(model, tokenizer, prompts["sampled"], seed=s.seed, **how),
    }
    return [
        {"prompt_id": f"test/{e['id']}", "prompt": e["prompt"], "decoding": decoding, "text": answer.text}
        for decoding, each in asked.items()
        for e, answer in zip(each, decoded[decoding], strict=True)
    ]


# --- the SFT before other training ------------------------------------------------------------------------------


class KeepStages(ProbeCallback):
    """Also keeps the weights after some optimiser steps: `places` maps the step to the folder."""

    def __init__(self, probe_set: ProbeSet, places: dict[int, Path], **lengths: Any):
        super().__init__(probe_set, at=[0, *places], thresholds=None, **lengths)
        self.places = places

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Model | None = None,
        processing_class: Tokenizer | None = None,
        **_: Any,
    ) -> None:
        super().on_step_end(args, state, control, model=model)
        if state.global_step in self.places:
            models.save(model, processing_class, self.places[state.global_step])


@dataclass(frozen=True)
class Stages:
    """An SFT run that keeps its weights after each number of `epochs`."""

    seed: int
    model: str  # a folder or hub id
    data: str
    n_train: int
    n_probe: int
    epochs: tuple[int, ...]
    batch_size: int
    lr: float
    optimizer: str
    warmup: int
    max_prompt: int
    max_response: int
    device: str
    dtype: str
    format: str = "auto"
    skip_bad_rows: str = "no"
    clip: float = 10.0


def stage_grid(chosen: Any, epochs: Collection[int], seeds: Sequence[int]) -> list[Stages]:
    """One SFT run a seed; `chosen`: settings with all that `Stages` has, and `sft_lr` and `sft_batch_size`."""
    kept = {"epochs": tuple(sorted(set(epochs))), "lr": chosen.sft_lr, "batch_size": chosen.sft_batch_size}
    return [derive(Stages, chosen, seed=seed, model=base_model(chosen), **kept) for seed in seeds]


def stages(work: Path, s: Stages) -> pd.DataFrame:
    """SFT on the chosen answers, as in chapter 3, that keeps its weights after each number of `epochs`; a long table.

    The learning rate is constant, so that the weights after two of eight epochs are those of a run of two. They stay
    in `model-2/` and so on beside the table.
    """
    lm, tokenizer = models.read(s.model, device=s.device, dtype=s.dtype)
    examples = preferences.load(s.data, "train", s.n_train, s.skip_bad_rows)
    prompts, chosen = ([e[field] for e in examples] for field in ("prompt", "chosen"))
    rows = sft_rows(tokenizer, prompts, chosen, **lengths(s))
    ids = [f"train/{e['id']}" for e in examples[: s.n_probe]]
    probed = ProbeSet(prompts[: s.n_probe], {"chosen": chosen[: s.n_probe]}, ids)
    per_epoch = -(-len(rows) // s.batch_size)
    places = {epoch * per_epoch: work.parent / f"model-{epoch}" for epoch in s.epochs}
    callback = KeepStages(probed, places, **lengths(s))
    train(work, lm, tokenizer, rows, callback, derive(Training, s, epochs=max(s.epochs)))
    return store.compact(callback.table())
