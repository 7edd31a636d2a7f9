"""What is probed: prompts with twelve kinds of response, as text and as token ids (sections 4.1, 4.2, appendix D).

probes = ProbeSet.from_jsonl("my_prompts.jsonl")
table = measure(model, probes.encode(tokenizer))
"""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lddyn import Caution, InputError, unknown
from lddyn.data.responses import RESPONSE_TYPES


def with_space(prompt: str, response: str) -> str:
    """The response with exactly one space before it, or none after a prompt that ends in white space."""
    return response.strip() if prompt[-1:].isspace() else " " + response.strip()


def encode_prompt(tokenizer, prompt: str, max_prompt: int) -> list[int]:
    """Token ids of the end of a prompt, at most `max_prompt`; a beginning token that the tokenizer adds stays."""
    ids, added = (tokenizer(prompt, add_special_tokens=special).input_ids for special in (False, True))
    start = added[:1] if len(added) > len(ids) and added[0] == tokenizer.bos_token_id else []
    return start + ids[-(max_prompt - len(start)) :]


class Encoded(NamedTuple):
    """A probe set as token ids. `responses[type][i]` belongs to `prompts[i]`, whose name is `prompt_ids[i]`."""

    prompt_ids: list[str]
    prompts: list[list[int]]
    responses: dict[str, list[list[int]]]

    def only(self, prompt_id: str) -> "Encoded":
        """The part for one prompt; raises `InputError` when there is no such prompt."""
        if prompt_id not in self.prompt_ids:
            raise unknown("prompt_id", prompt_id, self.prompt_ids)
        i = self.prompt_ids.index(prompt_id)
        return Encoded([prompt_id], [self.prompts[i]], {kind: [r[i]] for kind, r in self.responses.items()})


@dataclass(frozen=True)
class ProbeSet:
    """Prompts with responses of some or all of the twelve types, as text.

    `responses[type][i]` is a response to `prompts[i]`. Raises `InputError` for an unknown type or uneven lists.
    """

    prompts: list[str]
    responses: dict[str, list[str]]
    prompt_ids: list[str] | None = None  # by default the row numbers

    def __post_init__(self):
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
    def from_jsonl(cls, path: Path | str, strict: bool = True) -> "ProbeSet":
        """Read a JSON Lines file: `prompt`, response types under our names or the authors', perhaps `prompt_id`.

        The types of the first row are those of the set; other fields (the authors' `chosen_selfr`) are left out.
        A row that is not such an object, lacks one of the types, holds something else than text, an empty text, or
        a chosen equal to the rejected raises `InputError` naming file and line; with `strict=False` such
        rows are skipped and one warning counts them.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would also split at U+2028
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read probes from {path}: {error}") from error
        names, texts, skipped = [], [], []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                name, row = _row(line, f"{path}, line {number}", texts[0] if texts else None)
            except InputError as error:
                if strict:
                    raise InputError(f"{error} (strict=False skips such rows)") from None
                skipped.append(error)
                continue
            names.append(name or f"{len(names):05d}")
            texts.append(row)
        if skipped:
            warnings.warn(f"{path}: skipped {len(skipped)} bad rows; the first: {skipped[0]}", Caution, stacklevel=2)
        if not texts:
            raise InputError(f"{path}: no rows")
        if len(set(names)) < len(names):
            raise InputError(f"{path}: the same prompt_id twice, {max(names, key=names.count)!r}")
        responses = {kind: [row[kind] for row in texts] for kind in RESPONSE_TYPES if kind in texts[0]}
        return cls([row["prompt"] for row in texts], responses, names)

    def encode(self, tokenizer, max_prompt: int = 256, max_response: int = 256) -> Encoded:
        """Tokenise once: the end of each prompt; the start of each response, with end of text if all of it fits.

        Leading space and end of text are the same for all types. Prompt and response are split as one text, as
        in training, unless a token would reach over the boundary.
        """
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-text token (eos_token), which every response ends with")
        if max_prompt < 2 or max_response < 1:
            raise InputError(f"max_prompt={max_prompt} and max_response={max_response} must be at least 2 and 1")
        heads = [tokenizer(prompt, add_special_tokens=False).input_ids for prompt in self.prompts]

        def encode(texts: Sequence[str]) -> list[list[int]]:
            texts = [with_space(prompt, text) for prompt, text in zip(self.prompts, texts, strict=True)]
            whole = [prompt + text for prompt, text in zip(self.prompts, texts, strict=True)]
            whole = tokenizer(whole, add_special_tokens=False).input_ids
            ids = []
            for head, both, text in zip(heads, whole, texts, strict=True):
                fits = both[: len(head)] == head
                tail = both[len(head) :] if fits else tokenizer(text, add_special_tokens=False).input_ids
                ids.append([*tail, tokenizer.eos_token_id][:max_response])
            return ids

        prompts = [encode_prompt(tokenizer, prompt, max_prompt) for prompt in self.prompts]
        return Encoded(self.prompt_ids, prompts, {kind: encode(r) for kind, r in self.responses.items()})


def _row(line: str, where: str, first: dict | None) -> tuple[str, dict[str, str]]:
    """The name of a row ("" when it has none) and its texts under our names."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: not an object with a prompt and responses")
    ours = {name: kind for kind, names in RESPONSE_TYPES.items() for name in (kind, *names)} | {"prompt": "prompt"}
    texts = {ours[name]: text for name, text in row.items() if name in ours}
    for name in first or ("prompt",):
        if name not in texts:
            raise InputError(f"{where}: no field {name!r}")
    if first is None and len(texts) == 1:
        raise InputError(f"{where}: no response (allowed: {', '.join(RESPONSE_TYPES)})")
    for name in texts:
        if first and name not in first:
            raise InputError(f"{where}: field {name!r}, which the first row does not have")
        if not isinstance(texts[name], str) or not texts[name].strip():
            raise InputError(f"{where}: {name!r} must be text that is not empty, not {texts[name]!r}")
    if {"chosen", "rejected"} <= texts.keys() and texts["chosen"].strip() == texts["rejected"].strip():
        raise InputError(f"{where}: chosen and rejected are equal")
    return str(row.get("prompt_id", row.get("id", ""))), texts
