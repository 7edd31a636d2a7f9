"""Chapter 4: the claims of appendix E and the residuals of appendix B, measured on random distributions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lddyn.engine import pool
from lddyn.engine.settings import choose, derive
from lddyn.engine.store import Run, long
from lddyn.theory import losses, softmax

SCALES = {
    "smoke": {"seeds": 2, "draws": 40},
    "laptop": {"seeds": 5, "draws": 400},
    "paper": {"seeds": 5, "draws": 4000},
}
VOCABULARIES = (3, 10, 50, 1000, 50_000)
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # |eta'| of negative steps
PUSHED = (0.4, 0.1, 0.01, 1e-3, 1e-4, 1e-5)  # p_y, with the shape of the rest fixed


@dataclass(frozen=True)
class Chapter:
    """All settings of the chapter: those that a scale stands for, then those of the small example."""

    seeds: int
    draws: int
    vocab: int = 50
    peakiness: float = 2.6
    strength: float = 3.0


@dataclass(frozen=True)
class Measurement:
    """One run of `law`."""

    seed: int
    draws: int  # random distributions for each measurement


def settings(scale: str, given: Mapping[str, object]) -> Chapter:
    """The chapter's settings at a scale, with those of `given` (`choose`); `InputError` for an unknown scale."""
    return choose(Chapter, SCALES, scale, given)


def grid(settings: Chapter) -> list[Measurement]:
    """The runs of the chapter: one for each seed."""
    return [derive(Measurement, settings, seed=seed) for seed in range(settings.seeds)]


def runs(c: Chapter, **how) -> list[Run]:
    """The runs of the chapter, of about a second each; how: as for `pool.run_all`."""
    return pool.run_all(law, grid(c), **({"workers": 1} | how))


# --- the law, measured -------------------------------------------------------------------------------------


