"""Predicted times of the CUDA k-means pass, from the stated constants: python -m benchmarks.cuda_predictions.

Arithmetic, not measurement: these kernels have never run on a GPU. Bandwidths and rates of tensor cores are
assumptions; a phase takes the longest of its shared-memory, tensor-core and memory time, and for the screen
also of the time to issue its instructions and to send to other blocks. No weights, and rows of whole 16
bytes, one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

TOKENS, WIDTH = 1_060_000, 768
LATENCY = 700  # clocks of a read of device memory
BARRIERS = 400  # clocks a tile of the one-read kernel waits for barriers, shuffles and labels
ADD = 30  # clocks of one dependent addition in shared memory
LAUNCH = 3e-6  # seconds between two kernels
# The screen: instructions that a warp issues for a tile of 64 tokens in four blocks, counted in the machine
# code of screen_kernel<bf16, 56> for sm_90a (copies of whole tiles); bytes a clock that a multiprocessor
# sends to others of its cluster; tokens without a decision (benchmarks.screen_share, K = 100: up to 2.6 %).
SCREEN_INSTRUCTIONS = 1220
REMOTE_BYTES = 11
UNDECIDED = 0.026


@dataclass(frozen=True)
class Gpu:
    """What the prediction takes for granted."""

    name: str
    copy: float  # bytes a second
    processors: int
    clock: float
    shared: int  # bytes of a block at most
    product_clocks: float  # per m16n8k16 of half types, or m16n8k8 of tf32, and multiprocessor
    wgmma: bool  # 4096 products and additions of half types a clock and multiprocessor

    @property
    def memory(self) -> float:
        """Bytes a clock and multiprocessor."""
        return self.copy / self.processors / self.clock


GPUS = (
    Gpu("H200", 4.3e12, 132, 1.83e9, 232448, 1.6, True),
    Gpu("H100", 2.9e12, 132, 1.83e9, 232448, 1.6, True),
    Gpu("A100 80 GB", 1.6e12, 108, 1.41e9, 166912, 2.2, False),
)


def one_read_bytes(element: int, center_tiles: int, rows: int) -> int:
    """Shared memory of a block, but for the labels, norms and constants: see one_read_shape in csrc/."""
    blocks = ceil(WIDTH / 16)
    products = 8 * rows * (center_tiles + (center_tiles + 1) % 2) * 8 * 4
    return 2 * rows * (WIDTH * element + 16) + blocks * center_tiles * 512 + WIDTH * 4 + products


def one_read_rows(gpu: Gpu, element: int, centers: int) -> int:
    """Tokens of a tile; 0 where the path does not serve."""
    tiles = max(3, ceil(centers / 8))
    for rows in (32, 16) if element == 2 else (16,):
        # Norms, labels, base and slope take less than 2 KiB.
        if centers <= 32 and one_read_bytes(element, tiles, rows) + 2048 <= gpu.shared:
            return rows
    return 0


def num_runs(centers: int) -> int:
    return min(264, (128 << 20) // (centers * (WIDTH + 2) * 8))


def reduction_seconds(gpu: Gpu, centers: int, rows_per_move: int) -> float:
    """Partial sums: written, read and written again for each further move, read once more at the end."""
    moves = ceil(ceil(TOKENS / num_runs(centers)) / rows_per_move)
    return 2 * moves * num_runs(centers) * centers * (WIDTH + 2) * 8 / gpu.copy


def one_read_seconds(gpu: Gpu, element: int, centers: int, rows: int) -> float:
    tiles, blocks, row_tiles = max(3, ceil(centers / 8)), WIDTH // 16, rows // 16
    tile_bytes = rows * WIDTH * element
    product_bytes = 8 * rows * tiles * 8 * 4
    shift_bytes = blocks * row_tiles * (2 if element == 2 else 8) * 128
    per_product, per_sum = (2, 1) if element == 2 else (6, 4)
    multiply = max(
        (2 * tile_bytes + blocks * tiles * 512 + shift_bytes + product_bytes) / 128,
        blocks * row_tiles * tiles * per_product * gpu.product_clocks,
    )
    add_up = max(tile_bytes / 128, blocks * row_tiles * 4 * per_sum * gpu.product_clocks)
    clocks = max(tile_bytes / gpu.memory, multiply + product_bytes / 128 + BARRIERS + add_up)
    waves = ceil(num_runs(centers) / gpu.processors)  # one block a multiprocessor
    tiles_per_run = ceil(TOKENS / num_runs(centers) / rows)
    per_move = 2048 if element == 2 else 512
    return waves * tiles_per_run * clocks / gpu.clock + reduction_seconds(gpu, centers, per_move)


def assign_seconds(gpu: Gpu, element: int, centers: int) -> float:
    """256 tokens a block, one block a multiprocessor; centres in one chunk, up to 104."""
    tiles, blocks, rows = max(3, ceil(centers / 8)), WIDTH // 16, 256
    center_bytes, token_bytes = blocks * tiles * 512, rows * WIDTH * element
    clocks = max(
        (2 * token_bytes + 9 * center_bytes) / 128,
        rows // 16 * blocks * tiles * (2 if element == 2 else 6) * gpu.product_clocks,
        token_bytes / gpu.memory,
    )
    return ceil(ceil(TOKENS / rows) / gpu.processors) * clocks / gpu.clock


def accumulate_seconds(gpu: Gpu, element: int, centers: int) -> float:
    """Blocks of 64 threads, 128 bytes in flight each: waits, then adds."""
    shared = min(centers, 110) * 1024
    blocks = min(gpu.shared // (shared + 1024), 16)
    in_flight, rows = blocks * 64 * 128 * 2, 64 // element
    rate = min(gpu.memory, in_flight / (LATENCY + rows * ADD))
    read = TOKENS * WIDTH * element / gpu.processors / rate / gpu.clock
    return read + reduction_seconds(gpu, centers, 4096)


def screen_seconds(gpu: Gpu, centers: int) -> float:
    """Half types, clusters of four blocks, 64 runs; and two reads of the tokens without a decision."""
    half = 32 if centers <= 64 else 56 if centers <= 112 else 64
    rows, columns, runs, blocks = 64, WIDTH // 4, 64, 4
    tile_bytes, share_bytes = rows * columns * 2, rows * 256
    # A wgmma of 64 x n x 16 takes n / 2 clocks: 12 steps for the products, 12 of n = 64 for the sums.
    tensor = 2 * 12 * half / 2 + 2 * 12 * 64 / 2
    # The tile: written, read by both warpgroups for products and sums, once for norms, with the shift.
    shared = (8 * tile_bytes + 2 * half * columns * 2 + 2 * share_bytes) / 128
    issue = SCREEN_INSTRUCTIONS * 8 / 4
    remote = share_bytes * 3 / 4 / REMOTE_BYTES
    clocks = max(tile_bytes / gpu.memory, tensor, shared, issue, remote) + BARRIERS / 2
    waves = ceil(runs / (gpu.processors // blocks))
    rounds = ceil(TOKENS / runs / rows) + 2
    rest = UNDECIDED * (assign_seconds(gpu, 2, centers) + accumulate_seconds(gpu, 2, centers))
    partials = 2 * 2 * runs * centers * (WIDTH + 2) * 8 / gpu.copy
    return waves * rounds * clocks / gpu.clock + rest + partials + 7 * LAUNCH


def predict(gpu: Gpu, element: int, centers: int) -> dict[str, float]:
    """Seconds by path; the first is taken by itself."""
    rows = one_read_rows(gpu, element, centers)
    if rows:
        return {f"one read, {rows} rows": one_read_seconds(gpu, element, centers, rows)}
    paths = {"two reads": assign_seconds(gpu, element, centers) + accumulate_seconds(gpu, element, centers)}
    if gpu.wgmma and element == 2 and 32 < centers <= 128:
        paths["screen, one read"] = screen_seconds(gpu, centers)
    return paths


def main() -> None:
    print(f"PREDICTED, never measured: M = {TOKENS:,}, D = {WIDTH}, one pass")
    print(f"{'GPU':12}{'dtype':>6}{'K':>5}{'path':>19}{'read once':>12}{'predicted':>12}{'of copy rate':>14}")
    for gpu in GPUS:
        for dtype, element in (("bf16", 2), ("fp32", 4)):
            for centers in (20, 100):
                once = TOKENS * WIDTH * element / gpu.copy
                for path, seconds in predict(gpu, element, centers).items():
                    cells = f"{once * 1e3:9.2f} ms{seconds * 1e3:9.2f} ms{once / seconds:14.0%}"
                    print(f"{gpu.name:12}{dtype:>6}{centers:>5}{path:>19}{cells}")


if __name__ == "__main__":
    main()
