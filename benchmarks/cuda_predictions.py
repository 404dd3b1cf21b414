"""Predicted times of a CUDA k-means pass, and what binds: python -m benchmarks.cuda_predictions.

Arithmetic, not measurement: these kernels have never run on a GPU. A kernel takes at least as long as each of
five things does by itself, and is predicted to take as long as the longest, which is what binds:

memory    bytes of the tokens, at the rate of a copy
issue     instructions of the ordinary tile, counted from the machine code (benchmarks/cuda_hot_path.py)
shared    bytes of shared memory that these instructions ask for, without bank conflicts or broadcasts
products  tensor-core instructions
waits     bytes that are under way at a time, of which each waits for the latency of memory

to which the waits of flushes, the sort and the traffic of partial sums are added. That is the best case.
"in turn" is the time if a multiprocessor does one thing at a time beside its copies: instructions, then
shared memory, then products. No weights, rows of whole 16 bytes, one group. Left out: launches (a few
microseconds each, five of them for the sort), barriers, and the kernels that pack the centres. Needs nvcc,
and the nvdisasm of Triton.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import NamedTuple

from benchmarks.cuda_hot_path import (
    COPY,
    PRODUCT,
    Instruction,
    count,
    hot_path,
    loads_in_flight,
    shared_bytes,
)
from benchmarks.cuda_sources import Kernel, inspect

TOKENS, WIDTH = 1_060_000, 768  # CUB-200-2011's training set by ViT-B/16, the paper's case
DTYPES = {"bf16": 2, "fp32": 4}  # bytes of an element
COLUMN_TILES = WIDTH // 16
WARPS = 8  # of a block of one_read_kernel and of assign_kernel, which has a multiprocessor for itself

# CUDA C++ Programming Guide, "Compute Capability 8.x" and "9.0": four schedulers, each an instruction a
# clock; 32 banks of 4 bytes; registers, of which a thread gets a multiple of 8; resident blocks.
SCHEDULERS, BANKS, REGISTERS, BLOCKS = 4, 128, 65_536, 32
# csrc/kmeans_cuda.cu: at most so many runs of tokens, and of the sorted rows (as many shares of the sort).
RUNS, SORTED_RUNS = 264, 1056
PARTIAL_BYTES = (WIDTH + 2) * 8  # of one centre and run
ROWS_IN_FLIGHT = 16  # csrc/kmeans_cuda_accumulate.cuh
# Clocks from a load to its value, from device memory: 400 to 800 are reported; under load, the upper end.
LATENCY = 800
# A copy of large tensors reaches 85 to 90 % of the data sheet's bandwidth; bench_kmeans_cuda measures it.
COPY_SHARE = 0.87


@dataclass(frozen=True)
class Gpu:
    """What the prediction takes for granted, from the data sheets."""

    name: str
    arch: str
    bandwidth: float  # bytes a second
    processors: int
    clock: float  # at which the data sheet's peak of the tensor cores is reached
    shared: int  # bytes of a block at most
    product_clocks: float  # per m16n8k16 of half types, or m16n8k8 of tf32, and multiprocessor

    @property
    def copy(self) -> float:
        """Bytes a second."""
        return self.bandwidth * COPY_SHARE

    @property
    def memory(self) -> float:
        """Bytes a clock and multiprocessor."""
        return self.copy / self.processors / self.clock


# 989 TFLOP/s (H100, H200) and 312 (A100) of bf16 are 4,096 and 2,048 FLOP a clock and multiprocessor; an
# m16n8k16 is 4,096. On Hopper mma.sync reaches 62 % of the peak, which needs wgmma (Luo et al. 2024,
# "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking").
GPUS = (
    Gpu("H200", "90a", 4.8e12, 132, 1.83e9, 232448, 1 / 0.62),
    Gpu("H100", "90a", 3.35e12, 132, 1.83e9, 232448, 1 / 0.62),
    Gpu("A100 80 GB", "80", 2.04e12, 108, 1.41e9, 166912, 2.0),
)


@dataclass(frozen=True)
class Work:
    """What one tile of a kernel takes of a multiprocessor, in clocks."""

    kernel: str
    memory: float
    issue: float
    shared: float
    products: float
    waits: float
    tiles: float  # of the multiprocessor that has most, each after the other
    flush: float = 0.0  # clocks a tile, in which nothing else happens

    @property
    def binds(self) -> str:
        clocks = {name: getattr(self, name) for name in ("memory", "issue", "shared", "products", "waits")}
        return max(clocks, key=clocks.__getitem__)

    def seconds(self, gpu: Gpu, clocks: float) -> float:
        return clocks * self.tiles / gpu.clock

    def predicted(self, gpu: Gpu) -> float:
        return self.seconds(gpu, getattr(self, self.binds) + self.flush)

    def in_turn(self, gpu: Gpu) -> float:
        computed = self.issue + self.shared + self.products
        return self.seconds(gpu, max(self.memory, self.waits, computed) + self.flush)


@cache
def kernels(arch: str) -> dict[str, Kernel]:
    """The kernels as compiled for sm_`arch`."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("benchmarks.cuda_predictions: nvcc is not installed")
    with tempfile.TemporaryDirectory() as folder:
        found = inspect(nvcc, arch, Path(folder))
    if any(kernel.function is None for kernel in found.values()):
        sys.exit(f"benchmarks.cuda_predictions: no nvdisasm that reads sm_{arch}; pip install triton has one")
    return found


