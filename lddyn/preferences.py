"""Preference data: the built-in set and other sources, and the response types that are built from them.

Section 4 and appendix D.1. An example is a dictionary with `id`, `prompt` and one text a response type. A prompt ends
without a space and every response starts with exactly one, so `prompt + response` is the text and no type differs in
its first token (in the authors' data some types start with a space and some do not).
"""

import contextlib
import itertools
import json
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from lddyn import Caution, InputError, unknown, world

RESPONSE_TYPES = {  # our name: the names in the authors' files
    "chosen": (),
    "chosen_initial": (),  # sampled from the untouched model, by lddyn.probes
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
OUR_NAMES = {alias: name for name, aliases in RESPONSE_TYPES.items() for alias in aliases}
BUILTIN = Path(__file__).parent / "data" / "preferences.jsonl"
HUB = {  # data: repository, options of load_dataset, names of its splits
    "hh": ("Anthropic/hh-rlhf", {"data_dir": "helpful-base"}, {}),
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", {}, {"train": "train_prefs", "test": "test_prefs"}),
}
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}

Example = dict[str, str]  # id, prompt, chosen, rejected and what other response types the source has


# --- reading -----------------------------------------------------------------------------------------------


def load(data: str = "builtin", split: str = "train", limit: int | None = None, strict: bool = True) -> list[Example]:
    """Preference examples, in the order of the source, at most `limit` of them.

    `data`: "builtin" (splits train, test and pretrain); "world" or another design of it (`lddyn.world`); a JSON Lines
    file in our field names or the authors'; "hh"; "ultrafeedback"; or any data set of the hub, or folder of one, with
    prompt, chosen and rejected as texts or as lists of messages. A file whose rows name no `split` is divided: every
    sixth row is for testing.

    A bad row (invalid JSON, a field missing, empty or not a text, chosen equal to rejected) raises
    `InputError` naming file and line; with `strict=False` such rows are skipped and one warning counts them.
    """
    examples, skipped = [], []
    for where, row in _rows(data, split):
        if len(examples) == limit:
            break
        try:
            examples.append(_example(where, row, examples[:1]))
        except InputError as error:
            if strict:
                raise InputError(f"{error} (strict=False skips such rows)") from None
            skipped.append(error)
    if skipped:
        warnings.warn(f"{data}: skipped {len(skipped)} bad rows; the first: {skipped[0]}", Caution, stacklevel=2)
    if not examples:
        raise InputError(f"{data}: no rows of split {split!r}")
    return examples


def inputs(data: str) -> dict[str, Path]:
    """The file that a source is read from, for `records.run`; none for the hub."""
    path = BUILTIN if data == "builtin" else Path(data)
    return {"preferences": path} if path.is_file() else {}


def _rows(data: str, split: str) -> Iterator[tuple[str, object]]:
    """Where a row comes from, and the row: a dictionary, or the error that it could not be read with."""
    if data in world.DESIGNS:
        yield from ((f"{data} {split}, example {row['id']}", row) for row in world.examples(split, data))
        return
    if data != "builtin" and not Path(data).is_file():
        yield from _hub_rows(data, split)
        return
    path = BUILTIN if data == "builtin" else Path(data)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                row = error
            of = row.get("split") if isinstance(row, dict) else None
            if (of or ("test" if number % 6 == 0 else "train")) == split:
                yield f"{path}, line {number}", row


def _hub_rows(data: str, split: str) -> Iterator[tuple[str, object]]:
    if data not in HUB and "/" not in data and not Path(data).is_dir():
        known = ["builtin", *world.DESIGNS, *HUB]
        raise unknown("data", data, [*known, "a JSON Lines file", "a hub id such as owner/name"])
    repository, options, splits = HUB.get(data, (data, {}, {}))
    try:
        import datasets

        with hub_or_cache():
            rows = datasets.load_dataset(repository, split=splits.get(split, split), **options)
    except ImportError as error:
        raise InputError(f"data {data!r} needs the package datasets: pip install 'lddyn[train]'") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load split {split!r} of data {repository!r} ({first_line(error)}); "
            "without a network: data='builtin', a JSON Lines file, or a data set loaded once before"
        ) from error
    for number, row in enumerate(rows):
        yield f"{repository} {split}, row {number}", row


def first_line(error: Exception) -> str:
    """The first line of an error, for a message of one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextlib.contextmanager
def hub_or_cache():
    """Let the hub's clients go to their cache at once where there is no network; they would retry for 20 s."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE
    if not before:
        try:
            get_session().head(constants.ENDPOINT, timeout=5)
        except Exception:  # whatever the client calls it: no name, no route, refused, timed out
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _example(where: str, row: object, before: Sequence[Example]) -> Example:
    if not isinstance(row, dict):
        raise InputError(f"{where}: {f'invalid JSON ({row})' if isinstance(row, Exception) else 'not a JSON object'}")
    row = _as_texts(where, {OUR_NAMES.get(name, name): value for name, value in row.items() if value is not None})
    types = [name for name in RESPONSE_TYPES if name in row]
    expected = [name for name in RESPONSE_TYPES if name in before[0]] if before else ["chosen", "rejected"]
    for name in dict.fromkeys(["prompt", *expected, *types]):
        if name not in row:
            raise InputError(f"{where}: no field {name!r}; it has {', '.join(sorted(row)) or 'none'}")
        if before and name not in before[0]:
            raise InputError(f"{where}: field {name!r}, which the first row does not have")
        if not isinstance(row[name], str):
            raise InputError(f"{where}: {name} is of type {type(row[name]).__name__}, not a text")
        if not row[name].strip():
            raise InputError(f"{where}: {name} is empty")
    if row["chosen"].strip() == row["rejected"].strip():
        raise InputError(f"{where}: chosen and rejected are equal")
    texts = {name: " " + row[name].strip() for name in types}
    return {"id": str(row.get("id", where.split()[-1])), "prompt": row["prompt"].rstrip(), **texts}


def _as_texts(where: str, row: dict) -> dict:
    """Lists of messages, and whole dialogues as in Anthropic HH, as a prompt and two answers."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    try:
        if isinstance(chosen, list):
            history = row["prompt"] if isinstance(row.get("prompt"), list) else chosen[:-1]
            turns = [f"{ROLES[turn['role']]}: {turn['content']}" for turn in history]
            prompt = "\n".join([*turns, "Assistant:"])
            return row | {"prompt": prompt, "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(f"{where}: messages are not lists of {{role, content}} ({error!r})") from error
    if "prompt" not in row and isinstance(chosen, str) and "\n\nAssistant:" in chosen:
        prompt = chosen[: chosen.rindex("\n\nAssistant:") + len("\n\nAssistant:")]
        if not isinstance(rejected, str) or not rejected.startswith(prompt):
            raise InputError(f"{where}: chosen and rejected answer different prompts")
        return row | {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
    return row


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
