"""Residuals: G = the gradient of a loss with respect to the logits (sections 2 and 3, figure 2, appendix B).

Every loss here is a function of a few log-probabilities, so the chain rule splits its gradient in two:

    G = dL / dz = force * (pi - y),    force = -dL / dlog pi(y),

one (V, L) matrix for the chosen response and one for the rejected. A positive force pulls a response up, a
negative one pushes it down. The paper writes both G with the same sign and a minus between them; that minus
is part of our force.

Each loss is `<name>_loss`, its value, and mostly `<name>_force`, the closed form, (on chosen, on rejected); `LOSSES`
has them all by name. They take log pi(chosen), log pi(rejected) and the same two under the reference model: (batch,),
nats, summed over tokens. With the log-ratios to the reference, r+ = chosen - ref_chosen and r- = rejected -
ref_rejected, the margin is h = r+ - r-.
"""

import inspect
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, one_hot

Number = Tensor | float  # one for all pairs, or one for each
Forces = tuple[Tensor, Tensor]  # on chosen and on rejected
T = TypeVar("T")


def sft(p: Tensor, y: Tensor) -> Tensor:
    """G = pi - y for the cross-entropy loss (sections 2 and 3.1).

    p: (..., V) probabilities; y: (...) labels. Returns (..., V).
    """
    return p - one_hot(y, p.shape[-1]).to(p.dtype)


def margin(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number) -> Tensor:
    """h: how much more the policy prefers chosen to rejected than the reference does, in nats."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)


def sft_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number) -> Tensor:
    """-log pi(chosen) (eq. 4)."""
    return -chosen


def sft_force(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number) -> Forces:
    return torch.ones_like(chosen), torch.zeros_like(rejected)


def unlearning_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number) -> Tensor:
    """+log pi(rejected): gradient ascent on the negative log-likelihood. Nothing bounds it from below."""
    return rejected


def unlearning_force(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number) -> Forces:
    return torch.zeros_like(chosen), -torch.ones_like(rejected)


def npo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number, beta: float = 0.1) -> Tensor:
    """-(2 / beta) log sigmoid(-beta r-): unlearning that knows where it started (Zhang et al., 2024)."""
    return -2 / beta * logsigmoid(-beta * (rejected - ref_rejected))


def npo_force(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number, beta: float = 0.1) -> Forces:
    """-2 sigmoid(beta r-) on rejected: that of unlearning at the start; it halves, about, every log(2) / beta nats."""
    return torch.zeros_like(chosen), -2 * torch.sigmoid(beta * (rejected - ref_rejected))


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number, beta: float = 0.1) -> Tensor:
    """-log sigmoid(beta h) (eq. 6)."""
    return -logsigmoid(beta * margin(chosen, rejected, ref_chosen, ref_rejected))


def dpo_force(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number, beta: float = 0.1) -> Forces:
    """beta (1 - a) with a = sigmoid(beta h) (eq. 7): it fades as the pair is separated."""
    force = beta * torch.sigmoid(-beta * margin(chosen, rejected, ref_chosen, ref_rejected))
    return force, -force


def spin_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number, beta: float = 0.1) -> Tensor:
    """DPO where rejected was sampled from the reference, the policy of the last round (Chen et al., 2024)."""
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)


def spin_force(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number, beta: float = 0.1) -> Forces:
    return dpo_force(chosen, rejected, ref_chosen, ref_rejected, beta)


def ipo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number, beta: float = 0.1) -> Tensor:
    """(h - 1 / (2 beta))^2 (eq. 16). TRL divides each log-ratio by its length first."""
    return (margin(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)) ** 2


def ipo_force(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number, beta: float = 0.1) -> Forces:
    """2 (1 / (2 beta) - h): it turns round once the margin is larger than its target.

    Printed in eq. 17 is the force of DPO with a = h - 1 / (2 beta), beta (1 - a), which is not this.
    """
    force = 2 * (1 / (2 * beta) - margin(chosen, rejected, ref_chosen, ref_rejected))
    return force, -force


def slic_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    delta: float = 1.0, lam: float = 0.1, target: Number = 0.0,
) -> Tensor:  # fmt: skip
    """max(0, delta - (chosen - rejected)) - lam log pi(target) (eq. 18); no reference model.

    target: log-probability of the response that the regulariser holds on to, often the SFT answer.
    """
    return torch.relu(delta - (chosen - rejected)) - lam * target


def slic_force(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    delta: float = 1.0, lam: float = 0.1, target: Number = 0.0,
) -> Forces:  # fmt: skip
    """1 until the margin is delta, then 0; on the target it is always lam.

    Printed in eq. 19 and 20 is this times the force of DPO.
    """
    force = (delta - (chosen - rejected) > 0).to(chosen.dtype)
    return force, -force


def sppo_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number, beta: float = 0.1) -> Tensor:
    """(r+ - 1 / (2 beta))^2 + (r- + 1 / (2 beta))^2 (eq. 21; 1 / beta is the paper's eta)."""
    return (chosen - ref_chosen - 1 / (2 * beta)) ** 2 + (rejected - ref_rejected + 1 / (2 * beta)) ** 2


def sppo_force(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number, beta: float = 0.1) -> Forces:
    """2 (1 / (2 beta) - r+) and -2 (r- + 1 / (2 beta)): opposite at the start, each stops at its own target.

    Printed in eq. 22 is 2 (r+ - 1 / (2 beta)) and +2 (r- + 1 / (2 beta)): both signs are turned round.
    """
    return 2 * (1 / (2 * beta) - (chosen - ref_chosen)), -2 * (rejected - ref_rejected + 1 / (2 * beta))


def simpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 2.0, gamma: float = 1.0, chosen_length: Number = 1, rejected_length: Number = 1,
) -> Tensor:  # fmt: skip
    """-log sigmoid(beta (mean chosen - mean rejected) - gamma), means per token (Meng et al., 2024)."""
    return -logsigmoid(beta * (chosen / chosen_length - rejected / rejected_length) - gamma)


