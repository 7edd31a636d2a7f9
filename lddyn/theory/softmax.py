"""The squeezing effect: one gradient step on a softmax, exactly (section 3.3, appendix E).

Softmax regression, logits z = W^T phi, with cross-entropy to a label y. One gradient step on W changes the
logits of that context by -eta' (p - e_y), eta' = eta ||phi||^2: this is not an approximation, z is linear in W. A
positive gradient (SFT) has eta' > 0; a negative one, pushing y down, has eta' < 0. Here `eta` is eta'.

All tensors are batched over the leading dimensions: z, p (..., V); y (...) labels; eta a number or (..., 1). y* is the
most likely label other than y.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lddyn.theory import losses
from lddyn.theory.losses import Number

# --- one step ----------------------------------------------------------------------------------------------


def softmax(z: Tensor) -> Tensor:
    return z.softmax(-1)


def sparsemax(z: Tensor) -> Tensor:
    """Euclidean projection of the logits on the simplex (Martins and Astudillo, 2016): z - tau, cut at zero."""
    ordered = z.sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    total = ordered.cumsum(-1) - 1
    support = (ordered * count > total).sum(-1, keepdim=True)
    return (z - total.gather(-1, support - 1) / support).clamp(min=0)


def entmax(z: Tensor) -> Tensor:
    """1.5-entmax, between softmax and sparsemax (Peters et al., 2019): (z / 2 - tau)^2, where that is not negative.

    tau, for which the sum is 1, solves a quadratic equation on the k largest logits; the right k is the last one whose
    smallest logit is still above its tau.
    """
    half = (z - z.amax(-1, keepdim=True)) / 2
    ordered = half.sort(-1, descending=True).values
    count = torch.arange(1, z.shape[-1] + 1, dtype=z.dtype)
    mean, square = ordered.cumsum(-1) / count, ordered.square().cumsum(-1) / count
    tau = mean - (1 / count - (square - mean.square())).clamp(min=0).sqrt()
    support = (tau <= ordered).sum(-1, keepdim=True)
    return (half - tau.gather(-1, support - 1)).clamp(min=0).square()


OUTPUTS = {  # the alpha of each in the family of entmax, and its logits of a distribution p, up to a constant
    "softmax": (1.0, softmax, torch.log),
    "entmax": (1.5, entmax, lambda p: 2 * p.sqrt()),
    "sparsemax": (2.0, sparsemax, lambda p: p),
}


def step(z: Tensor, y: Tensor, eta: Number, outputs: Callable[[Tensor], Tensor] = softmax) -> Tensor:
    """The logits after one step, z - eta' (p - e_y), p = outputs(z).

    `outputs` may also be `sparsemax`, `entmax` or `torch.sigmoid`: with the loss that belongs to each (sparsemax loss,
    entmax loss, binary cross-entropy of every label) the residual is p - e_y again.
    """
    return z - eta * losses.sft(outputs(z), y)


def log_alpha(logp: Tensor, y: Tensor, eta: Number, i: Tensor) -> Tensor:
    """Lemma 1: log(p_i after / p_i before) = log sum_j e^z_j - log sum_j beta_j e^z_j, as in the paper, in nats.

    i = y: beta_j = exp(-eta' (1 + p_j - p_i)), beta_y = 1. i != y: beta_j = exp(-eta' (p_j - p_i)),
    beta_y = exp(-eta' (p_y - p_i - 1)). i: (...) labels. Returns (...).
    """
    p, at_y = logp.exp(), one_hot(y, logp.shape[-1]).bool()
    p_i, p_y = (p.gather(-1, label.unsqueeze(-1)) for label in (i, y))
    own = torch.where(at_y, 0.0, 1 + p - p_i)
    other = torch.where(at_y, p_y - p_i - 1, p - p_i)
    exponent = torch.where((i == y).unsqueeze(-1), own, other)
    return -(logp - eta * exponent).logsumexp(-1)


def first_order(p: Tensor, y: Tensor, eta: Number) -> Tensor:
    """d log p_i = -eta' (p_i - 1[i = y] + p_y - ||p||^2), in nats: -eta' A G with A = I - 1 p^T. (..., V)."""
    g = losses.sft(p, y)
    return -eta * (g - (p * g).sum(-1, keepdim=True))


def threshold(logp: Tensor, y: Tensor, eta: Number) -> Tensor:
    """The probability above which a label other than y rises in a negative step of this size, exactly. (...).

    T = (1 / |eta'|) log sum_j p_j exp(|eta'| (p_j - 1[j = y])). It grows with the step, from ||p||^2 - p_y
    (the first-order law) to p_{y*}, where only y* is left.
    """
    g = losses.sft(logp.exp(), y)
    return (logp - eta * g).logsumexp(-1) / -torch.as_tensor(eta, dtype=logp.dtype).squeeze(-1)


def bar(p: Tensor, y: Tensor, alpha: float = 1.0) -> Tensor:
    """The probability above which a label of the support other than y rises in a small negative step. (...).

    dp = (diag(s) - s s^T / sum s) dz with s = p^(2 - alpha) on the support (Peters et al., 2019), so that label i rises
    where p_i > (sum_j s_j p_j - s_y) / sum_j s_j. Softmax: ||p||^2 - p_y. Sparsemax: 0 while y is in the support, and
    one over the size of the support once it is not.
    """
    s = torch.where(p > 0, p ** (2 - alpha), 0.0)
    at_y = s.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return ((s * p).sum(-1) - at_y) / s.sum(-1)


def top_other(p: Tensor, y: Tensor) -> Tensor:
    """y*, the most likely label other than y, from probabilities, log-probabilities or logits. (...)."""
    return p.masked_fill(one_hot(y, p.shape[-1]).bool(), -torch.inf).argmax(-1)


class Account(NamedTuple):
    """Where the probability went, (...) each: gain = from_pushed + from_others."""

    gain: Tensor  # of y*
    from_pushed: Tensor  # what y lost
    from_others: Tensor  # what all other labels lost together; negative when they gained

    @property
    def share(self) -> Tensor:
        """Share of y*'s gain that was taken from labels that nobody pushed."""
        return (self.from_others / self.gain).clamp(0, 1)


def account(before: Tensor, after: Tensor, y: Tensor) -> Account:
    """The balance of a step between two distributions (..., V)."""
    change = after - before
    gain = change.gather(-1, top_other(before, y).unsqueeze(-1)).squeeze(-1)
    from_pushed = -change.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return Account(gain, from_pushed, gain - from_pushed)


# --- distributions -----------------------------------------------------------------------------------------


def zipf(vocab: int, peakiness: float) -> Tensor:
    """Logits of p(rank) proportional to rank^-peakiness: 0 is uniform, 1 is like words, 3 is peaky. (V,), float64."""
    return -peakiness * torch.arange(1, vocab + 1, dtype=torch.float64).log()


def with_pushed(z: Tensor, y: Tensor, p_y: float) -> Tensor:
    """Logits with the probability of y set to p_y and the shape of the rest kept."""
    at_y = one_hot(y, z.shape[-1]).bool()
    rest = z.masked_fill(at_y, -torch.inf).log_softmax(-1)
    p = torch.tensor(p_y, dtype=z.dtype)
    return torch.where(at_y, p.log(), rest + torch.log1p(-p))


def with_margin(margin: Tensor, start: float = -40.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log pi of chosen and rejected, moved apart from `start` by half the margin each, and under the reference."""
    reference = torch.full_like(margin, start)
    return reference + margin / 2, reference - margin / 2, reference, reference
