"""Types of the compiled module, csrc/bindings.cpp. Addresses are integers, 0 for an array left out."""

from collections.abc import Sequence
from typing import TypedDict

class BuildInfo(TypedDict):
    isas: list[str]
    openmp: bool
    cuda: bool
    cuda_archs: str
    compiler: str

def build_info() -> BuildInfo: ...
def assign_accumulate_cpu(
    data: int,
    dtype: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    centers: int,
    num_centers: int,
    shift: int,
    weights: int,
    sums: int,
    counts: int,
    inertia: int,
    labels: int,
    distances: int,
    num_threads: int,
    isa: str,
) -> None: ...
def distances_cpu(
    data: int,
    dtype: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    centers: int,
    num_centers: int,
    shift: int,
    distances: int,
    num_threads: int,
    isa: str,
) -> None: ...

class PrunedPass:
    @property
    def inertia(self) -> float: ...
    @property
    def evaluated(self) -> int: ...
    @property
    def changed(self) -> int: ...
    @property
    def fresh(self) -> bool: ...

class PrunedAssignCpu:
    def __init__(
        self, part_rows: Sequence[int], width: int, shift: int, num_centers: int, isa: str
    ) -> None: ...
    def begin(self, centers: int, num_threads: int) -> list[int]: ...
    def add(
        self,
        part: int,
        data: int,
        dtype: int,
        sizes: Sequence[int],
        strides: Sequence[int],
        weights: int,
        num_threads: int,
    ) -> None: ...
    def end(self, sums: int, counts: int) -> PrunedPass: ...
    def labels(self) -> list[int]: ...

# The last two are there only in a module built with CUDA.
def assign_accumulate_cuda_workspace(groups: int, rows: int, width: int, num_centers: int) -> int: ...
def assign_accumulate_cuda(
    data: int,
    dtype: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    centers: int,
    num_centers: int,
    shift: int,
    weights: int,
    sums: int,
    counts: int,
    inertia: int,
    labels: int,
    distances: int,
    workspace: int,
    device: int,
    stream: int,
) -> None: ...
