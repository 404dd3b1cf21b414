"""Moment probing against the formula, step by step; its head in counts, files and timm's methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

import spt_fast

METHODS = ("mp", "mp+")


def moments(head: Any, patches: Tensor) -> Tensor:
    """Logits of patch tokens [B, N, D], image by image and pair by pair."""
    logits = []
    for x in patches @ head.project.weight.T + head.project.bias:
        groups = []
        for group in x.split(128, dim=1):
            centred = group - group.mean(1, keepdim=True)
            y = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
            y = y * head.norm.weight + head.norm.bias
            groups.append(y - y.mean(0))
        covariances = [groups[g].T @ groups[g + 1] / len(x) for g in range(3)]
        image = torch.stack([each / each.square().sum(0).sqrt() for each in covariances])[None]
        image = F.conv2d(image, head.convolutions[0].weight, stride=2)
        image = F.conv2d(F.gelu(image), head.convolutions[2].weight, stride=2)
        logits.append(image.flatten() @ head.classifier.weight.T + head.classifier.bias)
    return torch.stack(logits)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_those_of_the_formula(pair, book, flavour, method):
    both = pair(method, {**flavour, "init_values": 0.5})
    plain = both.plain

    def block(index: int, block: Any, x: Tensor) -> Tensor:
        if method == "mp":
            return book.block(index, block, x)
        rescale = both.tuned.rescales[index]
        x = x + block.ls1(book.attention(block.attn, block.norm1(x)))
        z = block.norm2(x)
        hidden = F.relu(z @ rescale.down.weight.T)
        w, b = hidden @ rescale.up_scale.weight.T, hidden @ rescale.up_shift.weight.T
        return x + block.ls2(b + (1 + w) * block.mlp(z))

    tokens = book.vit(plain, both.images, block)
    patches = tokens[:, plain.num_prefix_tokens :]
    assert patches.shape[1] == 16
    if flavour.get("global_pool") == "avg":
        patches = plain.fc_norm(patches)
    both.check((plain.forward_head(tokens) + moments(both.tuned.moments, patches)) / 2)


def test_counts(count, make_vit):
    """394,146 + 3,653 C on ViT-B, all of it the head, and 48 D L for mp+.

    The paper's column for FGVC has 1.20 million, where the mean over its tasks gives 1.25.
    """
    sizes = {"B": (768, 12), "L": (1024, 24), "H": (1280, 32)}
    head = {size: 512 * width + 930 + 100 * (2884 + width + 1) for size, (width, _) in sizes.items()}
    blocks = {size: 48 * width * depth for size, (width, depth) in sizes.items()}
    assert (head["B"], blocks["B"]) == (394_146 + 100 * 3653, 442_368)
    assert count("mp", num_classes=100) == head
    assert count("mp+", num_classes=100) == {size: head[size] + blocks[size] for size in sizes}
    assert spt_fast.tune(make_vit(), "mp").num_trainable(head=False) == 0
    assert spt_fast.tune(make_vit(), "mp+").num_trainable(head=False) == 48 * 32 * 3
    assert pytest.approx(1.251, abs=0.0005) == (394_146 + 3653 * 1173 / 5) / 1e6


@pytest.mark.parametrize("method", METHODS)
def test_files_and_release(check, method):
    check.life(method)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_checkpointing_and_compile(check, method):
    check.variants(method)


@pytest.mark.parametrize("method", METHODS)
def test_learns(check, method):
    check.learns(method)


def test_head_is_both_parts(make_vit, make_images):
    """None keeps a copy of the model's classifier, beside which the other one is new."""
    model = make_vit()
    tuned = spt_fast.tune(model, "mp").eval()
    classifier, of_moments = tuned.head
    assert torch.equal(classifier.weight, model.head.weight)
    assert tuned.num_classes == of_moments.classifier.out_features == 5
    groups = {group["name"]: group["params"] for group in tuned.parameter_groups(lr=1e-3)}
    assert groups.keys() == {"head", "no_decay"}
    tokens = tuned.forward_features(make_images())
    assert torch.equal(
        tuned.forward_head(tokens, pre_logits=True), model.forward_head(tokens, pre_logits=True)
    )
    assert {name.split(".")[0] for name in tuned.learned_state_dict()} == {"head"}


def test_head_norm_and_file_of_the_other(make_vit, tmp_path, make_images):
    tuned = spt_fast.tune(make_vit(), "mp", num_classes=3, head_norm="batch")
    tuned.train()(make_images())
    tuned.save(tmp_path / "mp.safetensors")
    loaded = spt_fast.load_tuned(tmp_path / "mp.safetensors", make_vit()).eval()
    assert torch.equal(loaded(make_images()), tuned.eval()(make_images()))
    other = spt_fast.tune(make_vit(), "mp+", num_classes=3, head_norm="batch")
    with pytest.raises(ValueError, match="was tuned by 'mp', but this model is tuned by"):
        other.load(tmp_path / "mp.safetensors")


def test_refuses_what_it_cannot_take(check, make_vit):
    distilled = make_vit(model_class=VisionTransformerDistilled)
    check.refused(distilled, "mp needs a model with one classifier, got 2", "mp")
    with pytest.raises(ValueError, match="mp is a head: num_classes must be an integer >= 1"):
        spt_fast.tune(make_vit(), "mp", num_classes=0)
    with pytest.raises(ValueError, match="num_classes"):
        spt_fast.tune(make_vit(num_classes=0), "mp")

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.head = make_vit().blocks, nn.Linear(32, 5)
            self.embed_dim = 32

    with pytest.raises(TypeError, match=r"mp\+ needs timm's `forward_features`, which Bare lacks"):
        spt_fast.tune(Bare(), "mp+")


def test_cannot_be_merged(vit):
    with pytest.raises(ValueError, match="merge is for methods that end in plain weights, which 'mp'"):
        spt_fast.tune(vit, "mp").merge()
