"""What a run of training has seen: loss, accuracy, rates and time, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from spt_fast.support.tables import csv_bytes

HISTORY_COLUMNS = ("epoch", "loss", "val_accuracy", "ema_accuracy", "lr", "prompt_lr", "seconds", "kept")


@dataclass
class History:
    """Loss, accuracy, rate and time of a run of `fit`, one entry per epoch or per evaluation.

    Attributes:
        loss: mean training loss (cross entropy) over the images of the epoch.
        val_accuracy: accuracy in [0, 1] on the validation images after each of `val_epochs`; empty without
            `val_loader`.
        val_epochs: epochs (from 1) after which the model was evaluated.
        lr: learning rate of the epoch's last step, of everything but prompts.
        seconds: wall-clock time of the epoch's training steps; evaluation is not counted.
        keep: as `fit` was asked.
        prompt_lr: as `lr`, of the prompts; None where no prompts learn.
        ema_accuracy: as `val_accuracy`, with the moving average of the weights; empty without one.
    """

    loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    val_epochs: list[int] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    keep: Literal["last", "best"] = "last"
    prompt_lr: list[float | None] = field(default_factory=list)
    ema_accuracy: list[float] = field(default_factory=list)

    @property
    def epochs(self) -> int:
        """The number of epochs so far."""
        return len(self.loss)

    @property
    def kept_epoch(self) -> int | None:
        """The epoch, from 1, whose weights are kept: the last, or the first of the best by validation."""
        if self.keep == "last":
            return self.epochs or None
        return self.val_epochs[self.val_accuracy.index(max(self.val_accuracy))] if self.val_epochs else None

    @property
    def train_seconds(self) -> float:
        """The time of all training steps."""
        return sum(self.seconds)

    def summary(self) -> str:
        """Epochs, time and last loss in one line, and accuracy on validation images in another, if any."""
        lines = [f"{self.epochs} epochs in {self.train_seconds:.1f} s, loss {self.loss[-1]:.4g}"]
        if self.val_accuracy:
            lines.append(f"validation accuracy {self.val_accuracy[-1]:.2%}")
        if self.ema_accuracy:
            lines.append(f"of the moving average {self.ema_accuracy[-1]:.2%}")
        if self.keep == "best" and self.val_accuracy:
            lines.append(f"kept epoch {self.kept_epoch}, best by validation: {max(self.val_accuracy):.2%}")
        return "\n".join(lines)

    def to_csv(self) -> bytes:
        """A row per epoch, in `HISTORY_COLUMNS`; accuracies are empty where nothing was evaluated.

        `kept` is 1 in the row of `kept_epoch` and 0 in the others.
        """
        accuracy = dict(zip(self.val_epochs, self.val_accuracy, strict=True))
        ema = dict(zip(self.val_epochs, self.ema_accuracy, strict=False))
        prompt_lr = self.prompt_lr or [None] * self.epochs
        rows = [
            (epoch, loss, accuracy.get(epoch, ""), ema.get(epoch, ""), *others, int(epoch == self.kept_epoch))
            for epoch, (loss, *others) in enumerate(
                zip(self.loss, self.lr, prompt_lr, self.seconds, strict=True), start=1
            )
        ]
        return csv_bytes(HISTORY_COLUMNS, rows)
