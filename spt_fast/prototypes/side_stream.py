"""A CUDA stream beside the model's, for work on one batch's tokens while the model runs on the next batch.

Limits: holds the tokens of two batches. Has never run on a GPU; on the CPU it only delays, which is tested.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_Job = Callable[[Tensor], object]


class SideStream:
    """Keeps the jobs of a batch until the model is under way with the next batch, then runs them.

    On CUDA a forward pass is only queued when the model returns. Jobs may wait for their own results without
    holding it up. Call `add` for each job of a batch, then `advance`, and `finish` after the last batch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._backend: Any = torch.cuda if device.type == "cuda" else torch.cpu
        self._stream = self._backend.Stream(device)
        self._new_jobs: list[tuple[_Job, Tensor]] = []
        self._waiting_jobs: list[tuple[_Job, Tensor]] = []
        # The model has written the tokens of the waiting jobs once this event has passed.
        self._tokens_written = self._model_stream().record_event()

    def add(self, job: _Job, tokens: Tensor, dtype: torch.dtype) -> None:
        """Copy `tokens` as `dtype`; `job` gets the copy later, without autocast or gradients."""
        self._new_jobs.append((job, tokens.to(dtype, copy=True)))

    def advance(self) -> None:
        """Run the jobs of the batch before, now that the model is under way with the batch just added."""
        jobs, tokens_written = self._waiting_jobs, self._tokens_written
        self._waiting_jobs, self._new_jobs = self._new_jobs, []
        self._tokens_written = self._model_stream().record_event()
        self._stream.wait_event(tokens_written)
        with self._backend.stream(self._stream):
            for job, tokens in jobs:
                if tokens.is_cuda:
                    # The model's stream gets the memory back, and must not write to it before this is done.
                    tokens.record_stream(self._stream)
                job(tokens)

    def finish(self) -> None:
        """Run the jobs that are left; the model's stream may then use what all jobs have made."""
        self.advance()
        self._model_stream().wait_stream(self._stream)

    def _model_stream(self) -> Any:
        return self._backend.current_stream(self._device)
