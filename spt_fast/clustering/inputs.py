"""Checks and conversions of what users hand to the estimators."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spt_fast.errors import NonFiniteError
from spt_fast.ops.kmeans import TOKEN_DTYPES

ArrayLike = Any  # a torch tensor, a NumPy array, or anything numpy.asarray understands


def check_int(name: str, value: Any, minimum: int) -> int:
    """`value` as an int of at least `minimum`; TypeError or ValueError naming the argument otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be an integer >= {minimum}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value}")
    return int(value)


def as_tokens(X: ArrayLike, device: torch.device | None = None) -> Tensor:
    """A tensor of a dtype the kernels read; arrays and tensors of such a dtype are not copied.

    float64 and integers are converted to float32.
    """
    tensor = X if isinstance(X, Tensor) else torch.as_tensor(np.asarray(X))
    if tensor.is_complex() or tensor.dtype is torch.bool:
        raise TypeError(f"X must hold real numbers, got {tensor.dtype}")
    tensor = tensor.detach()
    if tensor.dtype not in TOKEN_DTYPES:
        tensor = tensor.float()
    return tensor if device is None else tensor.to(device)


def as_groups(X: ArrayLike, n_groups: int, device: torch.device | None = None) -> Tensor:
    """X as [G, M, D]: [M, D] is accepted where there is one group."""
    tokens = as_tokens(X, device)
    if tokens.ndim == 2 and n_groups == 1:
        tokens = tokens[None]
    if tokens.ndim != 3 or tokens.shape[0] != n_groups:
        allowed = "[M, D]" if n_groups == 1 else f"[{n_groups}, M, D]"
        raise ValueError(f"X must be {allowed}, got {list(tokens.shape)}")
    if tokens.shape[1] < 1 or tokens.shape[2] < 1:
        raise ValueError(f"X must hold at least one token of at least one feature, got {list(tokens.shape)}")
    return tokens


def as_weights(
    sample_weight: ArrayLike | None, shape: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """Weights as float32 [*shape]: finite, none negative, not all zero."""
    if sample_weight is None:
        return None
    weights = torch.as_tensor(
        np.asarray(sample_weight) if not isinstance(sample_weight, Tensor) else sample_weight
    )
    weights = weights.to(device, torch.float32)
    if weights.numel() != torch.Size(shape).numel():
        raise ValueError(f"sample_weight must be {list(shape)}, got {list(weights.shape)}")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ValueError("sample_weight must be finite and >= 0, with at least one weight above 0")
    return weights.reshape(shape)


def raise_non_finite(tokens: Tensor) -> None:
    """Raise the error that names the first row of [..., D] that is not finite, or too large to square."""
    rows = tokens.reshape(-1, tokens.shape[-1])
    for start in range(0, len(rows), 4096):
        bad = ~torch.isfinite(rows[start : start + 4096]).all(dim=1)
        if bool(bad.any()):
            row = start + int(bad.nonzero()[0, 0])
            raise NonFiniteError(f"X must be finite, but row {row} holds NaN or infinity", row)
    row = int(rows.float().abs().amax(dim=1).argmax())
    raise NonFiniteError(f"X must be small enough to be squared in float32, but row {row} is not", row)