def simpo_force(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 2.0, gamma: float = 1.0, chosen_length: Number = 1, rejected_length: Number = 1,
) -> Forces:  # fmt: skip
    """beta sigmoid(gamma - beta (mean margin)) over the length of each response."""
    force = beta * torch.sigmoid(gamma - beta * (chosen / chosen_length - rejected / rejected_length))
    return force / chosen_length, -force / rejected_length


def kto_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, kl: Number = 0.0,
) -> Tensor:  # fmt: skip
    """2 - sigmoid(beta (r+ - kl)) - sigmoid(beta (kl - r-)) (Ethayarajh et al., 2024).

    kl: the batch's estimate of KL(policy || reference), nats, through which no gradient flows.
    """
    good, bad = beta * (chosen - ref_chosen - kl), beta * (rejected - ref_rejected - kl)
    return 2 - torch.sigmoid(good) - torch.sigmoid(-bad)


def kto_force(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, kl: Number = 0.0,
) -> Forces:  # fmt: skip
    """beta a (1 - a) with a = sigmoid(beta (r - kl)) for each side alone: it fades in both directions."""
    good = torch.sigmoid(beta * (chosen - ref_chosen - kl))
    bad = torch.sigmoid(beta * (rejected - ref_rejected - kl))
    return beta * good * (1 - good), -beta * bad * (1 - bad)


def orpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    lam: float = 0.1, chosen_length: Number = 1, rejected_length: Number = 1,
) -> Tensor:  # fmt: skip
    """-log p+ - lam log sigmoid(log odds(p+) - log odds(p-)), p = exp(mean per token) (Hong et al., 2024)."""
    good, bad = chosen / chosen_length, rejected / rejected_length
    return -good - lam * logsigmoid(log_odds(good) - log_odds(bad))


