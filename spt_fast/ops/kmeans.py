"""The k-means primitives: assign-and-accumulate, and all squared distances.

Limits: no gradients; tokens in float32, float16 or bfloat16; centres in float32.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from spt_fast.ops import kmeans_native
from spt_fast.ops.kmeans_reference import assign_accumulate_reference, distances_reference

TOKEN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "native", "reference")


class Assigned(NamedTuple):
    """What one pass of assign-and-accumulate returns; M counts the tokens of a group."""

    sums: Tensor  # [G, K, D] float64: weighted sum of the tokens of each centre
    counts: Tensor  # [G, K] float64: sum of their weights
    inertia: Tensor  # [G] float64: weighted sum of squared distances to the nearest centre
    labels: Tensor | None  # [G, M] int32
    distances: Tensor | None  # [G, M] float32: squared distance to the nearest centre


def assign_accumulate(
    tokens: Tensor,  # [G, M, D] or [G, B, N, D]
    centers: Tensor,  # [G, K, D]
    *,
    shift: Tensor | None = None,  # [G, D]
    weights: Tensor | None = None,  # [G, M] or [G, B, N]
    with_labels: bool = False,
    with_distances: bool = False,
    backend: str = "auto",
) -> Assigned:
    """Assign each token to its nearest centre and sum up the tokens of each centre (eq. 9 and 10).

    Ties go to the lowest index. Tokens are read in place as long as their last dimension is
    contiguous; M = B * N. `shift`, a point near the data, guards float32 against cancellation and
    changes no result otherwise. A token that is NaN or infinite makes the group's inertia NaN or
    infinite. On the CPU results do not depend on the number of threads.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or `backend` cannot serve these tensors.
    """
    view, shift, weights = _check(tokens, centers, shift, weights)
    centers = centers.contiguous()
    if choose_backend(tokens.device, backend) == "native":
        return Assigned(
            *kmeans_native.assign_accumulate(view, centers, shift, weights, with_labels, with_distances)
        )
    sums, counts, inertia, labels, distances = assign_accumulate_reference(
        view.flatten(1, 2), centers, shift, weights
    )
    return Assigned(
        sums, counts, inertia, labels if with_labels else None, distances if with_distances else None
    )


class PrunedAssign:
    """Assign-and-accumulate over one group of tokens, again and again while the centres move.

    With the compiled kernels on the CPU, tokens whose centre cannot have changed since the call before
    are not read. Labels are those of `assign_accumulate` bit for bit; sums and inertia are the same
    but for the rounding of float64. Elsewhere each call is one of `assign_accumulate`. Arguments as
    there, with G = 1; `tokens`, `shift` and `weights` must stay as they are. Holds 18 bytes a token and
    4 more for every 16 centres.
    """

    def __init__(
        self,
        tokens: Tensor,  # [1, M, D] or [1, B, N, D]
        *,
        shift: Tensor | None = None,  # [1, D]
        weights: Tensor | None = None,  # [1, M] or [1, B, N]
        backend: str = "auto",
    ) -> None:
        if tokens.ndim in (3, 4) and tokens.shape[0] != 1:
            raise ValueError(f"tokens must be one group, [1, M, D] or [1, B, N, D], got {list(tokens.shape)}")
        self._tokens, self._shift, self._weights, self._backend = tokens, shift, weights, backend
        self._native: kmeans_native.PrunedAssign | None = None
        self._num_centers = 0

    def assign(self, centers: Tensor) -> Assigned:
        """One pass for `centers` [1, K, D]; K must not change between calls. No labels, no distances."""
        if not self._prunes():
            return assign_accumulate(
                self._tokens, centers, shift=self._shift, weights=self._weights, backend=self._backend
            )
        view, shift, weights = _check(self._tokens, centers, self._shift, self._weights)
        if self._native is None:
            self._num_centers = centers.shape[1]
            self._native = kmeans_native.PrunedAssign(view, self._num_centers, shift, weights)
        if centers.shape[1] != self._num_centers:
            raise ValueError(f"centers must be {self._num_centers} as before, got {centers.shape[1]}")
        sums, counts, inertia, _ = self._native.assign(centers.contiguous())
        return Assigned(sums, counts, inertia, None, None)

    def _prunes(self) -> bool:
        device = self._tokens.device
        return device.type == "cpu" and choose_backend(device, self._backend) == "native"


def squared_distances(
    tokens: Tensor,  # [G, M, D] or [G, B, N, D]
    centers: Tensor,  # [G, K, D]
    *,
    shift: Tensor | None = None,  # [G, D]
    backend: str = "auto",
) -> Tensor:
    """Squared distances [G, M, K] between tokens and centres, float32; arguments as above."""
    view, shift, _ = _check(tokens, centers, shift, None)
    centers = centers.contiguous()
    if choose_backend(tokens.device, backend) == "native":
        return kmeans_native.distances(view, centers, shift)
    return distances_reference(view.flatten(1, 2), centers, shift)


def explain_backend(device: torch.device) -> tuple[str, str]:
    """Name of the backend that serves tensors on `device`, and why."""
    reason = kmeans_native.why_not(device)
    if reason:
        return "reference", reason
    if device.type == "cuda":
        return "native", "compiled CUDA kernels"
    return "native", f"compiled kernels, {kmeans_native.build_info()['isa']}"


def choose_backend(device: torch.device, backend: str) -> str:
    """Resolve `backend`: "auto" falls back with a warning, an explicit choice raises if it cannot be had."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    reason = kmeans_native.why_not(device)
    if not reason:
        return "native"
    if backend == "native":
        raise ValueError(f"backend='native' cannot serve {device.type} tensors: {reason}")
    _warn_once(reason)
    return "reference"


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"spt_fast clusters with plain PyTorch, which is slower: {reason}", stacklevel=4)


def _check(
    tokens: Tensor, centers: Tensor, shift: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Validate, and bring tokens to [G, B, N, D] (a view), shift and weights to contiguous float32."""
    if tokens.dtype not in TOKEN_DTYPES:
        raise ValueError(f"tokens must be float32, float16 or bfloat16, got {tokens.dtype}")
    if centers.dtype != torch.float32:
        raise ValueError(f"centers must be float32, got {centers.dtype}")
    if tokens.ndim not in (3, 4) or 0 in tokens.shape:
        raise ValueError(f"tokens must be a non-empty [G, M, D] or [G, B, N, D], got {tuple(tokens.shape)}")
    groups, width = tokens.shape[0], tokens.shape[-1]
    if centers.ndim != 3 or centers.shape[0] != groups or centers.shape[2] != width or centers.shape[1] < 1:
        raise ValueError(f"centers must be [{groups}, K, {width}] with K >= 1, got {tuple(centers.shape)}")
    view = tokens if tokens.ndim == 4 else tokens[:, None]
    if view.stride(-1) != 1 and width > 1:
        view = view.contiguous()
    rows = view.shape[1] * view.shape[2]
    if shift is not None:
        shift = _check_extra("shift", shift, (groups, width), tokens.device)
    if weights is not None:
        weights = _check_extra("weights", weights.reshape(groups, -1), (groups, rows), tokens.device)
    if centers.device != tokens.device:
        raise ValueError(f"centers must be on {tokens.device} like tokens, got {centers.device}")
    return view, shift, weights


def _check_extra(name: str, value: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like tokens, got {value.device}")
    return value.to(torch.float32).contiguous()
