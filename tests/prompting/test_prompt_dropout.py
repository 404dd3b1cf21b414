"""VPT's dropout of prompts: others for each image, in training only, against the form written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_fast import PromptedViT


def written_out(tuned: PromptedViT, images: Tensor, share: float) -> Tensor:
    """VPT's code: dropout of the prompts expanded to the batch; deep, they are new in each block."""
    model, prompts = tuned.model, tuned.prompts
    x = model._pos_embed(model.patch_embed(images))
    count = x.shape[1]
    # The forwards that PromptedViT has put in their places are those under test.
    for index, block in enumerate(model.blocks):
        if tuned.depth == "deep" or index == 0:
            own = F.dropout(prompts[index].expand(len(x), -1, -1), share)
            x = torch.cat([x[:, :count], own], dim=1)
        x = type(block).forward(block, x)
    return model.forward_head(model.norm(x))


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_training_drops_elements_of_each_images_prompts(
    depth: str, vit: nn.Module, make_images: Callable[..., Tensor]
) -> None:
    images = make_images()
    prompts = torch.randn(3 if depth == "deep" else 1, 6, 32)
    tuned = PromptedViT(vit, prompts, depth=depth, prompt_dropout=0.3).train()
    for share, mode in ((0.3, True), (0.0, False)):
        tuned.train(mode)
        torch.manual_seed(5)
        found = tuned(images)
        torch.manual_seed(5)
        torch.testing.assert_close(found, written_out(tuned, images, share))
    assert not torch.allclose(tuned.train()(images), tuned.eval()(images), atol=1e-3)


def test_dropout_wants_prompts_as_tokens(vit: nn.Module) -> None:
    tuned = PromptedViT(vit, 4, prompt_dropout=0.1)
    assert tuned.engine == "concat"
    assert "prompt_dropout gives each image prompts of its own" in tuned.engine_reason
    with pytest.raises(ValueError, match="engine='kv' is not exact here: prompt_dropout"):
        PromptedViT(tuned.release(), 4, prompt_dropout=0.1, engine="kv")


@pytest.mark.parametrize("given", [1, -0.1, float("nan")])
def test_a_share_out_of_range_is_named(given: float, vit: nn.Module) -> None:
    with pytest.raises(ValueError, match="prompt_dropout must be"):
        PromptedViT(vit, 4, prompt_dropout=given)
