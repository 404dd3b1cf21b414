"""The parts of a backbone: its blocks and hooks on them, its width, its prefix tokens, its patches."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Called with the index of a block and the tokens [B, N, D] that enter it.
BlockInput = Callable[[int, Tensor], None]

# What models call the tokens that are no patches.
_PREFIX_TOKENS = ("cls_token", "class_token", "dist_token", "reg_token", "register_tokens")

# What parts are called in which a class token alone attends, as in CaiT and XCiT.
_CLASS_ATTENTION = re.compile(r"class_?att", re.IGNORECASE)

_LAYOUTS_WITHOUT_BLOCKS = {
    "layers": "stages in `.layers`, as a Swin Transformer has",
    "stages": "stages in `.stages`, as a ConvNeXt or an MViT has",
    "layer1": "stages in `.layer1`, `.layer2`, ..., as a ResNet has",
}


def get_blocks(model: nn.Module, argument: str = "model") -> nn.ModuleList | nn.Sequential:
    """The transformer blocks of `model`, each mapping tokens [B, N, D] to [B, N, D].

    Args:
        model: a timm Vision Transformer, or any module whose `.blocks` is a list of such blocks.
        argument: what error messages call `model`.

    Raises:
        TypeError: `model` is no module, has no blocks, or has blocks that are no such mapping; or its class
            token joins after them. Says which.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{argument} must be a torch.nn.Module, got {type(model).__name__}")
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
        raise TypeError(_needs_blocks(model, argument) + f": it has {_layout_found(model)}")
    if len(blocks) == 0:
        raise TypeError(_needs_blocks(model, argument) + ": its `.blocks` is empty")
    if any(isinstance(block, nn.ModuleList) for block in blocks):
        raise TypeError(
            _needs_blocks(model, argument) + ": its `.blocks` are lists of blocks, stage by stage"
        )
    if _is_convolutional(blocks):
        raise TypeError(
            _needs_blocks(model, argument)
            + ": its `.blocks` are convolution stages over feature maps, not over tokens"
        )
    widths = _norm_widths(blocks)
    if len(set(widths)) > 1:
        raise TypeError(
            _needs_blocks(model, argument)
            + f": the width of its blocks changes from {min(widths)} to {max(widths)}, stage by stage"
        )
    if (late := _class_attention(model, blocks)) is not None:
        raise TypeError(
            _needs_blocks(model, argument)
            + f": its class token is none of these tokens, but joins after the blocks, in `{late}`"
        )
    return blocks


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data-parallel wrappers, in which hooks on blocks might not run."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


@contextmanager
def block_input_hooks(blocks: Iterable[nn.Module], callback: BlockInput) -> Iterator[None]:
    """Within the context, each block calls `callback(index, tokens)` before it runs; `index` is from 0.

    `tokens` are the block's first argument, unchecked. `torch.compile` traces through these hooks; a model
    that is copied or pickled meanwhile carries them with it.
    """
    with ExitStack() as stack:
        for index, block in enumerate(blocks):
            hook = functools.partial(_hand_input, callback, index)
            stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def num_prefix_tokens(model: nn.Module) -> int:
    """Number of class and register tokens before the patch tokens; 0 where the model has none.

    Raises:
        TypeError: the model has such a token and does not say how many come before its patch tokens.
    """
    given = getattr(model, "num_prefix_tokens", None)
    if given is not None:
        return int(given)
    for name in _PREFIX_TOKENS:
        if getattr(model, name, None) is not None:
            raise TypeError(
                f"model has `{name}` but no `num_prefix_tokens`, so nobody knows which of its tokens are "
                "patches: set model.num_prefix_tokens, for one class token before the patch tokens to 1"
            )
    return 0


