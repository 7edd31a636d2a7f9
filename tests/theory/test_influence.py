import itertools
from functools import partial

import pytest
import torch
from torch.nn.functional import one_hot

from lddyn.chapters.digits import run as digits
from lddyn.data import images
from lddyn.theory import influence, logprobs, losses

torch.manual_seed(0)


@pytest.fixture(scope="module", params=["lenet", "mlp"])
def case(request):
    train, test = images.split(images.load(), 200, 300, seed=0)
    model = digits.network(request.param, 0).double()
    theta = digits.parameters_of(model)
    return (
        model,
        theta,
        partial(digits.logits, model),
        train.images.double(),
        train.labels,
        test.images.double(),
    )


def test_normalization_is_the_jacobian_of_log_softmax():
    z = torch.randn(7, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda v: v.log_softmax(-1))(z)
    torch.testing.assert_close(influence.normalization(z.softmax(-1)), jacobian)


@pytest.mark.parametrize("vocab", [3, 10, 1000])
def test_peakiness_is_the_squared_norm_of_the_explicit_matrix(vocab):
    p = (3 * torch.randn(4, vocab, dtype=torch.float64)).softmax(-1)
    explicit = influence.normalization(p).square().sum((-1, -2))
    torch.testing.assert_close(logprobs.peakiness(p), explicit, rtol=1e-12, atol=0)


def test_two_misprints_of_appendix_c_differ_from_what_is_so():
    p = torch.randn(7, dtype=torch.float64).softmax(-1)
    diagonal = torch.func.jacrev(lambda v: v.softmax(-1))(p.log()).diagonal()
    torch.testing.assert_close(diagonal, p * (1 - p))
    assert (diagonal - (1 - p * p)).abs().min() > 0.1
    uniform = torch.full((16,), 1 / 16, dtype=torch.float64)
    assert uniform.square().sum() == 1 / 16 and logprobs.peakiness(uniform) == 16 - 2 + 16 / 16


def test_residual_is_the_gradient_of_cross_entropy_with_respect_to_logits():
    z, y = torch.randn(5, 9, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 8, 2, 2])
    torch.nn.functional.cross_entropy(z, y, reduction="sum").backward()
    torch.testing.assert_close(losses.sft(z.softmax(-1), y).detach(), z.grad)
    assert losses.sft(one_hot(y, 9).double(), y).abs().max() == 0


def test_kernel_from_jacobians_equals_the_matrix_free_one(case):
    _, theta, f, images, _, observed = case
    jacobian_o, jacobian_u = (influence.jacobians(f, theta, x) for x in (observed[:2], images[:3]))
    explicit = influence.entk(jacobian_o, jacobian_u)
    for o in range(2):
        for u in range(3):
            free = influence.entk_matrix_free(f, theta, observed[o], images[u])
            torch.testing.assert_close(free, explicit[o, u], rtol=1e-5, atol=1e-12)
    # K(x_o, x_u) is the transpose of K(x_u, x_o), not equal to it
    swapped = influence.entk(jacobian_u, jacobian_o)
    torch.testing.assert_close(swapped.transpose(0, 1).transpose(-1, -2), explicit)
    assert not torch.allclose(swapped[0, 1], explicit[1, 0], rtol=1e-3)


def test_error_of_the_prediction_is_quadratic_in_eta(case):
    model, theta, f, images, labels, observed = case
    k = influence.entk_matrix_free(f, theta, observed[0], images[0])
    a = influence.normalization(f(theta, observed[0]).softmax(-1))
    g = losses.sft(f(theta, images[0]).softmax(-1), labels[0])
    errors = []
    for eta in (1e-3, 1e-4, 1e-5):  # below the nearest kink of a ReLU
        after = digits.gradient_step(model, theta, images[0], labels[0], eta)
        measured = f(after, observed[0]).log_softmax(-1) - f(theta, observed[0]).log_softmax(-1)
        errors.append((measured - influence.predicted_change(eta, a, k, g)).norm())
        assert errors[-1] < 0.2 * measured.norm()
    assert [float(x / y) for x, y in itertools.pairwise(errors)] == pytest.approx([100, 100], rel=0.3)


def test_lower_bound_of_the_kernel_holds(case):
    _, theta, f, images, labels, observed = case
    for o in range(4):
        p = f(theta, observed[o]).softmax(-1)
        k = influence.entk_matrix_free(f, theta, observed[o], images[0])
        g = losses.sft(f(theta, images[0]).softmax(-1), labels[0])
        change = influence.predicted_change(1e-2, influence.normalization(p), k, g)
        assert 0 < influence.lbk(change, logprobs.peakiness(p), g) <= 1e-4 * k.square().sum()
