"""`PromptedViT` answers as timm's models do: features of every block, classifier, widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
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


@pytest.mark.parametrize(
    "name", ["get_classifier", "forward_features", "forward_head", "forward_intermediates"]
)
def test_what_a_model_lacks_is_named(name: str, make_vit: MakeViT, images: Tensor) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = make_vit()
            self.blocks, self.patch_embed, self.head = inner.blocks, inner.patch_embed, inner.head
            self.num_prefix_tokens = 0

    tuned = PromptedViT(Plain(), 2)
    with pytest.raises(TypeError, match=f"model must have timm's `{name}`, which Plain lacks"):
        getattr(tuned, name)(*([] if name == "get_classifier" else [images]))


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"indices": [9]}, ValueError, r"indices must be from -3 to 2, got 9"),
        ({"indices": [0, -4]}, ValueError, r"indices must be from -3 to 2, got -4"),
        ({"indices": 9}, ValueError, "indices must be at most 3, the number of blocks, got 9"),
        ({"indices": 0}, ValueError, r"indices must be an integer >= 1 \(as many last blocks\).* got 0"),
        ({"indices": []}, ValueError, r"indices must name at least one block, got \[\]"),
        ({"indices": "x"}, TypeError, r"indices must be integers, such as \[0, -1\], or None, got 'x'"),
        ({"indices": 1.5}, TypeError, "indices must be integers, .* got 1.5"),
        ({"indices": [0.5]}, TypeError, r"indices must be integers, .* got \[0.5\]"),
        ({"indices": [True]}, TypeError, r"indices must be integers, .* got \[True\]"),
        ({"output_fmt": "NHWC"}, ValueError, "output_fmt must be one of 'NCHW', 'NLC', got 'NHWC'"),
        ({"norm": "no"}, TypeError, "norm must be True or False, got 'no'"),
    ],
    ids=str,
)
def test_wrong_arguments_for_intermediates_are_named(
    options: dict[str, Any], error: type[Exception], message: str, depth: Any, vit: nn.Module, images: Tensor
) -> None:
    tuned = PromptedViT(vit, 2, depth=depth)
    with pytest.raises(error, match=message):
        tuned.forward_intermediates(images, **options)


def test_indices_may_be_numpys_or_a_generator(make_vit: MakeViT, images: Tensor) -> None:
    tuned = PromptedViT(make_vit(), 2).eval()
    expected = tuned.forward_intermediates(images, indices=[1, 2])
    for indices in (np.int64(2), np.array([1, -1]), (number for number in (1, 2))):
        assert_same(tuned.forward_intermediates(images, indices=indices), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(2, 5, 31), ValueError, r"tokens must be \[B, N, 32\], got \[2, 5, 31\]"),
        (torch.zeros(2, 32), ValueError, r"tokens must be \[B, N, 32\], got \[2, 32\]"),
        (torch.zeros(2, 5, 32, dtype=torch.int64), TypeError, "tokens must be a floating-point tensor"),
        (np.zeros((2, 5, 32)), TypeError, "tokens must be a tensor, got ndarray"),
    ],
    ids=str,
)
def test_wrong_tokens_for_the_head_are_named(
    tokens: Any, error: type[Exception], message: str, vit: nn.Module
) -> None:
    with pytest.raises(error, match=message):
        PromptedViT(vit, 2).forward_head(tokens)


def test_width_and_classifier_are_the_models(make_vit: MakeViT) -> None:
    tuned = PromptedViT(make_vit(), 2, num_classes=7)
    assert (tuned.num_features, tuned.num_classes) == (32, 7)
    assert tuned.get_classifier() is tuned.model.head is tuned.head
    tuned.release()
    with pytest.raises(RuntimeError, match="released"):
        tuned.get_classifier()
    for name in ("num_features", "num_classes", "pretrained_cfg"):
        with pytest.raises(RuntimeError, match="released"):
            getattr(tuned, name)
