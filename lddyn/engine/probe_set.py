"""What is probed: prompts with twelve kinds of response, as text and as token ids (sections 4.1, 4.2, appendix D).

    probes = ProbeSet.from_jsonl("my_prompts.jsonl")
    table = measure(model, probes.encode(tokenizer))

Training reads its rows through the same encoding.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lddyn import Caution, InputError, unknown
from lddyn.data import preferences, rows
from lddyn.data.responses import RESPONSE_TYPES, Example, response_types
from lddyn.data.rows import Turn, joined

FORMATS = ("auto", "chat", "plain")
BUILT = ("other_train", "other_test", "unrelated", "chosen_shuffled", "test_shuffled")  # from pairs, without a model
END = re.compile(r"<[^<>\s]*>$")  # a token's name: TRL writes the end of text behind plain answers that it tokenises
Model = Any  # a causal LM of `transformers`, perhaps wrapped by PEFT
Tokenizer = Any  # one of `transformers`


def tokens_of(tokenizer: Tokenizer, prompt: str, format: str = "auto") -> list[int]:
    """Token ids of a prompt, with what opens an answer.

    A `Dialogue` is rendered by the tokenizer's chat template where it has one ("auto"); "chat" makes one message of
    the user out of a plain prompt, "plain" takes the text. A beginning token that the tokenizer adds comes once.
    """
    if turns := _turns(tokenizer, prompt, format):
        return _rendered(tokenizer, turns, add_generation_prompt=True)
    return _text_ids(tokenizer, prompt)


def _text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    bare, full = (tokenizer(text, add_special_tokens=special).input_ids for special in (False, True))
    start = [tokenizer.bos_token_id]
    return start + bare if full[:1] == start != bare[:1] else list(bare)


def _turns(tokenizer: Tokenizer, prompt: str, format: str) -> list[Turn] | None:
    """The messages to render, or None where the text itself is shown; `InputError` for "chat" without a template."""
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if format == "chat" and not tokenizer.chat_template:
        raise InputError("format='chat' needs a tokenizer with a chat template; this one has none (plain, auto)")
    if format == "plain" or not tokenizer.chat_template:
        return None
    return getattr(prompt, "turns", None) or ([{"role": "user", "content": prompt}] if format == "chat" else None)


def _rendered(tokenizer: Tokenizer, turns: list[Turn], **options: bool) -> list[int]:
    try:
        return list(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **options))
    except Exception as error:  # templates raise what they like, such as for a system message
        raise InputError(f"the chat template refuses a dialogue: {str(error).splitlines()[0]}") from error


def ends_of_turn(tokenizer: Tokenizer, prompts: Sequence[str], format: str = "auto") -> set[int]:
    """Special tokens with which the tokenizer's template ends an answer to these prompts; none for plain text."""
    turns = next((turns for prompt in prompts if (turns := _turns(tokenizer, prompt, format))), None)
    if turns is None:
        return set()
    ids = _rendered(tokenizer, [*turns, {"role": "assistant", "content": "yes"}])
    return set([i for i in ids if i in tokenizer.all_special_ids or i in tokenizer.added_tokens_decoder][-1:])


def encode_prompt(tokenizer: Tokenizer, prompt: str, max_prompt: int, format: str = "auto") -> list[int]:
    """Token ids of the end of a prompt, at most `max_prompt`; a beginning token stays."""
    return _cut(tokenizer, tokens_of(tokenizer, prompt, format), max_prompt)


def _cut(tokenizer: Tokenizer, ids: list[int], max_prompt: int) -> list[int]:
    start = ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []
    return ids if len(ids) <= max_prompt else start + ids[len(ids) - max_prompt + len(start) :]


