"""Rows of people's files: read as they are meant, or one line with file and row; never another text, never a traceback.

`LDDYN_FUZZ=2000 pytest tests/data/test_rows.py` draws as many mutated files.
"""

import copy
import json
import os
import random
import warnings

import pytest

from lddyn import InputError
from lddyn.data import preferences
from lddyn.data.rows import Dialogue
from lddyn.engine.probe_set import ProbeSet

USER, YES, NO = ({"role": r, "content": c} for r, c in (("user", "Hi"), ("assistant", "Yes."), ("assistant", "No.")))
MORE, SYSTEM = {"role": "user", "content": "Well?"}, {"role": "system", "content": "Be brief."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Well?\n\nAssistant:"
PLAIN = {"prompt": "Q", "chosen": "a", "rejected": "b"}
TURN = {"role": "user", "content": "Hi"}


def write(path, rows, end="\n", encoding="utf-8", start=b""):
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + end for row in rows)
    path.write_bytes(start + text.encode(encoding))
    return str(path)


def asked(turns):
    return str(Dialogue(turns))


READ = {  # row: prompt, chosen, rejected
    "messages everywhere": ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, (asked([TURN]), " Yes.", " No.")),
    "messages, then texts": ({"prompt": [USER], "chosen": "Yes.", "rejected": "No."}, (asked([TURN]), " Yes.", " No.")),
    "a message and a text": ({"prompt": [USER], "chosen": [YES], "rejected": "No."}, (asked([TURN]), " Yes.", " No.")),
    "a text, then messages": ({"prompt": "Hi", "chosen": [YES], "rejected": [NO]}, (asked([TURN]), " Yes.", " No.")),
    "whole dialogues": ({"chosen": [USER, YES], "rejected": [USER, NO]}, (asked([TURN]), " Yes.", " No.")),
    "a first question and whole dialogues": (
        {"prompt": "Hi", "chosen": [USER, YES, MORE, YES], "rejected": [USER, YES, MORE, NO]},
        (asked([USER, YES, MORE]), " Yes.", " No."),
    ),
    "parts of text": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}],
         "chosen": [YES], "rejected": [NO]},
        (asked([TURN]), " Yes.", " No."),
    ),
    "a system message beside a prompt": (
        {"system": "Be brief.", "prompt": "Hi", "chosen": "Yes.", "rejected": "No."},
        (asked([SYSTEM, TURN]), " Yes.", " No."),
    ),
    "another format's names": (
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yes."},
         "rejected": {"from": "gpt", "value": "No."}},
        (asked([TURN]), " Yes.", " No."),
    ),
    "Anthropic's dialogues": ({"chosen": HH + " Yes.", "rejected": HH + " No."}, (HH, " Yes.", " No.")),
    "the same with a prompt": (
        {"prompt": HH, "chosen": HH + " Yes.", "rejected": HH + " No."}, (HH, " Yes.", " No."),
    ),
    "an answer that quotes the assistant": (
        {"chosen": HH + " Sure.\n\nAssistant: a bot", "rejected": HH + " No."},
        (HH, " Sure.\n\nAssistant: a bot", " No."),
    ),
    "code": (
        {"prompt": "def f(x):\n", "chosen": "    return x\n", "rejected": "    pass\n"},
        ("def f(x):\n", "    return x\n", "    pass\n"),
    ),
    "other scripts": (
        {"prompt": "你好吗？", "chosen": "很好😀。", "rejected": "不好。"}, ("你好吗？", " 很好😀。", " 不好。"),
    ),
}  # fmt: skip
REFUSED = {
    "other histories": (
        {"chosen": [USER, YES], "rejected": [MORE, NO]}, "rejected has another history than the prompt",
    ),
    "a longer answer": (
        {"chosen": [USER, YES], "rejected": [USER, NO, MORE, NO]}, "rejected has another history than the prompt",
    ),
    "the user has the last word": (
        {"chosen": [USER, YES, MORE], "rejected": [USER, NO, MORE]}, "chosen ends with the user's message",
    ),
    "an answer of the user": (
        {"prompt": [USER], "chosen": [YES], "rejected": [USER]}, "rejected ends with the user's message",
    ),
    "a prompt of the assistant": (
        {"prompt": [USER, YES], "chosen": [YES], "rejected": [NO]}, "prompt ends with the assistant's message",
    ),
    "a tool": (
        {"prompt": [USER, {"role": "tool", "content": "20 C"}], "chosen": [YES], "rejected": [NO]}, "the role 'tool'",
    ),
    "a call of a tool": (
        {"prompt": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}, MORE], "chosen": "a",
         "rejected": "b"},
        "message 2 calls a tool",
    ),
    "no content": (
        {"prompt": [{"role": "user", "content": None}], "chosen": "a", "rejected": "b"}, "its content is missing",
    ),
    "an image": (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"},
        "not text or parts of text",
    ),
    "a turn too many": ({"chosen": HH + " Yes.", "rejected": HH + " No.\n\nHuman: Why?"}, "rejected goes on after"),
    "other prompts": (
        {"chosen": HH + " Yes.", "rejected": "\n\nHuman: Ho\n\nAssistant: No"}, "answer different prompts",
    ),
    "half a character": ('{"prompt": "Q", "chosen": "a \\ud83d", "rejected": "b"}', "half a surrogate pair"),
    "a field twice": ('{"prompt": "Q", "chosen": "a", "chosen": "c", "rejected": "b"}', "the field 'chosen' twice"),
    "no prompt": ({"question": "Q", "chosen": "a", "rejected": "b"}, "no field 'prompt'; it has chosen, question"),
    "an id again": (PLAIN | {"id": "first"}, "the id 'first' again, which .*line 1 has"),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_what_people_have_is_read_as_it_is_meant(tmp_path, case):
    row, expected = READ[case]
    (example,) = preferences.load(write(tmp_path / "mine.jsonl", [row]))
    assert (example["prompt"], example["chosen"], example["rejected"]) == expected
    probes = ProbeSet.from_jsonl(tmp_path / "mine.jsonl")  # the same reader
    assert (probes.prompts[0], probes.responses["chosen"][0]) == expected[:2]


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_one_line_with_file_and_row(tmp_path, case):
    row, message = REFUSED[case]
    path = write(tmp_path / "mine.jsonl", [PLAIN | {"id": "first"}, row])
    with pytest.raises(InputError, match=rf"mine\.jsonl, line 2.*{message}") as error:
        preferences.load(path)
    assert "\n" not in str(error.value) and "skip_bad_rows rows leaves out such rows" in str(error.value)
    with pytest.warns(UserWarning, match="skipped 1 bad rows"):
        assert len(preferences.load(path, skip_bad_rows="rows")) == 1


