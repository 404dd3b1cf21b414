"""Hands tensors to the compiled module `spt_fast._kmeans` as addresses, sizes and strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def _load() -> tuple[Any, str]:
    """The module and "", or None and the reason why it cannot be imported."""
    try:
        from spt_fast import _kmeans
    except ImportError as error:
        return None, f"the compiled module spt_fast._kmeans cannot be imported ({error})"
    return _kmeans, ""


def build_info() -> dict[str, Any]:
    """How the module was built: isas (best first, of this processor), openmp, cuda, cuda_archs, compiler.

    Raises:
        RuntimeError: the module is missing; the message says why.
    """
    module, reason = _load()
    if module is None:
        raise RuntimeError(reason)
    info: dict[str, Any] = module.build_info()
    return info | {"isa": info["isas"][0]}


def why_not(device: torch.device) -> str:
    """ "" if the compiled module serves tensors on `device`, else the reason why not."""
    module, reason = _load()
    if module is None:
        return reason
    if device.type == "cpu":
        return ""
    if device.type == "cuda":
        return _cuda_why_not(device.index)
    return f"there is no compiled kernel for {device.type} tensors"


@cache
def _cuda_why_not(index: int | None) -> str:
    """ "" if the module serves CUDA device `index` (None: the current one), else the reason why not."""
    module, _ = _load()
    if not module.build_info()["cuda"]:
        return "spt_fast was built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    with torch.cuda.device(index):
        reason: str = module.cuda_why_not()
    return reason


def assign_accumulate(
    tokens: Tensor,  # [G, B, N, D], last stride 1
    centers: Tensor,  # [G, K, D] float32, contiguous
    shift: Tensor | None,  # [G, D] float32, contiguous; never None on CUDA
    weights: Tensor | None,  # [G, B * N] float32, contiguous
    with_labels: bool,
    with_distances: bool,
    isa: str = "",
    last: tuple[Tensor, Tensor, Tensor] | None = None,  # sums, counts and labels, contiguous
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `spt_fast.ops.kmeans.assign_accumulate`."""
    module, _ = _load()
    groups, num_centers, width = centers.shape
    rows = tokens.shape[1] * tokens.shape[2]
    device = tokens.device
    labels = None
    if last is None:
        sums = torch.empty(groups, num_centers, width, dtype=torch.float64, device=device)
        counts = torch.empty(groups, num_centers, dtype=torch.float64, device=device)
        if with_labels:
            labels = torch.empty(groups, rows, dtype=torch.int32, device=device)
    else:
        sums, counts = (tensor.clone() for tensor in last[:2])
        # The kernels index by them.
        labels = last[2].clamp(0, num_centers - 1)
    inertia = torch.empty(groups, dtype=torch.float64, device=device)
    distances = torch.empty(groups, rows, dtype=torch.float32, device=device) if with_distances else None
    args = module.AssignArgs(
        tokens=_view(module, tokens),
        centers=centers.data_ptr(),
        num_centers=num_centers,
        sums=sums.data_ptr(),
        counts=counts.data_ptr(),
        inertia=inertia.data_ptr(),
        shift=_address(shift),
        weights=_address(weights),
        labels=_address(labels),
        distances=_address(distances),
        corrects=last is not None,
    )
    if device.type == "cuda":
        size = module.assign_accumulate_cuda_workspace(args)
        _call_on_stream(module.assign_accumulate_cuda, args, size, device)
    else:
        module.assign_accumulate_cpu(args, torch.get_num_threads(), isa)
    return sums, counts, inertia, labels, distances


class PrunedPasses:
    """Passes over one group on the CPU with moving centres, chunk by chunk; see csrc/kmeans_cpu_pruned.cpp.

    Raises:
        ValueError: `isa` is unknown, a chunk is empty, or a chunk is added out of turn or not at all.
    """

    def __init__(
        self,
        chunk_rows: Sequence[int],
        num_centers: int,
        width: int,
        shift: Tensor | None,  # [1, D] float32, contiguous
        isa: str = "",
    ) -> None:
        self._module, _ = _load()
        self._num_centers, self._width = num_centers, width
        self._passes = self._module.PrunedPasses(
            chunk_rows=chunk_rows, width=width, shift=_address(shift), num_centers=num_centers, isa=isa
        )

    def begin(self, centers: Tensor) -> list[int]:
        """Start a pass for `centers` [1, K, D] float32, contiguous; returns the chunks to add, ascending."""
        chunks: list[int] = self._passes.begin(centers.data_ptr(), torch.get_num_threads())
        return chunks

    def add(
        self,
        chunk: int,
        tokens: Tensor,  # [1, B, N, D], last stride 1, CPU
        weights: Tensor | None,  # [1, B * N] float32, contiguous
    ) -> None:
        """Read the next of the chunks that `begin` returned: the same tokens and weights in every pass."""
        view = _view(self._module, tokens)
        self._passes.add(chunk, view, _address(weights), torch.get_num_threads())

    def end(self) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Sums [1, K, D], counts [1, K] and inertia [1] in float64, and the `PassReport` of _kmeans.pyi."""
        sums = torch.empty(1, self._num_centers, self._width, dtype=torch.float64, device="cpu")
        counts = torch.empty(1, self._num_centers, dtype=torch.float64, device="cpu")
        report = self._passes.end(sums.data_ptr(), counts.data_ptr())
        return sums, counts, torch.tensor([report.inertia], dtype=torch.float64, device="cpu"), report

    def labels(self) -> Tensor:
        """Labels [1, M] of the last pass, int32."""
        return torch.tensor([self._passes.labels()], dtype=torch.int32, device="cpu")


def distances(
    tokens: Tensor,  # [G, B, N, D], last stride 1
    centers: Tensor,  # [G, K, D] float32, contiguous
    shift: Tensor | None,  # [G, D] float32, contiguous; never None on CUDA
    isa: str = "",
) -> Tensor:
    """Squared distances [G, B * N, K], float32."""
    module, _ = _load()
    groups, num_centers, _ = centers.shape
    rows = tokens.shape[1] * tokens.shape[2]
    device = tokens.device
    out = torch.empty(groups, rows, num_centers, dtype=torch.float32, device=device)
    args = module.DistanceArgs(
        tokens=_view(module, tokens),
        centers=centers.data_ptr(),
        num_centers=num_centers,
        distances=out.data_ptr(),
        shift=_address(shift),
    )
    if device.type == "cuda":
        size = module.distances_cuda_workspace(args)
        _call_on_stream(module.distances_cuda, args, size, device)
    else:
        module.distances_cpu(args, torch.get_num_threads(), isa)
    return out


def _call_on_stream(operation: Callable[..., None], args: Any, size: int, device: torch.device) -> None:
    """Enqueue `operation` on the current stream of `device`, with a workspace of `size` bytes."""
    # PyTorch's allocator gives this memory to later work of the same stream only, so it may be freed at once.
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    # PyTorch's guard goes back to the caller's device only if that has a context already. CUDA's own switch
    # would create one, and take hundreds of megabytes of a GPU that the process does not use.
    with torch.cuda.device(device.index):
        operation(args, workspace.data_ptr(), stream)


def _view(module: Any, tokens: Tensor) -> Any:
    """`tokens` [G, B, N, D] as the compiled module sees them."""
    return module.TokenView(
        data=tokens.data_ptr(),
        dtype=str(tokens.dtype).removeprefix("torch."),
        sizes=tokens.shape,
        strides=tokens.stride()[:3],
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
