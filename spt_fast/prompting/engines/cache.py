"""Keys and values of prompts kept between forward passes, for inference with prompts that do not change.

Optimisers, `load`, `copy_` and new storage change the version counter or the address of the prompts, and keys
and values are then computed again. A write through `.data` changes neither, so the cache is used only within
`PromptedViT.fixed_prompts`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spt_fast.ops.autocast import autocast_dtype
from spt_fast.prompting.engines.attention import KeysValues


class KeysValuesCache:
    """The last keys and values of each attention."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, int], tuple[tuple[Any, ...], KeysValues]] = {}

    def get(
        self,
        where: tuple[int, int],
        learned: Sequence[Tensor],
        dtype: torch.dtype,
        compute: Callable[[], KeysValues],
    ) -> KeysValues:
        """What `compute()` gave in the same place with the same `learned`, `dtype` and autocast.

        `where` is the number of a block and that of an attention in it.
        """
        if any(each.is_inference() for each in learned):
            # Tensors of inference mode have no version counter.
            return compute()
        device = learned[0].device
        versions = tuple((each.data_ptr(), each._version) for each in learned)
        key = (versions, device, dtype, autocast_dtype(device.type))
        found = self._entries.get(where)
        if found is not None and found[0] == key:
            return found[1]
        computed = compute()
        # If the caller has unfrozen the backbone, a second backward would find the graph freed.
        if not any(each.requires_grad for each in computed):
            self._entries[where] = (key, computed)
        return computed