@pytest.mark.parametrize(
    "how", [{"start": b"\xef\xbb\xbf"}, {"end": "\r\n"}, {"end": "\r"}, {"end": "\n\n"}, {"end": "\n \n"}]
)
def test_line_ends_blank_lines_and_a_byte_order_mark_change_nothing(tmp_path, how):
    rows = [PLAIN | {"prompt": f"Q {i}"} for i in range(12)]
    path = write(tmp_path / "mine.jsonl", rows, **how)
    assert [e["prompt"] for e in preferences.load(path, "test")] == ["Q 5", "Q 11"]
    assert len(preferences.load(path)) == 10 and len(ProbeSet.from_jsonl(path).prompts) == 12


@pytest.mark.parametrize(
    ("encoding", "message"),
    [("utf-16", "is UTF-16; save it as UTF-8"), ("latin-1", r"line 1: not UTF-8 \(byte 0xe9\)")],
)
def test_another_encoding_is_named(tmp_path, encoding, message):
    path = write(tmp_path / "mine.jsonl", [PLAIN | {"prompt": "Café?"}], encoding=encoding)
    with pytest.raises(InputError, match=message):
        preferences.load(path)


def test_an_id_that_is_missing_is_the_line(tmp_path):
    rows = [
        '{"prompt_id": null, "prompt": "Q", "chosen": "a", "rejected": "b"}',
        json.dumps(PLAIN | {"id": float("nan")}),
    ]
    assert [e["id"] for e in preferences.load(write(tmp_path / "mine.jsonl", rows))] == ["1", "2"]


