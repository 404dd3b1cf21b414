"""The losses of an epoch, which stay on the device and are looked at every few steps."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from spt_fast.support.distributed import ALONE, Processes
from spt_fast.support.waiting import OnTheWay

CHECK_EVERY = 32


class _Step(NamedTuple):
    number: int
    rate: float


class Losses:
    """Sums of the losses of each step and the images they are of, over all processes.

    Nothing waits for a device inside an epoch: every `CHECK_EVERY` steps the losses begin their way to the
    host, and they are read when the next ones do. Those of one process on the host are read at once.

    Args:
        epoch: from 1, for messages.
        total, count: of the steps of this epoch that an earlier process has done.
    """

    def __init__(
        self, epoch: int, *, total: float = 0.0, count: int = 0, processes: Processes = ALONE
    ) -> None:
        self._epoch = epoch
        self._total, self._count = total, count
        self._processes = processes
        self._new: list[tuple[Tensor, int, _Step]] = []
        self._sent: deque[tuple[OnTheWay, list[_Step]]] = deque()

    def add(self, loss: Tensor, count: int, step: int, rate: float) -> None:
        """Take the summed loss (a scalar) of `count` images here, of the step of this number, from 1."""
        self._new.append((loss, count, _Step(step, rate)))
        if loss.device.type == "cpu" and self._processes.size == 1:
            self.totals()
        elif len(self._new) == CHECK_EVERY:
            self._send()
            if len(self._sent) > 1:
                self._read_next()

    def totals(self) -> tuple[float, int]:
        """The sum of all losses so far and the number of their images; waits for them.

        Raises:
            FloatingPointError: a loss is NaN or infinite.
        """
        if self._new:
            self._send()
        while self._sent:
            self._read_next()
        return self._total, self._count

    def mean(self) -> float:
        """The mean loss over all images of the epoch.

        Raises:
            FloatingPointError: a loss is NaN or infinite.
            ValueError: there was no image.
        """
        total, count = self.totals()
        if count == 0:
            raise ValueError("train_loader must give at least one image, got none")
        return total / count

    def _send(self) -> None:
        losses = torch.stack([loss.detach().double() for loss, _, _ in self._new])
        counts = torch.tensor([count for _, count, _ in self._new], dtype=torch.float64, device="cpu")
        sums = torch.stack((losses, counts.to(losses.device, non_blocking=True)))
        self._sent.append((OnTheWay(self._processes.sum(sums)), [step for _, _, step in self._new]))
        self._new = []

    def _read_next(self) -> None:
        sent, steps = self._sent.popleft()
        for loss, count, step in zip(*sent.read(), steps, strict=True):
            if not math.isfinite(loss):
                learned = self._epoch > 1 or step.number > 1
                advice = "lower lr" if learned else "nothing was learned before: look at images and weights"
                raise FloatingPointError(
                    f"loss is {loss} at epoch {self._epoch}, step {step.number}, learning rate "
                    f"{step.rate:.2g}; {advice}"
                )
            self._total += loss
            self._count += int(count)
