"""Chapter 2: A, K and G on a language model, along real training runs (section 3.1, appendices B and C.2)."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lddyn import unknown
from lddyn.data import preferences, responses
from lddyn.engine import models, pool, recipe, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import Encoded, ProbeSet
from lddyn.engine.settings import choose, derive, lengths
from lddyn.engine.training import Training, dpo_rows, log_rows, sft_rows, train, with_adapters
from lddyn.theory import first_order, kernels, logprobs, losses
from lddyn.theory.first_order import Parameters, Text

# the second is the paper's learning rate, the fifth the built-in one of SFT
ETAS = [5e-8, 5e-7, 5e-6, 5e-5, 5e-4, 5e-3]
# how else the same answers are learned: learning rate as a multiple of the main run's, and what else is changed
VARIANTS = {
    "RMSprop": (0.2, {"optimizer": "rmsprop"}),
    "SGD": (20.0, {"optimizer": "sgd"}),
    "LoRA": (4.0, {"adapter": "lora"}),
}
OWN = {
    "smoke": {
        "n_train": 8, "n_probe": 2, "max_prompt": 24, "max_response": 12, "epochs": 2, "dpo_epochs": 1.0,
        "evaluations": 3, "every": 1, "block": 2, "batch_size": 4, "dpo_lr": 5e-4,
        "updates": 1, "draws": 2, "sketch": 1, "batch_of_factors": 4, "matrices": True,
    },
    "laptop": {
        "n_train": 64, "n_probe": 2, "max_prompt": 40, "max_response": 32, "epochs": 6, "dpo_epochs": 1.5,
        "evaluations": 5, "every": 1, "block": 8, "batch_size": 8, "dpo_lr": 2e-4,
        "updates": 2, "draws": 2, "sketch": 2, "batch_of_factors": 32, "matrices": True,
    },
    "pretrained": {
        "n_train": 32, "n_probe": 2, "max_prompt": 96, "max_response": 48, "epochs": 3, "dpo_epochs": 1.0,
        "evaluations": 3, "every": 4, "block": 8, "batch_size": 4, "dpo_lr": 1e-5,
        "updates": 1, "draws": 2, "sketch": 1, "batch_of_factors": 8, "matrices": False,
    },
    "paper": {
        "n_train": 5000, "n_probe": 20, "max_prompt": 256, "max_response": 256, "epochs": 8, "dpo_epochs": 8.0,
        "evaluations": 20, "every": 25, "block": 1250, "batch_size": 4, "dpo_lr": 5e-7,
        "updates": 10, "draws": 16, "sketch": 8, "batch_of_factors": 64, "matrices": False,
    },
}  # fmt: skip
SCALES = {scale: recipe.SCALES[scale] | own for scale, own in OWN.items()}  # model, data and optimizer of chapter 3


@dataclass(frozen=True)
class Chapter:
    """The settings of chapter 2, chosen by scale; see the notebook's parameters and `Follow` for what they mean."""

    seeds: int
    model: str
    size: str
    data: str
    n_train: int
    n_probe: int
    max_prompt: int
    max_response: int
    epochs: int
    dpo_epochs: float
    evaluations: int
    every: int
    block: int
    batch_size: int
    lr: float
    dpo_lr: float
    optimizer: str
    warmup: int
    updates: int
    draws: int
    sketch: int
    batch_of_factors: int
    matrices: bool
    variant_epochs: int = 2
    dpo_batch_size: int = 4
    first_seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    format: str = "auto"
    skip_bad_rows: str = "no"


@dataclass(frozen=True)
class Follow:
    """One run. DPO starts from the weights of the SFT run in the folder `stage`."""

    seed: int
    model: str  # a folder or hub id
    data: str
    optimizer: str
    n_train: int
    n_probe: int
    epochs: float
    evaluations: int
    every: int  # steps between predictions of one step
    block: int  # steps that a longer prediction covers
    batch_size: int
    lr: float
    warmup: int
    updates: int  # prompts whose update is decomposed
    draws: int  # random directions of an estimate of ||K||
    sketch: int  # largest directions of K that are taken out exactly
    batch_of_factors: int  # answers in the batch of `Frozen`
    matrices: bool  # A, K and G as matrices, which a large model has no room for
    max_prompt: int
    max_response: int
    device: str
    dtype: str
    format: str = "auto"
    skip_bad_rows: str = "no"
    method: str = "sft"  # or dpo
    stage: str = ""
    adapter: str = "none"  # or lora
    variant: str = "main"  # what figures call it: one of `VARIANTS`
    whole: bool = True  # not only steps and kernels, which is all for a variant
    beta: float = 0.1
    clip: float = 10.0
    n_probe_test: int = 0


