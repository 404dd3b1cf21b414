"""Tile sizes of the kernels in `prompt_attention_triton.py`: a pure rule, no device is asked.

Limits: the rule was derived from registers, shared memory and padding as compiled; no GPU has timed it.
`docs/design/prompt-attention.md` explains it.
"""

from __future__ import annotations

from typing import NamedTuple

# Multiprocessors of the chip that a compute capability stands for: A100, L40, H100 and H200, B200.
_MULTIPROCESSORS = {80: 108, 89: 142, 90: 132, 100: 148}


class Tiles(NamedTuple):
    """Rows that a program keeps, rows that it takes per step, and how it is run."""

    rows: int  # queries in the forward kernel, keys in the backward one
    step: int  # keys in the forward kernel, queries in the backward one
    warps: int
    stages: int  # copies of a step start `stages - 1` steps ahead; with two they are waited for at once
    transposed: bool = False  # backward: the product that gives the queries' gradients has the width down


def padded_width(width: int) -> int:
    """Head width as the kernels hold it: a power of two, at least 16."""
    return max(16, _power_of_two(width))


def forward_tiles(arch: int, width: int, itemsize: int, tokens: int, keys: int) -> Tiles:
    """Of the forward kernel: `tokens` queries over `keys` keys, those of the prompts counted."""
    wide = padded_width(width) > 64
    if itemsize > 2:
        return _fit(Tiles(16, 16, 4, 3) if wide else Tiles(32, 32, 4, 3), tokens, keys)
    if wide:
        # More steps of more rows would not fit beside each other into the shared memory of sm_86, 89 and 120.
        return _fit(Tiles(64, 32, 4, 3) if 90 <= arch < 120 else Tiles(128, 32, 8, 3), tokens, keys)
    return _fit(Tiles(128, 64, 8, 3) if arch == 90 else Tiles(64, 64, 4, 3), tokens, keys)


def backward_tiles(arch: int, width: int, itemsize: int, tokens: int, keys: int) -> Tiles:
    """Of the backward kernel: `keys` keys, those of the prompts counted, over `tokens` queries."""
    padded = padded_width(width)
    if itemsize > 2:
        return _fit(Tiles(16 if padded > 64 else 32, 16, 8, 3), keys, tokens)
    if padded > 64:
        return _fit(Tiles(32, 32, 8, 3), keys, tokens)
    # A warp group of sm_90 multiplies 64 rows: a step of queries is too few, the width is not.
    return _fit(Tiles(128, 32, 8, 3, transposed=arch == 90 and padded == 64), keys, tokens)


def images_per_split(arch: int, images: int, heads: int) -> int:
    """Images whose prompt gradients one program sums: as many as leave two programs a multiprocessor."""
    splits = max(1, min(images, 2 * _MULTIPROCESSORS.get(arch, 132) // max(heads, 1)))
    return -(-images // splits)


def _fit(tiles: Tiles, rows: int, steps: int) -> Tiles:
    """No more rows than there are, as far as a matrix product allows: 16."""
    return tiles._replace(
        rows=min(tiles.rows, max(16, _power_of_two(rows))),
        step=min(tiles.step, max(16, _power_of_two(steps))),
    )


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
