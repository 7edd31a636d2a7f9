"""Chapter 1: the two small networks, and one training run with everything that is measured on it.

Section 2, figure 1; appendix C.1, figures 6 and 7.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from lddyn import unknown
from lddyn.data import images
from lddyn.engine import pool
from lddyn.engine.settings import choose, derive
from lddyn.engine.store import Run, dense_early, long
from lddyn.theory import influence, logprobs, losses

SCALES = {
    "smoke": {"seeds": 2, "epochs": 8, "evaluations": 4, "n_train": 300, "n_test": 200, "lr": 3e-2},
    "laptop": {"seeds": 5, "epochs": 60, "evaluations": 24, "n_train": 1000, "n_test": 797, "lr": 1e-2},
    "paper": {"seeds": 5, "epochs": 100, "evaluations": 50, "n_train": 2000, "n_test": 10000, "lr": 1e-3},
}
ETAS = [10.0**k for k in range(-6, 1)]  # seven learning rates for the order of the error of proposition 1


@dataclass(frozen=True)
class Chapter:
    """All settings of the chapter: those that a scale stands for, then those that it does not change."""

    seeds: int
    epochs: int
    evaluations: int
    n_train: int
    n_test: int
    lr: float
    data: str = "digits"
    mnist_dir: str = "mnist"
    net: str = "lenet"
    eta: float = 1e-2


@dataclass(frozen=True)
class Training:
    """One run of `train`."""

    seed: int
    net: str
    data: str
    mnist_dir: str
    n_train: int
    n_test: int
    epochs: int
    evaluations: int
    lr: float
    eta: float  # of the single steps that are looked at


def settings(scale: str, given: Mapping[str, object]) -> Chapter:
    """The chapter's settings at a scale, with those of `given` (`choose`); `InputError` for an unknown scale."""
    return choose(Chapter, SCALES, scale, given)


def grid(settings: Chapter) -> list[Training]:
    """The runs of the chapter: one network for each seed."""
    mnist_dir = settings.mnist_dir if settings.data == "mnist" else ""
    return [derive(Training, settings, seed=seed, mnist_dir=mnist_dir) for seed in range(settings.seeds)]


def runs(c: Chapter, **how) -> list[Run]:
    """The runs of the chapter; how: as for `pool.run_all`."""
    return pool.run_all(train, grid(c), images.inputs(c.data, c.mnist_dir), **how)


# --- the networks ------------------------------------------------------------------------------------------


def network(net: str, seed: int) -> nn.Module:
    """`lenet`, as in the authors' code (tanh, 6 and 16 filters of 5 x 5, fully connected 400-60-42-10), or `mlp`."""
    torch.manual_seed(seed)
    if net == "lenet":
        features = [nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2)]
        features += [nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()]
        head = [nn.Linear(400, 60), nn.Tanh(), nn.Linear(60, 42), nn.Tanh(), nn.Linear(42, images.CLASSES)]
        return nn.Sequential(*features, *head)
    if net == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    raise unknown("net", net, ["lenet", "mlp"])


