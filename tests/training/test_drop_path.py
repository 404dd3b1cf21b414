"""Stochastic depth of blocks that stay in evaluation mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spt_fast import PromptedViT
from spt_fast.training.drop_path import stochastic_depth


@pytest.mark.parametrize("engine", ["kv", "concat"])
def test_training_drops_branches_as_timm_does(make_vit, engine):
    """Against timm's own DropPath with the same rates and random numbers, over its own forward."""
    images = torch.randn(6, 3, 32, 32)
    reference = make_vit(drop_path_rate=0.6)
    assert [block.drop_path1.drop_prob for block in list(reference.blocks)[1:]] == pytest.approx([0.3, 0.6])
    plain = make_vit()
    plain.load_state_dict(reference.state_dict())
    tuned = PromptedViT(plain, torch.zeros(3, 0, 32), engine=engine)
    with stochastic_depth(tuned, 0.6):
        torch.manual_seed(5)
        found = tuned.train()(images)
        evaluated = tuned.eval()(images)
    torch.manual_seed(5)
    torch.testing.assert_close(found, reference.train()(images))
    torch.testing.assert_close(evaluated, reference.eval()(images))


def test_blocks_are_as_before_afterwards(make_vit):
    model = make_vit()
    before = [dict(block.named_modules()) for block in model.blocks]
    tuned = PromptedViT(model, 2, num_classes=3)
    with stochastic_depth(tuned, 0.5):
        assert not isinstance(model.blocks[1].drop_path1, nn.Identity)
    assert [dict(block.named_modules()) for block in model.blocks] == before
    tuned.release()


def test_a_block_without_a_place_for_it_is_refused_and_nothing_changes(make_vit):
    model = make_vit()
    del model.blocks[2].drop_path2
    before = copy.copy(dict(model.named_modules()))
    with pytest.raises(ValueError, match=r"drop_path must be 0 for this model: .*Block.* no drop_path2"):
        stochastic_depth(model, 0.1).__enter__()
    assert dict(model.named_modules()) == before
    with stochastic_depth(nn.Linear(2, 2), 0.0):
        pass