def embed_dim(model: nn.Module) -> int:
    """Width D of the tokens between the blocks.

    Raises:
        TypeError: the model states no single width.
    """
    for name in ("embed_dim", "num_features"):
        width = getattr(model, name, None)
        if isinstance(width, int):
            return width
    widths = _norm_widths(get_blocks(model))
    if widths:
        return widths[0]
    raise TypeError(
        f"model must state its token width as an integer `.embed_dim`, but {type(model).__name__} has none"
    )


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Height and width of a patch in pixels.

    Raises:
        TypeError: the model states none.
    """
    # NaFlexViT has `embeds`.
    for name in ("patch_embed", "embeds"):
        embedding: Any = getattr(model, name, None)
        if hasattr(embedding, "backbone") and callable(getattr(embedding, "feat_ratio", None)):
            # Of a hybrid model `patch_size` counts places of a feature map, each of several pixels.
            return tuple(embedding.feat_ratio(as_scalar=False))
        size = getattr(embedding, "patch_size", None)
        if size is not None:
            return (size, size) if isinstance(size, int) else tuple(size)
    raise TypeError(
        "model must state the size of its patches as `.patch_embed.patch_size`, "
        f"which {type(model).__name__} does not"
    )


def image_dtype(model: nn.Module) -> torch.dtype:
    """The floating-point dtype in which `model` takes images: that of its patch embedding.

    Where it has none, or one without weights, that of its first parameter or buffer; float32 without any.
    """
    for part in (getattr(model, "patch_embed", None), model):
        if isinstance(part, nn.Module):
            for tensor in (*part.parameters(), *part.buffers()):
                if tensor.is_floating_point():
                    return tensor.dtype
    return torch.float32


def check_channels(images: Tensor, model: nn.Module) -> None:
    """ValueError where `images` [B, C, H, W] have other channels than the patch embedding of `model` takes.

    Nothing is checked where the embedding is no plain convolution.
    """
    embedding = getattr(model, "patch_embed", None)
    # Of a hybrid model, `proj` takes the features of a network before it.
    projection = None if hasattr(embedding, "backbone") else getattr(embedding, "proj", None)
    if isinstance(projection, nn.Conv2d) and images.shape[1] != projection.in_channels:
        raise ValueError(
            f"images must have {projection.in_channels} channels for this model, got {list(images.shape)}"
        )


def _hand_input(
    callback: BlockInput, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    callback(index, next(iter((*args, *kwargs.values())), None))  # type: ignore[arg-type]


def _needs_blocks(model: nn.Module, argument: str) -> str:
    return (
        f"{argument} must be a Vision Transformer whose `.blocks` map tokens [B, N, D] to [B, N, D] "
        f"at one width, got {type(model).__name__}"
    )


def _layout_found(model: nn.Module) -> str:
    if any(cls.__module__.partition(".")[0] == "transformers" for cls in type(model).__mro__):
        # One that wraps a timm model holds blocks after all.
        what_to_do = _inner_backbone(model) or (
            ", whose blocks have other parts; open the same weights in timm (docs/weights.md)"
        )
        return "no `.blocks`, for it is a Hugging Face model" + what_to_do
    found = [
        text
        for name, text in _LAYOUTS_WITHOUT_BLOCKS.items()
        if isinstance(getattr(model, name, None), nn.Module)
    ]
    if found:
        return "no `.blocks`, but " + found[0]
    return "no `.blocks`" + _inner_backbone(model)


def _inner_backbone(model: nn.Module) -> str:
    """Where a wrapper holds a Vision Transformer that could be given instead; empty where it holds none."""
    for name, part in model.named_modules():
        blocks = getattr(part, "blocks", None)
        if part is model or not isinstance(blocks, (nn.ModuleList, nn.Sequential)):
            continue
        try:
            get_blocks(part)
        except TypeError:
            continue
        # A stage of a hierarchical model has blocks, but nothing that turns images into tokens.
        others = (child for child in part.children() if child is not blocks)
        if any(isinstance(module, nn.Conv2d) for child in others for module in child.modules()):
            return (
                f", but its part `{name}` is a {type(part).__name__}, which has them: give that part instead"
            )
    return ""


def _is_convolutional(blocks: nn.ModuleList | nn.Sequential) -> bool:
    modules = list(blocks.modules())
    return any(isinstance(m, nn.Conv2d) for m in modules) and not any(
        isinstance(m, nn.Linear) for m in modules
    )


def _class_attention(model: nn.Module, blocks: nn.Module) -> str | None:
    """The name of the part beside `blocks` in which the class token joins; None where there is none."""
    for name, part in model.named_children():
        if part is not blocks and any(
            _CLASS_ATTENTION.search(type(each).__name__) for each in part.modules()
        ):
            return name
    return None


def _norm_widths(blocks: nn.ModuleList | nn.Sequential) -> list[int]:
    shapes = (getattr(getattr(block, "norm1", None), "normalized_shape", None) for block in blocks)
    return [int(shape[-1]) for shape in shapes if shape]
