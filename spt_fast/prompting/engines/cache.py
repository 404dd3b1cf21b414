"""Keys and values of prompts kept between forward passes, for inference with prompts that do not change.

A change is noticed by the version counter and the address of the prompts, which see optimisers, `load`,
`copy_` and new storage, but no write through `.data`: the cache is therefore used only where asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spt_fast.ops.autocast import autocast_dtype
from spt_fast.prompting.engines.attention import KeysValues


class KeysValuesCache:
    """The last keys and values of each block."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[tuple[Any, ...], tuple[KeysValues, ...]]] = {}

    def get(
        self, index: int, prompts: Tensor, dtype: torch.dtype, compute: Callable[[], tuple[KeysValues, ...]]
    ) -> tuple[KeysValues, ...]:
        """What `compute()` gave for block `index` with the same `prompts`, `dtype` and autocast."""
        if prompts.is_inference():
            # Such tensors count no versions.
            return compute()
        autocast = autocast_dtype(prompts.device.type)
        key = (prompts.data_ptr(), prompts._version, prompts.device, dtype, autocast)
        found = self._entries.get(index)
        if found is not None and found[0] == key:
            return found[1]
        computed = compute()
        # With a backbone that somebody unfroze, a second use would go through a graph that is gone.
        if not any(part.requires_grad for keys_values in computed for part in keys_values):
            self._entries[index] = (key, computed)
        return computed
