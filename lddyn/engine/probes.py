"""Twelve kinds of response to each prompt, and how likely a model finds them (sections 3.1, 4.1, 4.2, appendix D).

    probes = ProbeSet.from_jsonl("my_prompts.jsonl")
    table = measure(model, probes.encode(tokenizer))

A prompt's keys and values are computed once and shared by all its responses; the output layer sees only the
positions that predict a token of a response; batches hold texts of similar length. Probing changes nothing in
the model: training mode, gradients and random state stay as they were.
"""

import copy
import inspect
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache

from lddyn import Caution, InputError, unknown
from lddyn.data.responses import RESPONSE_TYPES
from lddyn.theory.logprobs import AT_ONCE, TokenStats, token_stats

QUANTITIES = ["logp", "argmax_logp", "rest_logp", "entropy", "sq_norm", "a_norm", "residual_norm", "rank"]
METRICS = ["logp_sum", "logp_mean", "argmax_logp_sum", "argmax_logp_mean", "rest_logp_sum", "entropy_mean"]
METRICS += ["sq_norm_mean", "a_norm_mean", "residual_norm_mean", "rank_mean", "tokens"]
BATCH_TOKENS = {"cpu": 2048, "cuda": 2**15}
TOLERANCE = {torch.bfloat16: 0.25, torch.float16: 0.05}  # nats per token, where it is not 1e-4
_checked = WeakKeyDictionary()  # model: ((dtype, attention, ...), longest text in tokens, why it cannot share)


# --- what is probed ----------------------------------------------------------------------------------------


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


# --- how likely the model finds it -------------------------------------------------------------------------


def measure(model, encoded: Encoded, batch_tokens: int | None = None, share: bool = True) -> pd.DataFrame:
    """Every metric of every response: a table `prompt_id, response_type, metric, value`.

    Sums and means are over the tokens of a response, end of text included, along the response's own path:
    `logp_sum`, `logp_mean` (log pi(y)); `argmax_logp_sum`, `argmax_logp_mean` (log pi(y*), y* the likeliest token at
    each position); `rest_logp_sum` (log(1 - pi(y*))); `entropy_mean`; all in nats. `sq_norm_mean` (||pi||^2);
    `a_norm_mean` (||A||_F = sqrt(V - 2 + V ||pi||^2), appendix C); `residual_norm_mean` (||pi - e_y||);
    `rank_mean` (0 is the arg max); `tokens`.

    Where the model cannot share a prompt between its responses (checked at the first call, on two texts, against
    one sequence at a time), all texts are computed in full and a warning says why; with `share=False` they are
    without one. `batch_tokens` bounds the memory. Raises `InputError` when a text does not fit the model.
    """
    kinds = list(encoded.responses)
    values = np.zeros((len(encoded.prompts) * len(kinds), len(METRICS)))
    with _probing(model):
        for texts, lengths, stats in _walk(model, encoded, batch_tokens, share):
            values[texts] = _of_responses(stats, np.array(lengths), _config(model).vocab_size)
    return pd.DataFrame(
        {
            "prompt_id": np.repeat(encoded.prompt_ids, len(kinds) * len(METRICS)),
            "response_type": np.tile(np.repeat(kinds, len(METRICS)), len(encoded.prompts)),
            "metric": np.tile(METRICS, len(values)),
            "value": values.ravel(),
        }
    )


def _of_responses(stats: TokenStats, lengths: np.ndarray, vocabulary: int) -> np.ndarray:
    """From one number per token to METRICS per response, summed in float64. Returns (responses, metrics)."""
    tokens = {name: value.double().cpu().numpy() for name, value in stats._asdict().items()}
    tokens["a_norm"] = np.sqrt(vocabulary - 2 + vocabulary * tokens["sq_norm"])
    tokens["residual_norm"] = np.sqrt(tokens["residual_sq"])
    starts = lengths.cumsum() - lengths
    sums = {f"{name}_sum": np.add.reduceat(tokens[name], starts) for name in QUANTITIES} | {"tokens": lengths}
    means = {f"{name}_mean": sums[f"{name}_sum"] / lengths for name in QUANTITIES}
    return np.stack([(sums | means)[metric] for metric in METRICS], axis=1)