def settings(scale: str, given: Mapping[str, object]) -> Chapter:
    """What a scale stands for in this chapter, with what is given in its place (`settings.choose`)."""
    return choose(Chapter, SCALES, scale, given)


def grid(c: Chapter) -> list[Follow]:
    """The SFT runs: one a seed, then one a variant and seed."""
    main = derive(Follow, c, seed=c.first_seed, model=recipe.base_model(c))
    short = replace(main, epochs=c.variant_epochs, every=4 * c.every, updates=1, whole=False)
    variants = [replace(short, variant=name, lr=c.lr * faster, **how) for name, (faster, how) in VARIANTS.items()]
    return [replace(run, seed=c.first_seed + n) for run in (main, *variants) for n in range(c.seeds)]


def dpo_grid(c: Chapter, stage: store.Run) -> list[Follow]:
    """The run of DPO that follows a main SFT run; none follows a variant."""
    before = Follow(**stage.manifest["parameters"])
    how = {"epochs": c.dpo_epochs, "lr": c.dpo_lr, "batch_size": c.dpo_batch_size, "model": recipe.base_model(c)}
    return [replace(before, method="dpo", stage=str(stage.folder), **how)] if before.whole else []


def runs(c: Chapter, **how) -> list[store.Run]:
    """The runs of the chapter, SFT and the DPO that follows; how: as for `pool.run_all`."""
    files = recipe.files(c)
    dpo = pool.run_then(follow, grid(c), follow, partial(dpo_grid, c), files, **how)
    return pool.run_all(follow, grid(c), files, workers=1) + dpo  # the first are all there


def drawn(data: str, count: int, seed: int, skip_bad_rows: str = "no") -> list[responses.Example]:
    """Training examples that depend on the seed: these runs are small, and should not all be about the same few."""
    everything = preferences.load(data, "train", None, skip_bad_rows)
    return [everything[i] for i in np.random.default_rng(seed).permutation(len(everything))[:count]]


# --- what is looked at -------------------------------------------------------------------------------------

Row = tuple[str, str, str, float]  # prompt_id, response_type, metric, value


def texts_of(encoded: Encoded, prompts: Sequence[int]) -> list[Text]:
    """All responses to some prompts, prompt after prompt, in the order of the types."""
    return [(encoded.prompts[i], of_type[i]) for i in prompts for of_type in encoded.responses.values()]


def pair_of(encoded: Encoded, i: int) -> tuple[Text, Text]:
    """The chosen and the rejected response to a prompt."""
    return tuple((encoded.prompts[i], encoded.responses[role][i]) for role in ("chosen", "rejected"))


def update_of(model, encoded: Encoded, i: int, reference: Tensor, s: Follow) -> Parameters:
    """The update of a plain gradient step with eta = 1 on one prompt: minus the gradient of the loss of SFT or DPO.

    reference: summed log pi of chosen and rejected under the reference model, (2,).
    """
    chosen, rejected = pair_of(encoded, i)
    if s.method == "sft":
        return first_order.step(model, 1.0, [chosen])
    how = {"loss": losses.dpo_loss, "reference": reference.view(2, 1), "beta": s.beta}
    return first_order.step(model, 1.0, [chosen], [rejected], **how)


def residuals_of(model, encoded: Encoded, i: int, reference: Tensor, s: Follow):
    """The closed form of G: the texts that a step on one prompt is taken on, and a (tokens, V) for each."""
    texts = list(pair_of(encoded, i))
    z = kernels.logits(model, texts)
    if s.method == "sft":
        return texts[:1], [kernels.residual(z[0], texts[0][1])]
    sums = first_order.sums(first_order.logps(model, texts))
    forces = losses.dpo_force(*sums, *reference, beta=s.beta)
    return texts, [kernels.residual(part, text[1], f.item()) for part, text, f in zip(z, texts, forces, strict=True)]


