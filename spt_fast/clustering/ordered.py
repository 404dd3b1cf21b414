"""Sums over tokens whose order does not depend on the number of threads.

On the CPU NumPy sums, in one thread: torch would split the sums by the number of threads. On a GPU torch
sums, by operations that use no atomics and leave the result there; none of it has run on a GPU yet.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_CHUNK_ELEMENTS = 2**18  # of tokens that are measured at once: they stay in the cache


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Sum of values [n] or [n, C] times weights [n] over the tokens, in float64."""
    if on_host(values):
        # Not a BLAS product: its order of summation, and so the last bit, would depend on its threads.
        return torch.as_tensor(
            (values.numpy().astype(np.float64).T * weights.numpy()).sum(axis=-1), device="cpu"
        )
    return (values.double().mT * weights).sum(-1) if values.ndim == 2 else (values.double() * weights).sum()


def running_sum(mass: Tensor) -> Tensor:
    """Sums of the first 1, 2, ..., n elements of [n], in float64."""
    if on_host(mass):
        return torch.from_numpy(np.cumsum(mass.numpy(), dtype=np.float64))
    # Two equal rows: for a single one torch takes CUB's scan, whose rounding differs from run to run.
    return mass.double().expand(2, -1).cumsum(1)[0]


def sum_by_label(labels: Tensor, values: Tensor, n_labels: int) -> Tensor:
    """Sums [C, K] of values [n, C] over the tokens of each label [n], in float64."""
    if on_host(values):
        index = labels.numpy()
        return torch.from_numpy(
            np.stack([np.bincount(index, weights=column, minlength=n_labels) for column in values.numpy().T])
        )
    members = labels[:, None] == torch.arange(n_labels, device=labels.device)
    return values.double().mT @ members.double()


def squared_differences(tokens: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """Squared distances [n] of tokens [n, D] to their points [K, D] by `labels` [n]; float64, to be summed.

    Of the float32 differences themselves: rounded by 1e-7 of themselves, where those of a pass are by that
    of the token's distance to the mean.
    """
    squared = torch.empty(len(tokens), dtype=torch.float64, device=tokens.device)
    rows = max(1, _CHUNK_ELEMENTS // tokens.shape[-1])
    chunks = (torch.split(values, rows) for values in (tokens, labels, squared))
    for part, own, out in zip(*chunks, strict=True):
        if on_host(tokens):
            steps = part.float().numpy() - points.numpy()[own.numpy()]
            out.copy_(torch.from_numpy(np.einsum("nd,nd->n", steps, steps)))
        else:
            out.copy_((part.float() - points[own]).square().sum(1))
    return squared


def on_host(values: Tensor) -> bool:
    """Whether NumPy sums these values."""
    return values.device.type == "cpu"
