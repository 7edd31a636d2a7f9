"""Preference data: the built-in set and other sources, and the response types that are built from them.

Section 4 and appendix D.1. An example is a dictionary with `id`, `prompt` and one text a response type. A prompt ends
without a space and every response starts with exactly one, so `prompt + response` is the text and no type differs in
its first token (in the authors' data some types start with a space and some do not).
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from lddyn import Caution, InputError, unknown
from lddyn.data import hub, responses, world

BUILTIN = Path(__file__).parent / "preferences.jsonl"
HUB = {  # data: repository, options of load_dataset, names of its splits
    "hh": ("Anthropic/hh-rlhf", {"data_dir": "helpful-base"}, {}),
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", {}, {"train": "train_prefs", "test": "test_prefs"}),
}
ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}


# --- reading -----------------------------------------------------------------------------------------------


def load(
    data: str = "builtin", split: str = "train", limit: int | None = None, strict: bool = True
) -> list[responses.Example]:
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

        with hub.hub_or_cache():
            rows = datasets.load_dataset(repository, split=splits.get(split, split), **options)
    except ImportError as error:
        raise InputError(f"data {data!r} needs the package datasets: pip install 'lddyn[train]'") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load split {split!r} of data {repository!r} ({hub.first_line(error)}); "
            "without a network: data='builtin', a JSON Lines file, or a data set loaded once before"
        ) from error
    for number, row in enumerate(rows):
        yield f"{repository} {split}, row {number}", row


def _example(where: str, row: object, before: Sequence[responses.Example]) -> responses.Example:
    if not isinstance(row, dict):
        raise InputError(f"{where}: {f'invalid JSON ({row})' if isinstance(row, Exception) else 'not a JSON object'}")
    row = _as_texts(
        where, {responses.OUR_NAMES.get(name, name): value for name, value in row.items() if value is not None}
    )
    types = [name for name in responses.RESPONSE_TYPES if name in row]
    expected = [name for name in responses.RESPONSE_TYPES if name in before[0]] if before else ["chosen", "rejected"]
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
