"""Rows of preference data, from a file or from elsewhere, checked one by one: the one reader of them.

A row has a prompt and responses of some of the twelve types, under our names or the authors'. All of them may be texts,
lists of messages or whole dialogues (`Dialogue`). What is wrong is one line with file and row.
"""

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lddyn import Caution, InputError, unknown
from lddyn.data.responses import OUR_NAMES, RESPONSE_TYPES, Example

PROMPTS = ("conversations", "messages")  # other names of a prompt that is a list of messages
SKIP = ("no", "rows", "fields")  # what to leave out where a row is bad
OPTIONAL = tuple(kind for kind in RESPONSE_TYPES if kind not in ("chosen", "rejected"))


# --- dialogues: prompts that are lists of messages, and answers that are texts, messages or whole dialogues ------

ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}
# names that other formats give to roles, and to the two fields of a message
ALIASES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
FIELDS = (("role", "content"), ("from", "value"))

Turn = dict[str, str]  # role, content


class Dialogue(str):
    """A prompt as text, which remembers the turns that it was made of: a chat template renders these instead."""

    turns: list[Turn]

    def __new__(cls, turns: list[Turn]) -> "Dialogue":
        text = super().__new__(cls, "\n".join([*(f"{ROLES[t['role']]}: {t['content']}" for t in turns), "Assistant:"]))
        text.turns = turns
        return text

    def __reduce__(self):
        return Dialogue, (self.turns,)


def turns_of(value: object, what: str) -> list[Turn]:
    """Messages as turns, every field of each checked. `what` names them in the `InputError` when one is wrong."""
    if not isinstance(value, list) or not value:
        raise InputError(f"{what} is not a list of messages")
    return [_turn(message, f"{what}, message {n}") for n, message in enumerate(value, 1)]


def _turn(message: object, what: str) -> Turn:
    if not isinstance(message, dict):
        raise InputError(f"{what} is not an object with role and content")
    role, content = next((pair for pair in FIELDS if pair[0] in message), FIELDS[0])
    for name in (role, content):
        if name not in message:
            raise InputError(f"{what} has no {name!r}")
    if message.get("tool_calls"):
        raise InputError(f"{what} calls a tool, which is not supported")
    speaker = ALIASES.get(message[role], message[role]) if isinstance(message[role], str) else None
    if speaker not in ROLES:
        raise InputError(f"{what} has the role {message[role]!r} (allowed: {', '.join(ROLES)})")
    text = message[content]
    if isinstance(text, list):
        parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in text]
        text = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(text, str):
        raise InputError(f"{what}: its {content} is {_kind(message[content])}, not text or parts of text")
    if not text.strip():
        raise InputError(f"{what} is empty")
    return {"role": speaker, "content": text}


def _kind(value: object) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"


def prompt_of(value: object, what: str) -> str:
    """A prompt as text, or as a `Dialogue` that ends with what the user says."""
    if isinstance(value, str):
        return value
    turns = turns_of(value, what)
    if turns[-1]["role"] != "user":
        raise InputError(f"{what} ends with the {turns[-1]['role']}'s message, not the user's")
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise InputError(f"{what} has a system message that is not the first")
    return Dialogue(turns)


def answer_of(value: object, history: list[Turn] | None, what: str) -> str:
    """The text of an answer: a text, one message, or a dialogue that repeats `history` and adds one message."""
    if isinstance(value, str):
        return value
    turns = turns_of([value] if isinstance(value, dict) else value, what)
    if turns[-1]["role"] != "assistant":
        raise InputError(f"{what} ends with the {turns[-1]['role']}'s message, not the assistant's")
    if len(turns) > 1 and turns[:-1] != history:
        raise InputError(f"{what} has another history than the prompt")
    return turns[-1]["content"]


def history_of(value: object, what: str) -> list[Turn] | None:
    """What comes before the last message of a whole dialogue; None for a text or a single message."""
    if not isinstance(value, list) or len(value) < 2:
        return None
    return turns_of(value, what)[:-1]


def split_text(chosen: str, rejected: str, what: str) -> tuple[str, str, str]:
    """Prompt and both answers from two whole dialogues in Anthropic's form, `\\n\\nHuman: ...\\n\\nAssistant: ...`.

    The prompt is the longest beginning that both share and that ends before an answer.
    """
    marker, ends = "\n\nAssistant:", []
    start = chosen.find(marker)
    while start >= 0 and rejected.startswith(chosen[: start + len(marker)]):
        ends.append(start + len(marker))
        start = chosen.find(marker, start + 1)
    if not ends:
        raise InputError(f"{what}: chosen and rejected answer different prompts")
    answers = chosen[ends[-1] :], rejected[ends[-1] :]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if "\n\nHuman:" in answer:
            raise InputError(f"{what}: {name} goes on after the answer that differs (a further turn of the human)")
    return chosen[: ends[-1]], *answers


