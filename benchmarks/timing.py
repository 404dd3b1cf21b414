"""Seconds of work on a CPU or a GPU, the sides taking turns.

On a GPU two things take time: the device, measured by events on its stream, and the host that launches the
work, measured by the clock until the call returns. A call costs its user whichever is larger.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Inputs = TypeVar("Inputs", bound=Sequence[Tensor])

# More than the last cache of any GPU that the kernels are compiled for (H100: 50 MB, B200: 126 MB).
_CACHE_BYTES = 256 * 2**20
# Cycles for which the device waits, so that the host has launched a call before the device begins it:
# about 0.5 ms, in which a host launches some fifty kernels.
_HEAD_START = 1_000_000


@dataclass(frozen=True)
class Seconds:
    """Of each counted call of a side."""

    device: list[float]  # on a CPU the same as `host`
    host: list[float]

    @property
    def median(self) -> float:
        """Of what the device took."""
        return statistics.median(self.device)

    @property
    def host_median(self) -> float:
        return statistics.median(self.host)


def alternate(
    sides: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    device: torch.device | str = "cpu",
    warmup: int = 1,
    launched_ahead: bool = False,
) -> dict[str, Seconds]:
    """Time one call of each side per round; the rounds of warm-up are not counted.

    The order changes in each round: in a fixed one, the same side would always find the same caches.

    Args:
        launched_ahead: give the host a head start, so that the device's time has no gaps in which it waits
            for launches. For kernels; not for training steps, whose launches are part of what a step costs.
    """
    cuda = torch.device(device).type == "cuda"
    measure = _on_gpu if cuda else _on_cpu
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    order, shuffle = list(sides), random.Random(0).shuffle
    for _ in range(rounds + warmup):
        shuffle(order)
        for name in order:
            taken[name].append(measure(sides[name], launched_ahead))
    return {
        name: Seconds([each[0] for each in times[warmup:]], [each[1] for each in times[warmup:]])
        for name, times in taken.items()
    }


def medians(timed: Mapping[str, Seconds]) -> dict[str, float]:
    return {name: seconds.median for name, seconds in timed.items()}


def finished(run: Callable[[], object], device: torch.device | str) -> Callable[[], object]:
    """`run` and the wait until the device has done it, for pytest-benchmark, which knows the host's clock."""

    def wait() -> None:
        run()
        synchronise(device)

    return wait


def synchronise(device: torch.device | str) -> None:
    """Wait until the device has done what was launched on it; nothing to wait for on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


class Rotating:
    """Copies of the same inputs, together larger than the cache, handed out in turn.

    Otherwise a kernel that runs again and again would find its inputs in the cache of the GPU.
    """

    def __init__(self, inputs: Inputs) -> None:
        size = sum(tensor.untyped_storage().nbytes() for tensor in inputs)
        copies = 1 if _on_host(inputs) else -(-_CACHE_BYTES // size)
        self._copies = [inputs, *(_copy(inputs) for _ in range(copies - 1))]
        self._next = 0

    def __call__(self) -> Any:
        self._next = (self._next + 1) % len(self._copies)
        return self._copies[self._next]


def _on_host(inputs: Sequence[Tensor]) -> bool:
    return inputs[0].device.type == "cpu"


def _copy(inputs: Sequence[Tensor]) -> list[Tensor]:
    """With the same strides: a copy of a view must not become contiguous."""
    copies = []
    for tensor in inputs:
        storage = tensor.detach().untyped_storage().clone()
        copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        copy.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        copies.append(copy.requires_grad_(tensor.requires_grad))
    return copies


def _on_cpu(run: Callable[[], object], launched_ahead: bool) -> tuple[float, float]:
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return seconds, seconds


def _on_gpu(run: Callable[[], object], launched_ahead: bool) -> tuple[float, float]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    if launched_ahead:
        torch.cuda._sleep(_HEAD_START)
    begin.record()  # type: ignore[no-untyped-call]
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    end.record()  # type: ignore[no-untyped-call]
    end.synchronize()  # type: ignore[no-untyped-call]
    return begin.elapsed_time(end) / 1e3, host  # type: ignore[no-untyped-call]
