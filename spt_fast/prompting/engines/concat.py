"""Prompts as extra tokens behind those of the image: the textbook form (eq. 4-6, 11-13), for any block.

The block must treat its tokens as a set, or rotate them by an argument `rope` as timm's EVA blocks do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from timm.models import eva
from torch import Tensor, nn

_ROTARY_BLOCKS = (eva.EvaBlock, eva.EvaBlockPostNorm)
# Parts of names of modules, parameters and buffers, by which a block is recognised.
_RELATIVE_MARKS = ("rel_pos", "relative_position")
_ROTARY_MARKS = ("rope", "rotary")
_POSITION_MARKS = (*_RELATIVE_MARKS, *_ROTARY_MARKS, "pos_proj")
_COUNT_MARKS = ("mlp_tokens", "linear_tokens", "mlp_channels.gate.proj")
_TIED_TO_POSITIONS = "ties positions to its tokens (`{}`), and prompts have none"
_TIED_TO_COUNT = "has a layer as wide as an image has tokens (`{}`), and prompts would be more"


def append_prompts(x: Tensor, prompts: Tensor) -> Tensor:
    """Tokens [B, N, D] and prompts [N_p, D] or [B, N_p, D] to [B, N + N_p, D], prompts last.

    Their order does not matter to a block without positions. Behind the others they leave prefix and patch
    tokens where the model's head expects them.
    """
    return torch.cat((x, prompts.expand(x.shape[0], -1, -1)), dim=1)


def drop_prompts(x: Tensor, num_prompts: int) -> Tensor:
    """Undo `append_prompts`: [B, N + N_p, D] to [B, N, D]."""
    return x[:, : x.shape[1] - num_prompts]


def concat_blocker(blocks: Iterable[nn.Module], model: nn.Module) -> str | None:
    """Why appended tokens would be wrong in `blocks` of `model`, or None.

    The only positions that can skip the prompts are rotations that the model hands to its blocks.
    """
    blocks = list(blocks)
    for block in blocks:
        names = list(_names(block, recurse=True))
        reason = _first_with(_POSITION_MARKS, block, names, _TIED_TO_POSITIONS)
        reason = reason or _first_with(_COUNT_MARKS, block, names, _TIED_TO_COUNT)
        if reason is not None:
            return reason
    # A model hands positions that it keeps beside its blocks to each of them.
    rotated = all(concat_extras(block) for block in blocks)
    marks = _RELATIVE_MARKS if rotated else (*_RELATIVE_MARKS, *_ROTARY_MARKS)
    return _first_with(marks, model, _names(model, recurse=False), _TIED_TO_POSITIONS)


def _names(module: nn.Module, *, recurse: bool) -> Iterator[str]:
    """Names of modules, parameters and buffers: all within `module`, or those that are its own."""
    modules = module.named_modules() if recurse else module.named_children()
    for named in (modules, module.named_parameters(recurse=recurse), module.named_buffers(recurse=recurse)):
        yield from (name for name, _ in named)


def _first_with(marks: tuple[str, ...], module: nn.Module, names: Iterable[str], reason: str) -> str | None:
    """`reason` about the first of `names` that holds one of `marks`."""
    for name in names:
        if any(mark in name for mark in marks):
            return f"{type(module).__name__} {reason.format(name)}"
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
    """Sines and cosines [..., N_e, 2 * r] and N_p more rows for a rotation by 0: sine 0, cosine 1."""
    half = rotary.shape[-1] // 2
    shape = (*rotary.shape[:-2], num_prompts, half)
    return torch.cat((rotary, torch.cat((rotary.new_zeros(shape), rotary.new_ones(shape)), dim=-1)), dim=-2)
