"""Times that `prompt_attention` should take on a GPU, by arithmetic from the kernels as compiled.

    python -m benchmarks.attention_predictions

A kernel takes the longest of its bytes over the copy rate, its bytes through L2 over the L2 rate and its
products over a product rate; kernels add up. Ours: the forward kernel; the backward kernel, five products
with the padding of its tiles, which takes the queries' side and float32 sums of their gradients through L2
for every tile of keys (through memory, where the programs in flight hold more than L2), in whole programs
per multiprocessor; and the prompts' partial sums, written and read. "joined": attention over tensors that
are joined already, five products in backward. "join": the same with the copies that join keys and
values, and split and stack their gradients. Both get the product rate of ours. ViT-B (12 heads of 64),
bfloat16. Limits: no measurement. The rates are assumptions; launches, and for the peers caches and the tail
of a grid, are left out.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

from benchmarks.triton_compiled import Case, compile_case, tile_of
from spt_fast.ops import prompt_attention_tiles as rules
from spt_fast.ops.triton_code import Compiled

HEADS, WIDTH, ITEMSIZE = 12, 64, 2
REGISTERS, THREADS = 65_536, 2_048  # of a multiprocessor


class Gpu(NamedTuple):
    """A GPU by its assumed rates."""

    arch: int
    shared: int  # bytes of shared memory of a multiprocessor
    copy: float  # bytes per second
    forward: float  # products of attention, FLOP/s
    backward: float
    processors: int
    cache: float  # bytes of L2
    cached: float  # bytes per second through L2


# Product rates: some 45 % (forward) and 35 % (backward) of dense bfloat16 products (790 and 280 TFLOP/s).
GPUS = {
    "H200": Gpu(90, 228 * 1024, 4.3e12, 350e12, 275e12, 132, 50e6, 5.5e12),
    "A100": Gpu(80, 164 * 1024, 1.6e12, 126e12, 98e12, 108, 40e6, 3.5e12),
}


class Shape(NamedTuple):
    """A batch of images and the prompts of one block."""

    images: int
    tokens: int
    prompts: int

    @property
    def keys(self) -> int:
        return self.tokens + self.prompts

    @property
    def share(self) -> float:
        """Bytes of one of q, k, v of the images."""
        return float(self.images * self.tokens * HEADS * WIDTH * ITEMSIZE)


def up(number: int, tile: int) -> int:
    return -(-number // tile) * tile


def products(shape: Shape, rows: int, columns: int, count: int) -> float:
    """FLOP of `count` products between `rows` and `columns` vectors per head and image."""
    return 2.0 * count * shape.images * HEADS * rows * columns * WIDTH


def ours(gpu: Gpu, shape: Shape) -> tuple[float, float]:
    """Seconds of forward and backward."""
    s, size = shape.share, (gpu.arch, WIDTH, ITEMSIZE, shape.tokens, shape.keys)
    tile = rules.forward_tiles(*size)
    work = products(shape, up(shape.tokens, tile.rows), up(shape.keys, tile.step), 2)
    forward = max(4 * s / gpu.copy, work / gpu.forward)
    return forward, backward(gpu, shape)


def backward(gpu: Gpu, shape: Shape) -> float:
    """Seconds of our backward kernel and of the sum of the prompts' partial gradients."""
    s, programs = shape.share, shape.images * HEADS
    tile = rules.backward_tiles(gpu.arch, WIDTH, ITEMSIZE, shape.tokens, shape.keys)
    work = products(shape, up(shape.keys, tile.rows), up(shape.tokens, tile.step), 5)
    again = -(-shape.keys // tile.rows) - 1
    # q, the output and its gradient are read again; float32 sums of the gradients of q are written and read.
    once_more = 3 * s + 2 * s * 4 / ITEMSIZE
    in_flight = min(programs, gpu.processors * resident(gpu, "backward"))
    # A program comes back to the queries' side: three tensors and the float32 sums.
    held = in_flight * (3 * s + s * 4 / ITEMSIZE) / programs
    partial = 2.0 * 4 * programs * shape.prompts * WIDTH
    memory, cached = 8 * s + partial, again * once_more
    if held > gpu.cache:
        memory, cached = memory + cached, 0.0
    tail = up(programs, gpu.processors) / programs
    return tail * max(memory / gpu.copy, cached / gpu.cached, work / gpu.backward) + partial / gpu.copy


def joined(gpu: Gpu, shape: Shape) -> tuple[float, float]:
    """Seconds of forward and backward of attention over tensors that are joined already."""
    s, more = shape.share, shape.keys / shape.tokens
    work = products(shape, up(shape.tokens, 64), up(shape.keys, 64), 1)
    forward = max((2 + 2 * more) * s / gpu.copy, 2 * work / gpu.forward)
    return forward, max((4 + 4 * more) * s / gpu.copy, 5 * work / gpu.backward)


def join(gpu: Gpu, shape: Shape) -> tuple[float, float]:
    """The same with the copies: k and v joined in front, gradients split and stacked in backward."""
    s, more = shape.share, shape.keys / shape.tokens
    forward, backward = joined(gpu, shape)
    return forward + (2 + 2 * more) * s / gpu.copy, backward + (4 + 2 * more) * s / gpu.copy


@cache
def compiled(gpu: Gpu, kernel: str) -> Compiled:
    """A kernel as compiled for 577 tokens and 100 prompts."""
    return compile_case(_case(gpu, kernel))


def resident(gpu: Gpu, kernel: str) -> int:
    """Programs that a multiprocessor has registers and shared memory for."""
    found, warps = compiled(gpu, kernel), tile_of(_case(gpu, kernel)).warps
    return min(REGISTERS // (up(found.registers, 8) * 32 * warps), gpu.shared // (found.shared + 1024))


def occupancy(gpu: Gpu, kernel: str) -> str:
    """Registers, shared memory and threads in flight of a kernel."""
    found, programs = compiled(gpu, kernel), resident(gpu, kernel)
    share = 100 * programs * 32 * tile_of(_case(gpu, kernel)).warps / THREADS
    return (
        f"{kernel:8s} {found.registers:4d} registers, {found.shared:6d} B shared: {programs} programs, "
        f"{share:.0f} % of the threads of a multiprocessor"
    )


def _case(gpu: Gpu, kernel: str) -> Case:
    return Case(kernel, gpu.arch, "bf16", WIDTH)


def main() -> None:
    warnings.simplefilter("ignore")
    print(
        "predicted, not measured: ViT-B, bfloat16; microseconds forward + backward, and ratios of their sums"
    )
    for name, gpu in GPUS.items():
        for kernel in ("forward", "backward"):
            print(f"{name} {occupancy(gpu, kernel)}")
        for images in (32, 128):
            for tokens in (197, 577):
                for prompts in (20, 100):
                    shape = Shape(images, tokens, prompts)
                    own, floor, copies = (side(gpu, shape) for side in (ours, joined, join))
                    sides = {"ours": own, "join": copies, "joined": floor}
                    cells = [
                        f"{side} {1e6 * times[0]:5.0f} + {1e6 * times[1]:5.0f} ({sum(times) / sum(own):.2f}x)"
                        for side, times in sides.items()
                    ]
                    print(f"{name} B={images:<4d}N={tokens:<4d}N_p={prompts:<4d}" + "  ".join(cells))


if __name__ == "__main__":
    main()