def decomposed(model, encoded: Encoded, i: int, reference: Tensor, s: Follow) -> list[Row]:
    """Sizes of A, K and G between the update on prompt i and all responses to it, and eq. 26's two measures; rows.

    Changes are per unit of eta: `rate` of log pi(y), `sign_delta` of the whole vocabulary, `lbk` in units of eta
    squared. `kernel_norm` is ||K||_F; in DPO over both texts of the pair.
    """
    texts = texts_of(encoded, [i])
    updated, g = residuals_of(model, encoded, i, reference, s)
    z = kernels.logits(model, texts)
    direction = kernels.pull_back(model, updated, [-part for part in g])
    changes = kernels.push_forward(model, direction, texts)
    by_autograd = update_of(model, encoded, i, reference, s)
    apart = first_order.norm(first_order.difference(by_autograd, direction)) / first_order.norm(by_autograd)
    norms = [kernels.kernel_norms(model, texts, text, s.draws, s.sketch) for text in updated]
    together, name = torch.cat(g), encoded.prompt_ids[i]
    rows: list[Row] = [(name, "update", "g_norm", together.norm().item()), (name, "update", "g_error", apart)]
    for number, kind in enumerate(encoded.responses):
        size = sum(of[number].value ** 2 for of in norms) ** 0.5
        rates = kernels.log_changes(z[number], changes[number])
        tokens = torch.tensor(texts[number][1], device=rates.device)
        measured = {
            "rate": rates.gather(-1, tokens.unsqueeze(-1)).sum().item(),
            "lbk": kernels.lbk(z[number], changes[number], together),
            "sign_delta": kernels.sign_delta(z[number], changes[number]),
            "a_norm": logprobs.peakiness(z[number].softmax(-1)).sum().sqrt().item(),
            "kernel_norm": size,
        }
        rows += [(name, kind, metric, value) for metric, value in measured.items()]
    return rows


def single_steps(model, encoded: Encoded, i: int, reference: Tensor, s: Follow) -> list[Row]:
    """Predicted (`single_rate`, per unit of eta) and measured changes of all responses to prompt i and to another one
    after one plain gradient step on prompt i, for every learning rate of `ETAS`, in float64."""
    exact = models.snapshot(model).double().requires_grad_()
    other = (i + 1) % len(encoded.prompts)
    prompts = [i, other] if other != i else [i]
    texts = texts_of(encoded, prompts)
    update = update_of(exact, encoded, i, reference, s)
    change = first_order.predicted_change(exact, update, texts)
    measured = {"single_rate": change.sums}
    for eta in ETAS:
        after = first_order.logps(exact, texts, first_order.stepped(exact, first_order.scaled(update, eta)))
        measured[f"single_{eta:g}"] = first_order.sums(after) - change.logps
    names = [(f"{encoded.prompt_ids[i]}>{encoded.prompt_ids[o]}", kind) for o in prompts for kind in encoded.responses]
    return _rows(names, measured)


def _rows(names: Sequence[tuple[str, str]], measured: dict[str, Tensor]) -> list[Row]:
    """One row for each name (prompt_id, response_type) and metric."""
    pairs = [(metric, zip(names, values.tolist(), strict=True)) for metric, values in measured.items()]
    return [(*name, metric, value) for metric, each in pairs for name, value in each]


def explicit(model, encoded: Encoded, i: int) -> list[Row]:
    """A, K and G as matrices between one token of the rejected and one of the chosen response to prompt i.

    `lbk_share`: LBK over ||K||^2, at most 1 (eq. 26); `peakiness_error`: ||A||^2 against V - 2 + V ||pi||^2 (eq. 27).
    """
    chosen, rejected = pair_of(encoded, i)
    place, name = min(len(chosen[1]), len(rejected[1])) // 2, encoded.prompt_ids[i]
    f = kernels.factors(model, rejected, chosen, place, place)
    z = kernels.logits(model, [rejected])[0][place]
    a_squared = f.a.square().sum().item()
    lbk = (f.a @ (f.k @ f.g)).square().sum().item() / (a_squared * f.g.square().sum().item())
    off = abs(a_squared / logprobs.peakiness(z.double().softmax(-1)).item() - 1)
    return [
        (name, "rejected", "lbk_share", lbk / f.k.square().sum().item()),
        (name, "rejected", "peakiness_error", off),
    ]


