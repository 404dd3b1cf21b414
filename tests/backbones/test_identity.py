"""The fingerprint: the same for the same weights wherever and however they lie, another for other weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from spt_fast.backbones.identity import (
    check_backbone,
    describe,
    describe_norm,
    fingerprint,
    readable,
    same_weights,
)

MakeViT = Callable[..., VisionTransformer]


def randomised(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def same(first: nn.Module, second: nn.Module) -> bool:
    return same_weights(describe(first)["fingerprint"], describe(second)["fingerprint"])


@pytest.mark.parametrize("scale", [1.0, 1e-4])
@pytest.mark.parametrize("seed", range(5))
def test_casts_leave_it_the_same(seed: int, scale: float, make_vit: MakeViT) -> None:
    """Two roundings meet where a model in bfloat16 is compared with one in float16."""
    model = randomised(make_vit(), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    casts = [copy.deepcopy(model).to(d) for d in (torch.bfloat16, torch.float16, torch.float64)]
    for first in (model, *casts):
        for second in (model, *casts):
            assert same(first, second)
            assert same_weights(*(describe_norm(each)["norm_fingerprint"] for each in (first, second)))


@pytest.mark.parametrize("seed", range(5))
def test_a_change_of_half_a_percent_is_seen(seed: int, make_vit: MakeViT) -> None:
    first, second = (randomised(make_vit()) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1 + 0.005 * torch.randn(parameter.shape, generator=generator))
    assert not same(first, second)


@pytest.mark.parametrize("name", ["cls_token", "patch_embed.proj.bias", "blocks.2.norm1.bias"])
def test_a_change_of_one_tensor_is_seen(name: str, make_vit: MakeViT) -> None:
    first, second = (randomised(make_vit()) for _ in range(2))
    with torch.no_grad():
        second.get_parameter(name).mul_(1.02)
    assert not same(first, second)
    assert describe_norm(first) == describe_norm(second)


def test_head_and_norm_do_not_count(make_vit: MakeViT) -> None:
    first = randomised(make_vit())
    second = randomised(make_vit())
    nn.init.zeros_(second.head.weight)
    assert describe(first) == describe(second)
    assert describe_norm(first) == describe_norm(second)
    nn.init.ones_(second.norm.weight)
    assert same(first, second)
    assert describe_norm(first) != describe_norm(second)


def test_order_in_memory_and_trainability_do_not_count(make_vit: MakeViT) -> None:
    model = randomised(make_vit())
    before = describe(model)
    model.to(memory_format=torch.channels_last).requires_grad_(False)
    assert describe(model) == before


def test_weights_that_cannot_be_read_have_none(make_vit: MakeViT) -> None:
    class Packed(torch.Tensor):
        pass

    assert "fingerprint" not in describe(make_vit().to("meta"))
    assert fingerprint([torch.ones(3).as_subclass(Packed)]) is None
    assert fingerprint([]) is None


def test_broken_weights_are_not_taken_for_others() -> None:
    fine, broken = torch.ones(8), torch.full((8,), float("nan"))
    marks = [fingerprint([each]) or "" for each in (fine, broken, broken.clone())]
    assert all(marks)
    assert same_weights(marks[1], marks[2])
    assert not same_weights(marks[0], marks[1])


def test_number_of_heads_counts(make_vit: MakeViT) -> None:
    """The weights do not tell it, and MoCo-v3's ViT-S has twice as many as timm's."""
    facts = describe(make_vit(num_heads=2))
    with pytest.raises(ValueError, match=r"file is for num_heads '2', but this model has '4'; .* allow_"):
        check_backbone("file", facts, make_vit(num_heads=4))
    check_backbone("file", facts, make_vit(num_heads=4), allow_other_backbone=True)


def test_shape_of_the_prompts_counts_whatever_is_allowed(make_vit: MakeViT) -> None:
    with pytest.raises(ValueError, match=r"file is for num_blocks '3', but this model has '2'$"):
        check_backbone("file", describe(make_vit()), make_vit(depth=2), allow_other_backbone=True)


@pytest.mark.parametrize("mark", ["", "no base64 !", "AAA", "AAAA"])
def test_a_damaged_fingerprint_is_refused(mark: str, make_vit: MakeViT) -> None:
    model = make_vit()
    facts = {**describe(model), "fingerprint": mark}
    for allow in (False, True):
        with pytest.raises(ValueError, match=r"^p is damaged: its fingerprint is none of weights, got '"):
            check_backbone("p", facts, model, allow_other_backbone=allow)


def test_name_counts_only_where_a_fingerprint_is_missing(make_vit: MakeViT) -> None:
    model = make_vit()
    model.pretrained_cfg = {"architecture": "vit_toy"}
    facts = {**describe(model), "architecture": "another"}
    check_backbone("file", facts, model)
    del facts["fingerprint"]
    with pytest.raises(ValueError, match="file is for architecture 'another', but this model has 'vit_toy'"):
        check_backbone("file", facts, model)


def test_readable_facts_are_short(make_vit: MakeViT) -> None:
    facts = readable(describe(make_vit()))
    assert len(facts["fingerprint"]) == 8
    assert facts["num_blocks"] == "3"
