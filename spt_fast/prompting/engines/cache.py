"""Keys and values of prompts kept between forward passes, for inference with prompts that do not change.

Optimisers, `load`, `copy_` and new storage change the version counter or the address of the prompts, and keys
and values are then computed again. A write through `.data` changes neither, so the cache is used only within
`PromptedViT.fixed_prompts`.
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
            # Tensors of inference mode have no version counter.
            return compute()
        autocast = autocast_dtype(prompts.device.type)
        key = (prompts.data_ptr(), prompts._version, prompts.device, dtype, autocast)
        found = self._entries.get(index)
        if found is not None and found[0] == key:
            return found[1]
        computed = compute()
        # If the caller has unfrozen the backbone, a second backward would find the graph freed.
        if not any(part.requires_grad for keys_values in computed for part in keys_values):
            self._entries[index] = (key, computed)
        return computed