def orpo_force(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    lam: float = 0.1, chosen_length: Number = 1, rejected_length: Number = 1,
) -> Forces:  # fmt: skip
    """(1 + w / (1 - p+)) / L+ and -w / (1 - p-) / L-, with w = lam sigmoid(log odds(p-) - log odds(p+))."""
    good, bad = chosen / chosen_length, rejected / rejected_length
    weight = lam * torch.sigmoid(log_odds(bad) - log_odds(good))
    return (1 - weight / torch.expm1(good)) / chosen_length, weight / torch.expm1(bad) / rejected_length


def log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p < 0."""
    return logp - torch.log(-torch.expm1(logp))


def dpop_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, lam: float = 5.0,
) -> Tensor:  # fmt: skip
    """DPO with the margin less lam max(0, -r+), a fine for losing the chosen answer (Pal et al., 2024)."""
    fine = lam * torch.relu(ref_chosen - chosen)
    return -logsigmoid(beta * (margin(chosen, rejected, ref_chosen, ref_rejected) - fine))


def dpop_force(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, lam: float = 5.0,
) -> Forces:  # fmt: skip
    """beta (1 - a), and on chosen (1 + lam) times that while it is below its start."""
    fine = lam * torch.relu(ref_chosen - chosen)
    force = beta * torch.sigmoid(-beta * (margin(chosen, rejected, ref_chosen, ref_rejected) - fine))
    return force * (1 + lam * (chosen < ref_chosen)), -force


def rpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, alpha: float = 1.0, chosen_length: Number = 1,
) -> Tensor:  # fmt: skip
    """DPO plus alpha times the per-token negative log-likelihood of chosen (Pang et al., 2024)."""
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta) - alpha * chosen / chosen_length


def rpo_force(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, alpha: float = 1.0, chosen_length: Number = 1,
) -> Forces:  # fmt: skip
    """DPO's force, and alpha / L+ more on chosen, which does not fade."""
    up, down = dpo_force(chosen, rejected, ref_chosen, ref_rejected, beta)
    return up + alpha / chosen_length, down


def cdpo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, label_smoothing: float = 0.1,
) -> Tensor:  # fmt: skip
    """DPO with smoothed labels: a share of the pairs is held for labelled the wrong way (Mitchell, 2023)."""
    h = beta * margin(chosen, rejected, ref_chosen, ref_rejected)
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def cdpo_force(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, label_smoothing: float = 0.1,
) -> Forces:  # fmt: skip
    """beta (1 - a - label_smoothing): it turns round where a = sigmoid(beta h) is 1 - label_smoothing."""
    h = beta * margin(chosen, rejected, ref_chosen, ref_rejected)
    force = beta * (torch.sigmoid(-h) - label_smoothing)
    return force, -force


def gated_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, rejected_length: Number = 1,
) -> Tensor:  # fmt: skip
    """DPO's loss; the gradient on rejected is multiplied by its probability per token, exp(rejected / length).

    Our own short form of the idea of Gate-DPO (Mouiche, 2026): a push fades where there is nothing left to push.
    """
    gate = torch.exp(rejected / rejected_length).detach()
    held = gate * rejected + (1 - gate) * rejected.detach()  # the value of rejected with a smaller gradient
    return dpo_loss(chosen, held, ref_chosen, ref_rejected, beta)


def gated_force(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, rejected_length: Number = 1,
) -> Forces:  # fmt: skip
    """DPO's force, on rejected times its probability per token."""
    up, down = dpo_force(chosen, rejected, ref_chosen, ref_rejected, beta)
    return up, down * torch.exp(rejected / rejected_length)


def mean_ipo_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, chosen_length: Number = 1, rejected_length: Number = 1,
) -> Tensor:  # fmt: skip
    """TRL's IPO: the squared distance of the margin from 1 / (2 beta), with log-ratios per token."""
    ratios = (chosen - ref_chosen) / chosen_length, (rejected - ref_rejected) / rejected_length
    return ipo_loss(*ratios, 0.0, 0.0, beta)


def hinge_loss(chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta h): SLiC's hinge on the log-ratios to the reference, with delta = 1 / beta."""
    return torch.relu(1 - beta * margin(chosen, rejected, ref_chosen, ref_rejected))


