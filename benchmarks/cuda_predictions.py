"""What a CUDA k-means pass moves and multiplies, and predicted times: python -m benchmarks.cuda_predictions.

Arithmetic, not measurement: these kernels have never run on a GPU. Bytes and operations follow from the
sizes in csrc/kmeans_cuda*; bandwidths and rates of tensor cores are assumptions, and a phase takes the
longest of its shared-memory, tensor-core and memory time. No weights, rows of whole 16 bytes, one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

TOKENS, WIDTH = 1_060_000, 768
DTYPES = {"bf16": 2, "fp32": 4}  # bytes of an element
ONE_READ_SHAPES = (("bf16", 2, 20, 32), ("bf16", 2, 20, 16), ("bf16", 2, 32, 16), ("fp32", 4, 20, 16))
LATENCY = 700  # clocks of a read of device memory
BARRIERS = 400  # clocks a tile of the one-read kernel waits for barriers, shuffles and labels
ADD = 30  # clocks of one dependent addition in shared memory
LAUNCH = 3e-6  # seconds between two kernels


@dataclass(frozen=True)
class Gpu:
    """What the prediction takes for granted."""

    name: str
    copy: float  # bytes a second
    processors: int
    clock: float
    shared: int  # bytes of a block at most
    product_clocks: float  # per m16n8k16 of half types, or m16n8k8 of tf32, and multiprocessor

    @property
    def memory(self) -> float:
        """Bytes a clock and multiprocessor."""
        return self.copy / self.processors / self.clock


GPUS = (
    Gpu("H200", 4.3e12, 132, 1.83e9, 232448, 1.6),
    Gpu("H100", 2.9e12, 132, 1.83e9, 232448, 1.6),
    Gpu("A100 80 GB", 1.6e12, 108, 1.41e9, 166912, 2.2),
)


def center_tiles(centers: int) -> int:
    return max(3, ceil(centers / 8))


def one_read_bytes(element: int, tiles: int, rows: int) -> int:
    """Shared memory of a block: one_read_shape in csrc/kmeans_cuda_one_read.cuh."""
    blocks = ceil(WIDTH / 16)
    product_stride = 8 * (tiles + (tiles + 1) % 2)
    constants = 64 * blocks + 2 * ceil(32 * tiles / 16) * 16  # shift, base and slope
    shares = 8 * rows * (product_stride + 1) * 4  # products and norms of eight warps
    return 2 * rows * (16 * blocks * element + 16) + blocks * tiles * 512 + constants + shares + rows * 4


def one_read_rows(gpu: Gpu, element: int, centers: int) -> int:
    """Tokens of a tile; 0 where the path does not serve."""
    for rows in (32, 16) if element == 2 else (16,):
        if centers <= 32 and one_read_bytes(element, center_tiles(centers), rows) <= gpu.shared:
            return rows
    return 0


@dataclass(frozen=True)
class Traffic:
    """Bytes through shared memory for one tile of the one-read kernel, each counted once."""

    tile: int
    centers: int
    shift: int
    products: int

    @property
    def total(self) -> int:
        """The tile is written and read twice, the shares of products are written and read."""
        return 3 * self.tile + self.centers + self.shift + 2 * self.products


def one_read_traffic(element: int, tiles: int, rows: int) -> Traffic:
    blocks = WIDTH // 16
    shift = blocks * rows // 16 * (2 if element == 2 else 8) * 128
    return Traffic(rows * WIDTH * element, blocks * tiles * 512, shift, 8 * rows * tiles * 8 * 4)


def one_read_products(element: int, tiles: int, rows: int) -> tuple[int, int]:
    """Instructions `mma` of a tile: for its products with the centres, and for its sums."""
    per_product, per_sum = (2, 1) if element == 2 else (6, 4)
    blocks = WIDTH // 16 * rows // 16
    return blocks * tiles * per_product, blocks * 4 * per_sum


def num_runs(centers: int) -> int:
    return min(264, (128 << 20) // (centers * (WIDTH + 2) * 8))


def reduction_seconds(gpu: Gpu, centers: int, rows_per_move: int) -> float:
    """Partial sums: written, read and written again for each further move, read once more at the end."""
    moves = ceil(ceil(TOKENS / num_runs(centers)) / rows_per_move)
    return 2 * moves * num_runs(centers) * centers * (WIDTH + 2) * 8 / gpu.copy


def one_read_seconds(gpu: Gpu, element: int, centers: int, rows: int) -> float:
    tiles = center_tiles(centers)
    traffic = one_read_traffic(element, tiles, rows)
    product_mma, sum_mma = one_read_products(element, tiles, rows)
    multiply = max(
        (2 * traffic.tile + traffic.centers + traffic.shift + traffic.products) / 128,
        product_mma * gpu.product_clocks,
    )
    add_up = max(traffic.tile / 128, sum_mma * gpu.product_clocks)
    clocks = max(traffic.tile / gpu.memory, multiply + traffic.products / 128 + BARRIERS + add_up)
    waves = ceil(num_runs(centers) / gpu.processors)  # one block a multiprocessor
    tiles_per_run = ceil(TOKENS / num_runs(centers) / rows)
    per_move = 2048 if element == 2 else 512
    return waves * tiles_per_run * clocks / gpu.clock + reduction_seconds(gpu, centers, per_move)


def assign_seconds(gpu: Gpu, element: int, centers: int) -> float:
    """256 tokens a block, one block a multiprocessor; centres in one chunk, up to 104."""
    tiles, blocks, rows = center_tiles(centers), WIDTH // 16, 256
    center_bytes, token_bytes = blocks * tiles * 512, rows * WIDTH * element
    clocks = max(
        (2 * token_bytes + 9 * center_bytes) / 128,
        rows // 16 * blocks * tiles * (2 if element == 2 else 6) * gpu.product_clocks,
        token_bytes / gpu.memory,
    )
    return ceil(ceil(TOKENS / rows) / gpu.processors) * clocks / gpu.clock


def accumulate_slabs(gpu: Gpu, centers: int) -> tuple[int, int]:
    """Slabs of centres, and blocks on a multiprocessor: launch_accumulate in csrc/kmeans_cuda.cu."""
    slabs = ceil(centers / min(110, (gpu.shared // 2 - 2048) // 1024))
    return slabs, min(gpu.shared // (1024 * ceil(centers / slabs) + 1024), 16)


def accumulate_seconds(gpu: Gpu, element: int, centers: int) -> float:
    """Blocks of 64 threads, 256 bytes a thread in flight: waits, then adds.

    A slab of centres takes its share of the rows.
    """
    slabs, blocks = accumulate_slabs(gpu, centers)
    in_flight, rows = blocks * 64 * 64 // element * 4 * element / slabs, 64 // element
    rate = min(gpu.memory, in_flight / (LATENCY + rows * ADD))
    read = TOKENS * WIDTH * element / gpu.processors / rate / gpu.clock
    return read + reduction_seconds(gpu, centers, 4096)


def predict(gpu: Gpu, element: int, centers: int) -> dict[str, float]:
    """Seconds by path; the first is taken by itself."""
    rows = one_read_rows(gpu, element, centers)
    if rows:
        return {f"one read, {rows} rows": one_read_seconds(gpu, element, centers, rows)}
    return {"two reads": assign_seconds(gpu, element, centers) + accumulate_seconds(gpu, element, centers)}


def print_one_read() -> None:
    """What a block of the one-read kernel keeps, moves and multiplies."""
    print(f"ONE READ, D = {WIDTH}: a block of eight warps, a tile of tokens at a time")
    print(f"{'dtype':5}{'K':>5}{'rows':>6}{'shared memory':>15}{'mma: products, sums':>22}", end="")
    print(f"{'KiB through shared memory':>28}: {'tile x 3':>9}{'centres':>9}{'shift':>7}{'shares x 2':>12}")
    for dtype, element, centers, rows in ONE_READ_SHAPES:
        tiles = center_tiles(centers)
        products, sums = one_read_products(element, tiles, rows)
        moved = one_read_traffic(element, tiles, rows)
        parts = (3 * moved.tile, moved.centers, moved.shift, 2 * moved.products)
        cells = "".join(f"{part / 1024:{size}.0f}" for part, size in zip(parts, (10, 9, 7, 12), strict=True))
        shared = f"{one_read_bytes(element, tiles, rows) / 1024:.0f} KiB"
        print(f"{dtype:5}{centers:>5}{rows:>6}{shared:>15}{f'{products}, {sums}':>22}", end="")
        print(f"{moved.total / 1024:28.0f}:{cells}")


def print_limits() -> None:
    """What the GPUs allow, and how the time of a tile's bytes in shared memory compares with its reading."""
    for gpu in GPUS:
        rows = one_read_rows(gpu, 2, 20)
        moved = one_read_traffic(2, 3, rows)
        share = moved.total / 128 / (moved.tile / gpu.memory)
        slabs, blocks = accumulate_slabs(gpu, 100)
        print(f"{gpu.name:12}{gpu.shared / 1024:.0f} KiB a block; K = 20, bf16, {rows} rows: ", end="")
        print(f"shared memory takes {share:.0%} of the time of reading; ", end="")
        print(f"{num_runs(20)} runs in {num_runs(20) / gpu.processors:.2f} rounds; ", end="")
        print(f"K = 100: {blocks} blocks add up, {slabs} slab(s)")
    sums = 100 * WIDTH * 4 / 1024
    print(f"sums of K = 100 in float32: {sums:.0f} KiB; one read is ", end="")
    print(", ".join(f"{TOKENS * WIDTH * size / 1e9:.2f} GB ({kind})" for kind, size in DTYPES.items()))


def print_times() -> None:
    print(f"PREDICTED, never measured: M = {TOKENS:,}, D = {WIDTH}, one pass")
    print(f"{'GPU':12}{'dtype':>6}{'K':>5}{'path':>19}{'read once':>12}{'predicted':>12}{'of copy rate':>14}")
    for gpu in GPUS:
        for dtype, element in DTYPES.items():
            for centers in (20, 100):
                once = TOKENS * WIDTH * element / gpu.copy
                for path, seconds in predict(gpu, element, centers).items():
                    cells = f"{once * 1e3:9.2f} ms{seconds * 1e3:9.2f} ms{once / seconds:14.0%}"
                    print(f"{gpu.name:12}{dtype:>6}{centers:>5}{path:>19}{cells}")


def main() -> None:
    print_one_read()
    print()
    print_limits()
    print()
    print_times()


if __name__ == "__main__":
    main()