@cache
def path(arch: str, kernel: str, copies: int, multiply_adds: int = 0) -> list[Instruction]:
    """Instructions of an ordinary tile, in which a thread makes so many 16-byte copies.

    `multiply_adds` asks for the way past so many of them, where norms are not computed in every tile.
    """
    function = kernels(arch)[kernel].function
    assert function is not None
    wanted = {COPY: copies} | ({"FFMA": multiply_adds} if multiply_adds else {})
    return hot_path(function, wanted)


def center_tiles(centers: int) -> int:
    return max(3, ceil(centers / 8))


def one_read_bytes(element: int, tiles: int, rows: int) -> int:
    """Shared memory of a block: one_read_shape in csrc/kmeans_cuda_one_read.cuh."""
    product_stride = 8 * (tiles + (tiles + 1) % 2)
    constants = 64 * COLUMN_TILES + 2 * ceil(32 * tiles / 16) * 16  # shift, base and slope
    shares = WARPS * rows * (product_stride + 1) * 4  # products and norms of the warps
    stages = 2 * rows * (16 * COLUMN_TILES * element + 16)
    return stages + COLUMN_TILES * tiles * 512 + constants + shares + rows * 2


def one_read_rows(gpu: Gpu, element: int, centers: int) -> int:
    """Tokens of a tile; 0 where the path does not serve."""
    for rows in (32, 16) if element == 2 else (16,):
        if centers <= 32 and one_read_bytes(element, center_tiles(centers), rows) <= gpu.shared:
            return rows
    return 0


def reduction_seconds(gpu: Gpu, centers: int, rows_per_flush: int) -> float:
    """Partial sums of one read: written, read and written again for each further flush, read at the end."""
    flushes = ceil(ceil(TOKENS / RUNS) / rows_per_flush)
    return 2 * flushes * RUNS * centers * PARTIAL_BYTES / gpu.copy


def sort_seconds(gpu: Gpu, centers: int, changed: float | None) -> float:
    """The sort between two reads, and the partial sums of the second.

    `changed` is the share of the tokens that change to another centre in a pass that corrects the sums of the
    last one; None: all are sorted.
    """
    # Labels and distances (4 bytes each) are written and read; labels are read again, twice.
    token_bytes, sorted_rows, steps = 4 * 4 + 2 * 4, 1.0, 2 * ceil(TOKENS / SORTED_RUNS / 32)
    if changed is not None:
        # The last labels are copied, read and written; two labels a token go to the sort, and not one.
        token_bytes += 4 * 4 + 3 * 4
        sorted_rows, steps = 2 * changed, 2 * steps + steps // 2
    # A sorted row is a number of 8 bytes and a label, written and read.
    partial_bytes = 2 * (SORTED_RUNS + centers) * PARTIAL_BYTES
    copied = TOKENS * (token_bytes + sorted_rows * 2 * 12) + partial_bytes
    # A warp takes its share 32 rows at a time, and each time waits for what it has just changed: in both
    # kernels of the sort, and where it compares labels with the last ones.
    return copied / gpu.copy + steps * LATENCY / gpu.clock


