"""Adapters against the formula, in every style; what they start as; what learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.models import beit
from timm.models.vision_transformer import ParallelThingsBlock, VisionTransformer
from torch import Tensor, nn

import spt_fast

STYLES = ("houlsby", "pfeiffer", "parallel")


def formula(z: Tensor, adapter: nn.Module, scale: float) -> Tensor:
    hidden = z @ adapter.down.weight.T + adapter.down.bias
    return scale * (F.gelu(hidden) @ adapter.up.weight.T + adapter.up.bias)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("of", [{}, {"init_values": 0.5, "reg_tokens": 2}, {"global_pool": "avg"}])
def test_outputs_and_gradients_are_those_of_the_formula(pair, book, style, of):
    both = pair("adapter", of, style=style, bottleneck=5, scale=0.7)
    adapters = list(both.tuned.adapters)

    def block(index: int, block: nn.Module, x: Tensor) -> Tensor:
        y = book.attention(block.attn, block.norm1(x))
        if style == "houlsby":
            y = y + formula(y, adapters[2 * index], 0.7)
        x = x + block.ls1(y)
        z = block.norm2(x)
        y = block.mlp(z)
        adapter = adapters[2 * index + 1] if style == "houlsby" else adapters[index]
        return x + block.ls2(y + formula(z if style == "parallel" else y, adapter, 0.7))

    both.check(both.plain.forward_head(book.vit(both.plain, both.images, block)))


def test_runs_on_every_flavour(pair, book, flavour):
    both = pair("adapter", flavour)
    adapters = both.tuned.adapters

    def block(index: int, block: nn.Module, x: Tensor) -> Tensor:
        x = x + book.attention(block.attn, block.norm1(x))
        y = block.mlp(block.norm2(x))
        return x + y + formula(y, adapters[index], 1.0)

    both.check(both.plain.forward_head(book.vit(both.plain, both.images, block)))


@pytest.mark.parametrize("init", ["lora", "vpt_zero"])
@pytest.mark.parametrize("style", STYLES)
def test_starts_as_the_model(make_vit, make_images, style, init):
    model = make_vit().eval()
    expected = model(make_images())
    tuned = spt_fast.tune(model, "adapter", style=style, init=init).eval()
    assert torch.equal(tuned(make_images()), expected)


def test_houlsby_starts_near_the_model(vit):
    tuned = spt_fast.tune(vit, "adapter", bottleneck=64, init="houlsby")
    layers = [layer for each in tuned.adapters for layer in (each.down, each.up)]
    weights = torch.cat([layer.weight.flatten() for layer in layers])
    assert weights.abs().max() <= 0.02
    # Of a normal distribution of deviation 0.01 that is cut at two deviations.
    assert weights.std().item() == pytest.approx(0.0088, rel=0.03)
    assert not any(layer.bias.any() for layer in layers)


def test_matrices_of_vpt_zero_never_learn(make_vit, make_images):
    """Twenty steps of AdamW without decay move nothing but the bias of W_up."""
    tuned = spt_fast.tune(make_vit(), "adapter", init="vpt_zero", num_classes=4)
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2, weight_decay=0)
    labels = torch.arange(4)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(tuned(make_images()), labels).backward()
        optimizer.step()
    for adapter in tuned.adapters:
        assert not adapter.down.weight.any()
        assert not adapter.down.bias.any()
        assert not adapter.up.weight.any()
        assert adapter.up.bias.any()


def test_counts(count):
    """2 D d + d + D for each adapter; the paper's rows have one for each block, of width 12."""

    def expected(bottleneck: int, adapters: int = 1) -> dict[str, int]:
        sizes = {"B": (768, 12), "L": (1024, 24), "H": (1280, 32)}
        return {
            size: adapters * blocks * (2 * width * bottleneck + bottleneck + width)
            for size, (width, blocks) in sizes.items()
        }

    assert count("adapter", bottleneck=12, init="vpt_zero") == expected(12)
    assert count("adapter", bottleneck=96, style="parallel") == expected(96)
    assert count("adapter", bottleneck=8, style="houlsby") == expected(8, adapters=2)
    found = [expected(12), expected(96), expected(3), expected(8, adapters=2)]
    assert [sizes["B"] for sizes in found] == [230_544, 1_779_840, 64_548, 313_536]
    # The paper's columns are means over the tasks, with heads of 234.6 and 49.47 classes.
    paper = pytest.approx(0.41, abs=0.005), pytest.approx(0.27, abs=0.005)
    assert tuple((expected(12)["B"] + 769 * classes) / 1e6 for classes in (1173 / 5, 940 / 19)) == paper


@pytest.mark.parametrize("style", STYLES)
def test_files_and_release(check, style):
    check.life("adapter", style=style, bottleneck=3)


def test_half_precision_checkpointing_and_compile(check):
    check.variants("adapter", style="houlsby")


def test_learns(check):
    check.learns("adapter", style="parallel", init="lora")


def test_takes_other_transformers(make_images):
    """Blocks that call their `attn` with more than tokens, as BEiT's do."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = beit.Beit(**sizes, use_shared_rel_pos_bias=True).eval()
    expected = model(make_images())
    tuned = spt_fast.tune(model, "adapter", style="houlsby", init="lora").eval()
    assert torch.equal(tuned(make_images()), expected)


def test_refuses_what_it_cannot_take(check, make_vit):
    message = "style='pfeiffer' needs a part `mlp`.* block 1 .ParallelThingsBlock. has none"
    check.refused(make_vit(block_fn=ParallelThingsBlock), message, "adapter")
    for option, value, message in (
        ("style", "Houlsby", "style must be one of 'houlsby'"),
        ("init", "zero", "init must be one of"),
        ("bottleneck", 0, "bottleneck must be an integer >= 1"),
        ("bottleneck", 1.5, "bottleneck must be an integer >= 1"),
        ("scale", 0, "scale must be a finite number > 0"),
        ("rank", 4, "'rank' is no option of method 'adapter'"),
    ):
        check.refused(make_vit(), message, "adapter", **{option: value})


def test_cannot_be_merged(vit):
    assert isinstance(vit, VisionTransformer)
    tuned = spt_fast.tune(vit, "adapter")
    with pytest.raises(ValueError, match="merge is for methods that end in plain weights, which 'adapter'"):
        tuned.merge()
    assert tuned.release() is vit
