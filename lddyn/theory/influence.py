"""The decomposition: one gradient step on (x_u, y_u) changes log pi(. | x_o) by -eta A K G (sections 2 and 3, eq. 3).

    A(x_o)      = I - 1 pi(x_o)^T                      normalisation   (V, V)
    K(x_o, x_u) = grad z(x_o) grad z(x_u)^T            similarity      (V, V), empirical NTK of the logits
    G(x_u, y_u) = grad_z L(x_u, y_u)                   residual        (V,), see `residuals`

A network is given as `logits(parameters, x) -> (V,)`, a pure function of a dict of tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import jacrev, jvp, vjp, vmap

Logits = Callable[[dict[str, Tensor], Tensor], Tensor]


def normalization(p: Tensor) -> Tensor:
    """A = I - 1 pi^T: how a change of logits becomes a change of log-probabilities (eq. 9).

    p: (..., V) probabilities. Returns (..., V, V).
    """
    vocab = p.shape[-1]
    return torch.eye(vocab, dtype=p.dtype, device=p.device) - p.unsqueeze(-2).expand(*p.shape, vocab)


def jacobians(logits: Logits, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """grad z(x) for every input, flattened over all parameters.

    x: (batch, ...). Returns (batch, V, parameters); the memory is that of the result.
    """
    jacobian = vmap(jacrev(logits), (None, 0))(parameters, x)
    return torch.cat([j.flatten(2) for j in jacobian.values()], dim=-1)  # (batch, V, parameters)


def entk(jacobian_o: Tensor, jacobian_u: Tensor) -> Tensor:
    """K(x_o, x_u) from two sets of Jacobians, (O, V, P) and (U, V, P). Returns (O, U, V, V)."""
    return torch.einsum("oip,ujp->ouij", jacobian_o, jacobian_u)


def entk_matrix_free(logits: Logits, parameters: dict[str, Tensor], x_o: Tensor, x_u: Tensor) -> Tensor:
    """K(x_o, x_u) column by column as v -> J_o (J_u^T v), never holding a Jacobian.

    x_o, x_u: one input each. Returns (V, V).
    """
    z_u, pull_back = vjp(lambda theta: logits(theta, x_u), parameters)[:2]

    def column(v: Tensor) -> Tensor:
        (direction,) = pull_back(v)
        change: Tensor = jvp(lambda theta: logits(theta, x_o), (parameters,), (direction,))[1]
        return change

    return torch.stack([column(e) for e in torch.eye(len(z_u), dtype=z_u.dtype)], dim=1)


def predicted_change(eta: float, a: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Proposition 1 (eq. 3): the first-order change of log pi(. | x_o), -eta A K G, in nats.

    a, k: (..., V, V); g: (..., V). Returns (..., V). The remainder is O(eta^2).
    """
    return -eta * (a @ (k @ g.unsqueeze(-1))).squeeze(-1)


def lbk(change: Tensor, a_squared: Tensor, g: Tensor) -> Tensor:
    """Lower bound of the kernel (eq. 26): ||change||^2 / (||A||_F^2 ||G||^2), at most eta^2 ||K||_F^2 to first order.

    change: (..., V) of log pi(. | x_o); a_squared: (...) from `logprobs.peakiness`; g: (..., V). Returns (...).
    """
    return change.square().sum(-1) / (a_squared * g.square().sum(-1))
