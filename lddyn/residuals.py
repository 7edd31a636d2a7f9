"""Residuals: G = the gradient of a loss with respect to the logits (sections 2, 3.1 and 3.2, appendix B)."""

from torch import Tensor
from torch.nn.functional import one_hot


def sft(p: Tensor, y: Tensor) -> Tensor:
    """G = pi - y for the cross-entropy loss (sections 2 and 3.1).

    p: (..., V) probabilities; y: (...) labels. Returns (..., V).
    """
    return p - one_hot(y, p.shape[-1]).to(p.dtype)
