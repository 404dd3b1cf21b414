"""Work on one batch's tokens while the model runs on the next: on a CUDA stream beside the model's.

Limits: holds the tokens of two batches. Has never run on a GPU; on the CPU it only delays, which is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_Job = Callable[[Tensor], object]


class Overlap:
    """Keeps the tokens of a batch until the next batch's forward pass is under way, then hands them on.

    A forward pass is only queued when the model returns, so the jobs of the batch before, which wait for
    their own results here and there, run beside it. `add` the jobs of a batch, then `advance`, and `finish`
    after the last batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._backend: Any = torch.cuda if device.type == "cuda" else torch.cpu
        self._stream = self._backend.Stream(device)
        self._arriving: list[tuple[_Job, Tensor]] = []
        self._due: list[tuple[_Job, Tensor]] = []
        self._ready = self._model_stream().record_event()  # when the tokens due have been written

    def add(self, job: _Job, tokens: Tensor) -> None:
        """Copy `tokens`, for `job` to get them later, without autocast or gradients."""
        self._arriving.append((job, tokens.clone()))

    def advance(self) -> None:
        """The model is under way with the batch that `add` got: do the jobs of the one before."""
        due, ready = self._due, self._ready
        self._due, self._arriving = self._arriving, []
        self._ready = self._model_stream().record_event()
        self._stream.wait_event(ready)
        with self._backend.stream(self._stream):
            for job, tokens in due:
                if tokens.is_cuda:
                    # The model's stream gets the memory back, and must not write to it before this is done.
                    tokens.record_stream(self._stream)
                job(tokens)

    def finish(self) -> None:
        """Do the jobs that are left; what they made is then safe to use on the model's stream."""
        self.advance()
        self._model_stream().wait_stream(self._stream)

    def _model_stream(self) -> Any:
        return self._backend.current_stream(self._device)
