"""HSIC and CKA in PyTorch, on every device, from features and not from their n x n kernels.

Limits: float64 inside, of which it holds a copy of what it is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

# An HSIC below this share of the sum that it is the difference of is rounding in float64.
_ROUNDING = 1e-12
# What subtracting its mean leaves of a constant feature, at most, in float64.
_REST_OF_A_CONSTANT = 1e-13


def cka_forward(
    x: Tensor,  # [n, D1]
    y: Tensor,  # [n, D2]
    unbiased: bool,
) -> Tensor:
    """CKA of x and y, a scalar; float64 for float64, else float32."""
    (own_x, centred_x), (own_y, centred_y) = own_hsic(x, unbiased), own_hsic(y, unbiased)
    value = cka_of_hsic(hsic(centred_x, centred_y, unbiased), own_x, own_y)
    return value.to(torch.promote_types(x.dtype, torch.float32))


def own_hsic(x: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """HSIC [...] of features [..., n, D] with themselves, 0 where it is rounding, and the features centred.

    HSIC does not depend on the mean of a feature; without the mean nothing large cancels.
    """
    wide = x.double()
    centred = wide - wide.mean(dim=-2, keepdim=True)
    own = hsic(centred, centred, unbiased)
    n = x.shape[-2]
    nothing = centred.norm(dim=(-2, -1)) <= _REST_OF_A_CONSTANT * wide.norm(dim=(-2, -1))
    if unbiased:
        nothing = nothing | (own * (n * (n - 3)) <= _ROUNDING * _cross_products(centred, centred))
    return own.masked_fill(nothing, 0), centred


def hsic(x: Tensor, y: Tensor, unbiased: bool) -> Tensor:
    """HSIC [...] of centred features [..., n, D1] and [..., n, D2] with the kernels x x^T and y y^T.

    Biased, it is |x^T y|^2 / (n - 1)^2 (Gretton et al., 2005). Unbiased, it is HSIC_1: the rows of both
    kernels sum to 0. The sums over kernels without their diagonals, k and l, in Song et al. (2012) are
    therefore sums over the diagonals alone: K~ 1 = -k, 1^T K~ 1 = -sum k.
    """
    n = x.shape[-2]
    if not unbiased:
        return _cross_products(x, y) / (n - 1) ** 2
    k, l = x.square().sum(dim=-1), y.square().sum(dim=-1)  # noqa: E741
    total = _cross_products(x, y)
    total = total - n / (n - 2) * (k * l).sum(dim=-1) + k.sum(-1) * l.sum(-1) / ((n - 1) * (n - 2))
    return total / (n * (n - 3))


def cka_of_hsic(cross: Tensor, own_x: Tensor, own_y: Tensor) -> Tensor:
    """HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)); 0 where a factor below the root is 0."""
    scale = own_x.sqrt() * own_y.sqrt()
    positive = scale > 0
    return torch.where(positive, cross / torch.where(positive, scale, 1), 0)


def _cross_products(x: Tensor, y: Tensor) -> Tensor:
    """tr(x x^T y y^T) = |x^T y|^2, by whichever of the two needs fewer operations."""
    n, width_x, width_y = x.shape[-2], x.shape[-1], y.shape[-1]
    if n * (width_x + width_y) < width_x * width_y:
        return ((x @ x.mT) * (y @ y.mT)).sum(dim=(-2, -1))
    return (x.mT @ y).square().sum(dim=(-2, -1))
