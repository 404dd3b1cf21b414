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

from spt_fast.ops import kmeans_native, trust
from spt_fast.ops.kmeans_reference import assign_accumulate_reference, distances_reference
from spt_fast.support.arguments import check_choice, check_int, check_tensor

TOKEN_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "native", "reference")
# All CUDA kernels of the compiled module.
KERNEL = trust.Kernel(
    "k-means", "spt_fast.ops.cases:prove_kmeans", ("_kmeans*.so", "_kmeans*.pyd", "ops/kmeans*.py")
)
_CPU = torch.device("cpu")


class PassResult(NamedTuple):
    """What one pass over the tokens gives; M counts the tokens of a group."""

    sums: Tensor  # [G, K, D] float64: weighted sum of the tokens of each centre
    counts: Tensor  # [G, K] float64: sum of their weights
    inertia: Tensor  # [G] float64: weighted sum of squared distances to the nearest centre
    labels: Tensor | None = None  # [G, M] int32
    distances: Tensor | None = None  # [G, M] float32: squared distance to the nearest centre


def assign_accumulate(
    tokens: Tensor,  # [G, M, D] or [G, B, N, D]
    centers: Tensor,  # [G, K, D]
    *,
    shift: Tensor | None = None,  # [G, D]
    weights: Tensor | None = None,  # [G, M] or [G, B, N]
    with_labels: bool = False,
    with_distances: bool = False,
    last: PassResult | None = None,
    backend: str = "auto",
) -> PassResult:
    """Assign each token to its nearest centre and sum up the tokens of each centre (eq. 9 and 10).

    Of equally near centres the one with the lowest index is taken. Tokens are read in place if their last
    dimension is contiguous; M = B * N. `shift`, a point near the data, guards float32 against cancellation
    and changes no result otherwise. A token that is NaN or infinite makes the group's inertia NaN or
    infinite. On the CPU results do not depend on the number of threads.

    `last`, the result of a pass over the same tokens to other centres, with labels and without weights, may
    save time: on CUDA, where tokens would be read twice, its sums are corrected by those that change to
    another centre. Each such pass may add an error of 1e-6 of the sum of |x| over these tokens, and the
    errors of `last` remain, also those of tokens that leave: a centre without tokens has sums near zero.
    `last` itself stays as it is. Labels of it that are no centres are refused on the CPU; on CUDA, which
    would have to be waited for, they count as the nearest that are.

    Raises:
        TypeError: an argument is no tensor, or has a dtype that is not allowed.
        ValueError: a shape or device does not fit, or `backend` cannot serve these tensors; labels of `last`.
    """
    view, shift, weights = _check(tokens, centers, shift, weights)
    known = None if last is None else _check_last(last, view, centers, weights)
    centers = centers.contiguous()
    if choose_backend(tokens.device, backend, tokens.dtype) == "native":
        sums, counts, inertia, labels, distances = kmeans_native.assign_accumulate(
            view, centers, shift, weights, with_labels, with_distances, last=known
        )
        return PassResult(sums, counts, inertia, labels if with_labels else None, distances)
    sums, counts, inertia, labels, distances = assign_accumulate_reference(
        view.flatten(1, 2), centers, shift, weights
    )
    return PassResult(
        sums, counts, inertia, labels if with_labels else None, distances if with_distances else None
    )