# --- rows -------------------------------------------------------------------------------------------------


class FieldError(InputError):
    """An optional field of a row is wrong."""

    def __init__(self, message: str, field: str):
        super().__init__(message)
        self.field = field


def of_file(path: Path | str) -> Iterator[tuple[str, object]]:
    """Where each row of a JSON Lines file stands, and the row, or the `InputError` that it could not be read with.

    Lines end in LF, CR LF or CR; a byte order mark is no part of the first. Raises `InputError` for a file that cannot
    be read at all.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{path} is UTF-16; save it as UTF-8")
    for number, line in enumerate(re.split(rb"\r\n|\n|\r", raw.removeprefix(b"\xef\xbb\xbf")), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parsed(line, where)


def _parsed(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_unique, parse_constant=lambda _: None)
    except UnicodeDecodeError as error:
        return InputError(f"{where}: not UTF-8 (byte {line[error.start]:#x}); save the file as UTF-8")
    except ValueError as error:
        return InputError(f"{where}: invalid JSON ({error})")
    except RecursionError:
        return InputError(f"{where}: invalid JSON (nested too deeply)")


def _unique(pairs: list[tuple[str, object]]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {max(names, key=names.count)!r} twice")
    return row


def examples(
    rows: Iterable[tuple[str, object]],
    source: str,
    required: Sequence[str] = ("chosen", "rejected"),
    limit: int | None = None,
    skip_bad_rows: str = "no",
) -> list[Example]:
    """The rows as examples with `id`, `prompt` and one text a response type, at most `limit` of them.

    `required` are the types that every row must have. The types of the first row are those of all. A bad row raises
    `InputError`, unless `skip_bad_rows` says to leave out such "rows", or for an optional type that is bad in some rows
    this type of all ("fields": an empty `chosen_initial`, say, which the model then samples); a `Caution` counts them.
    """
    if skip_bad_rows not in SKIP:
        raise unknown("skip_bad_rows", skip_bad_rows, SKIP)
    found, names, skipped, dropped = [], {}, [], {}
    for where, row in rows:
        if len(found) == limit:
            break
        while True:
            try:
                example = example_of(where, row, required, found[0] if found else None, dropped)
                if (first := names.setdefault(example["id"], where)) is not where:
                    raise InputError(f"{where}: the id {example['id']!r} again, which {first} has")
                found.append(example)
            except FieldError as error:
                if skip_bad_rows == "fields":
                    dropped.setdefault(error.field, error)
                    continue
                _skip(error, skip_bad_rows, skipped)
            except InputError as error:
                _skip(error, skip_bad_rows, skipped)
            break
    if skipped:
        warnings.warn(f"{source}: skipped {len(skipped)} bad rows; the first: {skipped[0]}", Caution, stacklevel=3)
    for field, error in dropped.items():
        warnings.warn(f"{source}: left out {field} of all rows; the reason: {error}", Caution, stacklevel=3)
    return [{name: text for name, text in e.items() if name not in dropped} for e in found]


def _skip(error: InputError, skip_bad_rows: str, skipped: list[InputError]) -> None:
    if skip_bad_rows == "no":
        hint = "rows leaves out such rows" + (", fields this field" if isinstance(error, FieldError) else "")
        raise InputError(f"{error} (skip_bad_rows {hint})") from None
    skipped.append(error)


def example_of(where: str, row: object, required: Sequence[str], first: Example | None, dropped=()) -> Example:
    """One row as an example; raises `InputError` naming `where` and what is wrong. `first`: whose types count.

    Where prompt and response meet there is one space, on the side of the response, unless a line break or a tab stands
    there (`joined`).
    """
    if isinstance(row, InputError):
        raise row
    if not isinstance(row, dict):
        raise InputError(f"{where}: not a JSON object with a prompt and responses")
    row = {OUR_NAMES.get(name, name): value for name, value in row.items() if value is not None}
    _no_half_characters(where, row)
    prompt, answers = _texts(where, row, dropped)
    expected = [kind for kind in RESPONSE_TYPES if first and kind in first and kind not in dropped]
    for kind in (*required, *expected):
        if kind not in answers:
            error = f"{where}: no field {kind!r}; it has {', '.join(sorted(row)) or 'none'}"
            raise FieldError(error, kind) if kind in OPTIONAL and kind not in required else InputError(error)
    if not answers:
        raise InputError(f"{where}: no response (allowed: {', '.join(RESPONSE_TYPES)})")
    for kind, text in answers.items():
        if first and kind not in expected:
            raise FieldError(f"{where}: field {kind!r}, which the first row does not have", kind)
        if not text.strip():
            error = f"{where}: {kind} is empty"
            raise FieldError(error, kind) if kind in OPTIONAL else InputError(error)
    if {"chosen", "rejected"} <= answers.keys() and answers["chosen"].strip() == answers["rejected"].strip():
        raise InputError(f"{where}: chosen and rejected are equal")
    name = row.get("prompt_id", row.get("id"))
    texts = {kind: joined(prompt, answers[kind]) for kind in RESPONSE_TYPES if kind in answers}
    return {"id": where.split()[-1] if name is None else str(name), "prompt": prompt, **texts}


def joined(prompt: str, response: str) -> str:
    """The response as it follows the prompt: trimmed, after exactly one space.

    After a prompt that ends with a line break or a tab, as in code, it stays as it is.
    """
    if prompt[-1:].isspace():
        return response.strip() if prompt[-1] == " " else response
    return " " + response.strip()


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: JSON may hold half a surrogate pair, which is no character."""
    return not re.search(r"[\ud800-\udfff]", text)


