"""The recipes that the paper's authors published, by name; the other tables' were not released."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# What both command lines share (README of their repository): AdamW, a batch of 32 over two GPUs, rates that
# are not scaled by it, and 20 prompts per block, which are random tokens of the training images.
_BOTH = {"epochs": 100, "warmup_epochs": 10, "weight_decay": 1e-2}


def _published(*, lr: float, head_weight_decay: float) -> Mapping[str, Any]:
    """Prompts and head have one rate there."""
    return MappingProxyType({**_BOTH, "lr": lr, "prompt_lr": lr, "head_weight_decay": head_weight_decay})


# Arguments of `fit`, by backbone and data.
PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "mae-cub": _published(lr=5e-2, head_weight_decay=0.5),
        "supervised-dogs": _published(lr=1e-3, head_weight_decay=3.0),
    }
)
