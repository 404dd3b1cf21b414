"""Hooks on the parts of prompted blocks: they run as in timm, once, on the tokens of the image."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelThingsBlock, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from spt_fast import PromptedViT

MakeViT = Callable[..., VisionTransformer]
MakeImages = Callable[..., Tensor]

NUM_PROMPTS, TOKENS = 7, 17


@pytest.fixture(scope="module")
def images(make_images: MakeImages) -> Tensor:
    return make_images(3)


def make_prompts(layers: int = 3, width: int = 32) -> Tensor:
    return torch.randn(layers, NUM_PROMPTS, width, generator=torch.Generator().manual_seed(1))


def watch(part: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a part and their gradients, by the two hooks of pytorch-grad-cam."""
    activations: list[Tensor] = []
    gradients: list[Tensor] = []

    def save_activation(_: nn.Module, __: Any, output: Tensor) -> None:
        activations.append(output.detach())

    def save_gradient(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradients.insert(0, gradient.detach()))

    part.register_forward_hook(save_activation)
    part.register_forward_hook(save_gradient)
    return activations, gradients


def grad_cam(tuned: PromptedViT, images: Tensor) -> Tensor:
    """Grad-CAM [B, 4, 4] at `blocks[-1].norm1` for class 2, with the usual reshape of a ViT's tokens."""

    def reshape_transform(tokens: Tensor) -> Tensor:
        return tokens[:, 1:TOKENS].reshape(len(tokens), 4, 4, -1).permute(0, 3, 1, 2)

    activations, gradients = watch(tuned.model.blocks[-1].norm1)
    tuned(images.clone().requires_grad_())[:, 2].sum().backward()
    assert len(activations) == len(gradients) == 1
    weights = reshape_transform(gradients[0]).mean((2, 3), keepdim=True)
    return (weights * reshape_transform(activations[0])).sum(1).relu()


def test_grad_cam_at_the_last_norm1_equals_concats(make_random: MakeViT, images: Tensor) -> None:
    """The CAM has no head of its own: class 2 of the model's five."""
    maps = [
        grad_cam(PromptedViT(make_random(), make_prompts(), engine=engine), images)
        for engine in ("kv", "concat")
    ]
    assert maps[0].max() > 0
    torch.testing.assert_close(maps[0], maps[1], rtol=1e-4, atol=1e-5)


PARTS = (
    "norm1",
    "attn",
    "attn.qkv",
    "attn.q_norm",
    "attn.k_norm",
    "attn.proj",
    "attn.proj_drop",
    "ls1",
    "drop_path1",
    "norm2",
    "mlp",
    "mlp.fc1",
    "ls2",
    "drop_path2",
)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_every_part_shows_the_tokens_of_the_image_once(
    qk_norm: bool, make_random: MakeViT, images: Tensor
) -> None:
    """Outputs and gradients are those of "concat" at these tokens, where prompts are tokens behind them."""
    seen: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}
    for engine in ("kv", "concat"):
        tuned = PromptedViT(make_random(qk_norm=qk_norm), make_prompts(), engine=engine)
        seen[engine] = [watch(tuned.model.blocks[1].get_submodule(part)) for part in PARTS]
        tuned(images).square().sum().backward()
    for part, of_kv, of_concat in zip(PARTS, seen["kv"], seen["concat"], strict=True):
        for (kv,), (concat,) in zip(of_kv, of_concat, strict=True):
            tokens = -2 if part in ("attn.q_norm", "attn.k_norm") else 1
            assert kv.shape[tokens] == TOKENS, part
            expected = concat.narrow(tokens, 0, TOKENS)
            scale = float(expected.abs().max())
            torch.testing.assert_close(kv, expected, rtol=0, atol=1e-5 * scale, msg=part)


def test_hooks_run_in_every_block_that_takes_keys_and_values(make_random: MakeViT, images: Tensor) -> None:
    models = [
        make_random(block_fn=ResPostBlock),
        make_random(block_fn=ParallelThingsBlock),
        timm.create_model("beit_base_patch16_224", embed_dim=32, depth=3, num_heads=2, img_size=32),
        timm.create_model("eva02_tiny_patch14_224", embed_dim=32, depth=3, num_heads=2, img_size=28),
    ]
    for model in models:
        size = model.patch_embed.img_size[0]
        tuned = PromptedViT(model.eval(), make_prompts(), num_classes=5, engine="kv")
        attention = next(part for name, part in tuned.model.named_modules() if name.endswith(".attn"))
        (outputs, gradients), inputs = watch(attention), list[torch.Size]()
        attention.register_forward_pre_hook(lambda _, given, inputs=inputs: inputs.append(given[0].shape))
        tuned(images[..., :size, :size]).square().sum().backward()
        assert [each.shape for each in outputs] == inputs
        assert len(gradients) == 1


def test_a_hook_may_change_what_the_attention_returns(make_random: MakeViT, images: Tensor) -> None:
    both = []
    for engine in ("kv", "concat"):
        tuned = PromptedViT(make_random(), make_prompts(), engine=engine)
        hook = tuned.model.blocks[0].attn.register_forward_hook(lambda _, __, output: 2 * output)
        changed = tuned(images)
        hook.remove()
        assert not torch.allclose(changed, tuned(images))
        both.append(changed)
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_attention_weights_reach_a_hook_where_timm_does_not_fuse_them(
    make_random: MakeViT, images: Tensor
) -> None:
    shown, outputs = [], []
    for engine in ("kv", "concat"):
        tuned = PromptedViT(make_random(), make_prompts(), engine=engine)
        attention = tuned.model.blocks[0].attn
        expected = tuned(images)
        attention.fused_attn = False
        activations, _ = watch(attention.attn_drop)
        outputs.append(tuned(images))
        torch.testing.assert_close(outputs[-1], expected)
        shown.append(activations[0][:, :, :TOKENS])
    assert shown[0].shape == (3, 2, TOKENS, TOKENS + NUM_PROMPTS)
    torch.testing.assert_close(*shown)


def test_hooks_set_before_building_run_and_stay(make_random: MakeViT, images: Tensor) -> None:
    model = make_random()
    seen: list[torch.Size] = []
    model.blocks[0].attn.register_forward_hook(lambda _, __, output: seen.append(output.shape))
    tuned = PromptedViT(model, make_prompts())
    assert tuned.engine == "kv"
    tuned(images)
    tuned.release()(images)
    assert seen == [torch.Size([3, TOKENS, 32])] * 2


def test_release_gives_back_the_forward_of_each_attention(make_random: MakeViT, images: Tensor) -> None:
    model = make_random()
    expected = model(images)
    before = {name: set(vars(part)) for name, part in model.named_modules()}
    PromptedViT(model, make_prompts(), engine="kv").release()
    assert {name: set(vars(part)) for name, part in model.named_modules()} == before
    assert torch.equal(model(images), expected)


def test_a_copy_runs_its_own_attention(make_random: MakeViT, images: Tensor) -> None:
    tuned = PromptedViT(make_random(), make_prompts(), engine="kv")
    other = copy.deepcopy(tuned)
    seen: list[int] = []
    tuned.model.blocks[0].attn.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        other.prompts.zero_()
        other.model.blocks[0].attn.proj.weight.zero_()
    assert not torch.allclose(other(images), tuned(images))
    assert seen == [1]
