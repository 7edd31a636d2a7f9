"""Chapter 3: supervised finetuning, measured on all kinds of response (section 4.1, figure 3, appendix D)."""

from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from lddyn import models, preferences, probes, records, reuse, unknown
from lddyn.probes import ProbeSet
from lddyn.training import ProbeCallback, log_rows, sft_rows, train

HEAT_MAP_TARGETS = ("chosen", "rejected", "chosen_semantic", "rejected_semantic", "unrelated", "test_shuffled")
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


def base_model(chosen: dict) -> str:
    """The folder or hub id that finetuning starts from; pre-trains the built-in model where that is not done yet."""
    return str(models.builtin(chosen["size"])) if chosen["model"] == "builtin" else chosen["model"]


def grid(chosen: dict, seeds: Sequence[int], loss: str, device: str, dtype: str) -> tuple[list[dict], dict[str, Path]]:
    """The runs of chapter 3 and the files that they read: SFT on all prompts, and on the probed ones for each target.

    `chosen` comes from `settings`.
    """
    model = base_model(chosen)
    not_for_runs = ("seeds", "size", "map_epochs", "map_evaluations")
    whole = {name: value for name, value in chosen.items() if name not in not_for_runs}
    whole |= {"model": model, "target": "chosen", "loss": loss, "clip": 10.0, "device": device, "dtype": dtype}
    small = whole | {"n_train": chosen["n_probe"], "n_probe_test": 0, "generate": 0}
    small |= {"epochs": chosen["map_epochs"], "evaluations": chosen["map_evaluations"]}
    runs = [whole | {"seed": seed} for seed in seeds]
    runs += [small | {"seed": seed, "target": target} for seed in seeds for target in HEAT_MAP_TARGETS]
    return runs, {**models.inputs(model), **preferences.inputs(chosen["data"])}


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
    responses = preferences.response_types(examples, test_set, train_set, seed, kinds)
    if "chosen_initial" in kinds and "chosen_initial" not in responses:
        sampled = probes.sample(model, tokenizer, prompts, lengths["max_response"], seed, lengths["max_prompt"])
        responses["chosen_initial"] = [answer.text for answer in sampled]
    ids = [f"train/{e['id']}" for e in of_train] + [f"test/{e['id']}" for e in of_test]
    return ProbeSet(prompts, responses, ids)


def finetune(
    work: Path,
    *,
    seed: int,
    model: str,
    data: str,
    target: str,
    n_train: int,
    n_probe: int,
    n_probe_test: int,
    epochs: int,
    evaluations: int,
    batch_size: int,
    lr: float,
    loss: str,
    optimizer: str,
    warmup: int,
    clip: float,
    max_prompt: int,
    max_response: int,
    generate: int,
    device: str,
    dtype: str,
):
    """Finetune a model on one kind of response and measure all kinds along the way (section 4.1); returns a long table.

    `target` is a type of response (`chosen` is the paper's SFT; the others are the columns of figure 3's heat map).
    The first `n_train` training prompts are trained on; `n_probe` of them and `n_probe_test` prompts of the test
    split are probed. With `generate`, so many prompts of each split are answered greedily before and after, and
    the answers are compared with what was trained on (`reuse`). The finished weights stay in `model/` beside the
    table, the answers in `answers.json`. An interrupted run continues from its last checkpoint.
    """
    lengths = {"max_prompt": max_prompt, "max_response": max_response}
    lm, tokenizer = models.load(model, device=device, dtype=dtype)
    examples, test_set = preferences.load(data, "train", limit=n_train), preferences.load(data, "test")
    probed = probe_set(lm, tokenizer, examples, test_set, n_probe, n_probe_test, seed, lengths)
    responses = preferences.response_types(examples, test_set, seed=seed)
    if target not in responses:
        raise unknown("target", target, responses)
    rows = sft_rows(tokenizer, [e["prompt"] for e in examples], responses[target], **lengths)
    steps = -(-len(rows) // batch_size) * epochs
    callback = ProbeCallback(probed, at=records.dense_early(steps, evaluations), **lengths)
    before = answers(lm, tokenizer, probed, generate, lengths)
    log = train(
        work, lm, tokenizer, rows, callback, seed=seed, lr=lr, epochs=epochs, batch_size=batch_size,
        loss=loss, optimizer=optimizer, warmup=warmup, clip=clip,
    )  # fmt: skip
    after = answers(lm, tokenizer, probed, generate, lengths)
    models.save(lm, tokenizer, work.parent / "model")
    table = [callback.table(), log_rows(log, batch_size)]
    if generate:
        written = [{"step": step, **answer} for step, part in ((0, before), (steps, after)) for answer in part]
        records.write_json(work.parent / "answers.json", written)
        table.append(reuse_rows(written, examples, test_set, batch_size))
    return records.compact(pd.concat(table, ignore_index=True))


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


def read_answers(folder: Path) -> pd.DataFrame:
    """The greedy answers of a run: `step, prompt_id, prompt, text, logp`; the text is the model's own, so escape it."""
    return pd.read_json(folder / "answers.json", orient="records")


def reuse_rows(written: list[dict], trained_on: list, control: list, batch_size: int) -> pd.DataFrame:
    """How much of each greedy answer is made of spans from answers to other questions, as rows of a long table.

    `prob_reuse_train`: share of the answer's word 4-grams found in training answers to other questions;
    `prob_reuse_control`: the same for as many answers that were never trained on.
    """
    pools = {"prob_reuse_train": trained_on[: len(control)], "prob_reuse_control": control[: len(trained_on)]}
    of_pool = {metric: [(e["prompt"], reuse.ngrams(e["chosen"])) for e in pool] for metric, pool in pools.items()}
    own = {e["prompt"]: reuse.ngrams(e["prompt"] + e["chosen"]) for e in [*trained_on, *control]}
    rows = []
    for answer in written:
        for metric, pool in of_pool.items():
            others = set().union(*(grams for prompt, grams in pool if prompt != answer["prompt"]))
            share = reuse.share(answer["text"], others - own.get(answer["prompt"], set()))
            examples = answer["step"] * batch_size
            rows.append((answer["step"], examples, answer["prompt_id"], "greedy", metric, share))
    return records.long(rows)