def heat_maps(model, encoded: Encoded, i: int, kernel: bool, s: Follow) -> list[Row]:
    """Every type of response to prompt i as the update of one SFT step, and as what is observed; rows.

    `heat_<update>`: change of log pi(y) of the observed type per unit of eta; with `kernel` also `kernel_<update>`,
    ||K||_F.
    """
    texts, rows = texts_of(encoded, [i]), []
    for kind, text in zip(encoded.responses, texts, strict=True):
        found = {"heat": first_order.predicted_change(model, first_order.step(model, 1.0, [text]), texts).sums.tolist()}
        if kernel:
            found["kernel"] = [norm.value for norm in kernels.kernel_norms(model, texts, text, s.draws, s.sketch)]
        for metric, values in found.items():
            observed = zip(encoded.responses, values, strict=True)
            rows += [(encoded.prompt_ids[i], o, f"{metric}_{kind}", value) for o, value in observed]
    return rows


class Frozen:
    """How fast SFT on a batch of answers moves every response, and how fast it would with one factor as at the start.

    Called at any time of training it returns rows: `rate_all` with A, K and G of now, `rate_without_a`, `_k`, `_g` with
    that factor of the start; per unit of eta.
    """

    def __init__(self, model, encoded: Encoded, batch: Sequence[Text]):
        self.encoded, self.batch, self.model = encoded, batch, models.snapshot(model).requires_grad_()
        self.texts = texts_of(encoded, range(len(encoded.prompts)))
        self.z, self.g = kernels.logits(self.model, self.texts), self._residuals(self.model)

    def _residuals(self, model) -> list[Tensor]:
        z = kernels.logits(model, self.batch)
        return [kernels.residual(part, text[1], -1 / len(z)) for part, text in zip(z, self.batch, strict=True)]

    def __call__(self, model) -> list[Row]:
        z, g = kernels.logits(model, self.texts), self._residuals(model)
        moved = kernels.push_forward(model, kernels.pull_back(model, self.batch, g), self.texts)
        then_k = kernels.push_forward(self.model, kernels.pull_back(self.model, self.batch, g), self.texts)
        then_g = kernels.push_forward(model, kernels.pull_back(model, self.batch, self.g), self.texts)
        names = [(name, kind) for name in self.encoded.prompt_ids for kind in self.encoded.responses]
        rows = []
        for metric, of_a, dz in (("all", z, moved), ("a", self.z, moved), ("k", z, then_k), ("g", z, then_g)):
            metric = "rate_all" if metric == "all" else f"rate_without_{metric}"
            for name, text, z_o, change in zip(names, self.texts, of_a, dz, strict=True):
                tokens = torch.tensor(text[1], device=change.device).unsqueeze(-1)
                rows.append((*name, metric, kernels.log_changes(z_o, change).gather(-1, tokens).sum().item()))
        return rows


# --- the runs ----------------------------------------------------------------------------------------------


class Watch(ProbeCallback):
    """Also predicts what the optimiser's steps do to every response, and takes a closer look at every evaluation.

    Rows `predicted_n` and `measured_n`: change of log pi of a response over the last n steps, to first order from the
    parameters before them, and as it is; n is 1 (every `every` steps), `block`, and the whole run. `look` is called
    with model and step, and gives further rows.
    """

    def __init__(self, probe_set: ProbeSet, at: Sequence[int], every: int, block: int, look: Callable, **lengths):
        super().__init__(probe_set, at=at, thresholds=None, **lengths)
        self.spacing, self.block, self.look, self.starts = every, block, look, {}

    def _begins(self, step: int, last: int) -> list[int]:
        """Numbers of steps n for which a prediction starts at this step."""
        return [
            n for n, spacing in {1: self.spacing, self.block: self.block, last: last}.items() if step % spacing == 0
        ]

    def on_step_begin(self, args, state, control, model=None, **_):
        for n in self._begins(state.global_step, state.max_steps):
            self.starts[n] = state.global_step, first_order.parameters(model)

    def on_step_end(self, args, state, control, model=None, **_):
        now, rows = None, []
        texts = texts_of(self.encoded, range(len(self.encoded.prompts)))
        names = [(name, kind) for name in self.encoded.prompt_ids for kind in self.encoded.responses]
        for n, (begun, start) in list(self.starts.items()):
            if state.global_step - begun != n:
                continue
            if now is None:
                now = first_order.parameters(model), first_order.sums(first_order.logps(model, texts))
            change = first_order.predicted_change(model, first_order.difference(start, now[0]), texts, start)
            kind = "all" if n == state.max_steps else n
            rows += _rows(names, {f"predicted_{kind}": change.sums, f"measured_{kind}": now[1].cpu() - change.logps})
            del self.starts[n]
        self._add(args, state, rows)
        super().on_step_end(args, state, control, model=model)

    def _measure(self, args, state, model) -> None:
        self._add(args, state, self.look(model, self.encoded, state.global_step))
        super()._measure(args, state, model)

    def _add(self, args, state, rows: list[Row]) -> None:
        if rows:
            examples = state.global_step * args.per_device_train_batch_size
            self.parts.append(store.long((state.global_step, examples, *row) for row in rows))


