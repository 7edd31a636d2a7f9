"""The pairs that chapter 5 trains on."""

from collections.abc import Sequence

from lddyn import InputError, unknown

# the response that stands for the rejected one
PAIRS = {"as_written": "rejected", "style": "rejected_format", "swapped": "rejected", "rephrase": "chosen_semantic"}


def paired(examples: Sequence[dict], pairs: str) -> list[dict]:
    """The examples with `chosen` and `rejected` as they are trained on.

    as_written: as the data has them; style: against an off-topic text in the form of the rejected answer, which a bag
    of words tells apart; swapped: the roles of every second pair exchanged; rephrase: the chosen answer against its own
    rephrase that keeps the meaning. Raises `InputError` for another name, or when the data lacks what it needs.
    """
    if pairs not in PAIRS:
        raise unknown("pairs", pairs, PAIRS)
    if PAIRS[pairs] not in examples[0]:
        raise InputError(f"pairs={pairs!r} needs the response type {PAIRS[pairs]!r}, which the data lacks")
    result = [e | {"rejected": e[PAIRS[pairs]]} for e in examples]
    if pairs == "swapped":
        result[1::2] = [
            e | {_other_role(name): e[name] for name in e if name[:6] in ("chosen", "reject")} for e in result[1::2]
        ]
    return result


def _other_role(name: str) -> str:
    return name.replace("chosen", "rejected") if name.startswith("chosen") else name.replace("rejected", "chosen")
