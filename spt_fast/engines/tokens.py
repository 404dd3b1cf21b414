"""Prompts as extra tokens behind those of the image: the textbook form (eq. 4-6, 11-13), for any block.

The block must treat its tokens as a set, or rotate them by an argument `rope` as timm's EVA blocks do.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import eva
from torch import Tensor, nn

_ROTARY_BLOCKS = (eva.EvaBlock, eva.EvaBlockPostNorm)
_POSITION_MARKS = ("rel_pos", "relative_position", "rope")


def append_prompts(x: Tensor, prompts: Tensor) -> Tensor:
    """Tokens [B, N, D] and prompts [N_p, D] to [B, N + N_p, D], prompts last.

    A block with no position information treats every order alike; at the end they leave the positions of
    prefix and patch tokens as the model's head expects them.
    """
    return torch.cat((x, prompts.expand(x.shape[0], -1, -1)), dim=1)


def drop_prompts(x: Tensor, num_prompts: int) -> Tensor:
    """Undo `append_prompts`: [B, N + N_p, D] to [B, N, D]."""
    return x[:, : x.shape[1] - num_prompts]


def concat_blocker(block: nn.Module) -> str | None:
    """Why appended tokens would be wrong in `block`, or None: only a rotation can be made to skip them."""
    tensors = [*block.named_parameters(), *block.named_buffers()]
    for name in [name for name, _ in block.named_modules()] + [name for name, _ in tensors]:
        if any(mark in name for mark in _POSITION_MARKS):
            return f"{type(block).__name__} ties positions to its tokens (`{name}`), and prompts have none"
    return None


def concat_extras(block: nn.Module) -> tuple[str, ...]:
    """Names of the arguments beside tokens that `fit_extras` can fit to tokens with prompts appended."""
    return ("rope",) if isinstance(block, _ROTARY_BLOCKS) else ()


def fit_extras(extras: dict[str, Any], num_prompts: int) -> dict[str, Any]:
    """A block's arguments beside tokens, made to fit tokens with prompts appended: those are not rotated."""
    if extras.get("rope") is None:
        return extras
    return {**extras, "rope": _without_rotation_of(num_prompts, extras["rope"])}


def _without_rotation_of(num_prompts: int, rotary: Tensor) -> Tensor:
    """Sines and cosines [..., N_e, 2 * r] with N_p more rows that rotate by nothing: sine 0, cosine 1."""
    half = rotary.shape[-1] // 2
    shape = (*rotary.shape[:-2], num_prompts, half)
    return torch.cat((rotary, torch.cat((rotary.new_zeros(shape), rotary.new_ones(shape)), dim=-1)), dim=-2)