def follow(work: Path, s: Follow) -> pd.DataFrame:
    """Train a model by SFT or DPO and hold the decomposition beside what happens; returns a long table.

    With `whole` also single steps, `matrices`, and, in SFT, heat maps and frozen factors are looked at, and the
    finished weights of SFT stay in `model/` beside the table. An interrupted run starts again. Raises `InputError` for
    an unknown method or adapter.
    """
    if s.method not in ("sft", "dpo"):
        raise unknown("method", s.method, ["sft", "dpo"])
    if s.adapter not in ("none", "lora"):
        raise unknown("adapter", s.adapter, ["none", "lora"])
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    base, tokenizer = models.read(s.model, device=s.device, dtype=s.dtype)
    examples = drawn(s.data, s.n_train, s.seed, s.skip_bad_rows)
    test_set = preferences.load(s.data, "test", None, s.skip_bad_rows)
    probed = recipe.probe_set(base, tokenizer, examples, test_set, s)
    lm = models.read(str(Path(s.stage) / "model"), device=s.device, dtype=s.dtype)[0] if s.stage else base
    lm = with_adapters(lm, 8, s.seed) if s.adapter == "lora" else lm
    texts = [[e[field] for e in examples] for field in ("prompt", "chosen", "rejected")]
    if s.method == "sft":
        rows = sft_rows(tokenizer, *texts[:2], **lengths(s))
    else:
        rows = dpo_rows(tokenizer, *texts, **lengths(s))
    steps = int(-(-len(rows) // s.batch_size) * s.epochs)
    encoded = probed.encode(tokenizer, **lengths(s))
    both = [text for i in range(len(encoded.prompts)) for text in pair_of(encoded, i)]
    reference = first_order.sums(first_order.logps(lm, both)).view(-1, 2)  # (prompts, chosen and rejected)
    frozen = None
    if s.whole and s.method == "sft":
        prompts, chosen = (part[: s.batch_of_factors] for part in texts[:2])
        batch = ProbeSet(prompts, {"chosen": chosen}).encode(tokenizer, **lengths(s))
        frozen = Frozen(lm, encoded, list(zip(batch.prompts, batch.responses["chosen"], strict=True)))

    def look(model, encoded: Encoded, step: int) -> list[Row]:
        found, at_ends = [], step in (0, steps)
        for i in range(min(s.updates, s.n_probe)):
            found += decomposed(model, encoded, i, reference[i], s)
        if s.whole and at_ends:
            found += single_steps(model, encoded, 0, reference[0], s)
            found += explicit(model, encoded, 0) if s.matrices else []
        if frozen:
            found += frozen(model)
            found += heat_maps(model, encoded, 0, step > 0, s) if at_ends else []
        return found

    callback = Watch(probed, store.dense_early(steps, s.evaluations), s.every, s.block, look, **lengths(s))
    loss = "sequence_sum" if s.method == "sft" else "sigmoid"
    log = train(work, lm, tokenizer, rows, callback, derive(Training, s, loss=loss, checkpoints=1))
    if s.whole and s.method == "sft":
        models.save(lm, tokenizer, work.parent / "model")
    return store.compact(pd.concat([callback.table(), log_rows(log, s.batch_size)], ignore_index=True))
