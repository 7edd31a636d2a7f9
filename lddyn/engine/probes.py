"""How likely a model finds twelve kinds of response, and what it says itself (sections 3.1, 4.1, 4.2, appendix D).

    probes = ProbeSet.from_jsonl("my_prompts.jsonl")
    table = measure(model, probes.encode(tokenizer))

A prompt's keys and values are computed once and shared by all its responses; the output layer sees only the
positions that predict a token of a response; batches hold texts of similar length. Probing changes nothing in
the model: training mode, gradients and random state stay as they were.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache

from lddyn import Caution, InputError
from lddyn.engine.probe_set import Encoded, Model, Tokenizer, encode_prompt, ends_of_turn
from lddyn.theory.logprobs import AT_ONCE, TokenStats, token_stats

QUANTITIES = ["logp", "argmax_logp", "rest_logp", "entropy", "sq_norm", "a_norm", "residual_norm", "rank"]
METRICS = ["logp_sum", "logp_mean", "argmax_logp_sum", "argmax_logp_mean", "rest_logp_sum", "entropy_mean"]
METRICS += ["sq_norm_mean", "a_norm_mean", "residual_norm_mean", "rank_mean", "tokens"]
BATCH_TOKENS = {"cpu": 2048, "cuda": 2**15}
TOLERANCE = {torch.bfloat16: 0.25, torch.float16: 0.05}  # nats per token, where it is not 1e-4
_checked: WeakKeyDictionary[Model, "Checked"] = WeakKeyDictionary()
# whether nothing stands between a model's body, its output layer and its logits
_direct: WeakKeyDictionary[Model, bool] = WeakKeyDictionary()


# --- how likely the model finds it -------------------------------------------------------------------------


def measure(model: Model, encoded: Encoded, batch_tokens: int | None = None, share: bool = True) -> pd.DataFrame:
    """Every metric of every response: a table `prompt_id, response_type, metric, value`.

    Sums and means are over the tokens of a response, end of text included, along the response's own path:
    `logp_sum`, `logp_mean` (log pi(y)); `argmax_logp_sum`, `argmax_logp_mean` (log pi(y*), y* the likeliest token at
    each position); `rest_logp_sum` (log(1 - pi(y*))); `entropy_mean`; all in nats. `sq_norm_mean` (||pi||^2);
    `a_norm_mean` (||A||_F = sqrt(V - 2 + V ||pi||^2), appendix C); `residual_norm_mean` (||pi - e_y||);
    `rank_mean` (0 is the arg max); `tokens`.

    Where the model cannot share a prompt between its responses (`_way`), all texts are computed in full and a warning
    says why; with `share=False` they are without one. `batch_tokens` bounds the memory. Raises `InputError` when a
    text does not fit the model.
    """
    kinds = list(encoded.responses)
    values = np.zeros((len(encoded.prompts) * len(kinds), len(METRICS)))
    columns = unwrapped(getattr(model, "module", model)).get_output_embeddings().weight.shape[0]  # V
    with probing(model):
        for texts, lengths, stats in _walk(model, encoded, batch_tokens, share):
            values[texts] = _of_responses(stats, np.array(lengths), columns)
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


def per_token(model: Model, tokenizer: Tokenizer, encoded: Encoded, prompt_id: str) -> pd.DataFrame:
    """The responses to one prompt, token by token: `response_type, position, token` and the fields of `TokenStats`.

    `token` and `argmax` are text. Raises `InputError` when there is no such prompt or a text does not fit the model.
    """
    one, rows = encoded.only(prompt_id), []
    kinds = list(one.responses)
    with probing(model):
        for texts, lengths, stats in _walk(model, one, None, share=True):
            places = [(kinds[text], i) for text, length in zip(texts, lengths, strict=True) for i in range(length)]
            for (kind, i), *values in zip(places, *(field.tolist() for field in stats), strict=True):
                rows.append((kind, i, tokenizer.decode(one.responses[kind][0][i]), *values))
    table = pd.DataFrame(rows, columns=["response_type", "position", "token", *TokenStats._fields])
    table["argmax"] = [tokenizer.decode(token) for token in table["argmax"]]
    order = table.response_type.map(kinds.index)
    return table.iloc[np.lexsort([table.position, order])].reset_index(drop=True)


# --- the engine --------------------------------------------------------------------------------------------

# A text is a prompt and one of its responses, named by prompt number * response types + response type. All ways
# of computing yield (texts, their lengths in tokens, TokenStats of all their tokens in this order).
Walk = Iterator[tuple[list[int], list[int], TokenStats]]
Prompts = list[list[int]]
Texts = list[tuple[int, list[int]]]  # number of the prompt, response

# From the quickest to the one that is right for every model. `mixed`: a prompt serves all its responses, prompts of
# several lengths in one batch. `aligned`: the same with prompts of one length in a batch, so that no padding lies
# between a prompt and its response: it would count in a sliding window. `full`: each text from its beginning, in
# padded batches. `alone`: the same, without padding: some rotary frequencies depend on the longest text of a batch.
WAYS = ("mixed", "aligned", "full", "alone")


def _walk(model: Model, encoded: Encoded, batch_tokens: int | None, share: bool) -> Walk:
    model = getattr(model, "module", model)  # out of DistributedDataParallel
    prompts = encoded.prompts
    responses = [list(of_prompt) for of_prompt in zip(*encoded.responses.values(), strict=True)]
    texts = [(prompt, response) for prompt, each in enumerate(responses) for response in each]
    _check_fits(model, encoded, texts)
    budget = batch_tokens or BATCH_TOKENS.get(model.device.type, 2048)
    way, why_not = _way(model, prompts, texts, share)
    if why_not and share:
        name, cost = type(model).__name__, "each text is computed in full, which takes longer"
        warnings.warn(f"{name} cannot share a prompt between its responses ({why_not}): {cost}", Caution, stacklevel=3)
    yield from _computed(way, model, prompts, texts, range(len(texts)), budget)


def _computed(way: str, model: Model, prompts: Prompts, texts: Texts, wanted: Sequence[int], budget: int) -> Walk:
    if way in ("mixed", "aligned"):
        yield from _shared(model, prompts, texts, wanted, budget, aligned=way == "aligned")
    else:
        with _rope_at_start(model) as restart:
            yield from _plain(model, prompts, texts, wanted, budget, restart, alone=way == "alone")


def _shared(model: Model, prompts: Prompts, texts: Texts, wanted: Sequence[int], budget: int, aligned: bool) -> Walk:
    """Each prompt once; its keys and values serve all its responses; the output layer only where needed."""
    inside = unwrapped(model)
    direct = _head_is_last(inside)
    keyword = cache_keyword((inside.base_model if direct else inside).__class__)
    of_prompt: dict[int, list[int]] = {}
    for number in wanted:
        of_prompt.setdefault(texts[number][0], []).append(number)
    for chunk in _batches(of_prompt, lambda p: len(prompts[p]), budget, aligned):
        ids, mask = padded([prompts[p] for p in chunk], model.device)  # (prompts, P)
        keys_values, width = DynamicCache(), ids.shape[1]
        positions = torch.arange(width, device=model.device).expand_as(ids)
        ends = positions == mask.sum(1, keepdim=True) - 1  # predict the first token of each response
        text = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, keyword: keys_values}
        last = _states(inside, direct, ends, text)  # (prompts, width or V)
        place = {p: i for i, p in enumerate(chunk)}
        lengths = {text: width + len(texts[text][1]) for p in chunk for text in of_prompt[p]}
        for rows in _batches(lengths, lengths.__getitem__, budget):
            of = torch.tensor([place[texts[text][0]] for text in rows], device=model.device)
            targets, real = padded([texts[text][1] for text in rows], model.device)  # (rows, R)
            states = last[of].unsqueeze(1)
            if targets.shape[1] > 1:
                positions = mask[of].sum(1, keepdim=True) + torch.arange(targets.shape[1] - 1, device=model.device)
                text = {"input_ids": targets[:, :-1], "position_ids": positions}
                text |= {"attention_mask": torch.cat([mask[of], real[:, :-1]], 1)}
                later = _states(inside, direct, None, text | {keyword: _rows_of(keys_values, of)})
                states = torch.cat([states, later], 1)  # (rows, R, width or V)
            real = real.bool()
            yield rows, [len(texts[text][1]) for text in rows], _measured(inside, direct, states[real], targets[real])


def _states(inside: Model, direct: bool, places: Tensor | None, text: dict[str, Any]) -> Tensor:
    """Hidden states under the output layer where that is `direct`, else logits; at `places`, (rows, tokens), or all."""
    if direct:
        hidden: Tensor = inside.base_model(**text, use_cache=True).last_hidden_state
        return hidden if places is None else hidden[places]
    with nullcontext() if places is None else head_sees(inside, places):
        logits: Tensor = inside(**text, use_cache=True).logits
        return logits


def _measured(inside: Model, direct: bool, states: Tensor, targets: Tensor) -> TokenStats:
    """Statistics of `_states`, a few hundred tokens at a time. states: (tokens, width or V); targets: (tokens)."""
    head = inside.get_output_embeddings()
    at_once = max(256, 8 * AT_ONCE.get(states.device.type, 2**20) // head.weight.shape[0])
    pieces = zip(states.split(at_once), targets.split(at_once), strict=True)
    return _joined([token_stats(head(s) if direct else s, y) for s, y in pieces])


def _plain(
    model: Model,
    prompts: Prompts,
    texts: Texts,
    wanted: Sequence[int],
    budget: int,
    restart: Callable[[], None],
    alone: bool,
) -> Walk:
    """Every text in full, in batches of similar length, or of one length."""
    for rows in _batches(wanted, lambda text: len(prompts[texts[text][0]]) + len(texts[text][1]), budget, alone):
        restart()
        ids, mask = padded([prompts[texts[text][0]] + texts[text][1] for text in rows], model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logits = logits[:, -ids.shape[1] :]  # (rows, tokens, V): adapters may put virtual tokens in front
        parts, lengths = [], [len(texts[text][1]) for text in rows]
        for row, (end, length) in enumerate(zip(mask.sum(1).tolist(), lengths, strict=True)):
            parts.append(token_stats(logits[row, end - length - 1 : end - 1], ids[row, end - length : end]))
        yield rows, lengths, _joined(parts)


@contextmanager
def _rope_at_start(model: Model) -> Iterator[Callable[[], None]]:
    """A function that forgets the longest text seen so far, which some rotary embeddings keep; undone at the end."""
    kept = []
    for module in model.modules():
        for name in [n for n in vars(module) if n.endswith("max_seq_len_cached")]:
            prefix = name.removesuffix("max_seq_len_cached")
            if isinstance(getattr(module, f"{prefix}original_inv_freq", None), Tensor):
                kept.append((module, prefix, getattr(module, name), getattr(module, f"{prefix}inv_freq")))

    def restart() -> None:
        for module, prefix, _, _ in kept:
            setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
            setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq").clone())

    try:
        yield restart
    finally:
        for module, prefix, longest, frequencies in kept:
            setattr(module, f"{prefix}max_seq_len_cached", longest)
            setattr(module, f"{prefix}inv_freq", frequencies)


def _joined(parts: list[TokenStats]) -> TokenStats:
    return TokenStats(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _batches(keys: Iterable[int], length: Callable[[int], int], budget: int, same: bool = False) -> Iterator[list[int]]:
    """Group keys of similar length, or the `same`, longest first; a batch holds at most `budget` tokens, or one key."""
    batch: list[int] = []
    for key in sorted(keys, key=length, reverse=True):
        if batch and ((len(batch) + 1) * length(batch[0]) > budget or (same and length(key) != length(batch[0]))):
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch


def padded(sequences: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask: a padded query still sees real keys, so nothing becomes not-a-number."""
    width = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (width - len(s)) for s in sequences], device=device)
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=device)
    return ids, mask


