"""What methods share that add modules: parts by name, learned tensors, forwards around others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spt_fast.backbones.snapshot import placement
from spt_fast.methods.base import Blocks


def learned_like(model: nn.Module) -> dict[str, Any]:
    """Device and dtype of what learns on `model`, as keywords: at least float32, for small steps."""
    device, dtype = placement(model)
    return {"device": device, "dtype": torch.promote_types(dtype, torch.float32)}


def linear_as(x: Tensor, layer: nn.Linear) -> Tensor:
    """`layer` of x [..., in], with its weights in the dtype of x."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, layer.weight.to(x.dtype), bias)


def around(
    add: Callable[[Tensor, Tensor], Tensor],
    forward: Callable[..., Tensor],
    x: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """`add(x, y)` with the output y of a part's own `forward` of x, whatever else it is called with.

    For `functools.partial`, which is copied together with the model, unlike a closure.
    """
    return add(x, forward(x, *args, **kwargs))


def parts_of_blocks(
    method: str, blocks: Blocks, kinds: Mapping[str, type[nn.Module]]
) -> dict[str, nn.Module]:
    """The parts of all blocks with these names, by their names in the model ("blocks.0.mlp").

    Args:
        method: what errors call the method.
        kinds: of which class each must be, by the name that it has in a block ("attn.qkv").

    Raises:
        TypeError: a block has no such part, or one of another class; or one that its attention does not call.
    """
    found = {}
    for index, block in enumerate(blocks):
        for name, kind in kinds.items():
            part = _part_of(block, name)
            if not isinstance(part, kind):
                has = "has none" if part is None else f"has a {type(part).__name__} there"
                what = "" if kind is nn.Module else f" ({kind.__name__})"
                raise TypeError(
                    f"{method} needs a part `{name}`{what} in every block of the model, "
                    f"but block {index + 1} ({type(block).__name__}) {has}"
                )
            check_calls(method, block, name)
            found[f"blocks.{index}.{name}"] = part
    return found


def check_calls(method: str, block: nn.Module, name: str) -> None:
    """TypeError for a projection whose weights the attention reads without calling it, as BEiT's does."""
    attention = _part_of(block, name.rpartition(".")[0])
    if name.endswith("qkv") and getattr(attention, "q_bias", None) is not None:
        raise TypeError(
            f"{method} needs an attention that calls its `qkv`; {type(attention).__name__} with biases "
            "of its own for queries and values reads the weights of `qkv` instead"
        )


def _part_of(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None
