"""SSF against the formula; folded into the weights; the models that it cannot take."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from timm.layers import RmsNorm
from timm.models import beit, eva
from torch import Tensor, nn

import spt_fast

FLAVOURS_TO_MERGE = {
    "plain": {},
    "no-biases": {
        "qkv_bias": False,
        "proj_bias": False,
        "pre_norm": True,
        "norm_layer": partial(nn.LayerNorm, bias=False),
    },
    "average": {"global_pool": "avg", "init_values": 0.4},
    "normed-patches": {"embed_norm_layer": nn.LayerNorm, "qk_norm": True},
    "attention-pool": {"global_pool": "map", "class_token": False},
    "dynamic-size": {"dynamic_img_size": True},
}


def test_outputs_and_gradients_are_those_of_the_formula(pair, book, flavour):
    both = pair("ssf", {**flavour, "init_values": 0.5})
    operations = both.tuned.operations

    def after(name: str, y: Tensor) -> Tensor:
        learned = operations[name.replace(".", "-")]
        return learned.scale * y + learned.shift

    def block(index: int, block: nn.Module, x: Tensor) -> Tensor:
        here = f"blocks.{index}."
        z = after(here + "norm1", block.norm1(x))
        batch, length, width = z.shape
        packed = after(here + "attn.qkv", block.attn.qkv(z))
        q, k, v = packed.reshape(batch, length, 3, 2, 16).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
        x = x + block.ls1(after(here + "attn.proj", block.attn.proj(mixed)))
        z = after(here + "norm2", block.norm2(x))
        hidden = block.mlp.act(after(here + "mlp.fc1", block.mlp.fc1(z)))
        return x + block.ls2(after(here + "mlp.fc2", block.mlp.fc2(hidden)))

    plain, averages = both.plain, flavour.get("global_pool") == "avg"
    tokens = book.vit(plain, both.images, block, partial(after, "patch_embed"))
    if not averages:
        tokens = after("norm", tokens)
        both.check(plain.forward_head(tokens))
        return
    pooled = after("fc_norm", plain.fc_norm(plain.pool(tokens)))
    both.check(plain.head(pooled))


@pytest.mark.parametrize("name", FLAVOURS_TO_MERGE)
def test_merges_into_the_weights(check, name):
    check.merge("ssf", {}, **FLAVOURS_TO_MERGE[name])


def test_merges_norms_without_a_bias_not_at_all(make_vit, make_images):
    model = make_vit(norm_layer=RmsNorm).eval()
    tuned = spt_fast.tune(model, "ssf", num_classes=3)
    logits = tuned(make_images())
    with pytest.raises(ValueError, match=r"a weight and a bias in `blocks\.0\.norm1`, which RmsNorm"):
        tuned.merge()
    assert torch.equal(tuned(make_images()), logits)


def test_starts_from_normal_distributions(make_vit):
    tuned = spt_fast.tune(make_vit(embed_dim=64, depth=12), "ssf")
    for name, mean in (("scale", 1.0), ("shift", 0.0)):
        found = torch.cat([getattr(each, name).detach() for each in tuned.operations.values()])
        assert found.mean().item() == pytest.approx(mean, abs=1e-3)
        assert found.std().item() == pytest.approx(0.02, rel=0.03)


def test_counts(count):
    """22 D L + 4 D, and the paper's columns, means over the tasks with heads of 234.6 and 49.47 classes."""
    found = count("ssf")
    assert found == {"B": 205_824, "L": (22 * 24 + 4) * 1024, "H": (22 * 32 + 4) * 1280}
    paper = pytest.approx(0.39, abs=0.005), pytest.approx(0.24, abs=0.005)
    assert tuple((found["B"] + 769 * classes) / 1e6 for classes in (1173 / 5, 940 / 19)) == paper


def test_files_and_release(check):
    check.life("ssf")


def test_half_precision_checkpointing_and_compile(check):
    check.variants("ssf")


def test_learns(check):
    check.learns("ssf")


def test_refuses_what_it_cannot_take(check, make_vit):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    check.refused(beit.Beit(**sizes, qkv_bias=True), "needs an attention that calls its `qkv`", "ssf")
    check.refused(eva.Eva(**sizes, qkv_fused=False), "needs a part `attn.qkv` .Linear.* has none", "ssf")
    check.refused(make_vit(final_norm=False), "a final norm, `norm` or `fc_norm`", "ssf")
    check.refused(make_vit(), "'bottleneck' is no option of method 'ssf'.*adapter", "ssf", bottleneck=2)