def first_difference(a: Sequence[object], b: Sequence[object]) -> int:
    """Place of the first token (or character) in which two sequences differ; or the length of the shorter one."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Encoded(NamedTuple):
    """A probe set as token ids. `responses[type][i]` belongs to `prompts[i]`, whose name is `prompt_ids[i]`."""

    prompt_ids: list[str]
    prompts: list[list[int]]
    responses: dict[str, list[list[int]]]

    def only(self, prompt_id: str) -> "Encoded":
        """The part for one prompt; raises `InputError` when there is no such prompt."""
        if prompt_id not in self.prompt_ids:
            raise unknown("prompt_id", prompt_id, self.prompt_ids)
        return self.part(self.prompt_ids.index(prompt_id), len(self.prompts))

    def part(self, first: int, step: int) -> "Encoded":
        """Every `step`-th prompt from the place `first` on, with its responses."""
        every = slice(first, None, step)
        responses = {kind: each[every] for kind, each in self.responses.items()}
        return Encoded(self.prompt_ids[every], self.prompts[every], responses)


@dataclass(frozen=True)
class ProbeSet:
    """Prompts with responses of some or all of the twelve types, as text.

    `responses[type][i]` is a response to `prompts[i]`. Raises `InputError` for an unknown type or uneven lists.
    """

    prompts: list[str]
    responses: dict[str, list[str]]
    prompt_ids: list[str] = None  # type: ignore[assignment]  # by default the row numbers, see below

    def __post_init__(self) -> None:
        if self.prompt_ids is None:
            object.__setattr__(self, "prompt_ids", [f"{i:05d}" for i in range(len(self.prompts))])
        if not self.prompts or not self.responses:
            raise InputError("a probe set needs at least one prompt and one response type")
        for prompt_id, prompt in zip(self.prompt_ids, self.prompts, strict=False):
            if not prompt.strip():
                raise InputError(f"prompt {prompt_id!r} is empty")
        for kind in self.responses:
            if kind not in RESPONSE_TYPES:
                raise unknown("response type", kind, RESPONSE_TYPES)
        for name, texts in {"different prompt_ids": set(self.prompt_ids), **self.responses}.items():
            if len(texts) != len(self.prompts):
                raise InputError(f"{len(self.prompts)} prompts, but {len(texts)} {name}")

    @classmethod
    def from_jsonl(cls, path: Path | str, skip_bad_rows: str = "no") -> "ProbeSet":
        """Read a JSON Lines file: `prompt`, response types under our names or the authors', perhaps `prompt_id`.

        The types of the first row are those of the set; other fields (the authors' `chosen_selfr`) are left out.
        Rows are read and checked as those of preference data (`lddyn.data.rows`); `skip_bad_rows` as there.
        """
        found = rows.examples(rows.of_file(path), str(path), required=(), skip_bad_rows=skip_bad_rows)
        if not found:
            raise InputError(f"{path}: no rows")
        responses = {kind: [e[kind] for e in found] for kind in RESPONSE_TYPES if kind in found[0]}
        return cls([e["prompt"] for e in found], responses, [e["id"] for e in found])

    @classmethod
    def from_dataset(
        cls,
        data: Any,
        split: str = "train",
        held_out: Any = None,
        n: int = 24,
        n_test: int = 8,
        seed: int = 0,
        skip_bad_rows: str = "no",
    ) -> "ProbeSet":
        """`from_pairs` of a `datasets.Dataset`, of a split of a `DatasetDict`, or of what `preferences.load` takes.

        The last is a JSON Lines file, a folder or a hub id, as text. `held_out`: pairs that are not trained on, as a
        data set, or as the name of another split; none unless it is given.
        """
        if isinstance(data, Mapping):
            for name in (split, held_out):
                if isinstance(name, str) and name not in data:
                    raise unknown("split", name, data)
            data, held_out = data[split], data[held_out] if isinstance(held_out, str) else held_out
        elif isinstance(data, str | Path):
            source = str(data)
            data = preferences.load(source, split, skip_bad_rows=skip_bad_rows)
            if isinstance(held_out, str):
                held_out = preferences.load(source, held_out, skip_bad_rows=skip_bad_rows)
        if isinstance(held_out, str):
            raise InputError(f"held_out={held_out!r} names a split, but data is a single one: pass the other data set")
        return cls.from_pairs(data, held_out or (), n, n_test, seed, skip_bad_rows)

    @classmethod
    def from_pairs(
        cls,
        train: Iterable[Mapping[str, Any]],
        held_out: Iterable[Mapping[str, Any]] = (),
        n: int = 24,
        n_test: int = 8,
        seed: int = 0,
        skip_bad_rows: str = "no",
    ) -> "ProbeSet":
        """Draw `n` pairs that are trained on and `n_test` that are not; the types that need no model are built (BUILT).

        `train`, `held_out`: rows with `prompt`, `chosen` and `rejected` as texts or messages, or with a prompt that
        both answers begin with, as TRL takes them: `trainer.train_dataset`, or a list of dictionaries. Rows of a stream
        are the first ones. `unrelated` is from the built-in set; `other_test` needs `held_out`. Prompt ids start with
        `train/` or `test/`. Raises `InputError` for rows without these texts, and for a bad row that is drawn, unless
        `skip_bad_rows` says to draw another ("rows").
        """
        _check_pairs(_pair(next(iter(train), {})))
        of_train, of_test = (
            _drawn(pairs, split, count, seed, skip_bad_rows)
            for pairs, split, count in ((train, "train", n), (held_out, "test", n_test))
        )
        if not of_train:
            raise InputError("none of the pairs that are trained on can be probed")
        elsewhere = cycle(e["unrelated"] for e in preferences.load("builtin", "test"))
        examples = [{"unrelated": text} | e for e, text in zip([*of_train, *of_test], elsewhere, strict=False)]
        kinds = [kind for kind in RESPONSE_TYPES if kind in examples[0] or kind in BUILT]
        if len(of_test) < 2:  # none has an answer to another prompt
            kinds = [kind for kind in kinds if kind in examples[0] or kind not in ("other_test", "test_shuffled")]
        responses = response_types(examples, of_test, of_train, seed, kinds)
        ids = [f"{split}/{e['id']}" for split, part in (("train", of_train), ("test", of_test)) for e in part]
        return cls([e["prompt"] for e in examples], responses, ids)

    def encode(
        self, tokenizer: Tokenizer, max_prompt: int = 256, max_response: int = 256, format: str = "auto"
    ) -> Encoded:
        """Tokenise once: the end of each prompt; the start of each response, with end of text if all of it fits.

        Prompt and response are split as one text, as in training: a response begins where prompt and whole text part,
        which is the same place for all responses to a prompt. A `Dialogue` is rendered by the tokenizer's chat template
        (`tokens_of`), and its responses end as the template ends a turn; others end with the end of text, once.
        A `Caution` names the first text that the tokenizer does not give back. Raises `InputError` where a pair of
        chosen and rejected is equal within `max_response` tokens.
        """
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-text token (eos_token), which every response ends with")
        if max_prompt < 2 or max_response < 1:
            raise InputError(f"max_prompt={max_prompt} and max_response={max_response} must be at least 2 and 1")
        tails: dict[str, list[list[int]]] = {kind: [] for kind in self.responses}
        prompts: list[list[int]] = []
        lost: list[str] = []
        for i, prompt in enumerate(self.prompts):
            answers = {kind: texts[i] for kind, texts in self.responses.items()}
            head, wholes = _whole(tokenizer, prompt, answers, format)
            start = min(first_difference(head, whole) for whole in wholes.values())
            prompts.append(_cut(tokenizer, head[:start], max_prompt))
            for kind, whole in wholes.items():
                tails[kind].append(whole[start:][:max_response])
            lost += _lost(tokenizer, prompt, answers, wholes, f"prompt {self.prompt_ids[i]!r}", format)
        if lost:
            warnings.warn(
                f"{len(lost)} texts are not what their tokens say; the first: {lost[0]}", Caution, stacklevel=2
            )
        encoded = Encoded(self.prompt_ids, prompts, tails)
        if {"chosen", "rejected"} <= tails.keys():
            pairs = zip(self.prompt_ids, tails["chosen"], tails["rejected"], strict=True)
            equal = [name for name, chosen, rejected in pairs if chosen == rejected]
            if equal:
                raise InputError(
                    f"{len(equal)} of {len(prompts)} pairs are equal within max_response={max_response} tokens, "
                    f"the first: prompt {equal[0]!r}; raise max_response or leave them out"
                )
        return encoded


def _check_pairs(first: dict[str, Any]) -> None:
    """Raise `InputError` unless the first row has the texts of a pair; a `Caution` where they are joined otherwise."""
    if lacking := [kind for kind in ("chosen", "rejected") if kind not in first]:
        raise InputError(
            f"the pairs have no texts of {' and '.join(lacking)}, their columns are {', '.join(first) or 'none'}: "
            "make the probes of the data set before it is tokenised (ProbeSet.from_dataset), or of a file"
        )
    prompt, chosen = first.get("prompt"), first["chosen"]
    if isinstance(prompt, str) and isinstance(chosen, str) and re.fullmatch(r"\S\S", prompt[-1:] + chosen[:1]):
        warnings.warn(
            "answers follow their prompts without a space, so training sees other tokens than the probes, "
            "which put one there",
            Caution,
            stacklevel=3,
        )


def _drawn(pairs: Any, split: str, count: int, seed: int, skip_bad_rows: str) -> list[Example]:
    """So many examples of a split: drawn where the number of rows is known, else the first ones."""
    if hasattr(pairs, "__len__"):
        order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
        numbered: Iterator[tuple[int, Any]] = ((number, pairs[number]) for number in order)
    else:
        numbered = enumerate(pairs)
    named = ((f"{split} pairs, row {number}", _pair(row)) for number, row in numbered)
    return rows.examples(named, f"{split} pairs", limit=count, skip_bad_rows=skip_bad_rows)


def _pair(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what TRL's trainers write into texts, and with the prompt that it leaves to its two answers."""
    row = dict(row)
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "chosen_ids" in row:
            chosen, rejected = END.sub("", chosen), END.sub("", rejected)
        if not any(row.get(name) for name in ("prompt", *rows.PROMPTS)) and "\n\nAssistant:" not in chosen:
            start = first_difference(chosen, rejected)
            start -= chosen[:start].endswith(" ")  # the space belongs to the answers
            row["prompt"], chosen, rejected = chosen[:start], chosen[start:], rejected[start:]
        row |= {"chosen": chosen, "rejected": rejected}
    return row


def _whole(
    tokenizer: Tokenizer, prompt: str, answers: dict[str, str], format: str
) -> tuple[list[int], dict[str, list[int]]]:
    """Tokens of a prompt alone, and of it with each answer, to the end."""
    if turns := _turns(tokenizer, prompt, format):
        said = {kind: [*turns, {"role": "assistant", "content": text.strip()}] for kind, text in answers.items()}
        head = _rendered(tokenizer, turns, add_generation_prompt=True)
        return head, {kind: _rendered(tokenizer, each) for kind, each in said.items()}
    end, wholes = tokenizer.eos_token_id, {}
    for kind, text in answers.items():
        ids = _text_ids(tokenizer, prompt + joined(prompt, text))
        wholes[kind] = ids if ids[-1] == end else [*ids, end]
    return _text_ids(tokenizer, prompt), wholes


def _lost(
    tokenizer: Tokenizer,
    prompt: str,
    answers: dict[str, str],
    wholes: dict[str, list[int]],
    where: str,
    format: str,
) -> Iterator[str]:
    """What is wrong with texts whose tokens do not give them back; a template's words around them do not count."""
    asked = "" if _turns(tokenizer, prompt, format) else prompt
    for kind, ids in wholes.items():
        shown = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if (answers[kind].strip() or " ") not in shown or asked not in shown:
            yield f"{where} with {kind}, of which the tokenizer makes {shown[-80:]!r}"