def logits(model: nn.Module, parameters: dict[str, Tensor], image: Tensor) -> Tensor:
    """The network as a pure function of its parameters, for one image (1, 28, 28). Returns (10,)."""
    return functional_call(model, parameters, (image.unsqueeze(0),)).squeeze(0)


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """A detached copy of a model's parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradient_step(model: nn.Module, parameters: dict, image: Tensor, label: Tensor, eta: float) -> dict[str, Tensor]:
    """The parameters after one plain gradient step on one example (eq. 1)."""
    gradient = torch.func.grad(lambda theta: cross_entropy(logits(model, theta, image), label))(parameters)
    return {name: p - eta * gradient[name] for name, p in parameters.items()}


def one_step_changes(model, parameters, train: images.Digits, test: images.Digits, eta: float) -> tuple[Tensor, Tensor]:
    """Mean change of log pi(v | x_o), in nats, and of pi(v | x_o) after one step on a training image (figure 1b).

    Averaged over 3 updates of each class u and 10 test images of each class o. Returns two tensors (u, o, v).
    """
    observed = test.images[images.of_each_class(test, 10)]  # (o, 10, 1, 28, 28)
    per_class = observed.shape[1]

    def log_p(theta: dict) -> Tensor:
        z = functional_call(model, theta, (observed.flatten(0, 1),))
        return z.log_softmax(-1).unflatten(0, (images.CLASSES, per_class))  # (o, 10, v)

    before = log_p(parameters)
    nats, probability = torch.zeros(2, images.CLASSES, images.CLASSES, images.CLASSES)
    for u, examples in enumerate(images.of_each_class(train, 3)):
        for i in examples:
            after = log_p(gradient_step(model, parameters, train.images[i], train.labels[i], eta))
            nats[u] += (after - before).mean(1) / len(examples)
            probability[u] += (after.exp() - before.exp()).mean(1) / len(examples)
    return nats, probability


def factors(model, parameters, digits: images.Digits) -> tuple[Tensor, Tensor, Tensor]:
    """A (n, V, V), K (n, n, V, V) and G (n, V) over a few images, as observed (rows) and update (columns)."""
    jacobian = influence.jacobians(partial(logits, model), parameters, digits.images)
    p = functional_call(model, parameters, (digits.images,)).softmax(-1)
    return influence.normalization(p), influence.entk(jacobian, jacobian), losses.sft(p, digits.labels)


def class_means(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of a matrix over pairs of images by pair of classes, an image with itself left out. (n, n) -> (10, 10)."""
    member = torch.nn.functional.one_hot(labels, images.CLASSES).to(values)  # (n, c)
    different = 1 - torch.eye(len(values), dtype=values.dtype)
    return (member.T @ (values * different) @ member) / (member.T @ different @ member)


def proposition_errors(model, parameters, observed: images.Digits, updates: images.Digits, etas=ETAS) -> list[tuple]:
    """How far -eta A K G is from the measured change, for every pair and learning rate, in float64.

    Returns rows (pair, eta, ||measured - predicted||, ||measured||) with measured = log pi after - before.
    """
    model = model.double()
    theta = {name: p.double() for name, p in parameters.items()}
    both = images.Digits(
        torch.cat([observed.images, updates.images]).double(), torch.cat([observed.labels, updates.labels])
    )
    a, k, g = factors(model, theta, both)
    n = len(observed.labels)
    before = functional_call(model, theta, (both.images[:n],)).log_softmax(-1)
    rows = []
    for u in range(n, len(both.labels)):
        for eta in etas:
            after = gradient_step(model, theta, both.images[u], both.labels[u], eta)
            measured = functional_call(model, after, (both.images[:n],)).log_softmax(-1) - before
            predicted = influence.predicted_change(eta, a[:n], k[:n, u], g[u])
            sizes = zip((measured - predicted).norm(dim=-1).tolist(), measured.norm(dim=-1).tolist(), strict=True)
            rows += [(f"{o}<-{u - n}", eta, error, size) for o, (error, size) in enumerate(sizes)]
    model.float()
    return rows


def measure(model, train: images.Digits, test: images.Digits, few: images.Digits, eta: float) -> list[tuple]:
    """All measurements of one evaluation as rows (prompt_id, response_type, metric, value).

    `prompt_id` is the observed class, `response_type` the predicted class or the class of the update.
    """
    theta = parameters_of(model)
    z = functional_call(model, theta, (test.images,))
    member = torch.nn.functional.one_hot(test.labels, images.CLASSES).float()
    mean_prediction = (member / member.sum(0)).T @ z.softmax(-1)  # (true class, predicted class)
    nats, probability = one_step_changes(model, theta, train, test, eta)
    a, k, g = factors(model, theta, few)
    k_norm = k.flatten(2).norm(dim=-1)  # (n, n)
    change = torch.einsum("oij,oujk,uk->oui", a, k, g)  # per unit of -eta
    pairs = {
        "prob_mean": mean_prediction,
        "entk_norm": class_means(k_norm, few.labels),
        "effect_norm": class_means(change.norm(dim=-1), few.labels),
        "change_of_prob": torch.einsum("uou->ou", probability),
        "change_of_logp_after_4": nats[4],  # (o, v)
    }
    rows = [
        (f"class_{o}", f"class_{v}", metric, matrix[o, v].item())
        for metric, matrix in pairs.items()
        for o in range(images.CLASSES)
        for v in range(images.CLASSES)
    ]
    a_squared = a.square().sum((1, 2))
    identity = logprobs.peakiness(functional_call(model, theta, (few.images,)).softmax(-1))
    lbk = influence.lbk(change, a_squared[:, None], g[None])  # (o, u), in units of eta^2
    everything = {
        "accuracy": (z.argmax(-1) == test.labels).float().mean().item(),
        "nll": cross_entropy(z, test.labels).item(),
        "lbk_share_max": (lbk / k_norm.square()).max().item(),
        "peakiness_error": (a_squared / identity - 1).abs().max().item(),
        "residual_norm": g.norm(dim=-1).mean().item(),
        "peakiness": logprobs.peakiness(z.softmax(-1)).mean().item(),
    }
    return rows + [("test", "all", metric, value) for metric, value in everything.items()]


