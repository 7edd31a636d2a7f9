"""Gradients of several texts at once as factors, and inner products of such gradients.

The gradient of a weight is a sum over a text's tokens of (back-propagated error e) x (activation x). Between two texts,

    <grad_W a, grad_W b> = sum_{s,t} (e_s . e_t) (x_s . x_t)

where s runs over the tokens of one and t over those of the other (structured derivatives, Novak et al., 2022; ghost dot
products, Wang et al., Data Shapley in One Training Run, 2024). Embeddings are of the same form with one-hot rows. Where
they are the weights of the output layer too, both uses and their cross terms count.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

ROWS, AT_ONCE = 128, 2**24  # most rows, and numbers, of gradients without factors in one piece: quickest on a CPU


class Use(NamedTuple):
    """What one use of a weight adds to its gradient: the sum over places of rows (x) columns."""

    rows: Tensor  # (places, rows of the weight), or (places,) where the one of each one-hot is
    columns: Tensor  # (places, columns of the weight)
    untrained: int | None = None  # the row that training leaves as it is: that of an embedding's padding token


Gradient = list[Use] | Tensor  # of one parameter, as factors or as it is; an empty list is zero
Factors = dict[Parameter, Gradient]  # of the parameters that something depends on
Calls = list[tuple[Any, Tensor, Tensor]]  # a module, its input and its output


def _kind(module: nn.Module) -> type[nn.Module] | None:
    """Which module of those with factors it computes as, whatever its class is called."""
    if isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"):
        return nn.Embedding
    return next((kind for kind in (nn.Linear, Conv1D, nn.Embedding) if type(module).forward is kind.forward), None)


@contextmanager
def watched(model: nn.Module) -> Iterator[Calls]:
    """A list to which every call, with one tensor, of a module with trainable parameters of its own is added."""
    calls: Calls = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        if len(given) == 1 and not named and isinstance(out, Tensor):
            calls.append((module, given[0].detach(), out))

    hooks = [
        module.register_forward_hook(note, with_kwargs=True)
        for module in model.modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def taken_apart(
    calls: Calls,
    whole: Sequence[Parameter],
    texts: int,
    outputs: Sequence[Tensor],
    errors: Sequence[Tensor],
    *entry: Tensor,
) -> tuple[list[Factors], Sequence[Tensor]]:
    """The gradient of sum(outputs * errors) for each text, a row of a batch; and with respect to `entry`, for all.

    That of a linear layer or an embedding is given as factors; other modules are differentiated on each row alone. For
    `whole` parameters the batch must be of one text. Empties `calls`. Raises
    `ValueError` where a module is not called with a row for each text.
    """
    known = calls.copy()
    inputs = [*(out for *_, out in known), *whole, *entry]
    found = torch.autograd.grad(outputs, inputs, errors, allow_unused=True) if inputs and outputs else ()
    factors: list[Factors] = [{} for _ in range(texts)]
    for (module, x, _), error in zip(known, found, strict=False):
        if error is None:
            continue
        if texts > 1 and not len(x) == len(error) == texts:
            raise ValueError(f"{type(module).__name__} is not called with a row for each text")
        rows = zip(x.split(1), error.split(1), strict=True) if texts > 1 else [(x, error)]
        for of_text, (x_row, error_row) in zip(factors, rows, strict=True):
            for p, gradient in _of_call(module, x_row, error_row).items():
                of_text[p] = _sum(p, of_text[p], gradient) if p in of_text else gradient
    rest = found[len(known) : len(inputs) - len(entry)]
    factors[0] |= {p: _precise(g) for p, g in zip(whole, rest, strict=True) if g is not None}
    calls.clear()
    return factors, found[len(inputs) - len(entry) :]


def _of_call(module: Any, x: Tensor, error: Tensor) -> dict[Parameter, Any]:
    """Gradients of a module's own parameters by one call. x, error: (1, tokens, ...)."""
    kind = _kind(module)
    if kind is None:
        own = [p for p in module.parameters(recurse=False) if p.requires_grad]
        found = torch.autograd.grad(module(x), own, error, allow_unused=True)
        return {p: _precise(g) for p, g in zip(own, found, strict=True) if g is not None}
    error = _precise(error.flatten(0, -2))  # (tokens, width)
    if kind is nn.Embedding:
        use = Use(x.flatten(), error * getattr(module, "embed_scale", 1.0), module.padding_idx)
    else:
        x = _precise(x.flatten(0, -2))
        use = Use(error, x) if kind is nn.Linear else Use(x, error)
    of_module = {module.weight: [use], getattr(module, "bias", None): error.sum(0)}
    return {p: gradient for p, gradient in of_module.items() if p is not None and p.requires_grad}


