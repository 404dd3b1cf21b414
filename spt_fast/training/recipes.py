"""The recipes that the paper's authors published, by name; the other tables' were not released."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# What both command lines share (README of their repository): AdamW, a batch of 32 over two GPUs, rates that
# are not scaled by it, and 20 prompts per block, which are random tokens of the training images.
_BOTH = {"epochs": 100, "warmup_epochs": 10}

# Arguments of `fit`, by backbone and data.
PUBLISHED: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "mae-cub": MappingProxyType({**_BOTH, "lr": 5e-2, "weight_decay": 1e-2, "head_weight_decay": 0.5}),
        "supervised-dogs": MappingProxyType(
            {**_BOTH, "lr": 1e-3, "weight_decay": 1e-2, "head_weight_decay": 3.0}
        ),
    }
)