def _no_half_characters(where: str, row: dict) -> None:
    if not is_text(json.dumps(row, ensure_ascii=False)):
        raise InputError(f"{where}: it holds half a surrogate pair (\\ud800 to \\udfff), which is no character")


def _texts(where: str, row: dict, dropped) -> tuple[str, dict[str, str]]:
    """The prompt and the responses of a row as texts; a prompt that is made of messages is a `Dialogue`."""
    given = {kind: row[kind] for kind in RESPONSE_TYPES if kind in row and kind not in dropped}
    asked = next((row[name] for name in ("prompt", *PROMPTS) if name in row), None)
    if asked is None:
        asked, given = _from_answers(where, row, given)
    if not isinstance(asked, str | list):
        raise InputError(f"{where}: prompt is of type {type(asked).__name__}, not a text or a list of messages")
    if isinstance(asked, str) and ("system" in row or any(isinstance(value, list | dict) for value in given.values())):
        asked = _as_messages(where, row, asked, given)
    prompt = prompt_of(asked, f"{where}: prompt")
    if not prompt.strip():
        raise InputError(f"{where}: prompt is empty")
    history = prompt.turns if isinstance(prompt, Dialogue) else None
    answers = {kind: _answer(where, kind, value, history) for kind, value in given.items()}
    if prompt.endswith("\n\nAssistant:") and all(text.startswith(prompt) for text in answers.values()):
        answers = {kind: text.removeprefix(prompt) for kind, text in answers.items()}
    return (prompt if history else prompt.rstrip(" ")), answers


def _as_messages(where: str, row: dict, asked: str, given: dict) -> list:
    """A plain prompt beside answers in messages: what they have before the last one, or a message of the user."""
    for kind, value in given.items():
        if history := history_of(value, f"{where}: {kind}"):
            if asked.strip() not in [turn["content"].strip() for turn in history if turn["role"] == "user"]:
                raise InputError(f"{where}: {kind} has another history than the prompt")
            return history
    system = [{"role": "system", "content": row["system"]}] if "system" in row else []
    return [*system, {"role": "user", "content": asked}]


def _answer(where: str, kind: str, value: object, history: list[Turn] | None) -> str:
    try:
        if not isinstance(value, str | list | dict):
            raise InputError(f"{where}: {kind} is of type {type(value).__name__}, not a text")
        return answer_of(value, history, f"{where}: {kind}")
    except InputError as error:
        raise (FieldError(str(error), kind) if kind in OPTIONAL else error) from None


def _from_answers(where: str, row: dict, given: dict) -> tuple[object, dict]:
    """The prompt that whole dialogues share, where a row has none of its own; and the answers."""
    chosen, rejected = given.get("chosen"), given.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and "\n\nAssistant:" in chosen:
        prompt, chosen, rejected = split_text(chosen, rejected, where)
        return prompt, given | {"chosen": chosen, "rejected": rejected}
    if history := history_of(chosen, f"{where}: chosen"):
        answer_of(chosen, history, f"{where}: chosen")  # the last word must be an answer
        return history, given
    raise InputError(f"{where}: no field 'prompt'; it has {', '.join(sorted(row)) or 'none'}")
