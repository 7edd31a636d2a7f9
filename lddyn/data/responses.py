"""The twelve types of response to a prompt, and how those that data lack are built (section 4, app. D.1)."""

import itertools
import re
import warnings
from collections.abc import Collection, Sequence

import numpy as np

from lddyn import Caution, InputError, unknown

RESPONSE_TYPES = {  # our name: the names in the authors' files
    "chosen": (),
    "chosen_initial": (),  # sampled from the untouched model, by lddyn.engine.recipe
    "chosen_semantic": ("chosen_gptsemantic",),
    "chosen_format": ("chosen_gptformat",),
    "rejected": (),
    "rejected_semantic": ("reject_gptsemantic", "rejected_gptsemantic"),
    "rejected_format": ("reject_gptformat", "rejected_gptformat"),
    "other_train": ("irr_train",),
    "other_test": ("irr_test",),
    "unrelated": ("irr_hum",),
    "chosen_shuffled": ("random_permute",),
    "test_shuffled": ("random_nonhum",),
}
MEANINGS = {  # what each is, in words
    "chosen": "the preferred answer: what finetuning trains",
    "chosen_initial": "what the untouched model says itself, sampled",
    "chosen_semantic": "the preferred answer in other words, with its meaning",
    "chosen_format": "the form of the preferred answer, with another meaning",
    "rejected": "the dispreferred answer",
    "rejected_semantic": "the dispreferred answer in other words, with its meaning",
    "rejected_format": "the form of the dispreferred answer, with another meaning",
    "other_train": "the preferred answer to another training question",
    "other_test": "the preferred answer to a question that is not trained on",
    "unrelated": "a human sentence about something else",
    "chosen_shuffled": "the words of the preferred answer in random order",
    "test_shuffled": "the words of other_test in random order",
}
OUR_NAMES = {alias: name for name, aliases in RESPONSE_TYPES.items() for alias in aliases}

Example = dict[str, str]  # id, prompt, chosen, rejected and what other response types the source has


# --- response types ----------------------------------------------------------------------------------------


def response_types(
    examples: Sequence[Example],
    other_test: Sequence[Example] = (),
    other_train: Sequence[Example] | None = None,
    seed: int = 0,
    kinds: Collection[str] = RESPONSE_TYPES,
) -> dict[str, list[str]]:
    """The responses of each type, one an example: what the source has, and what can be built from it.

    other_train: the chosen response of another example of `other_train` (default: of `examples`), y_{j != u};
    other_test: of an example of `other_test`, which must never be trained on;
    chosen_shuffled, test_shuffled: the words of chosen and of other_test in random order.
    One of `kinds` that the source lacks and that cannot be built is left out, and a warning names it;
    `chosen_initial` is sampled from the model, by `lddyn.sft`. Section 4.1 and appendix D.1; deviation: the authors
    take other_test from the training split.
    """
    given = {name: [e[name] for e in examples] for name in RESPONSE_TYPES if all(name in e for e in examples)}
    derived = {
        "other_train": _of_others(examples, examples if other_train is None else other_train, seed),
        "other_test": _of_others(examples, other_test, seed + 1),
        "chosen_shuffled": _shuffled(given["chosen"], seed),
    }
    found = {name: texts for name, texts in derived.items() if texts} | given
    if "other_test" in found:
        found.setdefault("test_shuffled", _shuffled(found["other_test"], seed + 1))
    left_out = [name for name in kinds if name not in found and name != "chosen_initial"]
    if left_out:
        warnings.warn(f"response types left out, the data lacks them: {', '.join(left_out)}", Caution, stacklevel=2)
    return {name: found[name] for name in RESPONSE_TYPES if name in found and name in kinds}


def _of_others(examples: Sequence[Example], pool: Sequence[Example], seed: int) -> list[str]:
    """For each example the chosen response of another one, never its own text; empty where there is none."""
    order = np.random.default_rng(seed).permutation(len(pool))
    place = {pool[k]["prompt"]: p for p, k in enumerate(order)}
    texts = []
    for number, example in enumerate(examples):
        start = place.get(example["prompt"], number - 1) + 1  # the next in a random cycle: each is used equally often
        cycle = (pool[order[(start + k) % len(pool)]] for k in range(len(pool)))
        others = (o["chosen"] for o in cycle if o["prompt"] != example["prompt"] and o["chosen"] != example["chosen"])
        texts += itertools.islice(others, 1)
    return texts if len(texts) == len(examples) else []


def _shuffled(texts: Sequence[str], seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" " + " ".join(rng.permutation(text.split())) for text in texts]


def words(text: str) -> list[str]:
    """The words of a text in lower case, punctuation left out."""
    return re.findall(r"[\w'.]*\w", text.lower())


def repetition(text: str, n: int = 4) -> float:
    """Share of the runs of `n` words that occurred before in the same text (rep-n), 0 to 1; 0 for a short text."""
    said = words(text)
    runs = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def style_accuracy(chosen: Sequence[str], rejected: Sequence[str], unit: str = "word") -> float:
    """How often a bag of n-grams tells chosen from rejected, on pairs that it was not trained on: 0.5 is chance.

    TF-IDF and logistic regression, 5-fold with both answers of a pair in the same fold; `unit` is "word" (1-2 grams)
    or "char" (2-5 grams within words). Where this is high, a small model finds one shared direction, and DPO lowers
    everything together. Needs at least 5 pairs.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline

    if unit not in ("word", "char"):
        raise unknown("unit", unit, ["word", "char"])
    if len(chosen) != len(rejected) or len(chosen) < 5:
        raise InputError(f"{len(chosen)} chosen and {len(rejected)} rejected responses; at least 5 pairs are needed")
    grams = {"word": {"ngram_range": (1, 2)}, "char": {"analyzer": "char_wb", "ngram_range": (2, 5)}}[unit]
    classifier = make_pipeline(TfidfVectorizer(**grams), LogisticRegression(max_iter=2000))
    pairs = list(range(len(chosen))) * 2
    labels = [1] * len(chosen) + [0] * len(rejected)
    scores = cross_val_score(classifier, [*chosen, *rejected], labels, groups=pairs, cv=GroupKFold(5))
    return float(scores.mean())
