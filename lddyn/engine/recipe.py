"""What chapters on language models share: scales, base model, probe set, answers, and the SFT before other training."""

from collections.abc import Collection, Sequence
from pathlib import Path

from lddyn import unknown
from lddyn.data import preferences, responses
from lddyn.engine import models, probes, store
from lddyn.engine.probes import ProbeSet
from lddyn.engine.training import ProbeCallback, sft_rows, train


def stage_grid(chosen: dict, seeds: Sequence[int], device: str, dtype: str) -> tuple[list[dict], dict[str, Path]]:
    """The SFT runs of this chapter, one a seed, and the files that they read. `chosen` comes from `settings`."""
    model = base_model(chosen)
    names = ("data", "n_train", "n_probe", "optimizer", "warmup", "max_prompt", "max_response")
    common = {name: chosen[name] for name in names}
    common |= {"model": model, "lr": chosen["sft_lr"], "batch_size": chosen["sft_batch_size"]}
    common |= {"clip": 10.0, "device": device, "dtype": dtype}
    common["epochs"] = sorted({chosen["sft_short"], chosen["sft_epochs"], chosen["sft_long"]})
    return [common | {"seed": seed} for seed in seeds], {**models.inputs(model), **preferences.inputs(chosen["data"])}


# --- the runs ----------------------------------------------------------------------------------------------


class KeepStages(ProbeCallback):
    """Also keeps the weights after some optimiser steps: `places` maps the step to the folder."""

    def __init__(self, probe_set: ProbeSet, places: dict[int, Path], **lengths):
        super().__init__(probe_set, at=[0, *places], **lengths)
        self.places = places

    def on_step_end(self, args, state, control, model=None, processing_class=None, **_):
        super().on_step_end(args, state, control, model=model)
        if state.global_step in self.places:
            models.save(model, processing_class, self.places[state.global_step])


def stages(
    work: Path,
    *,
    seed: int,
    model: str,
    data: str,
    n_train: int,
    n_probe: int,
    epochs: Sequence[int],
    batch_size: int,
    lr: float,
    optimizer: str,
    warmup: int,
    clip: float,
    max_prompt: int,
    max_response: int,
    device: str,
    dtype: str,
):
    """SFT on the chosen answers, as in chapter 3, that keeps its weights after each number of `epochs`; a long table.

    The learning rate is constant, so that the weights after two of eight epochs are those of a run of two. They stay
    in `model-2/` and so on beside the table.
    """
    lengths = {"max_prompt": max_prompt, "max_response": max_response}
    lm, tokenizer = models.read(model, device=device, dtype=dtype)
    examples = preferences.load(data, "train", limit=n_train)
    prompts, chosen = ([e[field] for e in examples] for field in ("prompt", "chosen"))
    rows = sft_rows(tokenizer, prompts, chosen, **lengths)
    ids = [f"train/{e['id']}" for e in examples[:n_probe]]
    probed = ProbeSet(prompts[:n_probe], {"chosen": chosen[:n_probe]}, ids)
    per_epoch = -(-len(rows) // batch_size)
    places = {epoch * per_epoch: work.parent / f"model-{epoch}" for epoch in epochs}
    callback = KeepStages(probed, places, **lengths)
    train(
        work, lm, tokenizer, rows, callback, seed=seed, lr=lr, epochs=max(epochs), batch_size=batch_size,
        optimizer=optimizer, warmup=warmup, clip=clip,
    )  # fmt: skip
    return store.compact(callback.table())


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
    "paper": {
        "seeds": 3, "model": "EleutherAI/pythia-410m-deduped", "size": "small", "data": "hh",
        "n_train": 5000, "n_probe": 500, "n_probe_test": 500, "max_prompt": 256, "max_response": 256,
        "epochs": 8, "evaluations": 400, "batch_size": 4, "lr": 5e-7, "optimizer": "rmsprop", "warmup": 150,
        "generate": 100, "map_epochs": 10, "map_evaluations": 50,
    },
}  # fmt: skip


