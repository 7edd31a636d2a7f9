"""Replicates of the main runs of chapters 3 and 5 that differ in more than a seed: the base model, and the data.

A seed varies the order of the examples and what is sampled. Here two pre-trained bases meet two halves of the built-in
training pairs, or a data set of your own. What each run says of every claim is kept in
`book/recorded/replicates.json`; what holds over seeds but not in every replicate does not count as replicated.
"""

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lddyn.chapters.dpo import run as dpo
from lddyn.chapters.sft import run as sft
from lddyn.data import preferences
from lddyn.engine import models, pool, recipe, recorded, store
from lddyn.workshop import released

BASES = (0, 1)  # seeds of pre-training; 0 comes with the package
HALVES = ("first", "second")


def halves() -> dict[str, str]:
    """Files with every second of the built-in training pairs, and all test pairs: name of the half -> path."""
    store.runs_root().mkdir(parents=True, exist_ok=True)
    train, test = (preferences.load("builtin", split) for split in ("train", "test"))
    found = {}
    for n, name in enumerate(HALVES):
        path = store.runs_root() / f"builtin-{name}-half.jsonl"
        rows = [e | {"split": split} for split, part in (("train", train[n::2]), ("test", test)) for e in part]
        text = "\n".join(map(json.dumps, rows)) + "\n"
        store.write_atomically(path, lambda p, text=text: p.write_text(text))
        found[f"{name} half"] = str(path)
    return found


def record(scale: str, data: Mapping[str, str], given: Mapping[str, Any]) -> str:
    """Compute all replicates, or read them from the cache, and write what they say; returns one line.

    data: names and files of more data sets; given: settings in place of those of the scale.
    """
    rows, runs = [], []
    each_data = halves() | dict(data)
    total = len(BASES) * len(each_data)
    for base, (name, file) in pool.counted(itertools.product(BASES, each_data.items()), "replicates", total, every=0):
        how = {**given, "seeds": 1, "model": str(models.builtin("small", base)), "data": file}
        how["n_train"] = len(preferences.load(file, "train", given.get("n_train")))
        mine = _runs(scale, how)
        runs += [run for each in mine.values() for run in each]
        for chapter, each in mine.items():
            values = released.values_of(store.frame(each), chapter)
            rows.append({"base": base, "data": name, "chapter": chapter, "values": values})
    store.keep(recorded.REPLICATES, rows, runs, scale=scale)
    return f"{len(rows)} replicates in {len(runs)} runs: {recorded.REPLICATES.relative_to(store.ROOT)}"


def _runs(scale: str, how: Mapping[str, Any]) -> dict[str, list[store.Run]]:
    """The main run of chapter 3, and that of chapter 5 with what it is compared with."""
    of_sft, of_dpo = sft.settings(scale, how), dpo.settings(scale, how)
    files = recipe.files(of_sft)
    stages = [replace(stage, epochs=(of_dpo.sft_epochs,)) for stage in dpo.stage_grid(of_dpo)]
    aligned = pool.run_then(recipe.stages, stages, dpo.align, lambda stage: dpo.grid(of_dpo, stage)[:1], files)
    return {
        "03_sft": pool.run_all(sft.finetune, sft.grid(of_sft)[:1], sft.files(of_sft)),
        "05_dpo": aligned + pool.run_all(recipe.stages, dpo.sft_like_dpo(of_dpo), files),
    }
