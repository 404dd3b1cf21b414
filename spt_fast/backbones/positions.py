"""Position embeddings of a square grid for a model whose own grid has as many patches, but is not square.

timm's filters resize positions where their number differs. Where it does not, 16 positions of a 4 x 4 grid
would be read as a 2 x 8 grid, row by row; newer filters go by the image size of timm's own weights.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn


@torch.no_grad()
def from_square_grid(model: nn.Module, positions: Tensor) -> tuple[Tensor, str] | None:
    """`positions` [1, N, D] of a file for the grid of `model`, and words for the report if that resized them.

    None where timm's filter knows enough: the grid of `model` is square, or has another number of patches.
    No file states its grid. It is taken for the one, the square or the model's, in which patches that lie
    above each other are more alike.
    """
    grid: Any = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    own = getattr(model, "pos_embed", None)
    if grid is None or not isinstance(own, Tensor) or own.ndim != 3 or own.shape != positions.shape:
        return None
    patches = math.prod(grid)
    side = math.isqrt(patches)
    if side * side != patches or grid[0] == grid[1]:
        return None
    of_patches = positions[0, -patches:].float()
    if _difference_of_rows(of_patches, grid[1]) < _difference_of_rows(of_patches, side):
        return positions, ""
    prefix = positions.shape[1] - patches
    resized = resample_abs_pos_embed(positions, list(grid), [side, side], num_prefix_tokens=prefix)
    return resized, f"pos_embed resized, {side}x{side} -> {grid[0]}x{grid[1]} patches"


def _difference_of_rows(positions: Tensor, width: int) -> float:
    """Mean squared difference of `positions` [N, D] from those below them in a grid of this width."""
    return float((positions[width:] - positions[:-width]).square().mean())
