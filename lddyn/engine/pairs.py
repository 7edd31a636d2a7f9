"""Training on pairs: what two texts of a batch begin with is computed once, as in probing. The gradients stay equal.

A batch of pairs has the texts with the chosen answers first, then those with the rejected ones, so that text i and
text i + pairs share their prompt. Each pair becomes one row, `prompt chosen rejected`, in which an answer sees its
prompt and itself.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lddyn.engine.probe_set import Model
from lddyn.engine.probes import padded, probing, unwrapped


class Packed(NamedTuple):
    """Pairs of texts as one row each, and where the tokens of the texts are in them."""

    ids: Tensor  # (pairs, L)
    positions: Tensor  # (pairs, L)
    sees: Tensor  # (pairs, L, L): whether a token (second dimension) sees another
    place: Tensor  # (2 pairs, tokens): where in its pair's row a token of a text is; 0 for padding


def pack(ids: Tensor, mask: Tensor) -> Packed:
    """ids, mask: (2 pairs, tokens), padded on the right."""
    (a, b), (in_a, in_b) = ids.chunk(2), mask.bool().chunk(2)  # (pairs, tokens) each
    shared = ((a == b) & in_a & in_b).cumprod(1).sum(1, keepdim=True)  # (pairs, 1): tokens that both begin with
    length_a, length_b = in_a.sum(1, keepdim=True), in_b.sum(1, keepdim=True)
    width = int((length_a + length_b - shared).max())
    at = torch.arange(ids.shape[1], device=ids.device).expand_as(a)  # (pairs, tokens)
    place_a = torch.where(in_a, at, 0)
    place_b = torch.where(in_b, torch.where(at < shared, at, length_a + at - shared), 0)
    row = torch.arange(width, device=ids.device).expand(len(a), width)  # (pairs, L)
    of_b = row >= length_a  # the rest of the second text
    positions = torch.where(of_b, row - length_a + shared, row)
    packed = torch.zeros_like(row)
    for text, inside, place in ((a, in_a, place_a), (b, in_b, place_b)):
        packed.scatter_(1, place, torch.where(inside, text, a[:, :1]))  # padding writes what is at 0 anyway
    query, key = row.unsqueeze(2), row.unsqueeze(1)  # (pairs, L, 1), (pairs, 1, L)
    sees = (key <= query) & ((key < shared.unsqueeze(2)) | (of_b.unsqueeze(1) == of_b.unsqueeze(2)))
    return Packed(packed, positions, sees, torch.cat([place_a, place_b]))


@contextmanager
def shared(model: Model, texts: Sequence[tuple[list[int], list[int]]]) -> Iterator[None]:
    """Within it, the body of the model computes what pairs of texts begin with once, where that saves anything.

    `texts`: token ids of some pairs, on which it is tried first. Nothing changes for a model that gives other hidden
    states in this way, such as one with a sliding window that is shorter than they are.
    """
    body = unwrapped(getattr(model, "module", model)).base_model
    plain, own = body.forward, vars(body).get("forward")
    if not _right(body, texts):
        yield
        return

    def forward(input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **more: Any) -> Any:
        asked = {name for name, value in more.items() if value is not None and value is not False} - {"return_dict"}
        if input_ids is not None and attention_mask is not None and not asked and len(input_ids) % 2 == 0:
            packed = pack(input_ids, attention_mask)
            if packed.ids.numel() < input_ids.numel():
                return _apart(body, plain, packed)
        return plain(input_ids=input_ids, attention_mask=attention_mask, **more)

    body.forward = forward
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


def _apart(body: Model, forward: Callable[..., Any], packed: Packed) -> Any:
    """The body's output for packed pairs; its last hidden states are those of the texts, (2 pairs, tokens, width)."""
    sees = packed.sees.unsqueeze(1)  # (pairs, 1, L, L)
    if body.config._attn_implementation != "sdpa":  # what it adds to the scores
        sees = torch.zeros(sees.shape, dtype=body.dtype, device=sees.device).masked_fill(~sees, -1e9)
    row = {"input_ids": packed.ids, "position_ids": packed.positions, "attention_mask": sees}
    out = forward(**row, use_cache=False)
    states = out.last_hidden_state  # (pairs, L, width)
    pairs = torch.arange(len(states), device=states.device).repeat(2).unsqueeze(1)  # (2 pairs, 1)
    out.last_hidden_state = states[pairs, packed.place]
    return out


def _right(body: Model, texts: Sequence[tuple[list[int], list[int]]]) -> bool:
    """Whether hidden states come out the same, of the texts one by one and of them packed."""
    device = next(body.parameters()).device
    ids, mask = padded([text for both in zip(*texts, strict=True) for text in both], device)
    real = mask.bool()
    try:
        with probing(body):
            apart = _apart(body, body.forward, pack(ids, mask)).last_hidden_state[real]
            whole = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[real]
    except Exception:  # whatever a model that was not written for this raises
        return False
    tolerance = 1e-4 if whole.dtype == torch.float32 else 0.05
    return bool((apart - whole).abs().max() <= tolerance * whole.abs().max())
