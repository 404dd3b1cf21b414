"""The k-means primitives: assign-and-accumulate, and all squared distances.

Limits: no gradients; tokens in float32, float16 or bfloat16; centres in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from spt_fast.ops import kmeans_native
from spt_fast.ops.kmeans_reference import assign_accumulate_reference, distances_reference

TOKEN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "native", "reference")
_CPU = torch.device("cpu")


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
    there, with G = 1; `tokens`, `shift` and `weights` must stay as they are. Holds what `PrunedParts` holds.
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
        self._parts: PrunedParts | None = None

    def assign(self, centers: Tensor) -> Assigned:
        """One pass for `centers` [1, K, D]; K must not change between calls. No labels, no distances."""
        if not can_prune(self._tokens.device, self._backend):
            return assign_accumulate(
                self._tokens, centers, shift=self._shift, weights=self._weights, backend=self._backend
            )
        if self._parts is None:
            self._tokens, self._shift, self._weights = _check(
                self._tokens, centers, self._shift, self._weights
            )
            rows, width = self._tokens.shape[1:-1].numel(), self._tokens.shape[-1]
            self._parts = PrunedParts([rows], centers.shape[1], width, shift=self._shift)
        for part in self._parts.begin(centers):
            self._parts.add(part, self._tokens, self._weights)
        return self._parts.end()


class PrunedParts:
    """`PrunedAssign` over tokens that come in parts; a part without a token to be read need not come.

    A pass is `begin`, `add` for each part that it asks for, and `end`. A part is always the same tokens. How
    they are cut changes no label, but the last bits of the sums. Where `can_prune` only. Holds 14 bytes a
    token, 4 more for every 16 centres (12 without AVX2), and 4 for each token of the largest part.
    """

    def __init__(
        self, part_rows: Sequence[int], num_centers: int, width: int, *, shift: Tensor | None = None
    ) -> None:
        if shift is not None:
            shift = _check_extra("shift", shift, (1, width), _CPU)
        self._part_rows, self._num_centers, self._width = list(part_rows), num_centers, width
        self._native = kmeans_native.PrunedPasses(self._part_rows, num_centers, width, shift)

    def begin(self, centers: Tensor) -> list[int]:
        """Start a pass for `centers` [1, K, D]; returns the parts to be added, ascending."""
        _check_centers(centers, 1, self._width, _CPU)
        if centers.shape[1] != self._num_centers:
            raise ValueError(f"centers must be {self._num_centers} as before, got {centers.shape[1]}")
        return self._native.begin(centers.contiguous())

    def add(
        self,
        part: int,
        tokens: Tensor,  # [1, m, D] or [1, B, N, D] with m = B * N
        weights: Tensor | None = None,  # [1, m] or [1, B, N]
    ) -> None:
        """Take in the next of the parts that `begin` returned."""
        view, rows = _check_tokens(tokens), self._part_rows[part]
        given = (view.shape[0], view.shape[1] * view.shape[2], view.shape[3])
        if given != (1, rows, self._width) or view.device != _CPU:
            raise ValueError(
                f"tokens of part {part} must be [1, {rows}, {self._width}] on the CPU, "
                f"got {list(tokens.shape)} on {tokens.device}"
            )
        if weights is not None:
            weights = _check_extra("weights", weights.reshape(1, -1), (1, rows), _CPU)
        self._native.add(part, view, weights)

    def end(self) -> Assigned:
        """What `assign_accumulate` returns for all parts together. No labels, no distances."""
        sums, counts, inertia, _ = self._native.end()
        return Assigned(sums, counts, inertia, None, None)


def can_prune(device: torch.device, backend: str) -> bool:
    """Whether there are kernels for pruned passes: the compiled ones on the CPU."""
    return device.type == "cpu" and choose_backend(device, backend) == "native"


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
    view = _check_tokens(tokens)
    groups, width = view.shape[0], view.shape[-1]
    _check_centers(centers, groups, width, tokens.device)
    rows = view.shape[1] * view.shape[2]
    if shift is not None:
        shift = _check_extra("shift", shift, (groups, width), tokens.device)
    if weights is not None:
        weights = _check_extra("weights", weights.reshape(groups, -1), (groups, rows), tokens.device)
    return view, shift, weights


def _check_tokens(tokens: Tensor) -> Tensor:
    """Tokens as [G, B, N, D] whose last dimension is contiguous, which is a view if it is already."""
    if tokens.dtype not in TOKEN_DTYPES:
        raise ValueError(f"tokens must be float32, float16 or bfloat16, got {tokens.dtype}")
    if tokens.ndim not in (3, 4) or 0 in tokens.shape:
        raise ValueError(f"tokens must be a non-empty [G, M, D] or [G, B, N, D], got {tuple(tokens.shape)}")
    view = tokens if tokens.ndim == 4 else tokens[:, None]
    return view.contiguous() if view.stride(-1) != 1 and view.shape[-1] > 1 else view


def _check_centers(centers: Tensor, groups: int, width: int, device: torch.device) -> None:
    if centers.dtype != torch.float32:
        raise ValueError(f"centers must be float32, got {centers.dtype}")
    if centers.ndim != 3 or centers.shape[0] != groups or centers.shape[2] != width or centers.shape[1] < 1:
        raise ValueError(f"centers must be [{groups}, K, {width}] with K >= 1, got {tuple(centers.shape)}")
    if centers.device != device:
        raise ValueError(f"centers must be on {device} like tokens, got {centers.device}")


def _check_extra(name: str, value: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like tokens, got {value.device}")
    return value.to(torch.float32).contiguous()
