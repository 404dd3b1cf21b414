"""Groups for an optimiser: what is in each, its rate, its decay, and the default rate of prompts."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from spt_fast import PromptedViT
from spt_fast.methods.parameter_groups import PROMPT_LR_FACTOR, default_prompt_lr, parameter_groups


def by_name(groups):
    return {group["name"]: group for group in groups}


def rms(tensor):
    return tensor.detach().double().square().mean().sqrt().item()


def test_groups_of_a_prompted_vit(vit):
    tuned = PromptedViT(vit, 3, num_classes=5)
    groups = by_name(tuned.parameter_groups(0.02, 0.5, weight_decay=0.3))
    assert list(groups) == ["head", "no_decay", "prompts"]
    assert groups["head"]["params"] == [tuned.head.weight]
    assert groups["no_decay"]["params"] == [tuned.head.bias]
    assert len(groups["prompts"]["params"]) == 1
    assert groups["prompts"]["params"][0] is tuned.prompts
    assert [group["lr"] for group in groups.values()] == [0.02, 0.02, 0.5]
    assert [group["weight_decay"] for group in groups.values()] == [0.3, 0.0, 0.3]
    learned = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(learned) == sorted(map(id, tuned.trainable_parameters()))


def test_head_may_decay_otherwise(vit):
    tuned = PromptedViT(vit, 3, num_classes=5)
    vit.patch_embed.proj.weight.requires_grad_(True)
    groups = by_name(tuned.parameter_groups(0.02, weight_decay=0.1, head_weight_decay=0.5))
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "head": 0.5,
        "others": 0.1,
        "no_decay": 0.0,
        "prompts": 0.1,
    }
    assert groups["others"]["params"] == [vit.patch_embed.proj.weight]
    with pytest.raises(ValueError, match="head_weight_decay needs a part `head`, which Linear has not"):
        parameter_groups(nn.Linear(2, 2), 0.1, head_weight_decay=0.5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_default_rate_grows_with_lr_and_the_length_of_the_prompts(make_vit, scale):
    prompts = scale * torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    tuned = PromptedViT(make_vit(embed_dim=32, depth=2), prompts, num_classes=5)
    rate = by_name(tuned.parameter_groups(0.02))["prompts"]["lr"]
    assert rate == pytest.approx(PROMPT_LR_FACTOR * 0.02 * rms(prompts))
    assert rate == default_prompt_lr(0.02, [tuned.prompts])


def test_a_step_of_adamw_turns_short_and_long_prompts_alike(make_vit):
    """What the default is for: blocks see directions only."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 32, generator=generator)
    images, labels = torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)
    turned = []
    for scale in (1.0, 8.0):
        torch.manual_seed(0)
        tuned = PromptedViT(make_vit(embed_dim=32, depth=2), scale * start, num_classes=5)
        nn.init.normal_(tuned.head.weight)
        optimizer = torch.optim.AdamW(tuned.parameter_groups(3e-3, weight_decay=0.0), eps=1e-20)
        nn.functional.cross_entropy(tuned(images), labels).backward()
        optimizer.step()
        turned.append(torch.cosine_similarity(tuned.prompts.detach(), start, dim=-1))
    assert (turned[0] < 0.999).all()
    torch.testing.assert_close(*turned, rtol=0, atol=2e-4)


def test_prompts_without_length_have_the_rate_of_the_head(make_vit):
    tuned = PromptedViT(make_vit(embed_dim=32, depth=2), torch.zeros(2, 3, 32), num_classes=5)
    assert by_name(tuned.parameter_groups(0.02))["prompts"]["lr"] == 0.02
    assert default_prompt_lr(0.02, []) == 0.02


def test_groups_hold_only_what_learns(vit):
    frozen = PromptedViT(vit, 3, num_classes=5, freeze_prompts=True)
    assert list(by_name(frozen.parameter_groups(0.02))) == ["head", "no_decay"]
    frozen.requires_grad_(False)
    assert frozen.parameter_groups(0.02) == []
    frozen.release()
    without = PromptedViT(vit, 0, num_classes=5)
    assert list(by_name(without.parameter_groups(0.02))) == ["head", "no_decay"]
    without.release()
    features = PromptedViT(vit, 3, num_classes=0)
    assert list(by_name(features.parameter_groups(0.02))) == ["prompts"]


def test_groups_of_a_wrapped_model_and_of_any_module(vit):
    tuned = PromptedViT(vit, 3, num_classes=5)
    wrapped = nn.ModuleDict({"module": tuned, "more": nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))})
    groups = by_name(parameter_groups(wrapped, 0.02))
    assert groups["prompts"]["params"][0] is tuned.prompts
    assert groups["prompts"]["lr"] == tuned.parameter_groups(0.02)[-1]["lr"]
    # Where the head lies is not known of a module that only holds such a model.
    assert [tuple(parameter.shape) for parameter in groups["others"]["params"]] == [(5, 32), (2, 4)]
    assert [tuple(parameter.shape) for parameter in groups["no_decay"]["params"]] == [
        (5,),
        (4,),
        (4,),
        (2,),
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr must be a finite number > 0, got 0.0"),
        ({"lr": 0.1, "prompt_lr": -1}, ValueError, "prompt_lr must be a finite number > 0, got -1"),
        ({"lr": 0.1, "prompt_lr": "1"}, TypeError, "prompt_lr must be a finite number > 0, got '1'"),
        (
            {"lr": 0.1, "weight_decay": math.nan},
            ValueError,
            "weight_decay must be a finite number >= 0, got nan",
        ),
    ],
    ids=str,
)
def test_bad_numbers_are_named(vit, options, error, message):
    tuned = PromptedViT(vit, 1, num_classes=2)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        tuned.parameter_groups(**options)
