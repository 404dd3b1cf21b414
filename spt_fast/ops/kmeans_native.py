"""Hands tensors to the compiled module `spt_fast._kmeans` as addresses, sizes and strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


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
        return "" if module.build_info()["cuda"] else "spt_fast was built without CUDA"
    return f"there is no compiled kernel for {device.type} tensors"


def assign_accumulate(
    tokens: Tensor,  # [G, B, N, D], last stride 1
    centers: Tensor,  # [G, K, D] float32, contiguous
    shift: Tensor | None,  # [G, D] float32, contiguous
    weights: Tensor | None,  # [G, B * N] float32, contiguous
    with_labels: bool,
    with_distances: bool,
    isa: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """See `spt_fast.ops.kmeans.assign_accumulate`."""
    module, _ = _load()
    groups, num_centers, width = centers.shape
    rows = tokens.shape[1] * tokens.shape[2]
    device = tokens.device
    sums = torch.empty(groups, num_centers, width, dtype=torch.float64, device=device)
    counts = torch.empty(groups, num_centers, dtype=torch.float64, device=device)
    inertia = torch.empty(groups, dtype=torch.float64, device=device)
    labels = torch.empty(groups, rows, dtype=torch.int32, device=device) if with_labels else None
    distances = torch.empty(groups, rows, dtype=torch.float32, device=device) if with_distances else None
    arguments = {
        **_view_arguments(tokens),
        "centers": centers.data_ptr(),
        "num_centers": num_centers,
        "shift": _address(shift),
        "weights": _address(weights),
        "sums": sums.data_ptr(),
        "counts": counts.data_ptr(),
        "inertia": inertia.data_ptr(),
        "labels": _address(labels),
        "distances": _address(distances),
    }
    if device.type == "cuda":
        size = module.assign_accumulate_cuda_workspace(groups, rows, width, num_centers)
        _call_on_stream(module.assign_accumulate_cuda, arguments, size, device)
    else:
        module.assign_accumulate_cpu(**arguments, num_threads=torch.get_num_threads(), isa=isa)
    return sums, counts, inertia, labels, distances


class PrunedPasses:
    """Passes over one group on the CPU, part by part, with moving centres; see csrc/kmeans_cpu_pruned.cpp."""

    def __init__(
        self,
        part_rows: Sequence[int],
        num_centers: int,
        width: int,
        shift: Tensor | None,  # [1, D] float32, contiguous
        isa: str = "",
    ) -> None:
        module, _ = _load()
        self._num_centers, self._width = num_centers, width
        self._passes = module.PrunedAssignCpu(
            part_rows=part_rows, width=width, shift=_address(shift), num_centers=num_centers, isa=isa
        )

    def begin(self, centers: Tensor) -> list[int]:
        """Start a pass for `centers` [1, K, D] float32, contiguous; returns the parts to be added."""
        parts: list[int] = self._passes.begin(centers.data_ptr(), torch.get_num_threads())
        return parts

    def add(
        self,
        part: int,
        tokens: Tensor,  # [1, B, N, D], last stride 1, CPU
        weights: Tensor | None,  # [1, B * N] float32, contiguous
    ) -> None:
        self._passes.add(
            part,
            **_view_arguments(tokens),
            weights=_address(weights),
            num_threads=torch.get_num_threads(),
        )

    def end(self) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Sums [1, K, D], counts [1, K] and inertia [1] in float64; and what the pass did: evaluated,
        changed, fresh."""
        sums = torch.empty(1, self._num_centers, self._width, dtype=torch.float64)
        counts = torch.empty(1, self._num_centers, dtype=torch.float64)
        done = self._passes.end(sums.data_ptr(), counts.data_ptr())
        return sums, counts, torch.tensor([done.inertia], dtype=torch.float64), done

    def labels(self) -> Tensor:
        """Labels [1, M] of the last pass, int32."""
        return torch.tensor([self._passes.labels()], dtype=torch.int32)


def distances(
    tokens: Tensor,  # [G, B, N, D], last stride 1
    centers: Tensor,  # [G, K, D] float32, contiguous
    shift: Tensor | None,  # [G, D] float32, contiguous
    isa: str = "",
) -> Tensor:
    """Squared distances [G, B * N, K], float32."""
    module, _ = _load()
    groups, num_centers, width = centers.shape
    rows = tokens.shape[1] * tokens.shape[2]
    device = tokens.device
    out = torch.empty(groups, rows, num_centers, device=device)
    arguments = {
        **_view_arguments(tokens),
        "centers": centers.data_ptr(),
        "num_centers": num_centers,
        "shift": _address(shift),
        "distances": out.data_ptr(),
    }
    if device.type == "cuda":
        size = module.distances_cuda_workspace(groups, rows, width, num_centers)
        _call_on_stream(module.distances_cuda, arguments, size, device)
    else:
        module.distances_cpu(**arguments, num_threads=torch.get_num_threads(), isa=isa)
    return out


def _call_on_stream(
    operation: Callable[..., None], arguments: dict[str, Any], size: int, device: torch.device
) -> None:
    """Enqueue `operation` on the current stream of `device`, with a workspace of `size` bytes."""
    # PyTorch's allocator gives the memory to later work of this stream only, so it may go at once.
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    operation(**arguments, workspace=workspace.data_ptr(), device=device.index, stream=stream)


def _view_arguments(tokens: Tensor) -> dict[str, Any]:
    return {
        "data": tokens.data_ptr(),
        "dtype": _DTYPE_CODES[tokens.dtype],
        "sizes": list(tokens.shape),
        "strides": list(tokens.stride()[:3]),
    }


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
