"""What one token of a response tells: log pi(y), log pi(y*) on the same path, and the mass outside the arg max.

Everything follows from one split of the distribution, y* = argmax_v pi(v) against the rest. With the logits shifted so
that y* has 0 and r = logsumexp of the others, log pi(y*) = -log(1 + e^r) and log(1 - pi(y*)) = r - log(1 + e^r): no
difference of nearly equal numbers anywhere, however peaked the distribution.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LOWEST = -1e30  # instead of -inf, whose product with a probability of zero is not a number
AT_ONCE = {"cpu": 2**18, "cuda": 2**24}  # logits in one piece: what stays in a core's cache, or fills a device


class TokenStats(NamedTuple):
    """One number per token; log-probabilities and entropy in nats."""

    logp: Tensor  # log pi(y)
    argmax: Tensor  # y*, a token id
    argmax_logp: Tensor  # log pi(y*)
    rest_logp: Tensor  # log(1 - pi(y*))
    entropy: Tensor  # -sum pi log pi
    sq_norm: Tensor  # ||pi||^2
    rank: Tensor  # tokens that are likelier than y; 0 exactly when y is y*
    residual_sq: Tensor  # ||pi - e_y||^2, the squared norm of the SFT residual


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x <= 0, exact to rounding at both ends: the log of what a log-probability leaves over."""
    return torch.where(x > -0.6931472, (-x.expm1()).log(), (-x.exp()).log1p())


def peakiness(p: Tensor) -> Tensor:
    """||A||_F^2 = V - 2 + V ||pi||^2, without building A (appendix C). p: (..., V). Returns (...)."""
    vocab = p.shape[-1]
    return vocab - 2 + vocab * p.square().sum(-1)


def token_stats(logits: Tensor, targets: Tensor) -> TokenStats:
    """Measure each token of a response under the logits that predict it (paper sections 3.1 and 4.2, appendix C).

    logits: (..., V) of any floating type; computed in float32, or float64 if they are. targets: (...) token
    ids. Returns tensors (...), in nats, one per token. Works through a few tokens at a time, so the memory
    beyond the logits is constant.
    """
    shape, vocab = targets.shape, logits.shape[-1]
    at_once = max(1, AT_ONCE.get(logits.device.type, 2**22) // vocab)
    pieces = zip(logits.reshape(-1, vocab).split(at_once), targets.reshape(-1, 1).split(at_once), strict=True)
    parts = [_few(z.to(torch.promote_types(z.dtype, torch.float32)), y) for z, y in pieces]
    return TokenStats(*(torch.cat(field).reshape(shape) for field in zip(*parts, strict=True)))


def _few(z: Tensor, y: Tensor) -> TokenStats:
    top, best = z.max(-1, keepdim=True)  # (tokens, 1)
    rest = (z - top).clamp_(min=LOWEST)  # (tokens, V), the arg max at 0
    shifted_y = rest.gather(-1, y)
    rest.scatter_(-1, best, LOWEST)
    q = rest.softmax(-1)  # the distribution given that it is not y*
    r = rest.amax(-1) - q.amax(-1).log()  # logsumexp of the rest
    argmax_logp, rest_logp = logsigmoid(-r), logsigmoid(r)
    logp = shifted_y.squeeze(-1) + argmax_logp
    p_top, p_rest = argmax_logp.exp(), rest_logp.exp()
    entropy = -p_top * argmax_logp - p_rest * (rest_logp + torch.linalg.vecdot(q, rest) - r)
    rest_sq = (p_rest * torch.linalg.vector_norm(q, dim=-1)).square()
    is_best = (best == y).squeeze(-1)
    likelier = torch.gt(rest, shifted_y, out=q).sum(-1).long()
    return TokenStats(
        logp=logp,
        argmax=best.squeeze(-1),
        argmax_logp=argmax_logp,
        rest_logp=rest_logp,
        entropy=entropy,
        sq_norm=p_top.square() + rest_sq,
        rank=torch.where(is_best, 0, likelier + 1),
        residual_sq=torch.where(is_best, p_rest.square(), 1 - 2 * logp.exp() + p_top.square()) + rest_sq,
    )
