"""Matrix products that keep float32's precision, whatever the user lets PyTorch round float32 to.

`torch.set_float32_matmul_precision`, `allow_tf32`, `fp32_precision` and autocast let PyTorch round the
factors of a float32 product to TensorFloat-32 or to a half type. That is a choice for models. The ops promise
error bounds, so they multiply with `full_product`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# The settings by device type, as PyTorch reads them; no other device rounds.
_SETTINGS = {
    "cuda": torch.backends.cuda.matmul,
    "cpu": torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
}


def full_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32's precision, in the dtype of `a` and `b`: float32 or float64.

    Where PyTorch may round float32, the product is made in float64. No setting is changed, because settings
    belong to the whole process and other threads would notice.
    """
    with _without_autocast(a.device.type):
        if a.dtype == torch.float32 and rounds_float32(a.device):
            return (a.double() @ b.double()).float()
        return a @ b


def _without_autocast(device_type: str) -> AbstractContextManager[Any]:
    # Meta tensors, and devices of few users, know no autocast.
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def rounds_float32(device: torch.device) -> bool:
    """Whether PyTorch may round the factors of float32 products on such a device."""
    setting = _SETTINGS.get(device.type)
    return setting is not None and setting.fp32_precision in ("tf32", "bf16")
