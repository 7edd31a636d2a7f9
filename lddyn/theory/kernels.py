"""A, K and G of eq. 5 on any causal language model, explicitly or as products and norms (section 3, appendix C).

K(chi_o, chi_u) = J_o J_u^T between the logits of two responses. `pull_back` is its right half (reverse mode), and
`push_forward` its left half (forward mode), so that K v costs one of each, whatever the sizes. Between one token and
another K is a (V, V) matrix that `kernel_at` computes exactly. Texts and parameters are as in `first_order`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor
from torch.func import functional_call, jvp, vjp, vmap

from lddyn import InputError
from lddyn.theory import logprobs, losses
from lddyn.theory.first_order import (
    Model,
    Parameters,
    Text,
    batches,
    differentiable,
    gradient,
    inner,
    norm,
    response_logits,
    trainable,
)


class Estimate(NamedTuple):
    """A stochastic estimate with a 95% interval."""

    value: float
    low: float
    high: float


class Factors(NamedTuple):
    """A, K and G between one token of an observation and one of an update, on some or all of the vocabulary."""

    a: Tensor  # (k, k)
    k: Tensor  # (k, k')
    g: Tensor  # (k',)
    observed: Tensor  # (k,) token ids of the rows
    updated: Tensor  # (k',) token ids of the columns


# --- the two halves of K, and the whole of it ---------------------------------------------------------------


def logits(model: Model, texts: Sequence[Text], batch_tokens: int | None = None) -> list[Tensor]:
    """Logits of each response, a list of (tokens, V)."""
    found: dict[int, Tensor] = {}
    with differentiable(model), torch.no_grad():
        for batch in batches(model, texts, batch_tokens, share=True):
            z = response_logits(model, {}, batch)
            found.update(zip(batch.numbers, z.split(batch.lengths), strict=True))
    return [found[number] for number in range(len(texts))]


def residual(z: Tensor, response: Sequence[int], force: float = 1.0) -> Tensor:
    """G of a response from its logits: force * (pi - e_y), with the force of a loss of `residuals`. (tokens, V)"""
    return force * losses.sft(z.softmax(-1), torch.as_tensor(response, device=z.device))


def pull_back(model: Model, texts: Sequence[Text], v: Sequence[Tensor]) -> Parameters:
    """The right half of K: sum over texts of J_u^T v, a direction among the parameters. v: a (tokens, V) for each."""
    theta = {name: p.requires_grad_() for name, p in trainable(model).items()}
    with differentiable(model), torch.enable_grad():
        total = torch.zeros((), device=model.device)
        for batch in batches(model, texts, 2**62):
            weights = torch.cat([v[number] for number in batch.numbers])
            total = total + (response_logits(model, theta, batch) * weights).sum()
        found = torch.autograd.grad(total, list(theta.values()), allow_unused=True)
    pairs = zip(theta.items(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else g.detach() for (name, p), g in pairs}


def push_forward(
    model: Model, direction: Parameters, texts: Sequence[Text], batch_tokens: int | None = None
) -> list[Tensor]:
    """The left half of K: J_o times a direction, the first-order change of all logits. A (tokens, V) for each text."""
    theta = trainable(model, direction)
    found: dict[int, Tensor] = {}
    with differentiable(model), torch.no_grad():
        for batch in batches(model, texts, batch_tokens, share=True):
            change = jvp(lambda p, batch=batch: response_logits(model, p, batch), (theta,), (direction,))[1]
            found.update(zip(batch.numbers, change.split(batch.lengths), strict=True))
    return [found[number] for number in range(len(texts))]


def kernel_product(model: Model, observations: Sequence[Text], update: Text, v: Tensor) -> list[Tensor]:
    """K v = J_o (J_u^T v) without K. v: (tokens of the update, V). Returns a (tokens, V) for each observation."""
    return push_forward(model, pull_back(model, [update], [v]), observations)


def log_changes(z: Tensor, dz: Tensor) -> Tensor:
    """A dz: the change of log pi of the whole vocabulary that a change of logits means. (tokens, V), nats."""
    mean: Tensor = torch.linalg.vecdot(z.softmax(-1), dz)  # (tokens,)
    return dz - mean.unsqueeze(-1)


def kernel_at(model: Model, observation: Text, update: Text, m: int, l: int) -> Tensor:
    """K(chi_o, chi_u) between token m of one response and token l of another, exactly: (V, V).

    Only the hidden states' Jacobians (width x parameters) are materialised. With z = W h, J = W dh + dW h, so
    K = W (J_h J_h'^T) W^T + W X + (W Y)^T + (h . h') I, where X and Y are what W does inside the network when input
    and output embeddings are tied. Raises `InputError` when the output layer has a bias or is not trained.
    """
    head = model.get_output_embeddings()
    name = next((n for n, p in model.named_parameters() if p is head.weight), None)
    if getattr(head, "bias", None) is not None or name is None or not head.weight.requires_grad:
        raise InputError("kernel_at needs an output layer without bias whose weights are trained")
    h_o, jacobian_o = _hidden_jacobian(model, observation, m)
    h_u, jacobian_u = _hidden_jacobian(model, update, l)
    shared = sum(jacobian_o[n].flatten(1) @ jacobian_u[n].flatten(1).T for n in jacobian_o)  # (width, width)
    w: Tensor = head.weight.detach()  # (V, width)
    k = w @ shared @ w.T
    k += w @ (jacobian_o[name] @ h_u) + (w @ (jacobian_u[name] @ h_o)).T  # (width, V, width) @ (width,)
    k.diagonal().add_(h_o @ h_u)
    return k


def _hidden_jacobian(model: Model, text: Text, position: int) -> tuple[Tensor, Parameters]:
    """The hidden state that predicts a response token, (width,), and its derivatives, (width, *shape) each."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ids = torch.tensor([[*text[0], *text[1]]], device=model.device)

    def hidden(theta: Parameters) -> Tensor:
        functional_call(model, theta, (), {"input_ids": ids, "use_cache": False})
        return seen.pop()[0, len(text[0]) - 1 + position]

    try:
        with differentiable(model):
            h, pull = vjp(hidden, trainable(model))[:2]
            (jacobian,) = vmap(pull)(torch.eye(len(h), dtype=h.dtype, device=h.device))
    finally:
        hook.remove()
    return h.detach(), {name: j.detach() for name, j in jacobian.items()}