class PrunedPasses:
    """Assign-and-accumulate over one group of tokens, again and again while the centres move.

    The tokens come in chunks; tokens in memory are a single chunk. A pass is `begin`, then `add` for each
    chunk that `begin` asks for, then `end`. A token whose centre cannot have changed since the pass before is
    not read, and a chunk without a token to read is not asked for. Labels are those of `assign_accumulate`
    bit for bit; sums and inertia equal its own up to the rounding of float64, and so do sums of the same
    tokens that are cut into other chunks. Where `can_prune` only.

    Holds 14 bytes a token, 4 more for every 16 centres (12 without AVX2), and 4 for each token of the largest
    chunk.

    Args:
        chunk_rows: the number of tokens in each chunk. A chunk must hold the same tokens in every pass.
        num_centers: K, the same in every pass.
        width: D.
        shift: [1, D], as in `assign_accumulate`.
    """

    def __init__(
        self, chunk_rows: Sequence[int], num_centers: int, width: int, *, shift: Tensor | None = None
    ) -> None:
        self._chunk_rows = [check_int("chunk_rows", rows, 1) for rows in chunk_rows]
        self._num_centers = check_int("num_centers", num_centers, 1)
        self._width = check_int("width", width, 1)
        if shift is not None:
            shift = _check_vector("shift", shift, (1, width), _CPU)
        self._native = kmeans_native.PrunedPasses(self._chunk_rows, num_centers, width, shift)
        self._missing: list[int] | None = None  # chunks of the pass under way that were not added yet

    def begin(self, centers: Tensor) -> list[int]:
        """Start a pass for `centers` [1, K, D]; returns the chunks to be added, ascending.

        A pass that was not ended is forgotten.
        """
        check_tensor(
            "centers", centers, (1, self._num_centers, self._width), dtype=torch.float32, device=_CPU
        )
        self._missing = self._native.begin(centers.contiguous())
        return list(self._missing)

    def add(
        self,
        chunk: int,
        tokens: Tensor,  # [1, m, D] or [1, B, N, D] with m = B * N
        weights: Tensor | None = None,  # [1, m] or [1, B, N]
    ) -> None:
        """Take in the tokens of the next of the chunks that `begin` returned.

        Raises:
            TypeError, ValueError: it is another chunk's turn, or the tensors do not fit.
        """
        if not self._missing or chunk != self._missing[0]:
            due = f"{self._missing[0]}, which is next" if self._missing else "one that begin asked for"
            raise ValueError(f"chunk must be {due}, got {chunk}")
        view, rows = _check_tokens(tokens), self._chunk_rows[chunk]
        given = (view.shape[0], view.shape[1] * view.shape[2], view.shape[3])
        if given != (1, rows, self._width) or view.device != _CPU:
            raise ValueError(
                f"tokens of chunk {chunk} must be [1, {rows}, {self._width}] on the CPU, "
                f"got {list(tokens.shape)} on {tokens.device}"
            )
        if weights is not None:
            weights = _check_vector("weights", _flat(weights), (1, rows), _CPU)
        self._native.add(chunk, view, weights)
        self._missing.pop(0)

    def end(self) -> PassResult:
        """What `assign_accumulate` returns for all chunks together, without labels and distances.

        Raises:
            ValueError: no pass is under way, or a chunk that `begin` asked for was not added.
        """
        if self._missing is None:
            raise ValueError("no pass is under way: begin must be called before end")
        if self._missing:
            raise ValueError(f"every chunk that begin asked for must be added, {self._missing} are missing")
        self._missing = None
        sums, counts, inertia, _ = self._native.end()
        return PassResult(sums, counts, inertia)

    def labels(self) -> Tensor:
        """Labels [1, M] of the last pass that was ended, int32."""
        return self._native.labels()


def can_prune(device: torch.device, backend: str) -> bool:
    """Whether `PrunedPasses` serves these tensors: on the CPU, with the compiled kernels."""
    return device.type == "cpu" and choose_backend(device, backend) == "native"


def can_correct(device: torch.device, dtype: torch.dtype, backend: str) -> bool:
    """Whether `last` may save `assign_accumulate` time: on CUDA, with the compiled kernels."""
    return device.type == "cuda" and choose_backend(device, backend, dtype) == "native"


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
    if choose_backend(tokens.device, backend, tokens.dtype) == "native":
        return kmeans_native.distances(view, centers, shift)
    return distances_reference(view.flatten(1, 2), centers, shift)