def per_token(model, tokenizer, encoded: Encoded, prompt_id: str) -> pd.DataFrame:
    """The responses to one prompt, token by token: `response_type, position, token` and the fields of `TokenStats`.

    `token` and `argmax` are text. Raises `InputError` when there is no such prompt or a text does not fit the model.
    """
    one, rows = encoded.only(prompt_id), []
    kinds = list(one.responses)
    with _probing(model):
        for texts, lengths, stats in _walk(model, one, None, share=True):
            places = [(kinds[text], i) for text, length in zip(texts, lengths, strict=True) for i in range(length)]
            for (kind, i), *values in zip(places, *(field.tolist() for field in stats), strict=True):
                rows.append((kind, i, tokenizer.decode(one.responses[kind][0][i]), *values))
    table = pd.DataFrame(rows, columns=["response_type", "position", "token", *TokenStats._fields])
    table["argmax"] = [tokenizer.decode(token) for token in table["argmax"]]
    order = table.response_type.map(kinds.index)
    return table.iloc[np.lexsort([table.position, order])].reset_index(drop=True)


# --- the engine --------------------------------------------------------------------------------------------

# A text is a prompt and one of its responses, named by prompt number * response types + response type. Both ways
# of computing yield (texts, their lengths in tokens, TokenStats of all their tokens in this order).
Walk = Iterator[tuple[list[int], list[int], TokenStats]]


def _walk(model, encoded: Encoded, batch_tokens: int | None, share: bool) -> Walk:
    model = getattr(model, "module", model)  # out of DistributedDataParallel
    prompts = encoded.prompts
    responses = [list(of_prompt) for of_prompt in zip(*encoded.responses.values(), strict=True)]
    texts = [(prompt, response) for prompt, each in enumerate(responses) for response in each]
    _check_fits(model, encoded, texts)
    budget = batch_tokens or BATCH_TOKENS.get(model.device.type, 2048)
    why_not = _sharing(model, prompts, texts) if share else None
    if why_not:
        name, cost = type(model).__name__, "each text is computed in full, which takes longer"
        warnings.warn(f"{name} cannot share a prompt between its responses ({why_not}): {cost}", Caution, stacklevel=3)
    walk = _shared if share and not why_not else _plain
    yield from walk(model, prompts, texts, range(len(texts)), budget)


def _shared(model, prompts, texts, wanted, budget: int) -> Walk:
    """Each prompt once; its keys and values serve all its responses; the output layer only where needed."""
    body, head = _body_and_head(model)
    keyword, of_prompt = cache_keyword(type(body)), {}
    for text in wanted:
        of_prompt.setdefault(texts[text][0], []).append(text)
    for chunk in _batches(of_prompt, lambda p: len(prompts[p]), budget):
        ids, mask = _padded([prompts[p] for p in chunk], model.device)  # (prompts, P)
        keys_values, width = DynamicCache(), ids.shape[1]
        positions = torch.arange(width, device=model.device).expand_as(ids)
        hidden = body(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{keyword: keys_values}
        ).last_hidden_state  # (prompts, P, width)
        ends = mask.sum(1) - 1
        last = hidden[torch.arange(len(chunk), device=ends.device), ends]  # predicts the first token of each response
        place = {p: i for i, p in enumerate(chunk)}
        mine = [text for p in chunk for text in of_prompt[p]]
        for rows in _batches(mine, lambda text, width=width: width + len(texts[text][1]), budget):
            of = torch.tensor([place[texts[text][0]] for text in rows], device=model.device)
            targets, real = _padded([texts[text][1] for text in rows], model.device)  # (rows, R)
            hidden = last[of].unsqueeze(1)
            if targets.shape[1] > 1:
                positions = mask[of].sum(1, keepdim=True) + torch.arange(targets.shape[1] - 1, device=model.device)
                later = body(
                    input_ids=targets[:, :-1],
                    attention_mask=torch.cat([mask[of], real[:, :-1]], 1),
                    position_ids=positions,
                    use_cache=True,
                    **{keyword: _rows_of(keys_values, of)},
                ).last_hidden_state
                hidden = torch.cat([hidden, later], 1)  # (rows, R, width)
            real = real.bool()
            yield rows, [len(texts[text][1]) for text in rows], _through_head(head, hidden[real], targets[real])


