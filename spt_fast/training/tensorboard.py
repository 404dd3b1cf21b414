"""TensorBoard's view of a run: loss, accuracy, rates and NMI by epoch. Needs the extra `train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spt_fast.training.history import History


def check_tensorboard() -> None:
    """ImportError where the package is missing; the message says how to get it."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'tensorboard=True (--tensorboard) needs the package tensorboard: pip install "spt_fast[train]"'
        ) from error


class Board:
    """Writes scalars into a folder of event files; the x-axis is in epochs."""

    def __init__(self, folder: Path, epoch: int) -> None:
        """Go on after `epoch`: what an earlier process has written of later ones is hidden."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder), purge_step=epoch + 1)

    def add(self, epoch: int, history: History, nmi: Mapping[str, float]) -> None:
        """The values of the epoch that has ended, and NMI by name."""
        values = {"loss": history.loss[-1], "lr": history.lr[-1], "prompt_lr": history.prompt_lr[-1]}
        if history.val_epochs and history.val_epochs[-1] == epoch:
            values["val_accuracy"] = history.val_accuracy[-1]
        for name, value in {**values, **nmi}.items():
            if value is not None:
                self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