@cache
def cache_keyword(kind: type) -> str:
    """What the `forward` of this class of models calls keys and values: `cache` from transformers 5.24 on."""
    # all of them, because one may pass on **kwargs
    forwards = [inspect.signature(vars(c)["forward"]) for c in kind.__mro__ if "forward" in vars(c)]
    return "cache" if any("cache" in f.parameters for f in forwards) else "past_key_values"


def _rows_of(keys_values: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache whose row i is row `rows[i]` of `keys_values`, which stays as it is."""
    selected = copy.copy(keys_values)
    selected.layers = [copy.copy(layer) for layer in keys_values.layers]
    selected.batch_select_indices(rows)
    return selected


def unwrapped(model: Model) -> Model:
    """The model of `transformers` inside PEFT's wrapper, with its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def head_sees(model: Model, places: Tensor) -> Iterator[None]:
    """The output layer gets the hidden states at `places`, (batch, tokens), only; its logits are (places, V)."""
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, hidden: (hidden[0][places],))
    try:
        yield
    finally:
        hook.remove()


def _config(model: Model) -> Any:
    inside: Model = getattr(model, "module", model)
    return inside.config.get_text_config()


# --- how a model may be computed ---------------------------------------------------------------------------


class Checked(NamedTuple):
    """For which model, texts and weights a way of computing was verified."""

    state: tuple[object, ...]  # dtype, device, attention
    extent: tuple[int, ...]  # longest prompt, minus the shortest, longest response, longest text
    norms: Tensor  # of all weights
    way: str
    why_not: str | None


