"""Checks and conversions of what users hand to the estimators; `frame.py` brings it to what kernels read."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spt_fast.support.errors import NonFiniteError

ArrayLike = Any  # a torch tensor, a NumPy array, or anything numpy.asarray understands


def as_tokens(X: ArrayLike, device: torch.device | None = None, name: str = "X") -> Tensor:
    """A tensor of real numbers in the dtype of X; arrays and tensors are not copied."""
    if isinstance(X, Tensor) and X.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got a tensor of layout {X.layout}")
    if hasattr(X, "toarray"):
        raise TypeError(f"{name} must be dense, got a sparse {type(X).__name__}")
    tensor = X if isinstance(X, Tensor) else _from_array(np.asarray(X), name)
    if tensor.is_complex():
        raise ValueError(f"Complex data not supported: {name} must hold real numbers, got {tensor.dtype}")
    if tensor.dtype is torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {tensor.dtype}")
    tensor = tensor.detach()
    return tensor if device is None else tensor.to(device)


def as_groups(X: ArrayLike, n_groups: int, device: torch.device | None = None, name: str = "X") -> Tensor:
    """X as [G, M, D]: [M, D] is accepted where there is one group."""
    tokens = as_tokens(X, device, name)
    if tokens.ndim == 2 and n_groups == 1:
        tokens = tokens[None]
    if tokens.ndim != 3 or tokens.shape[0] != n_groups:
        allowed = "[M, D]" if n_groups == 1 else f"[{n_groups}, M, D]"
        raise ValueError(f"{name} must be {allowed}, got {list(tokens.shape)}. Reshape your data")
    check_filled(tokens, name)
    return tokens


def check_filled(tokens: Tensor, name: str = "X") -> None:
    """ValueError where [..., M, D] holds no token, or tokens without features."""
    if tokens.shape[-1] == 0:
        shape = f"({', '.join(map(str, tokens.shape[-2:]))})"
        raise ValueError(f"{name} has 0 feature(s) (shape={shape}) while a minimum of 1 is required.")
    if tokens.numel() == 0:
        raise ValueError(f"{name} must hold at least one token, got {list(tokens.shape)}")


def check_width(tokens: Tensor, expected: int, estimator: str) -> None:
    """ValueError, in scikit-learn's words, where [..., D] is not as wide as the data before."""
    if tokens.shape[-1] != expected:
        raise ValueError(
            f"X has {tokens.shape[-1]} features, but {estimator} is expecting {expected} features as input"
        )


def as_weights(
    sample_weight: ArrayLike | None,
    shape: tuple[int, ...],
    device: torch.device,
    leading: tuple[int, ...] | None = None,
) -> Tensor | None:
    """Weights as float32 [G, M], which is `shape`: finite, none negative, not all of a group zero.

    They may come as [G, M], where G is 1 as [M], and in the shape `leading` of the tokens that they are for.
    """
    if sample_weight is None:
        return None
    weights = as_tokens(sample_weight, device, "sample_weight").float()
    allowed = dict.fromkeys([shape[1:], shape] if shape[0] == 1 else [shape])
    if leading is not None:
        allowed[leading] = None
    if tuple(weights.shape) not in allowed:
        words = " or ".join(str(list(form)) for form in allowed)
        raise ValueError(f"sample_weight must be {words}, a weight for each token, got {list(weights.shape)}")
    weights = weights.reshape(shape)
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    if bool(bad.any()):
        raise ValueError(f"sample_weight must be finite in float32 and >= 0, got {float(weights[bad][0])}")
    if not bool((weights > 0).any(dim=-1).all()):
        raise ValueError(
            "sample_weight must hold at least one weight above 0 per group, got only zeros in float32"
        )
    return weights


def raise_non_finite(tokens: Tensor, first_row: int = 0, scaled: Tensor | None = None) -> None:
    """Raise the error that names the first row of [..., D] that is not finite, or the largest.

    `first_row` is the number that the first of these rows has in X, of which they may be one group. `scaled`
    are the tokens as they are squared, where earlier data have fixed how they are moved and scaled.
    """
    rows = tokens.reshape(-1, tokens.shape[-1])
    for start in range(0, len(rows), 4096):
        bad = ~torch.isfinite(rows[start : start + 4096]).all(dim=1)
        if bool(bad.any()):
            row = first_row + start + int(bad.nonzero()[0, 0])
            raise NonFiniteError(
                f"X must be finite, but row {row} holds NaN, infinity or numbers that float32 cannot hold",
                row=row,
            )
    largest = (tokens if scaled is None else scaled).reshape(rows.shape).float().abs().amax(dim=1)
    row = first_row + int(largest.argmax())
    message = f"X must be small enough to be squared in float32, but row {row} is not"
    if scaled is not None:
        message += (
            ": the first data, which were tiny, huge or far from zero, have fixed how X is moved and scaled. "
            "Start a new estimator for data of another scale, or give it typical data first"
        )
    raise NonFiniteError(message, row=row)


def _from_array(array: np.ndarray, name: str) -> Tensor:
    """A tensor that shares the array's memory where torch can read it as it is."""
    if array.dtype.kind == "O":
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} must hold real numbers: {error}") from None
    if array.dtype.kind not in "biufc":
        raise TypeError(f"{name} must hold real numbers, got dtype {array.dtype}")
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    with warnings.catch_warnings():
        # Read-only memory, a memory map say: nothing here writes to tokens.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array) if array.ndim else torch.as_tensor(array, device="cpu")