def test_names_of_splits_are_understood_by_their_beginning(tmp_path):
    rows = [PLAIN | {"split": name} for name in ("train_prefs", "validation", "test_prefs", "dev")]
    path = write(tmp_path / "mine.jsonl", rows)
    assert (len(preferences.load(path)), len(preferences.load(path, "test"))) == (1, 3)
    few = write(tmp_path / "few.jsonl", [PLAIN] * 3)
    with pytest.raises(InputError, match=r"no rows of split 'test' \(a file that names no split is divided"):
        preferences.load(few, "test")


def test_an_optional_field_costs_itself_or_the_row_as_asked(tmp_path):
    rows = [PLAIN | {"chosen_initial": text, "unrelated": "c"} for text in ("x", " ", "z")]
    path = write(tmp_path / "mine.jsonl", rows)
    with pytest.raises(InputError, match=r"line 2: chosen_initial is empty \(skip_bad_rows rows .*, fields this field"):
        preferences.load(path)
    with pytest.warns(UserWarning, match="skipped 1"):
        assert len(preferences.load(path, skip_bad_rows="rows")) == 2
    with pytest.warns(UserWarning, match="left out chosen_initial of all rows"):
        found = preferences.load(path, skip_bad_rows="fields")
    assert len(found) == 3 and all(list(e) == ["id", "prompt", "chosen", "rejected", "unrelated"] for e in found)
    with pytest.raises(InputError, match="unknown skip_bad_rows 'row'; did you mean 'rows'"):
        preferences.load(path, skip_bad_rows="row")


def leaves(value: object) -> str:
    """All texts in a row, one after the other."""
    if isinstance(value, dict):
        value = [part for name, part in value.items() if name != "type"]
    parts = value if isinstance(value, list) else []
    return value if isinstance(value, str) else "".join(map(leaves, parts))


# --- mutated files -----------------------------------------------------------------------------------------


def mutated(draw: random.Random, row: dict) -> tuple[object, bool]:
    """A row after one accident, and whether its texts are still those that were written."""
    row = copy.deepcopy(row)
    where = draw.choice([name for name in ("prompt", "chosen", "rejected") if name in row])
    accident = draw.choice(
        ["gone", "null", "number", "empty", "text", "list", "role", "content", "extra", "order", "cut"]
    )
    if accident == "gone":
        del row[where]
    elif accident in ("null", "number", "empty", "text", "list"):
        row[where] = {"null": None, "number": 3, "empty": " ", "text": "other text", "list": []}[accident]
        return row, False
    elif accident in ("role", "content") and isinstance(row[where], list):
        row[where][-1][accident] = draw.choice([None, 7, "tool", "", ["x"], {"type": "text"}])
    elif accident == "extra":
        row |= draw.choice(
            [{"note": [1, {}]}, {"id": draw.choice([None, draw.randrange(10**9)])}, {"score": float("inf")}]
        )
        return row, True
    elif accident == "order":
        return dict(reversed(row.items())), True
    elif accident == "cut":
        return json.dumps(row)[: draw.randrange(1, 30)], False
    return row, False


@pytest.mark.parametrize("seed", range(int(os.environ.get("LDDYN_FUZZ", "60"))))
def test_a_mutated_file_gives_its_texts_or_one_line(tmp_path, seed):
    draw = random.Random(seed)
    good = [READ[name] for name in draw.sample(sorted(READ), 3)]
    rows, expected, clean = [], [], True
    for row, texts in good:
        changed, same = mutated(draw, row) if draw.random() < 0.6 else (row, True)
        rows.append(changed)
        expected.append(texts)
        clean &= same
    path = write(tmp_path / "mine.jsonl", rows, end=draw.choice(["\n", "\r\n", "\n\n"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = preferences.load(path, skip_bad_rows=draw.choice(["no", "rows", "fields"]))
        except InputError as error:
            assert "\n" not in str(error) and "mine.jsonl" in str(error)
            assert not clean, "a good file was refused"
            return
    given = [(e["prompt"], e["chosen"], e["rejected"]) for e in found]
    if clean:
        assert given == expected
    for example in found:  # what is read was written in one row: nothing is made up or mixed
        asked_for = [turn["content"] for turn in getattr(example["prompt"], "turns", [{"content": example["prompt"]}])]
        texts = [text.strip() for text in (*asked_for, example["chosen"], example["rejected"])]
        assert any(all(text in leaves(row) for text in texts) for row in rows), texts