def tile_work(gpu: Gpu, kernel: str, code: list[Instruction], read: int, ahead: int, tiles: float) -> Work:
    """A tile for which each of a block's warps executes `code`; its `read` bytes come `ahead` tiles ahead."""
    return Work(
        kernel,
        memory=read / gpu.memory,
        issue=WARPS * len(code) / SCHEDULERS,
        shared=WARPS * shared_bytes(code) / BANKS,
        products=WARPS * count(code, PRODUCT) * gpu.product_clocks,
        waits=LATENCY / ahead,
        tiles=tiles,
    )


def one_read(gpu: Gpu, dtype: str, centers: int) -> Work:
    element = DTYPES[dtype]
    rows = one_read_rows(gpu, element, centers)
    kernel = f"one_read_kernel<{dtype}, {rows // 16}, 6, {center_tiles(centers)}>"
    read = rows * WIDTH * element
    code = path(gpu.arch, kernel, copies=read // (16 * 32 * WARPS))
    tiles = ceil(RUNS / gpu.processors) * ceil(TOKENS / RUNS / rows)
    work = tile_work(gpu, kernel, code, read, ahead=1, tiles=tiles)
    # flush_sums waits for twelve batches of eight totals, after 2,048 tokens or 512.
    flush = 12 * LATENCY * rows / (2048 if element == 2 else 512)
    return Work(**{**vars(work), "flush": flush})


def assign(gpu: Gpu, dtype: str, centers: int) -> Work:
    """Steps of 64 bytes of 256 rows, and the centres of a slab of 13 tiles; K = 100 fills it."""
    element, kernel = DTYPES[dtype], f"assign_kernel<{dtype}>"
    step_tiles = 64 // (16 * element)
    stage = 256 * 80 + step_tiles * 13 * 512
    stages = min(4, (gpu.shared - 4 * WIDTH) // stage)
    # Four 16-byte copies of tokens, two for each column tile of centres; an element's norm takes an FFMA.
    code = path(gpu.arch, kernel, copies=4 + 2 * step_tiles, multiply_adds=16 * step_tiles)
    steps = COLUMN_TILES // step_tiles * ceil(ceil(TOKENS / 256) / gpu.processors)
    # The centres come from the L2 cache.
    return tile_work(gpu, kernel, code, 256 * 64, ahead=stages - 1, tiles=steps)


@cache
def accumulate_path(arch: str, dtype: str) -> list[Instruction]:
    """Instructions for 16 rows of one centre."""
    function = kernels(arch)[f"accumulate_kernel<{dtype}, uint4>"].function
    assert function is not None
    # An element takes an FFMA. The loop over the centres of the rows is gone through once: there are far
    # fewer centres than rows, so that 16 sorted rows nearly always have one.
    wanted = {"FFMA": ROWS_IN_FLIGHT * 16 // DTYPES[dtype]}
    return hot_path(function, wanted, of="LDG.E.128", may_loop=True)


def accumulate(gpu: Gpu, dtype: str) -> Work:
    """Blocks of one warp, which takes 16 bytes a lane of 16 rows at a time."""
    kernel = f"accumulate_kernel<{dtype}, uint4>"
    registers = ceil(kernels(gpu.arch)[kernel].registers / 8) * 8
    resident = min(REGISTERS // (registers * 32), BLOCKS)
    code = accumulate_path(gpu.arch, dtype)
    read = resident * ROWS_IN_FLIGHT * 32 * 16
    in_flight = resident * 32 * loads_in_flight(code)
    return Work(
        kernel,
        memory=read / gpu.memory,
        issue=resident * len(code) / SCHEDULERS,
        shared=resident * shared_bytes(code) / BANKS,
        products=0.0,
        # The numbers of the rows have to come before the rows.
        waits=LATENCY + read / in_flight * LATENCY,
        tiles=TOKENS * WIDTH * DTYPES[dtype] / read / gpu.processors,
    )


class Pass(NamedTuple):
    """A pass, made of the kernels that touch every token and of the rest."""

    name: str
    best: float  # seconds
    worst: float  # seconds, in turn


def predict(gpu: Gpu, dtype: str, centers: int) -> tuple[list[Work], list[Pass]]:
    """The kernels that touch every token, and the passes that are made of them."""
    element = DTYPES[dtype]
    if one_read_rows(gpu, element, centers):
        work = one_read(gpu, dtype, centers)
        rest = reduction_seconds(gpu, centers, 2048 if element == 2 else 512)
        return [work], [Pass("with partial sums", rest + work.predicted(gpu), rest + work.in_turn(gpu))]
    labels, sums = assign(gpu, dtype, centers), accumulate(gpu, dtype)
    passes = []
    for changed in (None, 0.1, 0.01):
        name = "with sort and partial sums" if changed is None else f"later pass, {changed:.0%} change"
        # A token that changes is added to one centre and taken away from another.
        rest = sort_seconds(gpu, centers, changed)
        read = sums.predicted(gpu) * (1 if changed is None else 2 * changed)
        passes.append(Pass(name, labels.predicted(gpu) + read + rest, labels.in_turn(gpu) + read + rest))
    return [labels, sums], passes


def print_tiles() -> None:
    """What a warp executes for a tile, as compiled."""
    print(
        "MACHINE CODE: a warp's tile of one_read_kernel, step of assign_kernel, 16 rows of accumulate_kernel"
    )
    columns = f"{'HMMA':>6}{'shared bytes':>14}{'16-byte copies':>16}{'loads in flight':>17}"
    print(f"{'kernel':34}{'arch':>6}{'instructions':>14}{columns}")
    for arch in ("80", "90a"):
        for name in sorted(kernels(arch)):
            dtype = "bf16" if "bf16" in name else "fp32"
            element = DTYPES[dtype]
            if "fp16" in name:
                continue
            if name.startswith("one_read_kernel"):
                code = path(arch, name, int(name.split(", ")[1]) * 16 * WIDTH * element // (16 * 32 * WARPS))
            elif name.startswith("assign_kernel"):
                code = path(arch, name, 4 + 2 * (4 // element), 16 * (4 // element))
            elif name.startswith("accumulate_kernel") and "uint4" in name:
                code = accumulate_path(arch, dtype)
            else:
                continue
            cells = f"{len(code):14}{count(code, PRODUCT):6}{shared_bytes(code):14}{count(code, COPY):16}"
            print(f"{name:34}{arch:>6}{cells}{loads_in_flight(code) // 16:17}")


def print_times() -> None:
    print(f"PREDICTED, never measured: M = {TOKENS:,}, D = {WIDTH}, one pass, ms")
    resources = ("memory", "issue", "shared", "products", "waits")
    columns = (*resources, "predicted", "in turn")
    print(f"{'GPU':12}{'dtype':>5}{'K':>5}  {'kernel':30}", end="")
    print("".join(f"{column:>10}" for column in columns) + f"  {'binds':10}{'of copy rate':>12}")
    for gpu in GPUS:
        for dtype, element in DTYPES.items():
            for centers in (20, 100):
                works, passes = predict(gpu, dtype, centers)
                once = TOKENS * WIDTH * element / gpu.copy
                head = f"{gpu.name:12}{dtype:>5}{centers:>5}  "
                for work in works:
                    times = [work.seconds(gpu, getattr(work, each)) for each in resources]
                    times += [work.predicted(gpu), work.in_turn(gpu)]
                    cells = "".join(f"{1e3 * each:10.2f}" for each in times)
                    print(f"{head}{work.kernel:30}{cells}  {work.binds}")
                for name, best, worst in passes:
                    share = f"{once / worst:.0%} to {once / best:.0%}"
                    print(f"{head}{name:30}{1e3 * best:60.2f}{1e3 * worst:10.2f}{share:>24}")


def main() -> None:
    print_tiles()
    print()
    print_times()


if __name__ == "__main__":
    main()