def factors(
    model: Model,
    observation: Text,
    update: Text,
    m: int = 0,
    l: int = 0,
    top: int | None = None,
    force: float = 1.0,
) -> Factors:
    """A, K and G of eq. 5 explicitly, between token m of the observation and token l of the update.

    With `top`, only the likeliest tokens of the observation and those with the largest |G| of the update are kept (the
    actual next token always is among them); without, the product -eta A K G is exact for this pair of tokens.
    """
    z_o, z_u = (z[place] for z, place in zip(logits(model, [observation, update]), (m, l), strict=True))
    p, g = z_o.softmax(-1), residual(z_u[None], [update[1][l]], force)[0]
    rows, columns = (
        _largest(values, token, top) for values, token in ((p, observation[1][m]), (g.abs(), update[1][l]))
    )
    k = kernel_at(model, observation, update, m, l)[rows][:, columns]
    a = torch.eye(len(rows), dtype=p.dtype, device=p.device) - p[rows]
    return Factors(a, k, g[columns], rows, columns)


def _largest(values: Tensor, token: int, top: int | None) -> Tensor:
    if top is None or top >= len(values):
        return torch.arange(len(values), device=values.device)
    return values.index_fill(0, torch.tensor([token], device=values.device), math.inf).topk(top).indices


# --- its size ----------------------------------------------------------------------------------------------


def kernel_norms(
    model: Model, observations: Sequence[Text], update: Text, probes: int = 4, sketch: int = 4, seed: int = 0
) -> list[Estimate]:
    """||K(chi_o, chi_u)||_F over all pairs of tokens and the whole vocabulary, estimated for each observation.

    ||K||^2 = ||K Q||^2 + E ||K (I - Q Q^T) v||^2 for random signs v and an orthonormal Q, here `sketch` directions in
    which K(chi_u, chi_u) is large, so that little is left to chance (as in Hutch++, Meyer et al., 2021). One backward
    pass and one Jacobian-vector product for each of probes and directions, shared by all observations. The interval is
    Student's t on the squares of the probes.
    """
    *started, after = _signs(model, update, sketch + 1, seed)
    large = [kernel_product(model, [update], update, v)[0].flatten() for v in started]
    q = torch.linalg.qr(torch.stack(large, dim=1)).Q if sketch else after.new_zeros(after.numel(), 0)  # (tokens V, k)

    def squares(v: Tensor) -> list[float]:
        product = kernel_product(model, observations, update, v.reshape(after.shape))
        return [part.double().square().sum().item() for part in product]

    known = [sum(column) for column in zip(*map(squares, q.T), strict=True)] or [0.0] * len(observations)
    left = [squares(v.flatten() - q @ (q.T @ v.flatten())) for v in _signs(model, update, probes, seed + 1)]
    found = [_estimate([base + x for x in column]) for base, column in zip(known, zip(*left, strict=True), strict=True)]
    return [Estimate(*(math.sqrt(max(0.0, value)) for value in square)) for square in found]