def settings(scale: str, **overrides) -> dict:
    """What a scale stands for in chapters 3 and later, with the values that are not None put in its place.

    Raises `InputError` for an unknown scale.
    """
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    return SCALES[scale] | {name: value for name, value in overrides.items() if value is not None}


def after_sft(scale: str) -> dict:
    """The same for chapters that begin with SFT: its learning rate and batch are `sft_lr` and `sft_batch_size`."""
    common = settings(scale)
    return common | {"sft_lr": common["lr"], "sft_batch_size": common["batch_size"]}


def base_model(chosen: dict) -> str:
    """The folder or hub id that finetuning starts from; pre-trains the built-in model where that is not done yet."""
    return str(models.builtin(chosen["size"])) if chosen["model"] == "builtin" else chosen["model"]


def probe_set(
    model,
    tokenizer,
    train_set: Sequence[dict],
    test_set: Sequence[dict],
    n_probe: int,
    n_probe_test: int,
    seed: int,
    lengths: dict,
    kinds: Collection[str] = probes.RESPONSE_TYPES,
) -> ProbeSet:
    """The probes of section 4: the first prompts that are trained on, and of those that are not, and their responses.

    Prompt ids start with `train/` or `test/`. Answers to other prompts come from anywhere in the two sets. The model is
    read only for `chosen_initial`, which is sampled from it as it is now.
    """
    of_train, of_test = train_set[:n_probe], test_set[:n_probe_test]
    examples = [*of_train, *of_test]
    prompts = [e["prompt"] for e in examples]
    texts = responses.response_types(examples, test_set, train_set, seed, kinds)
    if "chosen_initial" in kinds and "chosen_initial" not in texts:
        sampled = probes.sample(model, tokenizer, prompts, lengths["max_response"], seed, lengths["max_prompt"])
        texts["chosen_initial"] = [answer.text for answer in sampled]
    ids = [f"train/{e['id']}" for e in of_train] + [f"test/{e['id']}" for e in of_test]
    return ProbeSet(prompts, texts, ids)


def answers(model, tokenizer, probed: ProbeSet, count: int, lengths: dict) -> list[dict]:
    """Greedy answers to the first `count` prompts of each split: `prompt_id, prompt, text, logp` (nats, summed)."""
    ids = [i for split in ("train/", "test/") for i in [p for p in probed.prompt_ids if p.startswith(split)][:count]]
    if not ids:
        return []
    place = {name: n for n, name in enumerate(probed.prompt_ids)}
    prompts = [probed.prompts[place[i]] for i in ids]
    decoded = probes.greedy(model, tokenizer, prompts, lengths["max_response"], lengths["max_prompt"])
    return [
        {"prompt_id": i, "prompt": prompt, "text": answer.text, "logp": answer.logp}
        for i, prompt, answer in zip(ids, prompts, decoded, strict=True)
    ]


def respond(model, tokenizer, examples: Sequence[dict], samples: int, seed: int, lengths: dict) -> list[dict]:
    """Answers to prompts of the test split, one greedy and `samples` sampled: `prompt_id, prompt, decoding, text`."""
    asked = {"greedy": list(examples), "sampled": [e for e in examples for _ in range(samples)]}
    prompts = {decoding: [e["prompt"] for e in each] for decoding, each in asked.items()}
    how = {"max_new_tokens": lengths["max_response"], "max_prompt": lengths["max_prompt"], "batch_size": 128}
    decoded = {
        "greedy": probes.greedy(model, tokenizer, prompts["greedy"], **how),
        "sampled": probes.sample(model, tokenizer, prompts["sampled"], seed=seed, **how),
    }
    return [
        {"prompt_id": f"test/{e['id']}", "prompt": e["prompt"], "decoding": decoding, "text": answer.text}
        for decoding, each in asked.items()
        for e, answer in zip(each, decoded[decoding], strict=True)
    ]