# --- one run -----------------------------------------------------------------------------------------------


def train(work: Path, settings: Training):
    """Train one network and measure it along the way; returns a long table.

    SGD with momentum 0.9, weight decay 5e-4, batches of 64 and a cosine schedule to 1e-6, as in the authors'
    notebook. The single steps that are looked at are plain gradient steps of size `eta`. A checkpoint after every
    evaluation lets an interrupted run continue to the same numbers.
    """
    everything = images.load(settings.data, settings.mnist_dir)
    train_set, test_set = images.split(everything, settings.n_train, settings.n_test, settings.seed)
    few = images.Digits(*(part[images.of_each_class(test_set, 3).flatten()] for part in test_set))
    model = network(settings.net, settings.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs, eta_min=1e-6)
    rows, start, checkpoint = [], 0, work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        rows, start = [tuple(row) for row in saved["rows"]], saved["epoch"]
    looked_at = dense_early(settings.epochs, settings.evaluations)
    for epoch in range(start, settings.epochs + 1):
        if epoch in looked_at and not (checkpoint.exists() and epoch == start):
            examples = epoch * settings.n_train
            rows += [(epoch, examples, *row) for row in measure(model, train_set, test_set, few, settings.eta)]
            if epoch in (looked_at[0], looked_at[len(looked_at) // 2], looked_at[-1]):
                rows += _proposition_rows(model, train_set, test_set, epoch, examples)
            save(checkpoint, model, optimizer, schedule, rows, epoch)
        if epoch < settings.epochs:
            _one_epoch(model, optimizer, train_set, settings.seed * 100_003 + epoch)
            schedule.step()
    return long(rows)


def _proposition_rows(model, train_set, test_set, epoch: int, examples: int) -> list[tuple]:
    observed = images.Digits(*(part[images.of_each_class(test_set, 1).flatten()] for part in test_set))
    updates = images.Digits(*(part[images.of_each_class(train_set, 1).flatten()[[0, 4, 8]]] for part in train_set))
    rows = []
    for pair, eta, error, size in proposition_errors(model, parameters_of(model), observed, updates):
        rows.append((epoch, examples, pair, f"eta_{eta:.0e}", "first_order_error", error))
        rows.append((epoch, examples, pair, f"eta_{eta:.0e}", "change_norm", size))
    return rows


def save(path: Path, model, optimizer, schedule, rows, epoch: int) -> None:
    """Write a checkpoint in one step, so that a kill never leaves half of one."""
    states = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
    }
    torch.save(states | {"rows": [list(row) for row in rows], "epoch": epoch}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def trained(model: nn.Module, train_set: images.Digits, lr: float, epochs: int) -> nn.Module:
    """A network after a few epochs of SGD at a constant learning rate, for looking at by hand."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for epoch in range(epochs):
        _one_epoch(model, optimizer, train_set, epoch)
    return model


def _one_epoch(model, optimizer, train_set: images.Digits, shuffle_seed: int) -> None:
    order = torch.randperm(len(train_set.labels), generator=torch.Generator().manual_seed(shuffle_seed))
    for batch in order.split(64):
        optimizer.zero_grad()
        cross_entropy(model(train_set.images[batch]), train_set.labels[batch]).backward()
        optimizer.step()
