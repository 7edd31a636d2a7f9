"""The residuals: closed forms against automatic differentiation, the paper's misprints, and TRL's losses."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from torch.nn.functional import cross_entropy

from lddyn.theory import losses

SETTINGS = {
    "dpo": {"beta": 0.3},
    "ipo_sum": {"beta": 0.3},
    "slic": {"delta": 4.0, "lam": 0.2, "target": torch.tensor(-3.0)},
    "sppo": {"beta": 0.3},
    "simpo": {"beta": 2.5, "gamma": 0.5, "chosen_length": 6, "rejected_length": 4},
    "kto": {"beta": 0.3, "kl": 1.5},
    "orpo": {"lam": 0.5, "chosen_length": 6, "rejected_length": 4},
    "dpop": {"beta": 0.3, "lam": 2.0},
    "rpo": {"beta": 0.3, "alpha": 0.7, "chosen_length": 6},
    "cdpo": {"beta": 0.3, "label_smoothing": 0.2},
    "gated": {"beta": 0.3, "rejected_length": 6},
    "npo": {"beta": 0.3},
}
WITH_FORCE = [name for name, loss in losses.LOSSES.items() if loss.force]


def error(name: str, *where, **settings):
    """`losses.gradient_error` of the function and the force that stand under a name."""
    found = losses.LOSSES[name]
    return losses.gradient_error(found.function, found.force, *where, **settings)


def draw(seed: int):
    random = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(2, 6, 50, generator=random, dtype=torch.float64)
    labels = torch.randint(50, (2, 6), generator=random)
    logps = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).sum((1, 2))
    return logits, labels, logps, logps + 2 * torch.randn(2, generator=random, dtype=torch.float64)


@pytest.mark.parametrize("name", WITH_FORCE)
def test_closed_form_is_the_gradient(name):
    for seed in range(20):
        logits, labels, _, reference = draw(seed)
        for settings in ({}, SETTINGS.get(name, {})):
            assert error(name, logits, labels, reference, **settings) < 1e-10


def test_losses_with_a_title_have_a_force_and_one_title_each():
    """Chapter 4 checks and draws them by title; its draws follow their order."""
    titles = ["SFT", "DPO", "SPIN", "IPO", "SLiC", "SPPO", "SimPO", "KTO", "ORPO", "DPOP", "RPO", "NLL unlearning"]
    assert list(losses.titled()) == titles and all(loss.force for loss in losses.titled().values())


def test_gate_scales_the_gradient_on_rejected_and_nothing_else():
    for seed in range(20):
        logits, labels, (chosen, rejected), reference = draw(seed)
        assert error("gated", logits, labels, reference, beta=0.3, rejected_length=6) < 1e-10
        dpo, gated = (loss(chosen, rejected, *reference) for loss in (losses.dpo_loss, losses.gated_loss))
        assert gated == pytest.approx(dpo)


def test_smoothed_labels_turn_the_force_round_at_their_margin():
    turn = torch.tensor(4.0, dtype=torch.float64).log() / 0.3  # sigmoid(0.3 h) = 0.8
    up, _ = losses.cdpo_force(turn, torch.zeros(()), 0.0, 0.0, beta=0.3, label_smoothing=0.2)
    assert up == pytest.approx(0, abs=1e-12)


def test_a_wrong_force_is_noticed():
    logits, labels, _, reference = draw(0)
    assert losses.gradient_error(losses.dpo_loss, losses.ipo_force, logits, labels, reference) > 1e-3


def test_sft_residual_is_the_gradient_of_the_summed_cross_entropy():
    logits, labels, *_ = draw(0)
    z = logits[0].requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(z, labels[0], reduction="sum"), z)
    torch.testing.assert_close(losses.sft(z.detach().softmax(-1), labels[0]), gradient)


def test_slic_regulariser_pulls_its_target_by_lam():
    target = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    losses.slic_loss(*torch.zeros(4), lam=0.2, target=target).backward()
    assert -target.grad == pytest.approx(0.2)


def printed_ipo(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    a = losses.margin(chosen, rejected, ref_chosen, ref_rejected) - 1 / (2 * beta)
    return beta * (1 - a), -beta * (1 - a)


def printed_slic(chosen, rejected, ref_chosen, ref_rejected):
    inside = (1 - (chosen - rejected) > 0).to(chosen)
    up, down = losses.dpo_force(chosen, rejected, ref_chosen, ref_rejected)
    return inside * up, inside * down


def printed_sppo(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    return 2 * (chosen - ref_chosen - 1 / (2 * beta)), 2 * (rejected - ref_rejected + 1 / (2 * beta))


@pytest.mark.parametrize("name, printed", [("ipo_sum", printed_ipo), ("slic", printed_slic), ("sppo", printed_sppo)])
def test_the_printed_force_is_not_the_gradient_and_ours_is(name, printed):
    logits, labels, logps, reference = draw(3)
    if name == "slic" and logps[0] - logps[1] > 1:
        logits, labels = logits.flip(0), labels.flip(0)
    assert losses.gradient_error(losses.LOSSES[name].function, printed, logits, labels, reference) > 1e-3
    assert error(name, logits, labels, reference) < 1e-12


def test_sppo_pushes_rejected_down_at_the_start():
    up, down = losses.sppo_force(*torch.full((4,), -40.0))
    assert up > 0 and down == -up


def test_dpop_pulls_harder_only_below_its_start():
    above = losses.dpop_force(*torch.tensor([-39.0, -40.0, -40.0, -40.0]), lam=5.0)
    below = losses.dpop_force(*torch.tensor([-41.0, -40.0, -40.0, -40.0]), lam=5.0)
    assert above[0] == -above[1] and below[0] == -6 * below[1]


# --- TRL ---------------------------------------------------------------------------------------------------

LENGTH = 6
LOGPS = torch.tensor([[-9.0, -31.0], [-12.0, -22.0]])  # chosen, rejected of two pairs
REFERENCE = torch.tensor([[-10.0, -29.0], [-11.0, -25.0]])
PAIR = (*LOGPS, *REFERENCE)


def trl_batch():
    """What TRL's model returns for two pairs whose answers have LENGTH tokens, and the batch that goes with it."""
    per_token = (LOGPS / LENGTH).reshape(4, 1).expand(4, LENGTH)
    outputs = MagicMock(log_probs=per_token)
    mask = torch.ones(4, LENGTH + 1, dtype=torch.long)
    mask[:, 0] = 0  # one token of prompt
    batch = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    for name in ("entropy", "mean_logits", "is_top1"):
        setattr(outputs, name, torch.zeros(4, LENGTH, dtype=torch.bool if name == "is_top1" else None))
    return MagicMock(return_value=outputs), batch


