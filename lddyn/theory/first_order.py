"""First order on any causal language model: what one step does to any response (section 3, eq. 5).

With chi = [x; y] a step on (x_u, y_u) changes log pi at token m of an observed response by

    [d log pi(. | chi_o)]_m = -eta sum_l [A(chi_o)]_m [K(chi_o, chi_u)]_{m,l} [G(chi_u)]_l

K has (tokens V)^2 entries and is never needed: read from the right, J_u^T G is the gradient, and J_o times a direction
in parameter space is one Jacobian-vector product for all observations together (`predicted_change`). The direction may
be any parameter difference: a gradient step, what AdamW applied, a LoRA update. The factors are in `kernels`.

A text is a pair (prompt, response) of token ids; `model` is a causal LM of `transformers`, perhaps wrapped by PEFT. All
functions leave the model as it was. Log-probabilities are in nats, and logits of a response are those that predict it.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from lddyn import InputError
from lddyn.theory import losses

Model = Any  # a causal LM of `transformers`, perhaps wrapped by PEFT
Text = tuple[Sequence[int], Sequence[int]]  # prompt, response
Parameters = dict[str, Tensor]  # some or all of a model's parameters, or a direction among them
BATCH_TOKENS = {"cpu": 2048, "cuda": 2**14}
SAVED = 128  # tokens of prompts, fewer are not worth a call of their own
BATCH_LOGITS = 2**25  # in one piece, so that a large vocabulary means smaller batches

# for each model the longest text with a shared prompt that was tried, and whether it came out right
_tried: WeakKeyDictionary[Model, tuple[int, bool]] = WeakKeyDictionary()


class Change(NamedTuple):
    """Log-probabilities of observed responses and their first-order change."""

    tokens: list[Tensor]  # change of each token's log pi, (tokens,) an observation
    sums: Tensor  # change of log pi of a response, (observations,)
    logps: Tensor  # log pi of a response before the step, (observations,)


# --- parameters and directions -----------------------------------------------------------------------------


def parameters(model: Model) -> Parameters:
    """A detached copy of the trainable parameters: where a step starts from, or where it ended."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def difference(before: Parameters, after: Parameters) -> Parameters:
    """What an optimiser, of whatever kind, has applied between two copies of the parameters."""
    return {name: after[name] - p for name, p in before.items()}


def scaled(direction: Parameters, factor: float) -> Parameters:
    """A direction times a number."""
    return {name: factor * d for name, d in direction.items()}


def norm(direction: Parameters) -> float:
    """Euclidean norm over all parameters."""
    return math.sqrt(sum(d.double().square().sum().item() for d in direction.values()))


def inner(a: Parameters, b: Parameters) -> float:
    """Inner product over all parameters."""
    return sum((d * b[name]).double().sum().item() for name, d in a.items())


def trainable(model: Model, direction: Parameters | None = None) -> Parameters:
    """The trainable parameters as they are, or those that a direction names; not copied."""
    named = dict(model.named_parameters())
    if direction is None:
        found = {name: p.detach() for name, p in named.items() if p.requires_grad}
        if not found:
            raise InputError(f"no parameter of {type(model).__name__} is trainable (requires_grad)")
        return found
    for name in direction:
        if name not in named:
            raise InputError(f"the update has {name!r}, which is no parameter of {type(model).__name__}")
    return {name: named[name].detach() for name in direction}


# --- texts through the model -------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Some texts as padded token ids, and where their response tokens are predicted."""

    numbers: list[int]  # places of the texts in the list that was given
    lengths: list[int]  # tokens of each response
    ids: Tensor  # (rows, tokens), padded on the right
    mask: Tensor
    kept: int  # last positions whose logits are needed
    at: tuple[Tensor, Tensor]  # row and kept position that predict each response token, all texts in turn
    targets: Tensor  # (response tokens,)
    shared: int = 0  # tokens that all texts begin with, which are computed once


