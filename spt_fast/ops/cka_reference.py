"""Unbiased HSIC and linear CKA as their authors write them, in float64 with n x n kernels; small n only."""

from __future__ import annotations

import torch
from torch import Tensor


def cka_reference(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L)) with K = x x^T, L = y y^T; float64 scalar.

    Nguyen, Raghu and Kornblith, "Do wide and deep networks learn the same things?", 2021.
    """
    kernels = [tensor.double() @ tensor.double().T for tensor in (x, y)]
    cross, own_x, own_y = (hsic_reference(*pair) for pair in (kernels, kernels[:1] * 2, kernels[1:] * 2))
    return cross / torch.sqrt(own_x * own_y)


def hsic_reference(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741
    """HSIC_1 of two kernels [n, n] (Song et al., 2012)."""
    n = len(k)
    k, l = (kernel - kernel.diag().diag() for kernel in (k, l))  # noqa: E741
    ones = k.new_ones(n)
    trace = (k @ l).trace()
    totals = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return (trace + totals - 2 / (n - 2) * (ones @ k @ l @ ones)) / (n * (n - 3))