def kernel_trace(model: Model, text: Text, probes: int = 8, seed: int = 0) -> Estimate:
    """trace K(chi, chi) = ||J||_F^2 over all tokens of a response, from E ||J^T v||^2 for random signs v."""
    return _estimate([norm(pull_back(model, [text], [v])) ** 2 for v in _signs(model, text, probes, seed)])


def _signs(model: Model, text: Text, probes: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = model.get_output_embeddings().weight
    for _ in range(probes):
        signs = torch.randint(2, (len(text[1]), weight.shape[0]), generator=generator) * 2 - 1
        yield signs.to(weight)


def _estimate(samples: Sequence[float]) -> Estimate:
    if len(samples) < 2:
        raise InputError(f"probes={len(samples)}: an interval needs at least 2")
    values = torch.tensor(samples, dtype=torch.float64)
    half = student.ppf(0.975, len(samples) - 1) * values.std().item() / math.sqrt(len(samples))
    mean = values.mean().item()
    return Estimate(mean, mean - half, mean + half)


# --- lower bounds, and what the follow-up literature measures ----------------------------------------------


def lbk(z: Tensor, dz: Tensor, g: Tensor) -> float:
    """LBK as printed (eq. 26): ||d log pi||_F^2 / (||A||_F^2 ||G||_F^2) over all tokens, at most eta^2 ||K||_F^2.

    z, dz: logits of the observation and their change by a step, (tokens, V); g: residual of the update, (tokens', V).
    """
    a_squared = logprobs.peakiness(z.softmax(-1)).sum()
    return (log_changes(z, dz).square().sum() / (a_squared * g.square().sum())).item()


def sign_delta(z: Tensor, dz: Tensor) -> float:
    """SignDelta as printed (appendix C.2): mean of the change of log pi over tokens and the whole vocabulary, nats."""
    return log_changes(z, dz).mean().item()


def ches(model: Model, chosen: Sequence[Text], rejected: Sequence[Text], normalised: bool = False) -> Tensor:
    """The centred hidden embedding similarity of each pair, <H+, H-> - ||H+||^2 (Razin et al., arXiv 2410.08847).

    H sums the last hidden states that predict the tokens of a response; `normalised` by length, it is their mean. A
    high score marks pairs whose chosen answer DPO is expected to make less likely. Returns (pairs,).
    """
    good, bad = (_hidden_sums(model, texts) for texts in (chosen, rejected))  # (pairs, width)
    if normalised:
        of_good, of_bad = (good.new_tensor([[len(y)] for _, y in texts]) for texts in (chosen, rejected))
        good, bad = good / of_good, bad / of_bad
    similarity: Tensor = torch.linalg.vecdot(good, bad)
    return similarity - good.square().sum(-1)


@torch.no_grad()
def _hidden_sums(model: Model, texts: Sequence[Text]) -> Tensor:
    seen: list[Tensor] = []
    found: dict[int, Tensor] = {}
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with differentiable(model):
            for batch in batches(model, texts, None):
                response_logits(model, {}, batch)
                hidden = seen.pop()[batch.at].double()  # (response tokens, width)
                sums = [part.sum(0) for part in hidden.split(batch.lengths)]
                found.update(zip(batch.numbers, sums, strict=True))
    finally:
        hook.remove()
    return torch.stack([found[number] for number in range(len(texts))])


def gradient_products(model: Model, chosen: Sequence[Text], rejected: Sequence[Text]) -> Tensor:
    """<grad log pi+, grad log pi->, ||grad log pi+||^2 and ||grad log pi-||^2 of each pair. Returns (pairs, 3).

    To first order one step of DPO raises the chosen answer by its force times eta times (the second minus the first):
    it falls where the first is larger (Yuan et al., arXiv 2410.13828).
    """
    rows = []
    for good, bad in zip(chosen, rejected, strict=True):
        up, down = (gradient(model, [text]) for text in (good, bad))
        rows.append([inner(up, down), inner(up, up), inner(down, down)])
    return torch.tensor(rows, dtype=torch.float64)
