"""`PromptedViT` answers as timm's models do: features of every block, classifier, widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast import PromptedViT

MakeViT = Callable[..., VisionTransformer]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"indices": 2},
    {"indices": [0, -1], "norm": True},
    {"indices": [1], "stop_early": True},
    {"indices": [0, 1], "intermediates_only": True},
    {"return_prefix_tokens": True, "output_fmt": "NLC"},
    {"return_prefix_tokens": True},
    {"output_dict": True, "return_prefix_tokens": True},
    {"output_dict": True, "intermediates_only": True},
]


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 32)


def assert_same(found: Any, expected: Any) -> None:
    """Nested lists, tuples and dicts of tensors."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name])
    else:
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_without_prompts_intermediates_are_timms(
    options: dict[str, Any], make_vit: MakeViT, flavour: dict[str, Any], images: Tensor
) -> None:
    model = make_vit(**flavour).eval()
    expected = model.forward_intermediates(images, **options)
    assert_same(PromptedViT(model, 0).forward_intermediates(images, **options), expected)


@pytest.mark.parametrize("flavour_name", ["class-token", "no-prefix"])
@pytest.mark.parametrize(
    "kind",
    [{"engine": "kv"}, {"engine": "concat"}, {"depth": "shallow"}, {"pool_prompts": True}],
    ids=lambda kind: "-".join(map(str, *kind.items())),
)
def test_with_prompts_they_are_what_leaves_the_blocks(
    kind: dict[str, Any], flavour_name: str, make_vit: MakeViT, images: Tensor
) -> None:
    prefix = 1 if flavour_name == "class-token" else 0
    model = make_vit(class_token=prefix == 1, global_pool="avg")
    tuned = PromptedViT(model, 4, num_classes=3, **kind).eval()
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: seen.append(call[2])) for block in model.blocks]
    features, maps = tuned.forward_intermediates(images)
    for hook in hooks:
        hook.remove()
    patches = [tokens[:, prefix : prefix + 16] for tokens in seen]
    assert len(seen) == 3
    for found, expected in zip(maps, patches, strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected.mT.reshape(2, 32, 4, 4))
    torch.testing.assert_close(features, tuned.forward_features(images))
    pairs = tuned.forward_intermediates(
        images, indices=[0], return_prefix_tokens=prefix == 1, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(pairs[0][0] if prefix else pairs[0], patches[0])
    early, _ = tuned.forward_intermediates(images, indices=[0], stop_early=True)
    torch.testing.assert_close(early, model.norm(seen[0][:, : prefix + 16]))
    assert not torch.equal(maps[0], PromptedViT(make_vit(), 0).forward_intermediates(images)[1][0])


def test_intermediates_of_other_families_and_sizes() -> None:
    rotary = timm.create_model("eva02_tiny_patch14_224", depth=2, img_size=28, num_classes=0)
    tuned = PromptedViT(rotary, 3, num_classes=2).eval()
    (found,) = tuned.forward_intermediates(torch.rand(1, 3, 28, 28), indices=[-1], intermediates_only=True)
    assert found.shape == (1, 192, 2, 2)


def test_intermediates_carry_gradients_to_the_prompts(make_vit: MakeViT, images: Tensor) -> None:
    tuned = PromptedViT(make_vit(), 4, num_classes=3, depth="shallow")
    _, maps = tuned.forward_intermediates(images, indices=[0])
    maps[0].square().sum().backward()
    assert tuned.prompts.grad is not None
    assert float(tuned.prompts.grad.abs().min()) > 0


def test_intermediates_of_a_model_without_them_are_refused(make_vit: MakeViT, images: Tensor) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = make_vit()
            self.blocks, self.patch_embed, self.head = inner.blocks, inner.patch_embed, inner.head
            self.num_prefix_tokens = 0

    tuned = PromptedViT(Plain(), 2)
    with pytest.raises(TypeError, match="`forward_intermediates`, which Plain lacks"):
        tuned.forward_intermediates(images)


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_another_format_is_refused(depth: Any, make_vit: MakeViT, images: Tensor) -> None:
    with pytest.raises((ValueError, AssertionError), match="NCHW"):
        PromptedViT(make_vit(), 2, depth=depth).forward_intermediates(images, output_fmt="NHWC")


def test_width_and_classifier_are_the_models(make_vit: MakeViT) -> None:
    tuned = PromptedViT(make_vit(), 2, num_classes=7)
    assert (tuned.num_features, tuned.num_classes) == (32, 7)
    assert tuned.get_classifier() is tuned.model.head is tuned.head
    tuned.release()
    with pytest.raises(RuntimeError, match="released"):
        tuned.get_classifier()
