"""Floor 0: what is measured for each token. Float64 and the definitions are the reference."""

import math

import pytest
import torch

from lddyn.theory import logprobs
from lddyn.theory.logprobs import log1mexp, token_stats


def definitions(z, y):
    """Every quantity of TokenStats as its definition says, in float64."""
    logp = z.double().log_softmax(-1)
    p, best = logp.exp(), logp.argmax(-1, keepdim=True)
    rest = logp.scatter(-1, best, -torch.inf)
    y = y.unsqueeze(-1)
    return {
        "logp": logp.gather(-1, y).squeeze(-1),
        "argmax": best.squeeze(-1),
        "argmax_logp": logp.amax(-1),
        "rest_logp": rest.logsumexp(-1),
        "entropy": -(p * logp).sum(-1),
        "sq_norm": p.square().sum(-1),
        "rank": (logp > logp.gather(-1, y)).sum(-1),
        "residual_sq": (p - torch.zeros_like(p).scatter(-1, y, 1)).square().sum(-1),
    }


def examples(scale, tokens=60, vocab=500, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(tokens, vocab, generator=generator, dtype=torch.float64).mul(scale).to(dtype)
    y = torch.randint(vocab, (tokens,), generator=generator)
    y[:20] = z[:20].argmax(-1)
    return z, y


@pytest.mark.parametrize("scale", [0.01, 1, 5, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_quantity_is_what_its_name_says(scale, dtype):
    z, y = examples(scale, dtype=dtype)
    measured = token_stats(z, y)._asdict()
    for name, expected in definitions(z, y).items():
        tolerance = 5e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(measured[name].double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_log_of_the_rest_is_finite_where_the_authors_formula_is_minus_infinity():
    z, y = torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([0])
    p_max = z.softmax(-1).amax(-1)
    assert torch.log(1 - p_max + 1e-100).item() == -math.inf  # 1e-100 is 0 in float32
    assert token_stats(z, y).rest_logp.item() == pytest.approx(math.log(2) - 200, rel=1e-6)


def test_small_probability_outside_the_arg_max_is_not_rounded_away():
    z, y = torch.tensor([[18.0, 0.0]]), torch.tensor([0])
    stats = token_stats(z, y)
    assert stats.logp.item() == pytest.approx(-math.log1p(math.exp(-18)), rel=1e-5, abs=0)  # not 0
    assert stats.residual_sq.item() == pytest.approx(2 * math.exp(-36), rel=1e-4, abs=0)


def test_equal_maxima_are_not_both_taken_for_the_arg_max():
    stats = token_stats(torch.tensor([[3.0, 3.0, -50.0]]), torch.tensor([2]))
    assert stats.argmax_logp.item() == pytest.approx(math.log(0.5))
    assert stats.rest_logp.item() == pytest.approx(math.log(0.5))
    assert stats.rank.item() == 2


def test_masked_vocabulary_gives_no_nan():
    z = torch.tensor([[1.0, -torch.inf, 0.0], [-torch.inf, 5.0, -torch.inf]])
    for field in token_stats(z, torch.tensor([0, 1])):
        assert torch.isfinite(field).all()


def test_bf16_logits_are_summed_in_float32():
    z, y = examples(5, dtype=torch.bfloat16)
    for half, single in zip(token_stats(z, y), token_stats(z.float(), y), strict=True):
        assert torch.equal(half, single)


def test_pieces_and_shapes_do_not_change_the_numbers(monkeypatch):
    z, y = examples(5)
    whole = token_stats(z, y)
    monkeypatch.setitem(logprobs.AT_ONCE, "cpu", 7 * 500)
    for a, b in zip(whole, token_stats(z.reshape(3, 20, 500), y.reshape(3, 20)), strict=True):
        assert torch.equal(a.reshape(3, 20), b)


def test_the_callers_logits_are_not_modified():
    z, y = examples(5)
    before = z.clone()
    token_stats(z, y)
    assert torch.equal(z, before)


def test_log1mexp_is_exact_at_both_ends():
    x = torch.tensor([-1e-30, -1e-5, -0.5, -0.6931472, -0.7, -5.0, -80.0])
    expected = [-69.0775527898, math.log(-math.expm1(-1e-5)), math.log(-math.expm1(-0.5)), -0.6931472]
    expected += [math.log(-math.expm1(-0.7)), math.log1p(-math.exp(-5)), -math.exp(-80)]
    assert log1mexp(x).tolist() == pytest.approx(expected, rel=1e-5, abs=0)
