"""The prompts that a `PromptedViT` starts from: given ones, or random ones as VPT draws them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import embed_dim, get_blocks, patch_size
from spt_fast.backbones.identity import check_backbone
from spt_fast.backbones.snapshot import placement
from spt_fast.support.arguments import check_bool, check_int, check_tensor
from spt_fast.support.errors import NonFiniteError

if TYPE_CHECKING:
    from spt_fast.prototypes.result import Prototypes


def initial_prompts(
    model: nn.Module, prompts: Prototypes | Tensor | int, depth: str, *, allow_other_backbone: bool = False
) -> Tensor:
    """A new tensor [L or 1, N_p, D] on the model's device, at least float32.

    Args:
        prompts, allow_other_backbone: as in `PromptedViT`.

    Raises:
        TypeError: `prompts` are no `Prototypes`, floating-point tensor or integer, or an integer for a model
            that states no patch size; `allow_other_backbone` is no bool.
        ValueError: another shape than [L or 1, N_p, D], an integer below 0, or `Prototypes` that were built
            from another backbone.
        NonFiniteError: a prompt holds NaN or infinity; `row` is counted over all layers.
    """
    check_bool("allow_other_backbone", allow_other_backbone)
    layers = len(get_blocks(model)) if depth == "deep" else 1
    values = getattr(prompts, "prompts", prompts)
    if isinstance(values, int | np.integer) and not isinstance(values, bool):
        values = random_prompts(model, layers, check_int("prompts", values, 0), embed_dim(model))
    if not isinstance(values, Tensor):
        raise TypeError(f"prompts must be Prototypes, a tensor or an integer, got {type(prompts).__name__}")
    check_tensor("prompts", values)
    name = "prompts.prompts" if hasattr(prompts, "prompts") else "prompts"
    _check_shape(values, layers, embed_dim(model), depth, name)
    _check_finite(values)
    facts = getattr(prompts, "metadata", {})
    check_backbone("prompts.metadata", facts, model, allow_other_backbone=allow_other_backbone)
    device, dtype = placement(model)
    # The steps of an optimiser are too small for half precision; blocks cast prompts to their own dtype.
    return values.detach().to(device, torch.promote_types(dtype, torch.float32), copy=True)


def random_prompts(model: nn.Module, layers: int, num_prompts: int, width: int) -> Tensor:
    """VPT's uniform initialisation: U(-v, v) with v = sqrt(6 / (3 * patch height * patch width + width))."""
    sides = patch_size(model)
    bound = math.sqrt(6 / (3 * sides[0] * sides[1] + width))
    return torch.empty(layers, num_prompts, width, dtype=torch.float32, device="cpu").uniform_(-bound, bound)


def _check_shape(values: Tensor, layers: int, width: int, depth: str, name: str) -> None:
    """ValueError unless `values` are [layers, N_p, width]; `name` is how the caller reaches the tensor."""
    given = list(values.shape)
    if values.ndim == 3 and given[0] == layers and given[2] == width:
        return
    hint = _repair(given, layers, depth, name) if values.ndim == 3 and given[2] == width else ""
    raise ValueError(
        f"prompts must have shape [{layers}, N_p, {width}] for depth={depth!r}, got {given}{hint}"
    )


def _repair(given: list[int], layers: int, depth: str, name: str) -> str:
    """How prompts of the other depth can be used."""
    if depth == "shallow":
        return f"; build them with depth='shallow', or give the first layer, {name}[:1]"
    if given[0] == 1:
        repeated = f"{name}.expand({layers}, -1, -1)"
        return f"; build them with depth='deep', or repeat the one layer for all, {repeated}"
    return ""


def _check_finite(values: Tensor) -> None:
    finite = torch.isfinite(values).all(dim=-1).flatten()
    if not values.is_meta and not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise NonFiniteError(f"prompts must be finite, but row {row} holds NaN or infinity", row=row)
