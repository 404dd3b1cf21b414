"""Checks of what a `PromptedViT` is given: the model, options, images, and calls of its blocks."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import check_channels, unwrap
from spt_fast.backbones.pooling import stated_pooling
from spt_fast.backbones.snapshot import has_head, placement
from spt_fast.prompting.engines import concat_blocker
from spt_fast.support.arguments import check_bool, check_int, check_number, check_tensor

_WEIGHT_DTYPES = {
    None: None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.float16: torch.float16,
}


def check_not_wrapped(model: nn.Module) -> None:
    """TypeError where `model` is inside `torch.compile` or a data-parallel wrapper.

    A compiled module hands out the attributes of the module inside, but runs its own compiled copy: a new
    head would never be called.
    """
    inner = unwrap(model)
    if inner is not model:
        raise TypeError(
            f"model must be the {type(inner).__name__} itself, got it inside {type(model).__name__}; "
            "compile or distribute the PromptedViT instead"
        )


def check_num_classes(model: nn.Module, num_classes: int | None) -> int | None:
    """The size of the head that `model` is to get: >= 1, 0 for none, or None where it keeps what it has.

    Raises:
        ValueError: `num_classes` is None for a model without a head, whose features would pass for logits.
        TypeError: `model` cannot get another head.
    """
    if num_classes is None:
        if not has_head(model):
            raise ValueError(
                f"model must have a head to keep, but this {type(model).__name__} has none and returns "
                "features: give num_classes=N for a new head of N classes, or num_classes=0 for features"
            )
        return None
    num_classes = check_int("num_classes", num_classes, 0, "or None")
    if num_classes == 0 and not has_head(model):
        return None
    if not callable(getattr(model, "reset_classifier", None)):
        raise TypeError(
            f"num_classes needs a model with timm's `reset_classifier`, got {type(model).__name__}; "
            "leave it None to keep the model's own head"
        )
    return num_classes


def check_weight_dtype(given: torch.dtype | str | None, model: nn.Module) -> torch.dtype | None:
    """bfloat16 or float16 for the dtype or its short name; None for None.

    Raises:
        ValueError: none of these, or for blocks in a dtype that autocast would not turn into it.
    """
    if not isinstance(given, (torch.dtype, str, type(None))) or given not in _WEIGHT_DTYPES:
        raise ValueError(
            f"weight_dtype must be None, torch.bfloat16 ('bf16') or torch.float16 ('fp16'), got {given!r}"
        )
    dtype, own = _WEIGHT_DTYPES[given], placement(model)[1]
    if dtype is not None and own not in (torch.float32, dtype):
        raise ValueError(
            f"weight_dtype must be None for a model in {own}, got {given!r}: autocast starts from float32"
        )
    return dtype


def check_pool_prompts(
    model: nn.Module, blocks: nn.ModuleList | nn.Sequential, pool_prompts: bool | None
) -> bool:
    """Whether prompts are averaged too; None is as `open_model` opened the model for, else False.

    Raises:
        TypeError: it is neither a bool nor None.
        ValueError: the head of `model` does not average tokens, or its last block takes no prompts as tokens.
    """
    if pool_prompts is None:
        stated = stated_pooling(model)
        pool_prompts = stated is not None and stated.pool == "avg-with-prompts"
    if not check_bool("pool_prompts", pool_prompts):
        return False
    pool = getattr(model, "global_pool", None)
    if pool != "avg":
        raise ValueError(f"pool_prompts needs a model with global_pool='avg', got {pool!r}")
    reason = concat_blocker([blocks[-1]], model)
    if reason is not None:
        raise ValueError(f"pool_prompts needs prompts as tokens of the last block, but {reason}")
    return True


def check_prompt_dropout(given: float) -> float:
    """`given` as a probability below 1.

    Raises:
        TypeError, ValueError: it is none.
    """
    if (dropout := check_number("prompt_dropout", given, 0)) >= 1:
        raise ValueError(f"prompt_dropout must be a probability below 1, got {given}")
    return dropout


def check_images(images: Tensor, model: nn.Module) -> None:
    """TypeError or ValueError unless `images` are [B, C, height, width] and fit `model`."""
    check_tensor("images", images)
    if images.ndim != 4:
        raise ValueError(f"images must be [B, C, height, width], got {list(images.shape)}")
    check_channels(images, model)
    patch_embed: Any = getattr(model, "patch_embed", None)
    size = getattr(patch_embed, "img_size", None)
    if size is None or not getattr(patch_embed, "strict_img_size", False):
        return
    if images.shape[-2:] != tuple(size):
        raise ValueError(f"images must be {size[0]} x {size[1]} for this model, got {list(images.shape)}")


def check_layers(name: str, layers: Iterable[int] | None, count: int) -> list[int]:
    """The layers, from 0, that a user names; None names all of `count`, and -1 the last.

    Raises:
        TypeError: they are no integers.
        ValueError: there is no such layer.
    """
    if layers is None:
        return list(range(count))
    try:
        given = list(layers)
        if any(isinstance(each, bool) for each in given):
            raise TypeError
        numbers = [operator.index(each) for each in given]
    except TypeError:
        raise TypeError(f"{name} must be integers, such as [0, -1], or None, got {layers!r}") from None
    for number in numbers:
        if not -count <= number < count:
            raise ValueError(f"{name} must be from {-count} to {count - 1}, got {number}")
    return [number % count for number in numbers]


def check_block_call(
    block: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], known: tuple[str, ...]
) -> None:
    """TypeError unless a block is called with tokens [B, N, D] and, beside them, `known` arguments only.

    Masks, grids and positions are for the tokens of the image; no engine knows what they mean for prompts.
    """
    if not isinstance(x, Tensor) or x.ndim != 3:
        found = f"shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{type(block).__name__} must take tokens [B, N, D] to be prompted, got {found}")
    positional = {f"argument {position}": value for position, value in enumerate(args, start=2)}
    foreign = [
        name
        for name, value in (*positional.items(), *kwargs.items())
        if name not in known and value is not None and value is not False
    ]
    if foreign:
        raise TypeError(
            f"{type(block).__name__} cannot be prompted when it is also given {', '.join(foreign)}"
        )


def check_block_input(x: Tensor, width: int, num_prefix_tokens: int, num_prompts: int) -> int:
    """The number of patch tokens in `x` [B, N, width], which also holds prefix tokens and prompts.

    Raises:
        TypeError: `x` is no floating-point tensor.
        ValueError: `x` has another shape, or holds no patch tokens.
    """
    check_tensor("x", x, ("B", "N", width))
    num_patches = x.shape[1] - num_prefix_tokens - num_prompts
    if num_patches < 1:
        raise ValueError(
            f"x must hold patch tokens beside {num_prefix_tokens} prefix tokens and {num_prompts} prompts, "
            f"so N must be at least {num_prefix_tokens + num_prompts + 1}, got {x.shape[1]}"
        )
    return num_patches


def check_all_saved(tuned: nn.Module, saved: Iterable[Tensor]) -> None:
    """ValueError where a parameter learns that is none of those `saved`."""
    kept = {id(tensor) for tensor in saved}
    others = [name for name, each in tuned.named_parameters() if each.requires_grad and id(each) not in kept]
    if others:
        raise ValueError(
            f"save writes prompts and head, but {len(others)} other parameters learn ({', '.join(others[:3])}"
            f"{', ...' if len(others) > 3 else ''}); save state_dict(), or freeze them again"
        )


def check_class_names(names: Sequence[str] | None, num_classes: int | None) -> None:
    """ValueError unless `names` are None, or strings, as many as there are classes where that is known."""
    if names is None:
        return
    is_sequence = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_sequence or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names must be a sequence of strings or None, got {names!r}")
    if num_classes is not None and len(names) != num_classes:
        raise ValueError(
            f"class_names must hold one name for each of {num_classes} classes, got {len(names)}"
        )