def robust_loss(
    chosen: Tensor, rejected: Tensor, ref_chosen: Number, ref_rejected: Number,
    beta: float = 0.1, label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    """DPO's loss, freed of the bias that a share `label_smoothing` of wrong labels gives it (Chowdhury, 2024)."""
    h = beta * margin(chosen, rejected, ref_chosen, ref_rejected)
    weighed = (1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)
    return -weighed / (1 - 2 * label_smoothing)


# --- the registry -------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """A loss on pairs: the function, and what others need to know of it."""

    function: Callable[..., Tensor]
    force: Callable[..., Forces] | None = None  # its closed form, where there is one here
    trl: str | None = None  # what TRL trains it under, names joined by "+" are added; none: trained by the function
    title: str | None = None  # in the figure of all forces; none: not in it


# A new loss is its function and a line here: it is then trained by this name (`training`, `lddyn train`), checked
# against automatic differentiation where it has a force, and drawn where it has a title.
LOSSES = {
    "sft_sum": Loss(sft_loss, sft_force, title="SFT"),
    "dpo": Loss(dpo_loss, dpo_force, "sigmoid", "DPO"),
    "spin": Loss(spin_loss, spin_force, "sigmoid", "SPIN"),
    "ipo_sum": Loss(ipo_loss, ipo_force, title="IPO"),
    "slic": Loss(slic_loss, slic_force, title="SLiC"),
    "sppo": Loss(sppo_loss, sppo_force, "sppo_hard", "SPPO"),
    "simpo": Loss(simpo_loss, simpo_force, title="SimPO"),
    "kto": Loss(kto_loss, kto_force, "apo_zero", "KTO"),
    "orpo": Loss(orpo_loss, orpo_force, title="ORPO"),
    "dpop": Loss(dpop_loss, dpop_force, title="DPOP"),
    "rpo": Loss(rpo_loss, rpo_force, "sigmoid+sft", "RPO"),
    "unlearning": Loss(unlearning_loss, unlearning_force, title="NLL unlearning"),
    "npo": Loss(npo_loss, npo_force),
    "ipo": Loss(mean_ipo_loss, trl="ipo"),
    "hinge": Loss(hinge_loss, trl="hinge"),
    "robust": Loss(robust_loss, trl="robust"),
    "cdpo": Loss(cdpo_loss, cdpo_force),
    "gated": Loss(gated_loss, gated_force),
}


def titled() -> dict[str, Loss]:
    """The losses of the figure of all forces, by title."""
    return {loss.title: loss for loss in LOSSES.values() if loss.title}


def keywords(function: Callable[..., object]) -> list[str]:
    """The keywords of a loss or a force besides the four log-probabilities."""
    return list(inspect.signature(function).parameters)[4:]


def value(function: Callable[..., T], *logps: Number, **given: object) -> T:
    """A loss, or a force, of the four log-probabilities and those of the `given` keywords that it takes.

    Lengths and beta, say: each loss has its own.
    """
    takes = keywords(function)
    return function(*logps, **{name: setting for name, setting in given.items() if name in takes})


def gradient_error(
    loss: Callable[..., Tensor],
    force: Callable[..., Forces],
    logits: Tensor,
    labels: Tensor,
    reference: Tensor,
    **settings: Number,
) -> Tensor:
    """Largest |force (pi - y) - dL/dz| over both responses, with dL/dz from automatic differentiation.

    logits: (2, L, V) of chosen and rejected; labels: (2, L); reference: (2,) log-probabilities, nats. `loss`
    and `force` are those of a `Loss`, `settings` their keywords. Returns a scalar.
    """
    z = logits.detach().requires_grad_()
    logps = z.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).sum((1, 2))  # (2,)
    (by_autograd,) = torch.autograd.grad(loss(*logps, *reference, **settings), z)  # (2, L, V)
    forces = torch.stack(force(*logps.detach(), *reference, **settings))  # (2,)
    return (forces[:, None, None] * sft(z.detach().softmax(-1), labels) - by_autograd).abs().max()
