"""`vipamin_prompts`: its formula written out, and that the model comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor

import spt_fast
from spt_fast.backbones.anatomy import block_input_hooks
from spt_fast.methods.vipamin import vipamin_prompts

MakeViT = Callable[..., VisionTransformer]
MakeImages = Callable[..., Tensor]
WIDTH, HEADS, NUM_PROMPTS, K = 32, 2, 4, 3


def textbook(model: VisionTransformer, images: Tensor, weight: float) -> list[Tensor]:
    """In float64, image by image."""
    entering: list[Tensor] = []
    with torch.no_grad(), block_input_hooks(model.blocks, lambda _, x: entering.append(x)):
        model(images)
    generator = torch.Generator().manual_seed(5)
    bound = (6 / (3 * 8 * 8 + WIDTH)) ** 0.5
    prompts = []
    for block, x in zip(model.blocks, entering, strict=True):
        draws = torch.rand(2, NUM_PROMPTS, WIDTH, generator=generator, dtype=torch.float64)
        anchors, others = draws * 2 * bound - bound
        w, b = block.attn.qkv.weight.detach(), block.attn.qkv.bias.detach()
        (wq, wk, wv), (bq, bk, bv) = w.split(WIDTH), b.split(WIDTH)

        def key(tokens: Tensor, block: Any = block, wk: Tensor = wk, bk: Tensor = bk) -> Tensor:
            return (block.norm1(tokens) @ wk.T + bk).unflatten(-1, (HEADS, -1)).mean(-2)

        keys = torch.stack([key(each) for each in x]).mean(0)[1:].detach()
        alike = []
        for anchor in key(anchors).detach():
            similarity = torch.cosine_similarity(anchor[None], keys, dim=-1)
            alike.append(x.mean(0)[1:][similarity.argsort(descending=True)[:K]].mean(0))
        outputs = []
        for each in x:
            normed, heads = block.norm1(each), []
            for h in range(HEADS):
                rows = slice(h * 16, (h + 1) * 16)
                q, k, v = (normed @ m[rows].T + c[rows] for m, c in ((wq, bq), (wk, bk), (wv, bv)))
                heads.append((q @ k.T / 4).softmax(-1) @ v)
            outputs.append(torch.cat(heads, dim=-1))
        span = torch.stack(outputs).mean(0).detach()
        values = others @ wv.T + bv
        # What least squares cannot explain by the outputs.
        rest = values.T - span.T @ torch.linalg.lstsq(span.T, values.T).solution
        outside = torch.linalg.lstsq(wv, rest - bv[:, None]).solution.T
        prompts.append((1 - weight) * torch.stack(alike) + weight * outside)
    return prompts


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_equals_the_textbook(weight: float, make_random: MakeViT, make_images: MakeImages) -> None:
    model, images = make_random().double().train(), make_images(6)
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    given = {"k": K, "weight": weight, "seed": 5}
    found = vipamin_prompts(model, [images[:4], images[4:]], NUM_PROMPTS, **given)  # type: ignore[arg-type]
    assert [module.training for module in model.modules()] == modes
    expected = torch.stack(textbook(model.eval(), images.double(), weight)).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    shallow = vipamin_prompts(model, [images], NUM_PROMPTS, depth="shallow", **given)  # type: ignore[arg-type]
    torch.testing.assert_close(shallow, found[:1])


def test_prompts_start_from_it(make_vit: MakeViT, make_images: MakeImages) -> None:
    model, images = make_vit(), make_images(6)
    before = torch.random.get_rng_state()
    found = vipamin_prompts(model, [images], 5)
    assert torch.equal(found, vipamin_prompts(model, [images, images * 7], 5, max_images=6))
    assert torch.equal(torch.random.get_rng_state(), before)
    tuned: Any = spt_fast.tune(model, "spt-deep", prompts=found)
    assert torch.equal(tuned.prompts, found)
    with pytest.raises(ValueError, match="model already belongs to a tuned model"):
        vipamin_prompts(model, [images])


@pytest.mark.parametrize(
    ("options", "given", "message"),
    [
        ({}, {"k": 17}, "k must be at most 16, the patches of an image, got 17"),
        ({}, {"k": 0}, "k must be an integer >= 1"),
        ({}, {"weight": 1.5}, "weight must be a number from 0 to 1"),
        ({}, {"num_prompts": 0}, "num_prompts must be"),
        ({}, {"depth": "first"}, "depth must be"),
        ({"embed_dim": 16}, {}, "weight must be 0 for this model: outputs of its 17 tokens"),
        ({"block_fn": ResPostBlock}, {}, "plain blocks of timm's ViT, but block 1 is ResPostBlock"),
        ({}, {"loader": []}, "loader must give at least one batch"),
    ],
)
def test_bad_input_is_refused(
    options: Any, given: dict[str, Any], message: str, make_vit: MakeViT, make_images: MakeImages
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        vipamin_prompts(make_vit(**options), given.pop("loader", [make_images(2)]), **given)
