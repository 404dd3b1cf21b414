"""Skip flows against the formula; the start; the blocks that have no skips to reach."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor

import spt_fast


def formula(flow: Any, x: Tensor, num_flows: int) -> Tensor:
    z = flow.shift + flow.log_scale.exp() * x
    for k in range(num_flows):
        z = z + flow.directions[k] * torch.tanh(z @ flow.weights[k] + flow.biases[k])[..., None]
    return z


@pytest.mark.parametrize("num_flows", [0, 1, 3])
def test_outputs_and_gradients_are_those_of_the_formula(pair, book, flavour, num_flows):
    both = pair("snf", {**flavour, "init_values": 0.5}, num_flows=num_flows)
    flows = both.tuned.flows

    def block(index: int, block: Any, x: Tensor) -> Tensor:
        x = formula(flows[2 * index], x, num_flows) + block.ls1(book.attention(block.attn, block.norm1(x)))
        return formula(flows[2 * index + 1], x, num_flows) + block.ls2(block.mlp(block.norm2(x)))

    both.check(both.plain.forward_head(book.vit(both.plain, both.images, block)))


SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Beit(**SIZES, init_values=0.5, use_rel_pos_bias=True),
        lambda: Beit(**SIZES, init_values=None, use_shared_rel_pos_bias=True),
        lambda: Eva(**SIZES, init_values=0.5, use_rot_pos_emb=True, ref_feat_shape=(4, 4)),
        lambda: Eva(**SIZES, swiglu_mlp=True, qkv_fused=False),
    ],
    ids=["beit", "beit-shared-bias", "eva-rope", "eva-separate"],
)
def test_eva_and_beit_have_the_same_skips(make, make_images):
    """The branch of a part is what timm's own block adds to its input; the flows are on the rest."""
    torch.manual_seed(3)
    plain, images = make().double().eval(), make_images(2).double()
    tuned = spt_fast.tune(copy.deepcopy(plain), "snf", num_flows=0).eval()
    before = plain.forward_features(images)
    torch.testing.assert_close(tuned.forward_features(images), before)
    with torch.no_grad():
        for flow in tuned.flows:
            flow.shift.normal_(std=0.1)
            flow.log_scale.normal_(std=0.1)
    for index, block in enumerate(plain.blocks):
        for part, flow in zip(("norm1", "norm2"), tuned.flows[2 * index : 2 * index + 2], strict=True):
            swap_skip(block, part, flow)
    found = tuned.forward_features(images)
    torch.testing.assert_close(found, plain.forward_features(images))
    assert (found - before).abs().max() > 0.01


def swap_skip(block: Any, part: str, flow: Any) -> None:
    """Let `block` add F(x) instead of x: what enters its drop path gets F(x) - x on top."""
    entered: list[Tensor] = []
    getattr(block, part).register_forward_pre_hook(lambda _, args: entered.append(args[0]))

    def add(_: Any, args: Any, branch: Tensor) -> Tensor:
        x = entered.pop()
        return branch + formula(flow, x, 0) - x

    getattr(block, f"drop_path{part[-1]}").register_forward_hook(add)


def test_starts_as_the_model_or_near_it(make_vit, make_images):
    expected = make_vit().eval()(make_images())
    assert torch.equal(spt_fast.tune(make_vit(), "snf", num_flows=0).eval()(make_images()), expected)
    tuned = spt_fast.tune(make_vit(), "snf", num_flows=16).eval()
    for flow in tuned.flows:
        drawn = torch.cat([flow.directions.flatten(), flow.weights.flatten(), flow.biases])
        assert drawn.abs().max() <= 0.01
        assert drawn.std().item() == pytest.approx(0.01 / 3**0.5, rel=0.1)
    assert 0 < (tuned(make_images()) - expected).abs().max() < 0.05


def test_drops_paths_as_timm_does(make_vit, make_images):
    from spt_fast.training.drop_path import stochastic_depth

    tuned = spt_fast.tune(make_vit(), "snf", num_classes=3).train()
    before = tuned(make_images())
    with stochastic_depth(tuned, 0.5):
        assert not torch.equal(tuned(make_images()), before)
    assert torch.equal(tuned(make_images()), before)


def test_counts(count):
    """2 L (2 D + K (2 D + 1)), and the paper's columns, cut and not rounded: K = 1 for FGVC, 6 for VTAB."""
    expected = {0: 36_864, 1: 73_752, 6: 258_192, 16: 627_072}
    for num_flows, number in expected.items():
        sizes = {"B": (768, 12), "L": (1024, 24), "H": (1280, 32)}
        formula = {
            name: 2 * blocks * (2 * width + num_flows * (2 * width + 1))
            for name, (width, blocks) in sizes.items()
        }
        assert formula["B"] == number
        if num_flows in (0, 6):
            assert count("snf", num_flows=num_flows) == formula
    paper = [int((expected[k] + 769 * classes) / 1e4) / 100 for k, classes in ((1, 1173 / 5), (6, 940 / 19))]
    assert paper == [0.25, 0.29]


@pytest.mark.parametrize("num_flows", [0, 2])
def test_files_and_release(check, num_flows):
    check.life("snf", num_flows=num_flows)


def test_half_precision_checkpointing_and_compile(check):
    check.variants("snf", num_flows=2)


def test_learns(check):
    check.learns("snf")


def test_refuses_what_it_cannot_take(check, make_vit):
    message = "snf needs blocks that run as timm's Block .* but block 1 is a ResPostBlock"
    check.refused(make_vit(block_fn=ResPostBlock), message, "snf")
    check.refused(make_vit(), "num_flows must be an integer >= 0", "snf", num_flows=-1)
    check.refused(make_vit(), "'k' is no option of method 'snf', which has num_flows", "snf", k=1)


def test_cannot_be_merged(vit):
    with pytest.raises(ValueError, match="merge is for methods that end in plain weights, which 'snf'"):
        spt_fast.tune(vit, "snf").merge()