def trl_trainer(**settings):
    gather = SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x, device="cpu")
    return MagicMock(accelerator=gather, aux_loss_enabled=False, precompute_ref_logps=True, **settings)


@pytest.mark.parametrize(
    ("loss_types", "ours"),
    [
        (["sigmoid"], losses.dpo_loss(*PAIR, beta=0.2)),
        (["hinge"], losses.slic_loss(*(LOGPS - REFERENCE) * 0.2, None, None, delta=1.0)),
        (["ipo"], losses.ipo_loss(*(t / LENGTH for t in PAIR), beta=0.2)),
        (["sppo_hard"], losses.sppo_loss(*PAIR, beta=0.2)),
        (["sigmoid", "sft"], losses.rpo_loss(*PAIR, beta=0.2, alpha=1.0, chosen_length=LENGTH)),
    ],
)
def test_losses_are_those_of_trl(loss_types, ours):
    trl = pytest.importorskip("trl")
    model, batch = trl_batch()
    batch |= {"ref_chosen_logps": REFERENCE[0], "ref_rejected_logps": REFERENCE[1]}
    trainer = trl_trainer(
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=loss_types,
        loss_weights=[1.0] * len(loss_types),
        beta=0.2,
        use_weighting=False,
        _total_train_tokens=0,
        _tp_size=1,
    )
    loss = trl.DPOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    torch.testing.assert_close(loss, ours.mean())


def test_kto_loss_is_that_of_trl():
    trl = pytest.importorskip("trl")
    model, batch = trl_batch()
    batch |= {"label": torch.tensor([True, True, False, False]), "ref_logps": REFERENCE.flatten()}
    batch["ref_KL_logps"] = torch.tensor([-20.0, -20.0])
    trainer = trl_trainer(calculate_KL=True, loss_type="kto", beta=0.2, desirable_weight=1.0, undesirable_weight=1.0)
    trainer._compute_kl_logps.return_value = torch.tensor([-18.0, -19.0])
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    loss = trl.KTOTrainer._compute_loss(trainer, model, batch, return_outputs=False)
    torch.testing.assert_close(2 * loss, losses.kto_loss(*PAIR, beta=0.2, kl=1.5).mean())


def test_simpo_and_orpo_losses_are_those_of_trl(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    cpo, orpo = (pytest.importorskip(f"trl.experimental.{name}") for name in ("cpo", "orpo"))
    lengths = {"chosen_length": LENGTH, "rejected_length": LENGTH}
    trainer = trl_trainer(alpha=0.0, beta=2.0, loss_type="simpo", simpo_gamma=0.5, label_smoothing=0.0)
    simpo, *_ = cpo.CPOTrainer.cpo_loss(trainer, *LOGPS / LENGTH)
    torch.testing.assert_close(simpo, losses.simpo_loss(*PAIR, beta=2.0, gamma=0.5, **lengths))
    # TRL's trainer subtracts this from the negative log-likelihood
    odds, *_ = orpo.ORPOTrainer.odds_ratio_loss(trl_trainer(beta=0.3), *LOGPS / LENGTH)
    torch.testing.assert_close(-LOGPS[0] / LENGTH - odds, losses.orpo_loss(*PAIR, lam=0.3, **lengths))