def _way(model: Model, prompts: Prompts, texts: Texts, share: bool) -> tuple[str, str | None]:
    """The quickest of WAYS that is right here, and why it is not one that shares prompts.

    What the configuration says is not tried. The rest is verified against texts computed one by one: at the first call,
    for longer texts, and when the norm of any weight has moved by a tenth.
    """
    state = (model.dtype, model.device, _config(model)._attn_implementation, share)
    sizes = [len(prompt) for prompt in prompts]
    totals = [len(prompts[p]) + len(response) for p, response in texts]
    extent = (max(sizes), -min(sizes), max(len(response) for _, response in texts), max(totals))
    norms = torch.stack([p.detach().float().norm() for p in model.parameters()])
    then = _checked.get(model)
    if (
        then is None
        or then.state != state
        or any(now > before for now, before in zip(extent, then.extent, strict=True))
        or ((norms - then.norms).abs() > 0.1 * then.norms).any()
    ):
        then = _checked[model] = Checked(state, extent, norms, *_verified(model, prompts, texts, share))
    return then.way, then.why_not


def _verified(model: Model, prompts: Prompts, texts: Texts, share: bool) -> tuple[str, str | None]:
    first, why_not = _by_configuration(model)
    candidates = [way for way in WAYS[WAYS.index(first) :] if share or way in ("full", "alone")]
    few = _telling(prompts, texts)
    exact = {rows[0]: stats.logp for rows, _, stats in _computed("alone", model, prompts, texts, few, budget=1)}
    tf32 = model.device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    tolerance = TOLERANCE.get(model.dtype, 0.05 if tf32 else 1e-4)
    for way in candidates[:-1]:
        try:
            worst = max(
                (stats.logp - torch.cat([exact[row] for row in rows])).abs().max().item()
                for rows, _, stats in _computed(way, model, prompts, texts, few, budget=2**30)
            )
        except Exception as error:  # whatever a model that was not written for this raises
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            if worst <= tolerance:
                return way, why_not
            problem = f"the two ways differ by {worst:.2g} nats a token"
        why_not = why_not or (problem if way == "aligned" else None)
    return candidates[-1], why_not


