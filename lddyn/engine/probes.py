"""Twelve kinds of response to each prompt, and how likely a model finds them (sections 3.1, 4.1, 4.2, appendix D).

    probes = ProbeSet.from_jsonl("my_prompts.jsonl")
    table = measure(model, probes.encode(tokenizer))

A prompt's keys and values are computed once and shared by all its responses; the output layer sees only the
positions that predict a token of a response; batches hold texts of similar length. Probing changes nothing in
the model: training mode, gradients and random state stay as they were.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import DynamicCache

from lddyn import Caution, InputError
from lddyn.engine.probe_set import Encoded
from lddyn.theory.logprobs import AT_ONCE, TokenStats, token_stats

QUANTITIES = ["logp", "argmax_logp", "rest_logp", "entropy", "sq_norm", "a_norm", "residual_norm", "rank"]
METRICS = ["logp_sum", "logp_mean", "argmax_logp_sum", "argmax_logp_mean", "rest_logp_sum", "entropy_mean"]
METRICS += ["sq_norm_mean", "a_norm_mean", "residual_norm_mean", "rank_mean", "tokens"]
BATCH_TOKENS = {"cpu": 2048, "cuda": 2**15}
TOLERANCE = {torch.bfloat16: 0.25, torch.float16: 0.05}  # nats per token, where it is not 1e-4
_checked = WeakKeyDictionary()  # model: ((dtype, attention, ...), longest text in tokens, why it cannot share)


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
    with probing(model):
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


def unwrapped(model):
    """The model of `transformers` inside PEFT's wrapper, with its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _body_and_head(model):
    """The transformer without its output layer, and the output layer."""
    model = unwrapped(model)
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
def probing(model) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
