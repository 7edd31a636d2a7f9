"""Which training example moves which response: the first-order change of every pair of them (section 3, eq. 5).

A gradient step on one example changes log pi of an observed response by -eta <grad L, grad log pi(observed)>. Every
loss here is a function of summed log-probabilities, so that all there is to compute are inner products of gradients of
log pi between texts (`products`); the loss multiplies them by its forces (`influences`). One forward and one backward
pass a text give the factors that all products are made of (`factors`). Where they do not fit in memory together, all
texts go back through the model layer by layer, so that those of one layer are held at a time.

Libraries of data attribution estimate another quantity, what a model would be without an example: TRAK from gradients
under random projections; kronfluence with Kronecker-factored curvature, of linear and convolutional layers; bergson
from gradients of such layers, projected unless told otherwise, of cross-entropy, KL or a policy gradient. Here it is
what a step does, for every loss on pairs and over all trainable parameters, with no approximation but the first order.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lddyn import InputError
from lddyn.theory import losses
from lddyn.theory.factors import Calls, Factors, dense, inner, taken_apart, tensors, trained, watched
from lddyn.theory.first_order import Batch, Model, Text, batches, differentiable, trainable

MEMORY = 2**30  # bytes
BATCH_TOKENS = {"cpu": 512, "cuda": 2**13}


class Products(NamedTuple):
    """Inner products of the gradients of log pi over all trainable parameters, and log pi."""

    products: Tensor  # (texts, others)
    logps: Tensor  # (texts,), nats, summed over tokens
    other_logps: Tensor  # (others,)


def influences(
    model: Model,
    observed: Sequence[Text],
    chosen: Sequence[Text],
    rejected: Sequence[Text] | None = None,
    loss: Callable[..., Tensor] = losses.sft_loss,
    reference: tuple[Tensor, Tensor] | None = None,
    memory: int = MEMORY,
    **settings: Any,
) -> Tensor:
    """What one plain gradient step on each example alone does to each observed response, to first order.

    Entry (i, j) is the change of log pi(observed_j), summed over tokens, in nats for each unit of eta, by a step on the
    loss of (chosen_i, rejected_i): what `predicted_change` gives for `step(model, 1.0, ...)` of this example. The mean
    over examples is the prediction for the batch. `loss`, `rejected`, `reference` and `settings` (numbers, or one for
    each example) are as in `gradient`, `memory` as in `products`. Returns (examples, observed) in float64.
    """
    if rejected and len(rejected) != len(chosen):
        raise InputError(f"{len(chosen)} chosen and {len(rejected)} rejected texts: a pair has one of each")
    found = products(model, [*chosen, *(rejected or [])], observed, memory)
    logps = found.logps.requires_grad_()
    with torch.enable_grad():
        good = logps[: len(chosen)]
        bad = logps[len(chosen) :] if rejected else torch.zeros_like(good)
        ref = (good.detach(), bad.detach()) if reference is None else reference
        value = loss(good, bad, *(r.to(good) for r in ref), **settings).sum()
        (slopes,) = torch.autograd.grad(value, logps)  # minus the force on each training text
    changes = -slopes.unsqueeze(1) * found.products
    return changes[: len(chosen)] + changes[len(chosen) :] if rejected else changes


def products(model: Model, texts: Sequence[Text], others: Sequence[Text], memory: int = MEMORY) -> Products:
    """<grad log pi(text), grad log pi(other)> for every text and every other; log pi is summed over the response.

    `memory`: bytes to hold beyond the model, roughly; with fewer, texts are computed more often. How a model's gradient
    comes apart is checked on a few tokens, and what is used in an unknown way is differentiated without taking it
    apart. A text's gradient is that of a training step, which leaves the embedding of padding as it is; the derivative
    of another one has it. Returns float64.
    """
    both = [[(tuple(prompt), tuple(response)) for prompt, response in side] for side in (texts, others)]
    every = sorted({*both[0], *both[1]}, key=lambda text: (len(text[0]), len(text[1]), text))
    number = {text: i for i, text in enumerate(every)}
    a, b = ([number[text] for text in side] for side in both)
    total = torch.zeros(len(every), len(every), dtype=torch.float64)
    logps = torch.zeros(len(every), dtype=torch.float64)
    with differentiable(model), torch.enable_grad(), watched(model) as calls:
        parts, size = _parts(model, every[0], calls)
        tokens = sum(len(prompt) + len(response) for prompt, response in every)
        if size * (tokens + _batch_tokens(model)) < 0.85 * memory:  # all factors, and what a backward pass holds
            parts = parts._replace(layers=[])
        (longest,) = _started(parts, {0: max(every, key=lambda text: len(text[0]) + len(text[1]))})
        held = max(1, sum(h.nbytes for h in longest.states))
        for rows, columns in _blocks(sorted({*a}), sorted({*b}), int(0.55 * memory) // held):
            needed = sorted({*rows, *columns})
            walks = _started(parts, {i: every[i] for i in needed})
            for piece in _pieces(parts):
                _add_products(total, piece, walks, rows, columns, int(0.85 * memory) - held * len(needed))
                for walk in walks:
                    _advance(walk)
            for walk in walks:
                logps[walk.texts] = walk.logps.double().cpu()
    return Products(total[a][:, b], logps[a], logps[b])


def _blocks(a: list[int], b: list[int], fit: int) -> Iterator[tuple[list[int], list[int]]]:
    """All pairs of a and b in blocks of `fit` rows and columns together, about as many of each."""
    width = len(b) if len(a) + len(b) <= fit else max(1, fit // 2, fit - len(a))
    height = max(1, fit - width)
    for i in range(0, len(a), height):
        for j in range(0, len(b), width):
            yield a[i : i + height], b[j : j + width]


def _batch_tokens(model: Model) -> int:
    return BATCH_TOKENS.get(model.device.type, 512)


def _bytes(factors: list[Factors]) -> int:
    return sum({t.data_ptr(): t.nbytes for of_text in factors for t in tensors(of_text)}.values())


# --- a model in pieces -------------------------------------------------------------------------------------


class Parts(NamedTuple):
    """How a model is taken apart."""

    model: Model
    calls: Calls
    layers: Sequence[Any]  # called in turn, each from hidden states to hidden states; none: the model is one piece
    together: bool  # whether several texts make a batch
    whole: list[Parameter]  # whose gradients are not taken apart


@dataclass(eq=False)
class Walk:
    """A batch of texts on its way back through the layers."""

    texts: list[int]
    batch: Batch
    logps: Tensor  # (texts,)
    states: list[Tensor] = field(default_factory=list)  # hidden states before each layer left, and after the last
    given: list[tuple[Any, Any]] = field(default_factory=list)  # what else these layers are called with
    error: Any = None  # gradient of log pi with respect to the hidden states after the next layer
    before: Any = None  # and before it


Piece = Callable[[Walk], list[Factors]]  # what one part of a model adds to the gradients of a walk's texts


def _parts(model: Model, text: Text, calls: Calls) -> tuple[Parts, float]:
    """The quickest way to take a gradient apart that gives what automatic differentiation finds on a few tokens.

    Also about how many bytes of factors there are for a token.
    """
    few = {0: (text[0][-2:], text[1][:2]), 1: (text[0][-4:], text[1][:4])}
    wanted = [model.get_parameter(name) for name in trainable(model)]
    (batch,) = batches(model, [few[0]], None)
    z, g, _ = _logits(model, batch)
    exact = torch.autograd.grad(z, wanted, g, allow_unused=True)
    noise: float = 1e-6 * max(g.norm().item() for g in exact if g is not None)

    def differs(p: Parameter, g: Tensor | None, found: Factors) -> bool:
        error: float = (dense(p, trained(found.get(p, []))) - (0 if g is None else g)).norm().item()
        tolerance = 1e-3 if torch.finfo(p.dtype).bits >= 32 else 0.05
        return error > noise + (0.0 if g is None else tolerance * g.norm().item())

    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    stack = max(lists, key=lambda module: sum(p.numel() for p in module.parameters()), default=nn.ModuleList())
    for layers, together in ((list(stack), True), (list(stack), False), ([], False)):
        parts = Parts(model, calls, layers, together, [])
        for _ in range(1 if together else 2):
            calls.clear()
            try:
                walk, found, size = _started(parts, few)[0], Factors(), 0.0
                for piece in _pieces(parts):
                    factors = piece(walk)
                    found |= factors[walk.texts.index(0)]
                    size += _bytes(factors) / walk.batch.ids.numel()
                    _advance(walk)
            except Exception:  # whatever a model raises whose layers are called in another way
                if not layers:
                    raise
                break
            wrong = [p for p, g in zip(wanted, exact, strict=True) if differs(p, g, found)]
            if not wrong:
                return parts, size
            parts = parts._replace(whole=wrong)
    return parts, size


def _logits(model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a batch, the gradient of log pi with respect to them, and log pi of its responses, (texts,).

    The gradient is e_y - pi where a response token is predicted, and zero elsewhere. Both are (texts, kept, V).
    """
    named = {"input_ids": batch.ids, "attention_mask": batch.mask, "logits_to_keep": batch.kept, "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:  # otherwise the batch may share what they mean
        named["position_ids"] = torch.arange(batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)
    z: Tensor = model(**named).logits
    with torch.no_grad():
        g = z.log_softmax(-1, dtype=torch.promote_types(z.dtype, torch.float32))
        logps = torch.stack([part.sum() for part in g[(*batch.at, batch.targets)].split(batch.lengths)])
        g.exp_().neg_()
        g[(*batch.at, batch.targets)] += 1
        predicts = torch.zeros(*z.shape[:2], 1, dtype=z.dtype, device=z.device)
        predicts[batch.at] = 1
        g.mul_(predicts)
    return z, g.to(z.dtype), logps


def _started(parts: Parts, texts: dict[int, Text]) -> list[Walk]:
    """Texts in batches, forward through the model and back to its last layer."""
    names, walks = list(texts), []
    for batch in batches(parts.model, list(texts.values()), _batch_tokens(parts.model) if parts.together else 1):
        walk = Walk([names[i] for i in batch.numbers], batch, torch.zeros(len(batch.numbers)))
        if parts.layers:
            with _followed(parts.layers, walk), torch.no_grad():
                z, g, walk.logps = _logits(parts.model, batch)
            parts.calls.clear()
            (walk.error,) = torch.autograd.grad(z, walk.states[-1], g)
        walks.append(walk)
    return walks


@contextmanager
def _followed(layers: Sequence[Any], walk: Walk) -> Iterator[None]:
    """What the layers are called with is kept, and the last one's output; only what comes after it has a graph."""
    kept: list[Tensor] = []  # one tensor for all layers: small ones would leave memory in pieces

    def enter(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not kept:
            kept.append(args[0].new_empty(len(layers), *args[0].shape))
        walk.states.append(kept[0][len(walk.states)].copy_(args[0]))
        walk.given.append((args[1:], named))

    def leave(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        torch.set_grad_enabled(True)
        walk.states.append(out.detach().requires_grad_())
        return walk.states[-1]

    hooks = [layer.register_forward_pre_hook(enter, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(leave))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _advance(walk: Walk) -> None:
    """A layer is behind a walk."""
    walk.error = walk.before
    del walk.given[-1:], walk.states[-2:-1]


def _pieces(parts: Parts) -> Iterator[Piece]:
    """The layers from the last to the first, then all else."""

    take = partial(taken_apart, parts.calls, parts.whole)

    def of_layer(layer: Any, walk: Walk) -> list[Factors]:
        args, named = walk.given[-1]
        h = walk.states[-2].detach().requires_grad_()
        factors, (walk.before,) = take(len(walk.texts), [layer(h, *args, **named)], [walk.error], h)
        return factors

    def of_the_rest(walk: Walk) -> list[Factors]:
        with _skipped(parts.layers, walk) as entered:
            z, g, walk.logps = _logits(parts.model, walk.batch)
        ends = [(out, error) for out, error in ((z, g), *((h, walk.error) for h in entered)) if out.requires_grad]
        return take(len(walk.texts), [out for out, _ in ends], [error for _, error in ends])[0]

    yield from (partial(of_layer, layer) for layer in reversed(parts.layers))
    yield of_the_rest


@contextmanager
def _skipped(layers: Sequence[Any], walk: Walk) -> Iterator[list[Tensor]]:
    """The model goes on from the hidden states that were kept; those that come to the first layer are noted."""
    entered: list[Tensor] = []

    def forward(h: Tensor, *_: Any, **__: Any) -> Tensor:
        if not entered:
            entered.append(h)
        return walk.states[-1]

    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = forward
    try:
        yield entered
    finally:
        for layer, mine in zip(layers, own, strict=True):
            if mine is None:
                del layer.forward
            else:
                layer.forward = mine


def _add_products(
    total: Tensor, piece: Piece, walks: list[Walk], rows: list[int], columns: list[int], memory: int
) -> None:
    """Add the products of one piece of the model to the `rows` and `columns` of all products."""
    largest = max(walks, key=lambda walk: walk.batch.ids.numel())
    kept = dict(zip(largest.texts, piece(largest), strict=True))
    held = _bytes(list(kept.values())) // len(kept)
    for some, others in _blocks(rows, columns, memory // max(1, held)):
        needed = {*some, *others}
        kept = {i: factors for i, factors in kept.items() if i in needed}
        for walk in walks:
            if needed.intersection(walk.texts) - kept.keys():
                kept |= {i: f for i, f in zip(walk.texts, piece(walk), strict=True) if i in needed}
        at = torch.tensor(some).unsqueeze(1), torch.tensor(others)
        total[at] += inner([kept[i] for i in some], [kept[i] for i in others])