def _by_configuration(model: Model) -> tuple[str, str | None]:
    """The first of WAYS that may be right by a model's configuration, and why it is none that shares prompts."""
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.peft_type.value in ("MULTITASK_PROMPT_TUNING", "POLY"):
        raise InputError(
            f"{adapter.peft_type.value} adapters cannot be probed: they want to know the task of each text"
        )
    if adapter is not None and adapter.is_prompt_learning:
        return "full", f"{adapter.peft_type.value} puts virtual tokens before each text"
    config = _config(model).to_dict()
    if any(kind in str(config.get("rope_parameters")) for kind in ("'dynamic'", "'longrope'")):
        return "alone", "its rotary frequencies depend on the length of a text"
    windows = ("sliding_window", "attention_chunk_size", "window_size")
    return "aligned" if any(config.get(name) for name in windows) else "mixed", None


def _telling(prompts: Prompts, texts: Texts) -> list[int]:
    """Texts in which the ways would differ if they do: extreme prompts, the longest response, the longest text."""
    shortest, longest = (pick(range(len(prompts)), key=lambda p: len(prompts[p])) for pick in (min, max))
    answered = [
        max((i for i, (p, _) in enumerate(texts) if p == end), key=lambda i: len(texts[i][1]))
        for end in (shortest, longest)
    ]
    by_response = max(range(len(texts)), key=lambda i: len(texts[i][1]))
    by_text = max(range(len(texts)), key=lambda i: len(prompts[texts[i][0]]) + len(texts[i][1]))
    return list(dict.fromkeys([*answered, by_response, by_text]))


