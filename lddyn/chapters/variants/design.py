"""What chapter 6 compares: losses, and whose answers are pushed."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lddyn.theory import losses


class Variant(NamedTuple):
    """A way to train on pairs: a loss, by its name in `losses.LOSSES`, and the settings that the chapter gives it."""

    loss: str
    options: Mapping = MappingProxyType({})  # keywords of the loss
    beta: float | None = None  # none: the chapter's
    rate: float = 1.0  # times the chapter's learning rate
    stop: float = 0.0  # the margin, in nats, at which training stops; 0: never


VARIANTS = {
    "DPO": Variant("dpo"),
    "IPO": Variant("ipo", beta=1.0),
    "SLiC": Variant("hinge"),
    "smoothed": Variant("cdpo", {"label_smoothing": 0.2}),
    "robust": Variant("robust", {"label_smoothing": 0.2}),
    "SPPO": Variant("sppo"),
    "KTO": Variant("kto"),
    "SimPO": Variant("simpo", beta=2.0),
    "ORPO": Variant("orpo"),
    "DPO + NLL": Variant("rpo"),
    "DPOP": Variant("dpop"),
    "gated": Variant("gated"),
    "low rate": Variant("dpo", rate=0.25),
    "early stop": Variant("dpo", stop=1.0),
}


def forces(variant: str, chosen: Tensor, rejected: Tensor, reference: tuple, lengths: tuple, beta: float):
    """The force of a variant's loss on chosen and rejected, -dL / dlog pi (`losses`): two tensors like `chosen`.

    chosen, rejected: (n,) log-probabilities in nats, summed over tokens; reference: the two of the reference model;
    lengths: tokens of the two answers. `beta` is the chapter's; a variant may have its own.
    """
    which = VARIANTS[variant]
    chosen, rejected = (x.detach().double().requires_grad_() for x in (chosen, rejected))
    given = {"beta": which.beta or beta, "chosen_length": lengths[0], "rejected_length": lengths[1], **which.options}
    loss = losses.value(losses.LOSSES[which.loss].function, chosen, rejected, *reference, **given)
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
