"""`release`: give a model back whose `PromptedViT` is out of reach."""

from __future__ import annotations

from torch import nn

from spt_fast.backbones.snapshot import find_takeover
from spt_fast.prompting.prompted_vit import PromptedViT


def release(model: nn.Module) -> nn.Module:
    """Give `model` back as it was before a `PromptedViT` took it over; see `PromptedViT.release`.

    For where that object is out of reach; it cannot run any more then.

    Raises:
        TypeError: `model` has no blocks.
        ValueError: it belongs to no `PromptedViT`.
    """
    if isinstance(model, PromptedViT):
        return model.release()
    owner = find_takeover(model)
    if owner is None:
        raise ValueError(f"model must belong to a PromptedViT to be released, got {type(model).__name__}")
    owner.snapshot.restore(model)
    return model
