"""Numbers that go between a device and the host while neither waits for the other.

Limits: CUDA only; between other devices and the host everything waits. Has never run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class OnTheWay:
    """Values of a tensor on their way to the host."""

    def __init__(self, values: Tensor) -> None:
        self._arrival: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record(torch.cuda.current_stream(values.device))

    def has_arrived(self) -> bool:
        """Whether `read` would return at once."""
        return self._arrival is None or bool(self._arrival.query())  # type: ignore[no-untyped-call]

    def read(self) -> Any:
        """The values as `Tensor.tolist` gives them; waits for them, but not for later work of the device."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values.tolist()


def send(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device; the host may go on, and change nothing of `values` meanwhile."""
    if device.type == "cuda":
        # A copy from other memory may wait for the device's stream.
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def move(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Values on a device, without waiting for it where they come from the host.

    The other way it has to be waited for: what is read before it has arrived is not what was sent.
    """
    return values.to(device, dtype, non_blocking=values.device.type == "cpu")


def first_true(mask: Tensor) -> Tensor:
    """Index of the first true element of a flattened mask, or -1: int64, where the mask is."""
    return torch.where(mask.any(), mask.flatten().byte().argmax(), -1)
