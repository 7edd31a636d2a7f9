"""Chapter 2: A, K and G on a language model, along real training runs (section 3.1, appendices B and C.2)."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from lddyn import unknown
from lddyn.data import preferences, responses
from lddyn.engine import models, recipe, store
from lddyn.engine.callback import ProbeCallback
from lddyn.engine.probe_set import Encoded, ProbeSet
from lddyn.engine.training import Training, dpo_rows, log_rows, sft_rows, train, with_adapters
from lddyn.theory import first_order, influence, kernels, losses
from lddyn.theory.first_order import Parameters, Text

# the second is the paper's learning rate, the fifth the built-in one of SFT
ETAS = [5e-8, 5e-7, 5e-6, 5e-5, 5e-4, 5e-3]
# how else the same answers are learned: optimizer, adapter, learning rate as a multiple of the main run's
VARIANTS = {
    "RMSprop": {"optimizer": "rmsprop", "faster": 0.2},
    "SGD": {"optimizer": "sgd", "faster": 20.0},
    "LoRA": {"adapter": "lora", "faster": 4.0},
}
SCALES = {
    "smoke": {
        "seeds": 2, "n_train": 8, "n_probe": 2, "max_prompt": 24, "max_response": 12, "epochs": 2, "dpo_epochs": 1.0,
        "variant_epochs": 2, "evaluations": 3, "every": 1, "block": 2, "batch_size": 4, "dpo_batch_size": 4, "lr": 1e-3,
        "dpo_lr": 5e-4, "beta": 0.1, "updates": 1, "draws": 2, "sketch": 1, "batch_of_factors": 4, "matrices": True,
    },
    "laptop": {
        "seeds": 3, "n_train": 64, "n_probe": 2, "max_prompt": 40, "max_response": 32, "epochs": 6, "dpo_epochs": 1.5,
        "variant_epochs": 2, "evaluations": 5, "every": 1, "block": 8, "batch_size": 8, "dpo_batch_size": 4, "lr": 5e-4,
        "dpo_lr": 2e-4, "beta": 0.1, "updates": 2, "draws": 2, "sketch": 2, "batch_of_factors": 32,
        "matrices": True,
    },
    "paper": {
        "seeds": 3, "n_train": 5000, "n_probe": 20, "max_prompt": 256, "max_response": 256, "epochs": 8,
        "dpo_epochs": 8.0, "variant_epochs": 2, "evaluations": 20, "every": 25, "block": 1250, "batch_size": 4,
        "dpo_batch_size": 4, "lr": 5e-7, "dpo_lr": 5e-7, "beta": 0.1, "updates": 10, "draws": 16, "sketch": 8,
        "batch_of_factors": 64, "matrices": False,
    },
}  # fmt: skip


def settings(scale: str, **overrides) -> dict:
    """What a scale stands for in this chapter, with the values that are not None put in its place.

    Model, data and optimizer are chapter 3's. Raises `InputError` for an unknown scale.
    """
    common = recipe.settings(scale)
    shared = {name: common[name] for name in ("model", "size", "data", "optimizer", "warmup")}
    return shared | SCALES[scale] | {name: value for name, value in overrides.items() if value is not None}


def grid(chosen: dict, seeds: Sequence[int], device: str, dtype: str) -> tuple[list[dict], dict[str, Path]]:
    """The SFT runs, one a seed and one a variant and seed, and the files that they read. `chosen`: from `settings`."""
    model = recipe.base_model(chosen)
    names = ("data", "optimizer", "warmup", "n_train", "n_probe", "max_prompt", "max_response", "epochs", "evaluations")
    names += ("every", "block", "batch_size", "lr", "beta", "updates", "draws", "sketch")
    names += ("batch_of_factors", "matrices")
    main = {name: chosen[name] for name in names}
    main |= {"model": model, "stage": "", "method": "sft", "adapter": "none", "variant": "main", "whole": True}
    main |= {"clip": 10.0, "device": device, "dtype": dtype}
    runs = [main | {"seed": seed} for seed in seeds]
    for name, change in VARIANTS.items():
        lr = chosen["lr"] * change["faster"]
        other = {key: value for key, value in change.items() if key != "faster"} | {"variant": name, "lr": lr}
        other |= {"epochs": chosen["variant_epochs"], "every": 4 * chosen["every"], "updates": 1, "whole": False}
        runs += [main | other | {"seed": seed} for seed in seeds]
    return runs, {**models.inputs(model), **preferences.inputs(chosen["data"])}


def dpo_grid(chosen: dict, stage: store.Run) -> list[dict]:
    """The run of DPO that follows a main SFT run; none follows a variant."""
    given = stage.manifest["parameters"]
    changed = {"method": "dpo", "model": recipe.base_model(chosen), "stage": str(stage.folder)}
    changed |= {"epochs": chosen["dpo_epochs"], "lr": chosen["dpo_lr"], "batch_size": chosen["dpo_batch_size"]}
    return [given | changed] if given["whole"] else []


def drawn(data: str, count: int, seed: int) -> list[responses.Example]:
    """Training examples that depend on the seed: these runs are small, and should not all be about the same few."""
    everything = preferences.load(data, "train")
    return [everything[i] for i in np.random.default_rng(seed).permutation(len(everything))[:count]]


# --- what is looked at -------------------------------------------------------------------------------------

Row = tuple[str, str, str, float]  # prompt_id, response_type, metric, value


def texts_of(encoded: Encoded, prompts: Sequence[int]) -> list[Text]:
    """All responses to some prompts, prompt after prompt, in the order of the types."""
    return [(encoded.prompts[i], of_type[i]) for i in prompts for of_type in encoded.responses.values()]


def pair_of(encoded: Encoded, i: int) -> tuple[Text, Text]:
    """The chosen and the rejected response to a prompt."""
    return tuple((encoded.prompts[i], encoded.responses[role][i]) for role in ("chosen", "rejected"))


def update_of(model, encoded: Encoded, i: int, method: str, beta: float, reference: Tensor) -> Parameters:
    """The update of a plain gradient step with eta = 1 on one prompt: minus the gradient of the loss of SFT or DPO.

    reference: summed log pi of chosen and rejected under the reference model, (2,).
    """
    chosen, rejected = pair_of(encoded, i)
    if method == "sft":
        return first_order.step(model, 1.0, [chosen])
    return first_order.step(
        model, 1.0, [chosen], [rejected], loss=losses.dpo_loss, reference=reference.view(2, 1), beta=beta
    )


def residuals_of(model, encoded: Encoded, i: int, method: str, beta: float, reference: Tensor):
    """The closed form of G: the texts that a step on one prompt is taken on, and a (tokens, V) for each."""
    texts = list(pair_of(encoded, i))
    z = kernels.logits(model, texts)
    if method == "sft":
        return texts[:1], [kernels.residual(z[0], texts[0][1])]
    sums = first_order.sums(first_order.logps(model, texts))
    forces = losses.dpo_force(*sums, *reference, beta=beta)
    return texts, [kernels.residual(part, text[1], f.item()) for part, text, f in zip(z, texts, forces, strict=True)]


def decomposed(model, encoded: Encoded, i: int, method: str, beta: float, reference: Tensor, draws: int, sketch: int):
    """Sizes of A, K and G between the update on prompt i and all responses to it, and eq. 26's two measures; rows.

    Changes are per unit of eta: `rate` of log pi(y), `sign_delta` of the whole vocabulary, `lbk` in units of eta
    squared. `kernel_norm` is ||K||_F; in DPO over both texts of the pair.
    """
    texts = texts_of(encoded, [i])
    updated, g = residuals_of(model, encoded, i, method, beta, reference)
    z = kernels.logits(model, texts)
    direction = kernels.pull_back(model, updated, [-part for part in g])
    changes = kernels.push_forward(model, direction, texts)
    by_autograd = update_of(model, encoded, i, method, beta, reference)
    apart = first_order.norm(first_order.difference(by_autograd, direction)) / first_order.norm(by_autograd)
    norms = [kernels.kernel_norms(model, texts, text, draws, sketch) for text in updated]
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
            "a_norm": influence.peakiness(z[number].softmax(-1)).sum().sqrt().item(),
            "kernel_norm": size,
        }
        rows += [(name, kind, metric, value) for metric, value in measured.items()]
    return rows


def single_steps(model, encoded: Encoded, i: int, method: str, beta: float, reference: Tensor) -> list[Row]:
    """Predicted (`single_rate`, per unit of eta) and measured changes of all responses to prompt i and to another one
    after one plain gradient step on prompt i, for every learning rate of `ETAS`, in float64."""
    exact = models.snapshot(model).double().requires_grad_()
    other = (i + 1) % len(encoded.prompts)
    prompts = [i, other] if other != i else [i]
    texts = texts_of(encoded, prompts)
    update = update_of(exact, encoded, i, method, beta, reference)
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
    off = abs(a_squared / influence.peakiness(z.double().softmax(-1)).item() - 1)
    return [
        (name, "rejected", "lbk_share", lbk / f.k.square().sum().item()),
        (name, "rejected", "peakiness_error", off),
    ]


def heat_maps(model, encoded: Encoded, i: int, draws: int, sketch: int, kernel: bool) -> list[Row]:
    """Every type of response to prompt i as the update of one SFT step, and as what is observed; rows.

    `heat_<update>`: change of log pi(y) of the observed type per unit of eta; with `kernel` also `kernel_<update>`,
    ||K||_F.
    """
    texts, rows = texts_of(encoded, [i]), []
    for kind, text in zip(encoded.responses, texts, strict=True):
        found = {"heat": first_order.predicted_change(model, first_order.step(model, 1.0, [text]), texts).sums.tolist()}
        if kernel:
            found["kernel"] = [norm.value for norm in kernels.kernel_norms(model, texts, text, draws, sketch)]
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
        super().__init__(probe_set, at=at, **lengths)
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


@dataclass(frozen=True)
class Follow:
    seed: int
    model: str
    stage: str
    data: str
    method: str
    optimizer: str
    adapter: str
    variant: str
    whole: bool
    n_train: int
    n_probe: int
    epochs: float
    evaluations: int
    every: int
    block: int
    batch_size: int
    lr: float
    beta: float
    warmup: int
    clip: float
    updates: int
    draws: int
    sketch: int
    batch_of_factors: int
    matrices: bool
    max_prompt: int
    max_response: int
    device: str
    dtype: str


def follow(work: Path, s: Follow):
    """Train a model by SFT or DPO and hold the decomposition beside what happens; returns a long table.

    DPO starts from the weights of the SFT run in the folder `stage`. `adapter` is "none" or "lora", `variant` names it
    or the optimizer in figures. Without `whole` (the variants) only steps and kernels are followed; with it also single
    steps, `matrices` (which a large model has no room for), and, in SFT, heat maps and frozen factors. Finished weights
    of SFT stay in `model/` beside the table. An interrupted run starts again. Raises `InputError` for an unknown method
    or adapter.
    """
    if s.method not in ("sft", "dpo"):
        raise unknown("method", s.method, ["sft", "dpo"])
    if s.adapter not in ("none", "lora"):
        raise unknown("adapter", s.adapter, ["none", "lora"])
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    lengths = {"max_prompt": s.max_prompt, "max_response": s.max_response}
    base, tokenizer = models.read(s.model, device=s.device, dtype=s.dtype)
    examples = drawn(s.data, s.n_train, s.seed)
    probed = recipe.probe_set(
        base, tokenizer, examples, preferences.load(s.data, "test"), s.n_probe, 0, s.seed, lengths
    )
    lm = models.read(str(Path(s.stage) / "model"), device=s.device, dtype=s.dtype)[0] if s.stage else base
    lm = with_adapters(lm, 8, s.seed) if s.adapter == "lora" else lm
    prompts, chosen, rejected = ([e[field] for e in examples] for field in ("prompt", "chosen", "rejected"))
    if s.method == "sft":
        rows = sft_rows(tokenizer, prompts, chosen, **lengths)
    else:
        rows = dpo_rows(tokenizer, prompts, chosen, rejected, **lengths)
    steps = int(-(-len(rows) // s.batch_size) * s.epochs)
    encoded = probed.encode(tokenizer, **lengths)
    both = [text for i in range(len(encoded.prompts)) for text in pair_of(encoded, i)]
    reference = first_order.sums(first_order.logps(lm, both)).view(-1, 2)  # (prompts, chosen and rejected)
    frozen = None
    if s.whole and s.method == "sft":
        batch = ProbeSet(prompts[: s.batch_of_factors], {"chosen": chosen[: s.batch_of_factors]}).encode(
            tokenizer, **lengths
        )
        frozen = Frozen(lm, encoded, list(zip(batch.prompts, batch.responses["chosen"], strict=True)))

    def look(model, encoded: Encoded, step: int) -> list[Row]:
        found = []
        for i in range(min(s.updates, s.n_probe)):
            found += decomposed(s.model, encoded, i, s.method, s.beta, reference[i], s.draws, s.sketch)
        if s.whole and step in (0, steps):
            found += single_steps(s.model, encoded, 0, s.method, s.beta, reference[0])
            found += explicit(s.model, encoded, 0) if s.matrices else []
        if frozen:
            found += frozen(s.model)
            found += heat_maps(s.model, encoded, 0, s.draws, s.sketch, step > 0) if step in (0, steps) else []
        return found

    callback = Watch(probed, store.dense_early(steps, s.evaluations), s.every, s.block, look, **lengths)
    log = train(
        work, lm, tokenizer, rows, callback, Training(method=s.method, loss="sequence_sum" if s.method == "sft" else "sigmoid", beta=s.beta, seed=s.seed, lr=s.lr, epochs=s.epochs, batch_size=s.batch_size, optimizer=s.optimizer, warmup=s.warmup, clip=s.clip, checkpoints=1))  # fmt: skip
    if s.whole and s.method == "sft":
        models.save(lm, tokenizer, work.parent / "model")
    return store.compact(pd.concat([callback.table(), log_rows(log, s.batch_size)], ignore_index=True))