def _plain(model, prompts, texts, wanted, budget: int) -> Walk:
    """Every text in full, in padded batches of similar length."""
    for rows in _batches(wanted, lambda text: len(prompts[texts[text][0]]) + len(texts[text][1]), budget):
        ids, mask = _padded([prompts[texts[text][0]] + texts[text][1] for text in rows], model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (rows, tokens, V)
        parts, lengths = [], [len(texts[text][1]) for text in rows]
        for row, (end, length) in enumerate(zip(mask.sum(1).tolist(), lengths, strict=True)):
            parts.append(token_stats(logits[row, end - length - 1 : end - 1], ids[row, end - length : end]))
        yield rows, lengths, _joined(parts)


def _through_head(head: Callable, hidden: Tensor, targets: Tensor) -> TokenStats:
    """Logits of a few hundred tokens at a time, measured and dropped. hidden: (tokens, width); targets: (tokens)."""
    at_once = max(256, 8 * AT_ONCE.get(hidden.device.type, 2**20) // head.weight.shape[0])
    pieces = zip(hidden.split(at_once), targets.split(at_once), strict=True)
    return _joined([token_stats(head(h), y) for h, y in pieces])


def _joined(parts: list[TokenStats]) -> TokenStats:
    return TokenStats(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _batches(keys, length: Callable, budget: int) -> Iterator[list]:
    """Group keys of similar length, longest first; a padded batch holds at most `budget` tokens, or one key."""
    batch = []
    for key in sorted(keys, key=length, reverse=True):
        if batch and (len(batch) + 1) * length(batch[0]) > budget:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def _padded(sequences: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask: a padded query still sees real keys, so nothing becomes not-a-number."""
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    return ids, mask


@cache
def cache_keyword(kind: type) -> str:
    """What the `forward` of this class of models calls keys and values: `cache` from transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def _rows_of(keys_values: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache whose row i is row `rows[i]` of `keys_values`, which stays as it is."""
    selected = copy.copy(keys_values)
    selected.layers = [copy.copy(layer) for layer in keys_values.layers]
    selected.batch_select_indices(rows)
    return selected


def _unwrapped(model):
    """The model of `transformers` inside PEFT's wrapper, with its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _body_and_head(model):
    """The transformer without its output layer, and the output layer."""
    model = _unwrapped(model)
    return model.base_model, model.get_output_embeddings()


def _config(model):
    return getattr(model, "module", model).config.get_text_config()


def _sharing(model, prompts, texts) -> str | None:
    """Why this model cannot share prompts, or None; checked once for a model, and again for longer texts."""
    state = model.dtype, model.device, _config(model)._attn_implementation
    longest = max(len(prompts[prompt]) + len(response) for prompt, response in texts)
    then, verified, why_not = _checked.get(model, (None, 0, None))
    if then != state or verified < longest:
        why_not = _why_not_shared(model, prompts, texts)
        _checked[model] = state, longest, why_not
    return why_not


def _why_not_shared(model, prompts, texts) -> str | None:
    """Compare both ways on the longest response to the shortest and to the longest prompt; None where they agree."""
    ends = {pick(range(len(prompts)), key=lambda p: len(prompts[p])) for pick in (min, max)}
    few = [max((i for i, (p, _) in enumerate(texts) if p == end), key=lambda i: len(texts[i][1])) for end in ends]
    exact = {rows[0]: stats.logp for rows, _, stats in _plain(model, prompts, texts, few, budget=1)}
    tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    tolerance = TOLERANCE.get(model.dtype, 0.05 if tf32 else 1e-4)
    try:
        body, head = _body_and_head(model)
        prompt, response = prompts[texts[few[0]][0]], texts[few[0]][1]
        hidden = body(input_ids=_padded([prompt + response], model.device)[0], use_cache=False).last_hidden_state
        logp = _through_head(head, hidden[0, len(prompt) - 1 : -1], torch.tensor(response, device=model.device)).logp
        if not torch.allclose(logp, exact[few[0]], rtol=0, atol=tolerance / 10):
            return "its logits are more than its output layer applied to its last hidden state"
        for rows, _, stats in _shared(model, prompts, texts, few, budget=2**30):
            worst = (stats.logp - torch.cat([exact[row] for row in rows])).abs().max().item()
    except Exception as error:  # whatever a model that was not written for this raises
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None if worst <= tolerance else f"the two ways differ by {worst:.2g} nats a token"


def _check_fits(model, encoded: Encoded, texts) -> None:
    config = _config(model)
    room = getattr(config, "max_position_embeddings", None) or float("inf")
    for number, (prompt, response) in enumerate(texts):
        ids = encoded.prompts[prompt] + response
        if len(ids) <= room and max(ids) < config.vocab_size:
            continue
        where = f"prompt {encoded.prompt_ids[prompt]!r} with {list(encoded.responses)[number % len(encoded.responses)]}"
        if len(ids) > room:
            raise InputError(f"{where} has {len(ids)} tokens, the model takes {room}: lower max_prompt or max_response")
        raise InputError(f"{where} has token {max(ids)}, the model knows {config.vocab_size}: wrong tokenizer?")


@contextmanager
def _probing(model) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


# --- what the model says by itself -------------------------------------------------------------------------


class Decoded(NamedTuple):
    """One continuation: its text, its token ids (end of text included when reached) and its log-probability in nats."""

    text: str
    tokens: list[int]
    logp: float  # summed over the tokens


def greedy(
    model, tokenizer, prompts, max_new_tokens: int, max_prompt: int = 256, batch_size: int = 32
) -> list[Decoded]:
    """Greedy decoding: the likeliest token after each prompt, again and again, until end of text or `max_new_tokens`.

    Unlike y* along a given response, every token follows the model's own earlier choices (section 4.2).
    """
    return _decode(
        model, tokenizer, prompts, max_new_tokens, max_prompt, batch_size, lambda logits, *_: logits.argmax(-1)
    )


def sample(
    model, tokenizer, prompts, max_new_tokens: int, seed: int, max_prompt: int = 256, batch_size: int = 32
) -> list[Decoded]:
    """Sample at temperature 1, as for `chosen_initial`, from the untouched model.

    The randomness of a prompt depends on `seed` and its place among `prompts`, not on the batches, and the global
    random state is neither used nor changed.
    """
    draws = torch.rand(len(prompts), max_new_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def choose(logits: Tensor, rows: list[int], step: int) -> Tensor:
        cumulative = logits.double().softmax(-1).cumsum(-1)  # (rows, V)
        u = draws[rows, step].to(logits.device).unsqueeze(-1) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, u, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)

    return _decode(model, tokenizer, prompts, max_new_tokens, max_prompt, batch_size, choose)


def _decode(model, tokenizer, prompts, max_new_tokens, max_prompt, batch_size, choose) -> list[Decoded]:
    encoded = [encode_prompt(tokenizer, prompt, max_prompt) for prompt in prompts]
    end, results = tokenizer.eos_token_id, {}
    keyword = cache_keyword(type(_unwrapped(model)))
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    with _probing(model):
        for rows in (order[i : i + batch_size] for i in range(0, len(order), batch_size)):
            width = max(len(encoded[i]) for i in rows)
            pad = [width - len(encoded[i]) for i in rows]
            ids = torch.tensor([[end] * n + encoded[i] for n, i in zip(pad, rows, strict=True)], device=model.device)
            mask = torch.tensor([[0] * n + [1] * (width - n) for n in pad], device=model.device)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            keys_values, tokens, logps = None, [], []
            for step in range(max_new_tokens):
                out = model(
                    input_ids=ids, attention_mask=mask, position_ids=positions,
                    use_cache=True, logits_to_keep=1, **{keyword: keys_values},
                )  # fmt: skip
                keys_values, logits = getattr(out, keyword), out.logits[:, -1]  # (rows, V)
                ids = choose(logits, rows, step).unsqueeze(1)
                tokens.append(ids)
                logps.append(token_stats(logits, ids.squeeze(1)).logp)
                if (torch.cat(tokens, 1) == end).any(1).all():
                    break
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
                positions = positions[:, -1:] + 1
            tokens, logps = torch.cat(tokens, 1).tolist(), torch.stack(logps, 1).double()
            for row, (i, mine) in enumerate(zip(rows, tokens, strict=True)):
                mine = mine[: mine.index(end) + 1] if end in mine else mine
                text = tokenizer.decode(mine, skip_special_tokens=True)
                results[i] = Decoded(text, mine, logps[row, : len(mine)].sum().item())
    return [results[i] for i in range(len(prompts))]