@torch.no_grad()
def _head_is_last(inside: Model) -> bool:
    """Whether logits are the output layer applied to the last hidden states of the body, and nothing else.

    Seen from what comes in and out of that layer, with its output a thousand times as large: a soft cap would show
    whatever the size of the logits is today.
    """
    if inside not in _direct:
        seen: dict[str, Tensor] = {}
        head = inside.get_output_embeddings()
        hooks = [
            head.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0])),
            head.register_forward_hook(lambda _, __, out: seen.update(out=1000 * out) or seen["out"]),
        ]
        ids = torch.arange(1, 4, device=inside.device).unsqueeze(0)
        try:
            logits = inside(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        hidden = inside.base_model(input_ids=ids, use_cache=False).last_hidden_state
        _direct[inside] = torch.equal(logits, seen["out"].to(logits.dtype)) and torch.equal(hidden, seen["hidden"])
    return _direct[inside]


def _check_fits(model: Model, encoded: Encoded, texts: Texts) -> None:
    room = getattr(_config(model), "max_position_embeddings", None) or float("inf")
    room -= getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    embedding = model.get_input_embeddings()
    known = getattr(embedding, "base_layer", embedding).weight.shape[0]
    for number, (prompt, response) in enumerate(texts):
        ids = encoded.prompts[prompt] + response
        if len(ids) <= room and max(ids) < known:
            continue
        where = f"prompt {encoded.prompt_ids[prompt]!r} with {list(encoded.responses)[number % len(encoded.responses)]}"
        if len(ids) > room:
            raise InputError(f"{where} has {len(ids)} tokens, the model takes {room}: lower max_prompt or max_response")
        raise InputError(f"{where} has token {max(ids)}, the model knows {known}: wrong tokenizer?")


@contextmanager
def probing(model: Model) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


# --- what a model says by itself (section 4.2) ---------------------------------------------------------------


class Decoded(NamedTuple):
    """One continuation: its text, its token ids (end of text included when reached) and its log-probability in nats."""

    text: str
    tokens: list[int]
    logp: float  # summed over the tokens


def greedy(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    max_prompt: int = 256,
    batch_size: int = 32,
    format: str = "auto",
) -> list[Decoded]:
    """Greedy decoding: the likeliest token after each prompt, again and again, until end of text or `max_new_tokens`.

    Unlike y* along a given response, every token follows the model's own earlier choices (section 4.2).
    """
    how = (max_new_tokens, max_prompt, batch_size, format)
    return _decode(model, tokenizer, prompts, lambda logits, *_: logits.argmax(-1), *how)


def sample(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int,
    max_prompt: int = 256,
    batch_size: int = 32,
    format: str = "auto",
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

    return _decode(model, tokenizer, prompts, choose, max_new_tokens, max_prompt, batch_size, format)


def _decode(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    choose: Callable[[Tensor, list[int], int], Tensor],
    max_new_tokens: int,
    max_prompt: int,
    batch_size: int,
    format: str,
) -> list[Decoded]:
    encoded = [encode_prompt(tokenizer, prompt, max_prompt, format) for prompt in prompts]
    end, results = tokenizer.eos_token_id, {}
    ends = {end, *ends_of_turn(tokenizer, prompts, format)}
    stops = torch.tensor(sorted(ends), device=model.device)
    keyword = cache_keyword(unwrapped(model).__class__)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    with probing(model):
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
                if torch.isin(torch.cat(tokens, 1), stops).any(1).all():
                    break
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
                positions = positions[:, -1:] + 1
            each = torch.stack(logps, 1).double()  # (rows, steps)
            for row, (i, mine) in enumerate(zip(rows, torch.cat(tokens, 1).tolist(), strict=True)):
                mine = mine[: next((n for n, token in enumerate(mine, 1) if token in ends), len(mine))]
                text = tokenizer.decode(mine, skip_special_tokens=True)
                results[i] = Decoded(text, mine, each[row, : len(mine)].sum().item())
    return [results[i] for i in range(len(prompts))]
