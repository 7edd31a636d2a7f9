"""Dialogues: prompts that are lists of messages, and answers that may be texts, messages or whole dialogues."""

from lddyn import InputError

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
