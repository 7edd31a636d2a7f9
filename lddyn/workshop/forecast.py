"""What one epoch of training on pairs will do to each answer, from the gradients before its first step (eq. 5).

At the start every pair has the same force, so the steps of an epoch add up to one direction in parameter space, and one
Jacobian-vector product gives the first-order change of every text (`first_order.predicted_change`). How far training
goes along it is a dose, and doses are compared at equal margin: the mean growth of log pi(chosen) - log pi(rejected).
Which pairs do it is read the other way round: K is symmetric, so one product along the gradient of what is observed
gives the part of every pair (`parts`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lddyn import InputError, unknown
from lddyn.engine.probe_set import Model
from lddyn.engine.training import OPTIMIZERS
from lddyn.theory import first_order, losses
from lddyn.theory.first_order import Parameters, Text
from lddyn.theory.logprobs import TokenStats, token_stats


class Pairs(NamedTuple):
    """Texts of pairs; pair i is `chosen[i]`, `rejected[i]`."""

    chosen: list[Text]
    rejected: list[Text]

    def only(self, numbers: Sequence[int]) -> "Pairs":
        return Pairs([self.chosen[i] for i in numbers], [self.rejected[i] for i in numbers])


@dataclass(frozen=True)
class How:
    """A training, as far as the first order knows it; `loss` is one of `losses.LOSSES`."""

    loss: str = "dpo"
    beta: float = 0.1
    optimizer: str = "adamw"
    batch_size: int = 4


class Direction(NamedTuple):
    """Where an epoch goes: `update` is minus the mean gradient times `scale`, parameter by parameter."""

    update: Parameters
    scale: Parameters  # 1 for plain gradient descent


def direction(model: Model, pairs: Pairs, how: How = How()) -> Direction:
    """The direction of an epoch's steps if all gradients were those at the start, of any length.

    AdamW and RMSprop divide each parameter's gradient by the root of its mean square, here over the epoch's batches.
    The model is its own reference. Raises `InputError` for an unknown loss or optimizer.
    """
    if how.optimizer not in OPTIMIZERS:
        raise unknown("optimizer", how.optimizer, OPTIMIZERS)
    if how.loss not in losses.LOSSES:
        raise unknown("loss", how.loss, losses.LOSSES)
    mean = {name: torch.zeros_like(p) for name, p in first_order.trainable(model).items()}
    square = {name: torch.zeros_like(p) for name, p in mean.items()}
    order = torch.randperm(len(pairs.chosen), generator=torch.Generator().manual_seed(0)).tolist()
    for first in range(0, len(order), how.batch_size):
        batch = pairs.only(order[first : first + how.batch_size])
        lengths = [torch.tensor([len(text[1]) for text in side], device=model.device) for side in batch]
        given = {"beta": how.beta, "chosen_length": lengths[0], "rejected_length": lengths[1]}
        loss = partial(losses.value, losses.LOSSES[how.loss].function)
        for name, g in first_order.gradient(model, *batch, loss, **given).items():
            share = len(batch.chosen) / len(order)
            mean[name] += share * g
            square[name] += share * g.square()
    if how.optimizer == "sgd":
        square = {name: torch.ones_like(s) for name, s in square.items()}
    scale = {name: torch.where(s > 0, s.rsqrt(), 0.0) for name, s in square.items()}
    return Direction({name: -scale[name] * g for name, g in mean.items()}, scale)


def parts(model: Model, pairs: Pairs, observed: Sequence[Text], towards: Direction, beta: float = 0.1) -> Tensor:
    """What each pair adds to the mean first-order change of the observed texts along DPO's direction.

    The parts add up to this mean. Returns (pairs,), float64, in nats for the whole length of the direction.
    """
    climb = {name: torch.zeros_like(p) for name, p in towards.update.items()}
    for text in observed:  # one at a time: little memory
        for name, g in first_order.gradient(model, [text]).items():
            climb[name] -= towards.scale[name] * g / len(observed)
    along = first_order.predicted_change(model, climb, [*pairs.chosen, *pairs.rejected]).sums
    up, down = along.chunk(2)
    return beta / 2 * (up - down) / len(up)


# --- how far ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def stats(model: Model, texts: Sequence[Text], theta: Parameters | None = None) -> list[TokenStats]:
    """Every token of every response, with `theta` in place of parameters of the model."""
    found: dict[int, TokenStats] = {}
    with first_order.differentiable(model):
        for batch in first_order.batches(model, texts, None):
            of_tokens = token_stats(first_order.response_logits(model, theta or {}, batch), batch.targets)
            parted = zip(*(values.split(batch.lengths) for values in of_tokens), strict=True)
            found.update((i, TokenStats(*of_text)) for i, of_text in zip(batch.numbers, parted, strict=True))
    return [found[i] for i in range(len(texts))]


def sums(of_texts: Sequence[TokenStats], quantity: str = "logp") -> Tensor:
    """A quantity of each response, summed over its tokens in float64. Returns (texts,)."""
    return first_order.sums([getattr(one, quantity).cpu() for one in of_texts])


class Forecast(NamedTuple):
    """Changes in nats, summed over a response, when the mean margin has grown by `margin`."""

    margin: float
    dose: float  # the factor of the direction
    chosen: Tensor  # (pairs,)
    rejected: Tensor  # (pairs,)
    top: Tensor  # log pi(y*) along the chosen answers, (pairs,)
    unpushed: Tensor  # (texts,)
    slopes: Tensor  # of each chosen answer by the first order alone, at the margin that was asked for, (pairs,)


def forecast(
    model: Model,
    pairs: Pairs,
    unpushed: Sequence[Text],
    margin: float,
    how: How = How(),
    towards: Direction | None = None,
    steps: int = 6,
) -> Forecast:
    """What an epoch does to every text: its direction is followed until the mean margin has grown by `margin`.

    The direction is that of the first order (`direction`, or `towards`); what happens along it is computed by the model
    itself, so that the curve of the softmax counts. The dose is found by the secant method, to 1% of `margin`, or the
    nearest of `steps` tries is taken: `Forecast.margin` says what was reached. Raises `InputError` where the margin
    does not grow along the direction at all.
    """
    update = (towards or direction(model, pairs, how)).update
    texts, n = [*pairs.chosen, *pairs.rejected], len(pairs.chosen)
    first = first_order.predicted_change(model, update, texts)
    slope = (first.sums[:n] - first.sums[n:]).mean().item()
    if not slope > 0:
        raise InputError("the margin of these pairs does not grow to first order: chosen and rejected pull alike")
    before = stats(model, texts)
    tried = [(0.0, 0.0, before)]  # margin, dose, every text
    dose = margin / slope
    while len(tried) <= steps and not abs(tried[-1][0] - margin) <= 0.01 * margin:
        after = stats(model, texts, first_order.stepped(model, first_order.scaled(update, dose)))
        change = sums(after) - sums(before)
        tried.append(((change[:n] - change[n:]).mean().item(), dose, after))
        (was, last, _), (now, _, _) = tried[-2:]
        rise = (now - was) / (dose - last)
        dose = min(max(dose + (margin - now) / rise, dose / 4), 4 * dose) if rise > 0 else dose / 2
    reached, dose, after = min(tried[1:], key=lambda one: abs(one[0] - margin))
    theta = first_order.stepped(model, first_order.scaled(update, dose))
    change = sums(after) - sums(before)
    top = sums(after[:n], "argmax_logp") - sums(before[:n], "argmax_logp")
    others = sums(stats(model, unpushed, theta)) - sums(stats(model, unpushed)) if unpushed else torch.zeros(0)
    return Forecast(reached, dose, change[:n], change[n:], top, others, margin / slope * first.sums[:n])