def explain_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Name of the backend that serves tokens of `dtype` on `device`, and why."""
    reason = _why_not(device, dtype)
    if reason:
        return "reference", reason
    if device.type == "cuda":
        return "native", "compiled CUDA kernels"
    return "native", f"compiled kernels, {kmeans_native.build_info()['isa']}"


def choose_backend(device: torch.device, backend: str, dtype: torch.dtype = torch.float32) -> str:
    """Resolve `backend`: "auto" falls back with a warning, an explicit choice raises if it cannot be had."""
    if check_choice("backend", backend, BACKENDS) == "reference":
        return backend
    reason = _why_not(device, dtype)
    if not reason:
        return "native"
    if backend == "native":
        raise ValueError(f"backend='native' cannot serve {device.type} tensors: {reason}")
    _warn_once(reason)
    return "reference"


def _why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why the compiled kernels cannot serve tokens of `dtype` on `device`, or ""."""
    reason = kmeans_native.why_not(device)
    return trust.why_not(KERNEL, device, dtype) if not reason and device.type == "cuda" else reason


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"spt_fast clusters with plain PyTorch, which is slower: {reason}", stacklevel=4)


def _check(
    tokens: Tensor, centers: Tensor, shift: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Validate, and bring tokens to [G, B, N, D] (a view), shift and weights to contiguous float32.

    Without a shift, the kernels for CUDA take the mean of the centres.
    """
    view = _check_tokens(tokens)
    groups, width = view.shape[0], view.shape[-1]
    check_tensor("centers", centers, (groups, "K", width), dtype=torch.float32, device=tokens.device)
    rows = view.shape[1] * view.shape[2]
    if shift is not None:
        shift = _check_vector("shift", shift, (groups, width), tokens.device)
    elif tokens.device.type == "cuda":
        shift = centers.mean(1)
    if weights is not None:
        weights = _check_vector("weights", _flat(weights), (groups, rows), tokens.device)
    return view, shift, weights


def _check_last(
    last: PassResult, view: Tensor, centers: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, counts and labels of `last`, contiguous."""
    if last.labels is None or weights is not None:
        raise ValueError("last must have labels, and takes no weights")
    shape, device = centers.shape, view.device
    labels = (shape[0], view.shape[1] * view.shape[2])
    known = (
        check_tensor("last.sums", last.sums, shape, dtype=torch.float64, device=device).contiguous(),
        check_tensor("last.counts", last.counts, shape[:2], dtype=torch.float64, device=device).contiguous(),
        check_tensor("last.labels", last.labels, labels, dtype=torch.int32, device=device).contiguous(),
    )
    if device.type == "cpu":
        low, high = (int(extreme) for extreme in known[2].aminmax())
        if low < 0 or high >= shape[1]:
            wrong = low if low < 0 else high
            raise ValueError(f"last.labels must be from 0 to {shape[1] - 1}, got {wrong}")
    return known


def _check_tokens(tokens: Tensor) -> Tensor:
    """Tokens as [G, B, N, D] whose last dimension is contiguous, which is a view if it is already."""
    check_tensor("tokens", tokens)
    if tokens.dtype not in TOKEN_DTYPES:
        raise TypeError(f"tokens must be float32, float16 or bfloat16, got {tokens.dtype}")
    if tokens.ndim not in (3, 4) or 0 in tokens.shape:
        raise ValueError(f"tokens must be a non-empty [G, M, D] or [G, B, N, D], got {list(tokens.shape)}")
    view = tokens if tokens.ndim == 4 else tokens[:, None]
    return view.contiguous() if view.stride(-1) != 1 and view.shape[-1] > 1 else view


def _flat(weights: Tensor) -> Tensor:
    """Weights [G, B, N] as [G, M]."""
    return weights.flatten(1) if isinstance(weights, Tensor) and weights.ndim == 3 else weights


def _check_vector(name: str, value: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    return check_tensor(name, value, shape, device=device).to(torch.float32).contiguous()
