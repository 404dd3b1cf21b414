"""Attention maps: those of the textbook form, where prompts are tokens behind those of the image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from spt_fast import PromptedViT

MakeViT = Callable[..., VisionTransformer]
MakeImages = Callable[..., Tensor]

NUM_PROMPTS, TOKENS, DEPTH = 7, 17, 3


@pytest.fixture(scope="module")
def images(make_images: MakeImages) -> Tensor:
    return make_images(3)


def make_prompts(layers: int = DEPTH, width: int = 32) -> Tensor:
    return torch.randn(layers, NUM_PROMPTS, width, generator=torch.Generator().manual_seed(1))


def textbook(block: nn.Module, x: Tensor) -> Tensor:
    """Softmax weights of a plain block over all of x [B, N, D], in float64."""
    normed = nn.functional.layer_norm(
        x.double(), x.shape[-1:], block.norm1.weight.double(), block.norm1.bias.double(), block.norm1.eps
    )
    projected = normed @ block.attn.qkv.weight.double().T + block.attn.qkv.bias.double()
    q, k, _ = projected.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize("engine", ["kv", "concat"])
def test_matches_the_textbook(engine: Any, depth: Any, make_random: MakeViT, images: Tensor) -> None:
    if (engine, depth) == ("kv", "shallow"):
        engine = "auto"
    prompts = make_prompts(DEPTH if depth == "deep" else 1)
    tuned = PromptedViT(make_random(), prompts, depth=depth, engine=engine)
    inputs: list[Tensor] = []
    for block in tuned.prompted_blocks:
        block.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    maps = tuned.attention_maps(images)
    assert len(maps) == DEPTH
    for index, (weights, x) in enumerate(zip(maps, inputs, strict=True)):
        if depth == "deep" or index == 0:
            x = torch.cat((x, prompts[index].expand(3, -1, -1)), dim=1)
        expected = textbook(tuned.model.blocks[index], x)[:, :, :TOKENS]
        assert weights.shape == (3, 2, TOKENS, TOKENS + NUM_PROMPTS)
        torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"qk_norm": True}, {"reg_tokens": 4}, {"block_fn": ResPostBlock}, {"block_fn": ParallelThingsBlock}],
    ids=lambda options: next(iter(options)) + str(next(iter(options.values()))),
)
def test_matches_what_timm_computes_with_prompts_as_tokens(
    options: dict[str, Any], make_random: MakeViT, images: Tensor
) -> None:
    shown: list[Tensor] = []
    tuned = PromptedViT(make_random(**options), make_prompts(), engine="concat")
    attentions = [part for name, part in tuned.model.blocks.named_modules() if name.endswith(".attn")]
    for attention in attentions:
        attention.fused_attn = False
        attention.attn_drop.register_forward_hook(lambda _, __, output: shown.append(output))
    maps = tuned.attention_maps(images)
    per_block = len(shown) // DEPTH
    for index, weights in enumerate(maps):
        expected = torch.cat(shown[index * per_block : (index + 1) * per_block], dim=1)
        expected = expected[:, :, : weights.shape[2]]
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size"), [("beit_base_patch16_224", 32), ("eva02_tiny_patch14_224", 28)], ids=lambda value: value
)
def test_positions_are_those_of_the_image(name: str, size: int, images: Tensor) -> None:
    """Without prompts these are timm's own weights; prompts take their share from each row."""
    options = {"embed_dim": 32, "depth": DEPTH, "num_heads": 2, "img_size": size, "num_classes": 5}
    model = timm.create_model(name, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    shown: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
    hook = model.blocks[0].attn.attn_drop.register_forward_hook(lambda _, __, output: shown.append(output))
    model(images[..., :size, :size])
    hook.remove()
    tuned = PromptedViT(model, make_prompts(), engine="kv")
    (weights,) = tuned.attention_maps(images[..., :size, :size], layers=[0])
    of_tokens = weights[..., :-NUM_PROMPTS]
    torch.testing.assert_close(of_tokens / of_tokens.sum(-1, keepdim=True), shown[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_blocks_are_counted_as_in_python_and_nothing_stays(make_random: MakeViT, images: Tensor) -> None:
    tuned = PromptedViT(make_random(), make_prompts())
    with torch.no_grad():
        every = tuned.attention_maps(images)
        chosen = tuned.attention_maps(images, layers=(-1, 0, 0))
    assert [any(torch.equal(each, one) for one in every) for each in chosen] == [True] * 3
    assert torch.equal(chosen[0], every[2])
    assert not any(block._forward_pre_hooks for block in tuned.prompted_blocks)
    assert PromptedViT(make_random(), 0).attention_maps(images)[1].shape == (3, 2, TOKENS, TOKENS)


def test_runs_in_half_precision_and_learns(make_random: MakeViT, images: Tensor) -> None:
    tuned = PromptedViT(make_random(), make_prompts(), weight_dtype="bf16")
    weights = tuned.attention_maps(images, layers=[1])[0]
    weights[..., -NUM_PROMPTS:].sum().backward()
    assert tuned.prompts.grad is not None
    assert float(tuned.prompts.grad[1].abs().max()) > 0


def test_what_has_no_known_weights_is_refused(make_random: MakeViT, images: Tensor) -> None:
    tuned = PromptedViT(make_random(), make_prompts())
    with pytest.raises(ValueError, match="layers must be from -3 to 2, got 3"):
        tuned.attention_maps(images, layers=[3])
    with pytest.raises(TypeError, match=r"layers must be integers, such as \[0, -1\], or None, got \[0\.5\]"):
        tuned.attention_maps(images, layers=[0.5])
    with pytest.raises(TypeError, match="got 1"):
        tuned.attention_maps(images, layers=1)  # type: ignore[arg-type]
    for block_class in (ParallelScalingBlock, type("OwnBlock", (Block,), {})):
        other = PromptedViT(make_random(block_fn=block_class), make_prompts())
        with pytest.raises(TypeError, match="attention_maps needs blocks that the engine 'kv' knows, but"):
            other.attention_maps(images)