def batches(model: Model, texts: Sequence[Text], budget: int | None, share: bool = False) -> Iterator[Batch]:
    """Texts with prompts of similar length together, at most `budget` padded tokens at a time.

    With `share`, those with the same prompt where that saves `SAVED` tokens, if it is right for the model.
    """
    vocabulary = model.get_output_embeddings().weight.shape[0]
    budget = min(budget or BATCH_TOKENS.get(model.device.type, 2048), max(1, BATCH_LOGITS // vocabulary))
    of_prompt: dict[tuple[int, ...], list[int]] = {}
    for number, (prompt, response) in enumerate(texts):
        if not prompt or not response:
            raise InputError("a text needs at least one token of prompt and one of response")
        of_prompt.setdefault(tuple(prompt), []).append(number)
    alone: list[int] = []
    for prompt, numbers in of_prompt.items():
        if share and (len(numbers) - 1) * len(prompt) >= SAVED and _shares(model, texts, numbers):
            for rows in _grouped(texts, numbers, budget):
                yield _batch(model, texts, rows)._replace(shared=len(prompt))
        else:
            alone += numbers
    for rows in _grouped(texts, alone, budget):
        yield _batch(model, texts, rows)


def _grouped(texts: Sequence[Text], numbers: Sequence[int], budget: int) -> Iterator[list[int]]:
    rows: list[int] = []
    width = 0
    for number in sorted(numbers, key=lambda i: (len(texts[i][0]), len(texts[i][1]))):
        length = sum(map(len, texts[number]))
        if rows and (len(rows) + 1) * max(width, length) > budget:
            yield rows
            rows, width = [], 0
        rows.append(number)
        width = max(width, length)
    if rows:
        yield rows


@torch.no_grad()
def _shares(model: Model, texts: Sequence[Text], numbers: Sequence[int]) -> bool:
    """Whether texts that share their prompt come out as one by one, tried on the longest so far of each model."""
    longest = max(numbers, key=lambda i: len(texts[i][1]))
    length = sum(map(len, texts[longest]))
    if length > _tried.get(model, (0, False))[0]:
        batch = _batch(model, texts, [longest])
        whole = response_logits(model, {}, batch)
        try:
            apart = response_logits(model, {}, batch._replace(shared=len(texts[longest][0])))
            tolerance = 1e-4 if torch.finfo(whole.dtype).bits >= 32 else 0.05
            right = bool((apart - whole).abs().max() <= tolerance * whole.abs().max())
        except Exception:  # whatever a model that was not written for this raises
            right = False
        _tried[model] = length, right
    return _tried[model][1]


def _batch(model: Model, texts: Sequence[Text], rows: list[int]) -> Batch:
    whole = [[*texts[i][0], *texts[i][1]] for i in rows]
    width, first = max(map(len, whole)), min(len(texts[i][0]) for i in rows) - 1
    lengths = [len(texts[i][1]) for i in rows]
    places = [
        (row, len(texts[i][0]) - 1 - first + k)
        for row, (i, n) in enumerate(zip(rows, lengths, strict=True))
        for k in range(n)
    ]
    row, column = torch.tensor(places, device=model.device).T
    return Batch(
        rows,
        lengths,
        torch.tensor([w + [0] * (width - len(w)) for w in whole], device=model.device),
        torch.tensor([[1] * len(w) + [0] * (width - len(w)) for w in whole], device=model.device),
        width - first,
        (row, column),
        torch.tensor([token for i in rows for token in texts[i][1]], device=model.device),
    )


def response_logits(model: Model, theta: Parameters, batch: Batch) -> Tensor:
    """Logits that predict the response tokens of a batch, (response tokens, V)."""
    if batch.shared:
        return _with_shared_prompt(model, theta, batch)[batch.at]
    inputs = {"input_ids": batch.ids, "attention_mask": batch.mask, "logits_to_keep": batch.kept}
    z: Tensor = functional_call(model, theta, (), inputs | {"use_cache": False}).logits[batch.at]
    return z


def _with_shared_prompt(model: Model, theta: Parameters, batch: Batch) -> Tensor:
    """Logits of the last positions, (rows, kept, V): a prompt's keys and values, and their tangents, serve all rows."""
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    named = inspect.signature(inside.forward).parameters
    cache = DynamicCache()
    again = {"cache" if "cache" in named else "past_key_values": cache, "use_cache": True}
    prompt, rest = batch.ids[:1, : batch.shared], batch.ids[:, batch.shared :]
    first = functional_call(model, theta, (), {"input_ids": prompt, "logits_to_keep": 1} | again).logits
    cache.batch_repeat_interleave(len(rest))
    places = torch.arange(batch.shared, batch.ids.shape[1], device=rest.device).expand_as(rest)
    inputs = {"input_ids": rest, "attention_mask": batch.mask, "position_ids": places}
    later = functional_call(model, theta, (), inputs | again).logits
    return torch.cat([first.expand(len(rest), -1, -1), later], 1)


def _of_targets(z: Tensor, targets: Tensor) -> Tensor:
    return z.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)


@contextmanager
def differentiable(model: Model) -> Iterator[None]:
    """Evaluation mode, and attention that has forward-mode derivatives; afterwards everything is as before.

    SDPA is held to its math kernel; anything else but eager attention (flash kernels) becomes eager meanwhile.
    """
    modes = {module: module.training for module in model.modules()}
    config = model.config.get_text_config()
    attention = config._attn_implementation
    try:
        model.eval()
        if attention not in ("sdpa", "eager"):
            model.set_attn_implementation("eager")
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if attention not in ("sdpa", "eager"):
            model.set_attn_implementation(attention)
        for module, training in modes.items():
            module.training = training


def logps(
    model: Model, texts: Sequence[Text], theta: Parameters | None = None, batch_tokens: int | None = None
) -> list[Tensor]:
    """log pi of each response, token by token: a list of (tokens,); `theta` stands in for parameters of the model."""
    found: dict[int, Tensor] = {}
    with differentiable(model), torch.no_grad():
        for batch in batches(model, texts, batch_tokens, share=True):
            of_tokens = _of_targets(response_logits(model, theta or {}, batch), batch.targets)
            found.update(zip(batch.numbers, of_tokens.split(batch.lengths), strict=True))
    return [found[number] for number in range(len(texts))]


def sums(tokens: Sequence[Tensor]) -> Tensor:
    """One number a response from one a token, added in float64. Returns (responses,)."""
    return torch.stack([part.double().sum() for part in tokens])


# --- the prediction ----------------------------------------------------------------------------------------


def predicted_change(
    model: Model,
    update: Parameters,
    observations: Sequence[Text],
    start: Parameters | None = None,
    batch_tokens: int | None = None,
) -> Change:
    """First-order change of log pi of every observation under an update of the parameters (proposition 1, eq. 5).

    update: the parameter difference, of all parameters or of some: `step(...)` for a gradient step, `difference` of the
    parameters around a step of any optimiser. `start`: the parameters before it, where the model is elsewhere by now.
    One Jacobian-vector product a batch, three times the cost of a forward pass; a prompt is computed once for several
    responses. Memory does not grow with the number of observations, `batch_tokens` bounds it. Raises `InputError` for a
    parameter that the model does not have.
    """
    theta = trainable(model, update)
    if start is not None:
        theta = {name: start[name] for name in theta}
    changes: dict[int, Tensor] = {}
    before = torch.zeros(len(observations), dtype=torch.float64)
    with differentiable(model), torch.no_grad():
        for batch in batches(model, observations, batch_tokens, share=True):

            def of_parameters(p: Parameters, batch: Batch = batch) -> Tensor:
                return _of_targets(response_logits(model, p, batch), batch.targets)

            logp, change = jvp(of_parameters, (theta,), (update,))[:2]
            changes.update(zip(batch.numbers, change.split(batch.lengths), strict=True))
            for number, of_text in zip(batch.numbers, logp.split(batch.lengths), strict=True):
                before[number] = of_text.double().sum()
    tokens = [changes[number] for number in range(len(observations))]
    return Change(tokens, sums(tokens).cpu(), before)


def gradient(
    model: Model,
    chosen: Sequence[Text],
    rejected: Sequence[Text] | None = None,
    loss: Callable[..., Tensor] = losses.sft_loss,
    reference: tuple[Tensor, Tensor] | None = None,
    **settings: Any,
) -> Parameters:
    """Gradient of the mean loss over a batch with respect to the trainable parameters: J_u^T G.

    loss: any `<name>_loss` of `residuals`, with its `settings`. `rejected` may be missing for a loss that does not read
    it. `reference`: summed log pi of chosen and rejected under the reference model, two (batch,); by default those of
    the model itself, as at the start of DPO.
    """
    theta = {name: p.requires_grad_() for name, p in trainable(model).items()}
    with differentiable(model), torch.enable_grad():
        good = _summed(model, theta, chosen)
        bad = _summed(model, theta, rejected) if rejected else torch.zeros_like(good)
        ref = (good.detach(), bad.detach()) if reference is None else reference
        value = loss(good, bad, *(r.to(good) for r in ref), **settings).mean()
        found = torch.autograd.grad(value, list(theta.values()), allow_unused=True)
    pairs = zip(theta.items(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else g.detach() for (name, p), g in pairs}


def _summed(model: Model, theta: Parameters, texts: Sequence[Text]) -> Tensor:
    (batch,) = batches(model, texts, 2**62) if len(texts) == 1 else (_batch(model, texts, list(range(len(texts)))),)
    of_tokens = _of_targets(response_logits(model, theta, batch), batch.targets)
    return torch.stack([part.sum() for part in of_tokens.split(batch.lengths)])


def step(
    model: Model, eta: float, chosen: Sequence[Text], rejected: Sequence[Text] | None = None, **options: Any
) -> Parameters:
    """The update of one plain gradient step, -eta times `gradient`, for `predicted_change`."""
    return scaled(gradient(model, chosen, rejected, **options), -eta)


def stepped(model: Model, update: Parameters) -> Parameters:
    """The parameters after an update, to be given to `logps`; the model stays as it is."""
    return {name: p + update[name] for name, p in trainable(model, update).items()}
