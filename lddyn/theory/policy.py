"""Policy gradients as forces: how a sampled answer is pushed or pulled (Shao et al., 2024; Schulman et al., 2017).

An answer y with advantage a contributes -a log pi(y) to the loss, so that its residual is that of every loss here,
G = force * (pi - y), with the force a times how much likelier the answer has become since it was sampled. A right
answer is pulled, a wrong one pushed: SFT on the one, unlearning on the other, weighed within a group.
"""

import torch
from torch import Tensor

SIGNS = {"right": (1.0, 0.0), "wrong": (0.0, 1.0), "both": (0.5, 0.5)}  # weight of pulls and of pushes


def advantages(rewards: Tensor) -> Tensor:
    """(reward - mean) / standard deviation within each group (Shao et al., 2024), 0 where all are alike.

    rewards: (groups, samples). Returns the same shape; the sum over each group is 0, so that its pulls and its pushes
    are equally strong.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    return torch.where(spread > 0, centred / spread.clamp(min=1e-12), 0.0)


def part(advantage: Tensor, sign: str) -> Tensor:
    """The advantages of which only the pulls ("right"), only the pushes ("wrong"), or half of "both" are kept."""
    pull, push = SIGNS[sign]
    return pull * advantage.clamp(min=0) + push * advantage.clamp(max=0)


def force(advantage: Tensor, log_ratio: Tensor, clip: float | None = None) -> Tensor:
    """advantage * ratio, the force on each token; with `clip` 0 once the ratio has left [1 - clip, 1 + clip] its way.

    That is the gradient of the clipped objective of PPO (Schulman et al., 2017), min(a ratio, a clipped ratio).
    log_ratio: log pi now - log pi when it was sampled, nats. advantage: of the same shape.
    """
    ratio = log_ratio.exp()
    if clip is None:
        return advantage * ratio
    gone = torch.where(advantage > 0, ratio > 1 + clip, ratio < 1 - clip)
    return torch.where(gone, 0.0, advantage * ratio)


def expected_residual(p: Tensor, rewards: Tensor, sign: str) -> Tensor:
    """G of one context in expectation over what is sampled from it, when rewards are 0 or 1: (..., V).

    Right answers alone have weight 1 each, wrong ones alone -1, both half of each. As sum_y p_y (p - e_y) = 0, all
    three are p (mean reward - reward): in expectation it makes no difference which of them one samples from p.
    """
    right, wrong = (p * rewards).sum(-1, keepdim=True), (p * (1 - rewards)).sum(-1, keepdim=True)
    pulled, pushed = right * p - p * rewards, p * (1 - rewards) - wrong * p
    return {"right": pulled, "wrong": pushed, "both": (pulled + pushed) / 2}[sign]
