"""Preference data: the built-in set and other sources, and the response types that are built from them.

Section 4 and appendix D.1. An example is a dictionary with `id`, `prompt` and one text a response type. A prompt ends
without a space and every response starts with exactly one, so `prompt + response` is the text and no type differs in
its first token (in the authors' data some types start with a space and some do not).
"""

import json
from collections.abc import Iterator
from pathlib import Path

from lddyn import InputError, first_line, hub_or_cache, unknown
from lddyn.data import responses, rows, world

BUILTIN = Path(__file__).parent / "preferences.jsonl"
PLAUSIBLE = BUILTIN.with_name("plausible.json")
HUB = {  # data: repository, options of load_dataset, names of its splits
    "hh": ("Anthropic/hh-rlhf", {"data_dir": "helpful-base"}, {}),
    "ultrafeedback": ("HuggingFaceH4/ultrafeedback_binarized", {}, {"train": "train_prefs", "test": "test_prefs"}),
}


# --- reading -----------------------------------------------------------------------------------------------


def load(
    data: str = "builtin", split: str = "train", limit: int | None = None, skip_bad_rows: str = "no"
) -> list[responses.Example]:
    """Preference examples, in the order of the source, at most `limit` of them.

    `data`: "builtin" (splits train, test and pretrain); "world" or another design of it (`lddyn.data.world`); a JSON
    Lines file in our field names or the authors'; "hh"; "ultrafeedback"; or any data set of the hub, or folder of one.
    Prompts and answers may be texts, messages or whole dialogues (`rows`). A file whose rows name no `split` is
    divided: every sixth row is for testing.

    A bad row (invalid JSON, a field missing, empty or not a text, chosen equal to rejected, an id twice) raises
    `InputError` naming file and line; `skip_bad_rows` ("rows" or "fields") leaves out such rows, or optional fields
    that are bad, and a warning counts them.
    """
    found = rows.examples(_rows(data, split), data, limit=limit, skip_bad_rows=skip_bad_rows)
    if not found:
        hint = (
            " (a file that names no split is divided: every sixth row is for testing)" if Path(data).is_file() else ""
        )
        raise InputError(f"{data}: no rows of split {split!r}{hint}")
    return found


def inputs(data: str) -> dict[str, Path]:
    """The file that a source is read from, for `cache.run`; none for the hub."""
    path = BUILTIN if data == "builtin" else Path(data)
    return {"preferences": path} if path.is_file() else {}


def plausible(data: str) -> dict[str, str]:
    """Answers in the form of `chosen` that could be meant: example id -> text; of the built-in set, its first 60.

    `chosen_format` keeps the form too, and leaves the subject for markets, trams and soup; these stay with the subject
    and answer another question about it.
    """
    return json.loads(PLAUSIBLE.read_text()) if data == "builtin" else {}


def _rows(data: str, split: str) -> Iterator[tuple[str, object]]:
    """Where a row comes from, and the row: an object, or the error that it could not be read with."""
    if data in world.DESIGNS:
        yield from ((f"{data} {split}, example {row['id']}", row) for row in world.examples(split, data))
        return
    if data != "builtin" and not Path(data).is_file():
        yield from _hub_rows(data, split)
        return
    source = rows.of_file(BUILTIN if data == "builtin" else data)
    for number, (where, row) in enumerate(source, 1):
        of = row.get("split") if isinstance(row, dict) else None
        if of is None:
            of = "test" if number % 6 == 0 else "train"
        if _is_of(str(of), split):
            yield where, row


def _is_of(name: str, split: str) -> bool:
    """Whether a row's split, such as train_prefs or validation, is the one that is asked for."""
    test = name.lower().startswith(("test", "val", "dev", "eval"))
    return name == split or (split == "test" and test) or (split == "train" and name.lower().startswith("train"))


def _hub_rows(data: str, split: str) -> Iterator[tuple[str, object]]:
    if data not in HUB and "/" not in data and not Path(data).is_dir():
        known = ["builtin", *world.DESIGNS, *HUB]
        raise unknown("data", data, [*known, "a JSON Lines file", "a hub id such as owner/name"])
    repository, options, splits = HUB.get(data, (data, {}, {}))
    try:
        import datasets

        with hub_or_cache():
            found = datasets.load_dataset(repository, split=splits.get(split, split), **options)
    except ImportError as error:
        raise InputError(f"data {data!r} needs the package datasets: pip install 'lddyn[train]'") from error
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load split {split!r} of data {repository!r} ({first_line(error)}); "
            "without a network: data='builtin', a JSON Lines file, or a data set loaded once before"
        ) from error
    for number, row in enumerate(found):
        yield f"{repository} {split}, row {number}", row
