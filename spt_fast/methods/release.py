"""`release`: give a model back whose tuned model is out of reach."""

from __future__ import annotations

from torch import nn

from spt_fast.backbones.anatomy import get_blocks
from spt_fast.backbones.snapshot import find_snapshot
from spt_fast.methods.base import TunedViT


def release(model: nn.Module) -> nn.Module:
    """Give `model` back as it was before a method took it over; see `TunedViT.release`.

    For where the tuned model is out of reach; it cannot run any more then.

    Raises:
        TypeError: `model` has no blocks.
        ValueError: it belongs to no tuned model.
    """
    if isinstance(model, TunedViT):
        return model.release()
    get_blocks(model)
    snapshot = find_snapshot(model)
    if snapshot is None:
        raise ValueError(f"model must belong to a tuned model to be released, got {type(model).__name__}")
    snapshot.restore(model)
    return model
