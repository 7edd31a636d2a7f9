"""Chapter 3: supervised finetuning, measured on all kinds of response (section 4.1, figure 3, appendix D)."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from lddyn import unknown
from lddyn.data import preferences, responses, reuse
from lddyn.engine import models, recipe, store
from lddyn.engine.training import ProbeCallback, log_rows, sft_rows, train

HEAT_MAP_TARGETS = ("chosen", "rejected", "chosen_semantic", "rejected_semantic", "unrelated", "test_shuffled")


def grid(chosen: dict, seeds: Sequence[int], loss: str, device: str, dtype: str) -> tuple[list[dict], dict[str, Path]]:
    """The runs of chapter 3 and the files that they read: SFT on all prompts, and on the probed ones for each target.

    `chosen` comes from `settings`.
    """
    model = recipe.base_model(chosen)
    not_for_runs = ("seeds", "size", "map_epochs", "map_evaluations")
    whole = {name: value for name, value in chosen.items() if name not in not_for_runs}
    whole |= {"model": model, "target": "chosen", "loss": loss, "clip": 10.0, "device": device, "dtype": dtype}
    small = whole | {"n_train": chosen["n_probe"], "n_probe_test": 0, "generate": 0}
    small |= {"epochs": chosen["map_epochs"], "evaluations": chosen["map_evaluations"]}
    runs = [whole | {"seed": seed} for seed in seeds]
    runs += [small | {"seed": seed, "target": target} for seed in seeds for target in HEAT_MAP_TARGETS]
    return runs, {**models.inputs(model), **preferences.inputs(chosen["data"])}


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
    lm, tokenizer = models.read(model, device=device, dtype=dtype)
    examples, test_set = preferences.load(data, "train", limit=n_train), preferences.load(data, "test")
    probed = recipe.probe_set(lm, tokenizer, examples, test_set, n_probe, n_probe_test, seed, lengths)
    texts = responses.response_types(examples, test_set, seed=seed)
    if target not in texts:
        raise unknown("target", target, texts)
    rows = sft_rows(tokenizer, [e["prompt"] for e in examples], texts[target], **lengths)
    steps = -(-len(rows) // batch_size) * epochs
    callback = ProbeCallback(probed, at=store.dense_early(steps, evaluations), **lengths)
    before = recipe.answers(lm, tokenizer, probed, generate, lengths)
    log = train(
        work, lm, tokenizer, rows, callback, seed=seed, lr=lr, epochs=epochs, batch_size=batch_size,
        loss=loss, optimizer=optimizer, warmup=warmup, clip=clip,
    )  # fmt: skip
    after = recipe.answers(lm, tokenizer, probed, generate, lengths)
    models.save(lm, tokenizer, work.parent / "model")
    table = [callback.table(), log_rows(log, batch_size)]
    if generate:
        written = [{"step": step, **answer} for step, part in ((0, before), (steps, after)) for answer in part]
        store.write_json(work.parent / "answers.json", written)
        table.append(reuse_rows(written, examples, test_set, batch_size))
    return store.compact(pd.concat(table, ignore_index=True))


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
    return store.long(rows)
