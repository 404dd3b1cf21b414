"""Batches on their way to a device while it works on the one before.

Limits: CUDA; for other devices batches pass unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spt_fast.support.waiting import send


def ahead(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """`batches`, of which the next one is copied to `device` from pinned memory while this one is used.

    Floating-point tensors are copied, also those in tuples and lists (which become lists) and in mappings
    (dicts). The rest is passed on, as labels are, which are checked on the host. Each batch is read one step
    early. On a device that is not CUDA batches pass unchanged.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    coming = _copies(iter(batches), device, stream)
    batch = next(coming, None)
    while batch is not None:
        used = torch.cuda.current_stream(device)
        used.wait_stream(stream)
        # The memory of a copy may be given to others once the stream that uses it is done with it.
        _map(batch[0], partial(_note_use, stream=used))
        following = next(coming, None)
        yield batch[0]
        batch = following


def _copies(batches: Iterator[Any], device: torch.device, stream: torch.cuda.Stream) -> Iterator[tuple[Any]]:
    for batch in batches:
        with torch.cuda.stream(stream):
            sent = _map(batch, partial(_sent, device=device))
        yield (sent,)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if tensor.device.type == "cpu":
        return send(tensor, device)
    return tensor.to(device, non_blocking=True)


def _note_use(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    # Labels are on the host, where there are no streams.
    if tensor.is_cuda:
        tensor.record_stream(stream)


def _map(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """`batch` with `change` of each of its tensors."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: _map(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return [_map(value, change) for value in batch]
    return batch
