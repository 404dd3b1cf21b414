"""VIPAMIN: a start for prompts, from what block by block a pretrained backbone makes of some images.

With the means over images of the tokens X [N_e, D] of the patches that enter a block, of their keys
K [N_e, d] (mean over heads too), and of the heads' outputs O [N, D] of all tokens, prompt j is

    (1 - weight) mean of the k rows of X whose keys are most similar (cosine) to the key of a_j
        + weight (P (W_V r_j + b_V) - b_V) W_V^{-T},  P = I - Q Q^T,  Q from the QR decomposition of O^T,

with random a_j and r_j, drawn as VPT draws prompts, the weights W_V and b_V of the values, and a
pseudo-inverse: a part like the tokens, and a part whose value lies outside of what attention gives already.

Source: Park et al., "VIPAMIN: Visual Prompt Initialization via Embedding Selection and Subspace Expansion",
NeurIPS 2025; one batch of 256 images, k from 2, 8, 32 and 128. k = 8 and weight = 0.1 are our defaults. The
released code multiplies by the pseudo-inverse where its transpose is meant. Nothing more is learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch
from timm.models.vision_transformer import Attention, Block  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional as F

from spt_fast.backbones.anatomy import (
    block_input_hooks,
    embed_dim,
    get_blocks,
    image_dtype,
    num_prefix_tokens,
    patch_size,
)
from spt_fast.backbones.snapshot import placement
from spt_fast.data.batches import image_batches
from spt_fast.methods.base import check_takeable
from spt_fast.support.arguments import check_choice, check_int, check_number, check_seed
from spt_fast.support.modes import evaluation_mode

VIPAMIN_IMAGES = 256


class _Means(NamedTuple):
    """Of one block, in float64."""

    tokens: Tensor
    keys: Tensor
    outputs: Tensor


def vipamin_prompts(
    model: nn.Module,
    loader: Iterable[Any],
    num_prompts: int = 20,
    *,
    depth: Literal["deep", "shallow"] = "deep",
    k: int = 8,
    weight: float = 0.1,
    max_images: int = VIPAMIN_IMAGES,
    seed: int = 0,
) -> Tensor:
    """What prompts may start from, [L or 1, N_p, D] in float32 on the CPU: `tune(model, name, prompts=...)`.

    Args:
        model: a Vision Transformer of timm, of plain blocks; it comes back as it was.
        loader: batches of images, as in `build_prototypes`.
        depth: "deep", for every block, or "shallow", for the first.
        k: how many patches of an image a prompt is the mean of.
        weight: of the second part, from 0 to 1.
        max_images: how many images are looked at.
        seed: of what is drawn; the caller's random state is not touched.

    Raises:
        TypeError: a block is no plain one of timm's ViT, or an argument is of the wrong type.
        ValueError: an argument is out of range, the loader is empty; there are as many tokens as channels, so
            that nothing lies outside of what attention gives (not with `weight=0`).
    """
    check_vipamin(model, num_prompts, depth=depth, k=k, weight=weight, max_images=max_images)
    generator = torch.Generator().manual_seed(check_seed(seed))
    blocks: list[Any] = list(get_blocks(model))[: 1 if depth == "shallow" else None]
    height, width = patch_size(model)
    bound = math.sqrt(6 / (3 * height * width + embed_dim(model)))
    means = _means(model, blocks, loader, max_images)
    prompts = []
    for block, of_block in zip(blocks, means, strict=True):
        shape = (2, num_prompts, embed_dim(model))
        anchors, others = (
            torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") * (2 * bound) - bound
        )
        found = (1 - weight) * _alike(block, of_block, anchors, k)
        if weight > 0:
            found = found + weight * _outside(block, of_block, others)
        prompts.append(found)
    return torch.stack(prompts).float()


def check_vipamin(
    model: nn.Module,
    num_prompts: int = 20,
    *,
    depth: Literal["deep", "shallow"] = "deep",
    k: int = 8,
    weight: float = 0.1,
    max_images: int = VIPAMIN_IMAGES,
) -> None:
    """Raise what `vipamin_prompts` would, as far as it is known without images."""
    check_takeable(model)
    check_choice("depth", depth, ("deep", "shallow"))
    for name, value in (("num_prompts", num_prompts), ("k", k), ("max_images", max_images)):
        check_int(name, value, 1)
    if check_number("weight", weight, 0) > 1:
        raise ValueError(f"weight must be a number from 0 to 1, got {weight}")
    blocks: list[Any] = list(get_blocks(model))[: 1 if depth == "shallow" else None]
    for number, block in enumerate(blocks, start=1):
        if type(block) is not Block or type(block.attn) is not Attention:
            raise TypeError(
                f"model must have plain blocks of timm's ViT, but block {number} is {type(block).__name__}"
            )


def _alike(block: Any, means: _Means, anchors: Tensor, k: int) -> Tensor:
    """Means of the k tokens whose keys are most similar to those of `anchors`, [N_p, D]."""
    if k > len(means.tokens):
        raise ValueError(f"k must be at most {len(means.tokens)}, the patches of an image, got {k}")
    weight = block.attn.qkv.weight
    keys = _heads(block, anchors.to(weight.device, weight.dtype)[None])[1].mean(1)[0].double().cpu()
    similar = F.normalize(keys, dim=-1) @ F.normalize(means.keys, dim=-1).T
    return means.tokens[similar.topk(k).indices].mean(1)


def _outside(block: Any, means: _Means, others: Tensor) -> Tensor:
    """Prompts [N_p, D] whose values are those of `others` without what lies in the span of the outputs."""
    count, width = means.outputs.shape
    if count >= width:
        raise ValueError(
            f"weight must be 0 for this model: outputs of its {count} tokens may span all {width} channels"
        )
    weight = block.attn.qkv.weight.detach()[-width:].double().cpu()
    bias = block.attn.qkv.bias
    bias = weight.new_zeros(width) if bias is None else bias.detach()[-width:].double().cpu()
    basis, _ = torch.linalg.qr(means.outputs.T)
    values = others @ weight.T + bias
    values = values - values @ basis @ basis.T
    found: Tensor = (values - bias) @ torch.linalg.pinv(weight).T
    return found


def _heads(block: Any, x: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, H, N, d] of tokens [B, N, D]."""
    packed = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1))
    return tuple(packed.permute(2, 0, 3, 1, 4).unbind(0))


@torch.no_grad()
def _means(model: nn.Module, blocks: list[Any], loader: Iterable[Any], max_images: int) -> list[_Means]:
    sums: list[list[Tensor]] = [[] for _ in blocks]
    prefix, count = num_prefix_tokens(model), 0

    def take_in(index: int, x: Tensor) -> None:
        block = blocks[index]
        q, k, v = _heads(block, x)
        mixed = F.scaled_dot_product_attention(block.attn.q_norm(q), block.attn.k_norm(k), v)
        outputs = mixed.transpose(1, 2).flatten(2)
        found = [each.double().sum(0).cpu() for each in (x[:, prefix:], k.mean(1)[:, prefix:], outputs)]
        sums[index] = found if not sums[index] else [a + b for a, b in zip(sums[index], found, strict=True)]

    with evaluation_mode(model), block_input_hooks(blocks, take_in):
        for images in image_batches(loader, max_images):
            count += len(images)
            model(images.to(placement(model)[0], image_dtype(model)))
    if count == 0:
        raise ValueError("loader must give at least one batch of images, got none")
    return [_Means(*(each / count for each in of_block)) for of_block in sums]
