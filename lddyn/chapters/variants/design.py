"""What chapter 6 compares: losses, and whose answers are pushed."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lddyn.theory import losses


class Variant(NamedTuple):
    """A way to train on pairs: the trainer's name of the loss, and the same loss as a function of log-probabilities."""

    loss: str
    function: Callable[..., Tensor]
    options: Mapping = MappingProxyType({})  # of the trainer
    keywords: Mapping = MappingProxyType({})  # of the function
    beta: float | None = None  # none: the chapter's
    rate: float = 1.0  # times the chapter's learning rate
    stop: float = 0.0  # the margin, in nats, at which training stops; 0: never


VARIANTS = {
    "DPO": Variant("sigmoid", losses.dpo_loss),
    "IPO": Variant("ipo", losses.mean_ipo_loss, beta=1.0),
    "SLiC": Variant("hinge", losses.hinge_loss),
    "smoothed": Variant("cdpo", losses.cdpo_loss, {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "robust": Variant("robust", losses.robust_loss, {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    "SPPO": Variant("sppo_hard", losses.sppo_loss),
    "KTO": Variant("apo_zero", losses.kto_loss),
    "SimPO": Variant("simpo", losses.simpo_loss, {"gamma": 1.0}, {"gamma": 1.0}, beta=2.0),
    "ORPO": Variant("orpo", losses.orpo_loss, {"lam": 0.1}, {"lam": 0.1}),
    "DPO + NLL": Variant("sigmoid+sft", losses.rpo_loss, {"loss_weights": [1.0, 1.0]}, {"alpha": 1.0}),
    "DPOP": Variant("dpop", losses.dpop_loss, {"lam": 5.0}, {"lam": 5.0}),
    "gated": Variant("gated", losses.gated_loss),
    "low rate": Variant("sigmoid", losses.dpo_loss, rate=0.25),
    "early stop": Variant("sigmoid", losses.dpo_loss, stop=1.0),
}


def forces(variant: str, chosen: Tensor, rejected: Tensor, reference: tuple, lengths: tuple, beta: float):
    """The force of a variant's loss on chosen and rejected, -dL / dlog pi (`residuals`): two tensors like `chosen`.

    chosen, rejected: (n,) log-probabilities in nats, summed over tokens; reference: the two of the reference model;
    lengths: tokens of the two answers. `beta` is the chapter's; a variant may have its own.
    """
    which = VARIANTS[variant]
    chosen, rejected = (x.detach().double().requires_grad_() for x in (chosen, rejected))
    given = {"beta": which.beta or beta, "chosen_length": lengths[0], "rejected_length": lengths[1]} | which.keywords
    takes = which.function.__code__.co_varnames[: which.function.__code__.co_argcount]
    loss = which.function(chosen, rejected, *reference, **{k: v for k, v in given.items() if k in takes})
    gradients = torch.autograd.grad(loss.sum(), (chosen, rejected), allow_unused=True)
    return tuple(torch.zeros_like(chosen) if g is None else -which.rate * g for g in gradients)


# --- whose answers are pushed ------------------------------------------------------------------------------


class Source(NamedTuple):
    """Where the two answers of a pair come from: the data, or samples of a policy."""

    chosen_from_data: bool
    rejected_from_data: bool
    refresh: bool  # samples of the policy as it is at the start of each round, not of the SFT model
    follow: bool = False  # that policy is also the reference


SOURCES = {
    "data": Source(True, True, refresh=False),
    "own rejected": Source(True, False, refresh=True),
    "SPIN": Source(True, False, refresh=True, follow=True),
    "both own, once": Source(False, False, refresh=False),
    "both own": Source(False, False, refresh=True),
}
