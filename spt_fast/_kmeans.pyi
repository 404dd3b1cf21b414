"""Types of the compiled module, csrc/bindings.cpp; they are the same in every build.

An array is contiguous and given as its address; 0 leaves it out. There are G groups of M = B * N tokens of
width D, and K centres. IN arrays are read, OUT arrays are written.
"""

from collections.abc import Sequence
from typing import TypedDict

class BuildInfo(TypedDict):
    isas: list[str]
    openmp: bool
    cuda: bool
    cuda_archs: str
    compiler: str

class TokenView:
    """Tokens [G, B, N, D] in memory: four sizes, and the first three strides, in elements; the last is 1."""

    def __init__(self, *, data: int, dtype: str, sizes: Sequence[int], strides: Sequence[int]) -> None: ...

class AssignArgs:
    """Arguments of assign_accumulate_cpu and assign_accumulate_cuda."""

    def __init__(
        self,
        *,
        tokens: TokenView,
        centers: int,  # IN  [G, K, D] float32
        num_centers: int,
        sums: int,  # OUT [G, K, D] float64
        counts: int,  # OUT [G, K] float64
        inertia: int,  # OUT [G] float64
        shift: int = ...,  # IN  [G, D] float32
        weights: int = ...,  # IN  [G, M] float32
        labels: int = ...,  # OUT [G, M] int32
        distances: int = ...,  # OUT [G, M] float32
        corrects: bool = ...,  # sums, counts and labels are INOUT, of a pass to other centres
    ) -> None: ...

class DistanceArgs:
    """Arguments of distances_cpu and distances_cuda."""

    def __init__(
        self,
        *,
        tokens: TokenView,
        centers: int,  # IN  [G, K, D] float32
        num_centers: int,
        distances: int,  # OUT [G, M, K] float32
        shift: int = ...,  # IN  [G, D] float32
    ) -> None: ...

class PassReport:
    """What one pass of PrunedPasses did."""

    @property
    def inertia(self) -> float: ...
    @property
    def tokens_read(self) -> int: ...
    @property
    def tokens_changed(self) -> int: ...
    @property
    def read_all(self) -> bool: ...

class PrunedPasses:
    def __init__(
        self,
        *,
        chunk_rows: Sequence[int],
        width: int,
        shift: int,  # IN  [D] float32
        num_centers: int,
        isa: str,
    ) -> None: ...
    def begin(self, centers: int, num_threads: int) -> list[int]: ...
    def add(self, chunk: int, tokens: TokenView, weights: int, num_threads: int) -> None: ...
    def end(self, sums: int, counts: int) -> PassReport: ...
    def labels(self) -> list[int]: ...

def build_info() -> BuildInfo: ...
def assign_accumulate_cpu(args: AssignArgs, num_threads: int, isa: str) -> None: ...
def distances_cpu(args: DistanceArgs, num_threads: int, isa: str) -> None: ...

# Why the current device cannot run the kernels, or "".
def cuda_why_not() -> str: ...

# Arrays, workspace and stream are those of the current device. A build without CUDA raises RuntimeError.
def assign_accumulate_cuda_workspace(args: AssignArgs) -> int: ...
def assign_accumulate_cuda(args: AssignArgs, workspace: int, stream: int) -> None: ...
def distances_cuda_workspace(args: DistanceArgs) -> int: ...
def distances_cuda(args: DistanceArgs, workspace: int, stream: int) -> None: ...