def _precise(t: Tensor) -> Tensor:
    """In single precision at least."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _sum(p: Parameter, one: Gradient, other: Gradient) -> Gradient:
    if isinstance(one, list) and isinstance(other, list):
        return one + other
    return dense(p, one) + dense(p, other)


def tensors(factors: Factors) -> list[Tensor]:
    """All that is held of a gradient."""
    held = [[of] if isinstance(of, Tensor) else [t for use in of for t in use[:2]] for of in factors.values()]
    return [t for some in held for t in some]


def trained(gradient: Gradient) -> Gradient:
    """The gradient that a training step takes, without rows that it leaves as they are."""
    if isinstance(gradient, Tensor):
        return gradient
    kept = [slice(None) if u.untrained is None else u.rows != u.untrained for u in gradient]
    return [Use(u.rows[k], u.columns[k]) for u, k in zip(gradient, kept, strict=True)]


def dense(p: Parameter, gradient: Gradient) -> Tensor:
    """The gradient of one parameter without factors, in its shape."""
    if isinstance(gradient, Tensor):
        return gradient
    out = torch.empty(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
    _fill(out, gradient, 0)
    return out


def _fill(out: Tensor, uses: list[Use], first: int) -> None:
    """Write the rows of a weight's gradient from `first` on."""
    if not uses or uses[0].rows.dim() == 1:
        out.zero_()
    for k, use in enumerate(uses):
        if use.rows.dim() == 2:
            out.addmm_(use.rows[:, first : first + len(out)].T, use.columns, beta=int(k > 0))
        else:
            here = (use.rows >= first) & (use.rows < first + len(out))
            out.index_add_(0, use.rows[here] - first, use.columns[here])


def inner(a: Sequence[Factors], b: Sequence[Factors]) -> Tensor:
    """Inner products of what a step takes, for each of a, with gradients b. Returns (a, b), float64."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for p in dict.fromkeys(p for side in (a, b) for factors in side for p in factors):
        total += _of_parameter(p, [trained(f.get(p, [])) for f in a], [f.get(p, []) for f in b]).cpu()
    return total


def _of_parameter(p: Parameter, a: Sequence[Gradient], b: Sequence[Gradient]) -> Tensor:
    """Inner products for one parameter, from factors or without, whichever takes fewer operations. (a, b), float64"""
    if any(isinstance(gradient, Tensor) for gradient in (*a, *b)):
        of_a, of_b = (torch.stack([dense(p, gradient).flatten() for gradient in side]) for side in (a, b))
        return (of_a @ of_b.T).double()
    uses = [use for gradient in (*a, *b) for use in gradient if isinstance(use, Use)]
    pairs, texts = len(a) * len(b), len(a) + len(b)
    places = sum(len(use.columns) for use in uses) / texts
    dense_places = sum(len(use.columns) for use in uses if use.rows.dim() == 2) / texts
    by_factors = pairs * (dense_places**2 * p.shape[0] + places**2 * p.shape[1])
    if by_factors < p.numel() * (dense_places * texts + pairs):
        return torch.stack([torch.stack([_between(p, one, other) for other in b]) for one in a]).double()
    gradients = [[use for use in gradient if isinstance(use, Use)] for gradient in (*a, *b)]
    long, short = p.shape
    if short > long and all(use.rows.dim() == 2 for use in uses):  # transposed: the products are the same
        gradients, long, short = [[Use(v, u) for u, v, _ in gradient] for gradient in gradients], short, long
    height = max(1, min(ROWS, AT_ONCE // (texts * short)))
    some = uses[0].columns.new_empty(texts, height, short)  # rows of all gradients
    total = torch.zeros(len(a), len(b), dtype=torch.float64, device=p.device)
    for first in range(0, long, height):
        here = some[:, : long - first]
        for out, gradient in zip(here, gradients, strict=True):
            _fill(out, gradient, first)
        of_a, of_b = here.flatten(1).split([len(a), len(b)])
        total += of_a @ of_b.T
    return total


def _between(p: Parameter, a: Gradient, b: Gradient) -> Tensor:
    """One inner product, from factors."""
    parts = [(_rows(u.rows, v.rows) * (u.columns @ v.columns.T)).sum() for u in a for v in b]
    return torch.stack(parts).sum() if parts else torch.zeros((), device=p.device)


def _rows(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of the rows of two uses, (places of one, places of the other)."""
    if a.dim() == 1:
        return a.unsqueeze(1) == b if b.dim() == 1 else b[:, a].T
    return a[:, b] if b.dim() == 1 else a @ b.T