def law(work: Path, settings: Measurement):
    """Measure the claims of appendix E, and the residuals of appendix B, on random distributions; a long table.

    Gaussian logits of random scale, labels and step sizes, in float64; `draws` of them for each vocabulary (a
    twentieth at 50,000). `prompt_id` is the draw, `response_type` what it was, `step` the rung of a ladder.
    """
    random, draws = torch.Generator().manual_seed(settings.seed), settings.draws
    rows = []
    for vocab in VOCABULARIES:
        count = draws if vocab <= 1000 else max(draws // 20, 2)
        rows += _lemma_and_guarantees(random, vocab, count) + _peaky(random, vocab, count) + _uniform(vocab)
    rows += _between(random, draws) + _ladder_of_steps(random, draws)
    rows += _ladder_of_pushed(random, draws) + _both_signs(random, draws)
    rows += _residuals(random, max(draws // 10, 2)) + _sppo(random)
    return long((s, 0, str(p), kind, metric, value) for s, p, kind, metric, value in rows)


def _uniform_random(random, *size, low=0.0, high=1.0) -> Tensor:
    return low + (high - low) * torch.rand(*size, generator=random, dtype=torch.float64)


def _logits(random, draws: int, vocab: int, low: float, high: float) -> Tensor:
    scale = _uniform_random(random, draws, 1, low=low, high=high)
    return scale * torch.randn(draws, vocab, generator=random, dtype=torch.float64)


def _label(random, z: Tensor) -> Tensor:
    """A label of random rank in each distribution, likely ones as often as unlikely ones."""
    draws, vocab = z.shape
    rank = (vocab ** _uniform_random(random, draws)).long().clamp(max=vocab) - 1
    return z.argsort(-1, descending=True).gather(-1, rank.unsqueeze(-1)).squeeze(-1)


def _rows(kind: str, metrics: dict[str, Tensor], step: int = 0) -> list[tuple]:
    return [(step, n, kind, name, v) for name, values in metrics.items() for n, v in enumerate(values.tolist())]


def _change(z: Tensor, y: Tensor, eta) -> tuple[Tensor, Tensor]:
    """log p before, and its change after a step. (draws, V) each."""
    logp = z.log_softmax(-1)
    return logp, softmax.step(z, y, eta).log_softmax(-1) - logp


def _at(values: Tensor, label: Tensor) -> Tensor:
    return values.gather(-1, label.unsqueeze(-1)).squeeze(-1)


def _log_odds(z: Tensor, label: Tensor) -> Tensor:
    """log(p / (1 - p)) of a label: it still moves where log p has rounded to 0. (draws,)."""
    return _at(z, label) - z.masked_fill(~_others(z, label), -torch.inf).logsumexp(-1)


def _others(z: Tensor, y: Tensor) -> Tensor:
    """Mask of the labels other than y. (draws, V)."""
    return ~one_hot(y, z.shape[-1]).bool()


def _lemma_and_guarantees(random, vocab: int, draws: int) -> list[tuple]:
    z = _logits(random, draws, vocab, 0.1, 4.0)
    y = _label(random, z)
    eta = -(10 ** _uniform_random(random, draws, 1, low=-3.0, high=1.3))
    logp, change = _change(z, y, eta)
    top, after = softmax.top_other(z, y), softmax.step(z, y, eta)
    observed = [y, top, *torch.randint(vocab, (3, draws), generator=random)]
    lemma = torch.stack([(softmax.log_alpha(logp, y, eta, i) - _at(change, i)).abs() for i in observed])
    rising, others = change > 0, _others(z, y)
    # labels within rounding of the threshold have no direction to predict
    clear = others & (change.abs() > 1e-12)
    exact = (logp.exp() > softmax.threshold(logp, y, eta).unsqueeze(-1)) == rising
    return _rows(
        f"V_{vocab}",
        {
            "lemma_error": lemma.amax(0),
            "log_odds_of_pushed": _log_odds(after, y) - _log_odds(z, y),
            "log_odds_of_top": _log_odds(after, top) - _log_odds(z, top),
            "prob_threshold_right": (exact & clear).sum(-1) / clear.sum(-1).clamp(min=1),
        },
    )


def _uniform(vocab: int) -> list[tuple]:
    z, y = torch.zeros(3, vocab, dtype=torch.float64), torch.tensor([0, 0, 0])
    _, change = _change(z, y, torch.tensor([[-0.01], [-1.0], [-20.0]], dtype=torch.float64))
    return _rows(f"V_{vocab}", {"uniform_not_rising": (change[:, 1:] <= 0).sum(-1).double()})


def _peaky(random, vocab: int, draws: int) -> list[tuple]:
    """p of y* between 0.7 and 0.999; pushed is the least likely label, at most about 1e-3."""
    z = _logits(random, draws, vocab, 0.1, 3.0)
    peak = _uniform_random(random, draws, 1, low=0.7, high=0.999)
    at_peak = ~_others(z, z.argmax(-1))
    rest = z.masked_fill(at_peak, -torch.inf).log_softmax(-1) + torch.log1p(-peak)
    z = torch.where(at_peak, peak.log(), rest)
    y = z.argmin(-1)
    z = torch.where(_others(z, y), z, z.clamp(max=-7.0))
    _, change = _change(z, y, -(10 ** _uniform_random(random, draws, 1, low=-2.0, high=1.3)))
    return _rows(f"V_{vocab}", {"peaky_rising": (change > 0).sum(-1).double()})


def _between(random, draws: int) -> list[tuple]:
    """Uneven distributions without a peak, pushed at an unlikely label: do likely ones rise and unlikely ones fall?"""
    z = _logits(random, draws, 50, 0.5, 1.5)
    y = z.argsort(-1)[:, 0:10].gather(-1, torch.randint(10, (draws, 1), generator=random)).squeeze(-1)
    logp, change = _change(z, y, -0.1)
    others = _others(z, y)
    rising, falling = others & (change > 0), others & (change < 0)
    lowest_riser = logp.masked_fill(~rising, torch.inf).amin(-1)
    highest_faller = logp.masked_fill(~falling, -torch.inf).amax(-1)
    return _rows(
        "V_50",
        {
            "between_both": (rising.any(-1) & falling.any(-1)).double(),
            "between_ordered": (lowest_riser >= highest_faller).double(),
        },
    )


def _ladder_of_steps(random, draws: int) -> list[tuple]:
    """The same distribution and label under larger and larger steps."""
    z = _logits(random, draws, 50, 0.1, 4.0)
    y = _label(random, z)
    rows, before = [], None
    for rung, strength in enumerate(STRENGTHS):
        logp, change = _change(z, y, -strength)
        predicted, others = softmax.first_order(logp.exp(), y, -strength), _others(z, y)
        top = softmax.top_other(logp, y)
        metrics = {
            "ladder_pushed": _at(change, y),
            "ladder_top": _at(change, top),
            "ladder_law_error": (change - predicted).norm(dim=-1) / change.norm(dim=-1),
            "prob_law_direction": ((change > 0) == (predicted > 0))[others].view(draws, -1).double().mean(-1),
            "prob_rising": (change > 0)[others].view(draws, -1).double().mean(-1),
        }
        if before is not None:
            grew = (change.abs() > before.abs())[others].view(draws, -1)
            metrics["prob_grew"] = grew.double().mean(-1)
        before = change
        rows += _rows("V_50", metrics, rung)
    return rows


def _ladder_of_pushed(random, draws: int) -> list[tuple]:
    """The same shape and step with the pushed label less and less likely."""
    z = _logits(random, draws, 50, 0.1, 4.0)
    y = _label(random, z)
    rows = []
    for rung, p_y in enumerate(PUSHED):
        z_y = softmax.with_pushed(z, y, p_y)
        logp, change = _change(z_y, y, -1.0)
        top = softmax.top_other(logp, y)
        rest = _others(z, y) & _others(z, top)
        balance = softmax.account(logp.exp(), (logp + change).exp(), y)
        rows += _rows(
            "V_50",
            {
                "pushed_top": _at(change, top),
                "pushed_top_gain": balance.gain,
                "pushed_others": change[rest].view(draws, -1).mean(-1),
                "prob_share_from_others": balance.share,
            },
            rung,
        )
    return rows


def _both_signs(random, draws: int) -> list[tuple]:
    """Chosen and rejected in one context with equal force, against rejected alone."""
    z = _logits(random, draws, 50, 0.1, 4.0)
    minus = _label(random, z)
    plus = (minus + torch.randint(1, 50, (draws,), generator=random)) % 50
    third = _others(z, minus) & _others(z, plus)
    p = softmax.softmax(z)
    rows = []
    for kind, g in (
        ("both", losses.sft(p, plus) - losses.sft(p, minus)),
        ("negative", -losses.sft(p, minus)),
    ):
        moved = (z - g).log_softmax(-1) - z.log_softmax(-1)
        change = moved[third].view(draws, -1)
        rows += _rows(kind, {"spread_of_third": change.amax(-1) - change.amin(-1)})
    return rows


def _residuals(random, draws: int) -> list[tuple]:
    """Closed forms against automatic differentiation, and how the forces depend on the margin."""
    rows = []
    for name, loss in losses.titled().items():
        errors = []
        for _ in range(draws):
            z = 3 * torch.randn(2, 6, 50, generator=random, dtype=torch.float64)
            labels = torch.randint(50, (2, 6), generator=random)
            reference = _uniform_random(random, 2, low=-40.0, high=0.0)
            errors.append(losses.gradient_error(loss.function, loss.force, z, labels, reference))
        rows += _rows(name, {"residual_error": torch.stack(errors)})
    beta = 10 ** _uniform_random(random, 1, low=-2.0, high=0.0).item()
    delta = _uniform_random(random, 1, low=0.0, high=3.0).item()
    margin = torch.linspace(-60, 60, 1201, dtype=torch.float64)
    pair = softmax.with_margin(margin)
    dpo, _ = losses.dpo_force(*pair, beta=beta)
    ipo, _ = losses.ipo_force(*pair, beta=beta)
    slic, _ = losses.slic_force(*pair, delta=delta)
    target = 1 / (2 * beta)
    rows.append((0, "grid", "DPO", "force_grows", (dpo.diff() > 0).double().mean().item()))
    rows.append((0, "grid", "DPO", "force_left", (dpo[-1] / dpo[0]).item()))
    wrong = (ipo.sign() != (target - margin).sign()) & ((margin - target).abs() > 1e-9)
    rows.append((0, "grid", "IPO", "force_wrong_way", wrong.double().mean().item()))
    rows.append((0, "grid", "SLiC", "force_beyond", slic[margin > delta].abs().max().item()))
    return rows


def _sppo(random, steps: int = 400) -> list[tuple]:
    """SPPO on one chosen and one rejected label in two contexts, from the start to where it stops."""
    z = _logits(random, 2, 50, 3.0, 3.0)  # context of chosen, of rejected
    y = z.argsort(-1, descending=True)[:, 25]
    start = z.log_softmax(-1)
    top = softmax.top_other(start[1:], y[1:])
    ref = _at(start, y)
    up, down = losses.sppo_force(*ref, *ref)
    for _ in range(steps):
        force = torch.stack(losses.sppo_force(*_at(z.log_softmax(-1), y), *ref))
        z = softmax.step(z, y, 0.01 * force.unsqueeze(-1))
    end = z.log_softmax(-1)
    return [
        (0, "start", "SPPO", "force_ratio", (down / up).item()),
        (0, "end", "SPPO", "log_ratio_rejected", (_at(end, y) - ref)[1].item()),
        (0, "end", "SPPO", "change_of_top", _at(end[1:] - start[1:], top).item()),
    ]
