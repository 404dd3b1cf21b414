"""Train the parameters of a model that require a gradient: AdamW, linear warm-up, cosine (paper, Sec. 4.1).

For one process and a classification task; mixed precision and several processes are up to the caller.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler

from spt_fast.data.batches import IGNORED_LABEL
from spt_fast.data.loading import shuffled_loader as shuffled_loader
from spt_fast.prompting.parameter_groups import parameter_groups
from spt_fast.support.arguments import check_choice, check_int, check_number, check_seed
from spt_fast.support.progress import progress_bar
from spt_fast.support.randomness import seeded
from spt_fast.support.tables import csv_bytes
from spt_fast.support.waiting import OnTheWay
from spt_fast.training.evaluation import check_gives_logits, device_of, evaluate, forward

FINAL_LR = 1e-8
WARMUP_SHARE = 0.1
HISTORY_COLUMNS = ("epoch", "loss", "val_accuracy", "lr", "prompt_lr", "seconds", "kept")
KEEP = ("last", "best")


class Batches(Iterable[Any], Sized, Protocol):
    """A loader, as `labelled_batch` reads its batches, that is iterated once per epoch and has a length."""


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
    """

    loss: list[float] = field(default_factory=list)
    val_accuracy: list[float] = field(default_factory=list)
    val_epochs: list[int] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    keep: Literal["last", "best"] = "last"
    prompt_lr: list[float | None] = field(default_factory=list)

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
        if self.keep == "best" and self.val_accuracy:
            lines.append(f"kept epoch {self.kept_epoch}, best by validation: {max(self.val_accuracy):.2%}")
        return "\n".join(lines)

    def to_csv(self) -> bytes:
        """A row per epoch, in `HISTORY_COLUMNS`; val_accuracy is empty where nothing was evaluated.

        `kept` is 1 in the row of `kept_epoch` and 0 in the others.
        """
        accuracy = dict(zip(self.val_epochs, self.val_accuracy, strict=True))
        prompt_lr = self.prompt_lr or [None] * self.epochs
        rows = [
            (epoch, loss, accuracy.get(epoch, ""), *others, int(epoch == self.kept_epoch))
            for epoch, (loss, *others) in enumerate(
                zip(self.loss, self.lr, prompt_lr, self.seconds, strict=True), start=1
            )
        ]
        return csv_bytes(HISTORY_COLUMNS, rows)


def fit(
    tuned: nn.Module,
    train_loader: Batches,
    val_loader: Iterable[Any] | None = None,
    *,
    epochs: int = 100,
    lr: float = 1e-2,
    prompt_lr: float | None = None,
    weight_decay: float = 1e-4,
    head_weight_decay: float | None = None,
    warmup_epochs: float | None = None,
    seed: int = 0,
    val_every: int = 1,
    keep: Literal["last", "best"] = "last",
    progress: bool = True,
    on_epoch: Callable[[int, History], None] | None = None,
) -> History:
    """Train every parameter of `tuned` that requires a gradient, in place.

    AdamW; the learning rate rises linearly over `warmup_epochs`, then falls as a cosine to 1e-8 at the last
    step. The paper trains for 100 epochs, 10 of them warm-up, with batches of 32 (Sec. 4.1).

    Args:
        tuned: maps images to logits, e.g. a `PromptedViT`; trained on the device its parameters are on.
        train_loader: batches of images [B, ...] and labels [B], as `data.batches.labelled_batch` reads them,
            with a length; it decides the order of the images. Images with the label -100 count nowhere.
        val_loader: such batches, evaluated after every `val_every`-th epoch and the last.
        epochs: passes over `train_loader`, at least 1.
        lr: highest learning rate.
        prompt_lr: highest learning rate of the parameters named `prompts`; None is in proportion to `lr` and
            to their root mean square (`prompting.parameter_groups.default_prompt_lr`).
        weight_decay: for tensors of two or more dimensions; biases and norms have none.
        head_weight_decay: the same for the head of `tuned`, its part `head`; None is `weight_decay`.
        warmup_epochs: length of the linear rise, below `epochs`; it may be a fraction. None is a tenth of
            `epochs`.
        seed: of the random numbers that the model's forward pass draws, as for dropout, and of those that
            transforms of images draw in this process. The global random states of Python, NumPy and torch
            are restored at the end. For the order of the images see `shuffled_loader`.
        keep: the weights that `tuned` has at the end: of the "last" epoch, or of the "best" by accuracy on
            `val_loader`, the first of equals. The paper's released code takes the best on its test images,
            which `fit` never sees.
        on_epoch: called as `on_epoch(epoch, history)` after every epoch, from 1; it may raise to stop.

    Raises:
        TypeError: `train_loader` has no length, `val_loader` is an iterator, which can be read only once, a
            batch holds something else, or an argument is of the wrong type.
        ValueError: an argument is out of range, a loader or a batch is empty, labels have another shape or
            are no classes of the model, no parameter requires a gradient, or one that does is float16.
        FloatingPointError: the loss is NaN or infinite; the message holds epoch, step and rate. It is raised
            after that step or the next one, so that no step waits for its loss; the model has taken them.
    """
    check_gives_logits(tuned)
    steps = _count_batches(train_loader)
    if isinstance(val_loader, Iterator):
        raise TypeError(
            "val_loader must start anew after each epoch, as a list or a DataLoader does, "
            f"got {type(val_loader).__name__}"
        )
    check_recipe(
        epochs=epochs,
        lr=lr,
        prompt_lr=prompt_lr,
        weight_decay=weight_decay,
        head_weight_decay=head_weight_decay,
        warmup_epochs=warmup_epochs,
    )
    if check_choice("keep", keep, KEEP) == "best" and val_loader is None:
        raise ValueError("keep='best' is chosen by validation images, but there is no val_loader")
    val_every, seed = check_int("val_every", val_every, 1), check_seed(seed)
    if warmup_epochs is None:
        warmup_epochs = WARMUP_SHARE * epochs
    optimizer = _adamw(tuned, lr, prompt_lr, weight_decay, head_weight_decay)
    schedule = warmup_cosine(optimizer, round(warmup_epochs * steps), epochs * steps)
    device = device_of(tuned)
    history = History(keep=keep)
    best: dict[str, Tensor] = {}
    with seeded(seed, device), progress_bar(show=progress, total=epochs, unit="epoch") as bar:
        for epoch in range(1, epochs + 1):
            _train_epoch(tuned, train_loader, optimizer, schedule, device, epoch, history)
            if val_loader is not None and (epoch % val_every == 0 or epoch == epochs):
                history.val_accuracy.append(evaluate(tuned, val_loader))
                history.val_epochs.append(epoch)
                if keep == "best" and history.kept_epoch == epoch:
                    best = _learned(tuned)
            bar.set_postfix(_last_values(history))
            bar.update()
            if on_epoch is not None:
                on_epoch(epoch, history)
    if best:
        _take_back(tuned, best)
    return history


def check_recipe(
    *,
    epochs: int,
    lr: float,
    prompt_lr: float | None = None,
    weight_decay: float,
    head_weight_decay: float | None = None,
    warmup_epochs: float | None = None,
) -> None:
    """Check these arguments of `fit`, for callers that have long work to do before they call it.

    Raises:
        TypeError: `epochs` is not an integer, or another argument is not a number.
        ValueError: an argument is out of range.
    """
    check_int("epochs", epochs, 1)
    for name, rate in (("lr", lr), ("prompt_lr", lr if prompt_lr is None else prompt_lr)):
        check_number(name, rate, above=FINAL_LR)
    check_number("weight_decay", weight_decay, 0)
    if head_weight_decay is not None:
        check_number("head_weight_decay", head_weight_decay, 0)
    if warmup_epochs is not None and check_number("warmup_epochs", warmup_epochs, 0) >= epochs:
        raise ValueError(f"warmup_epochs must be below epochs ({epochs}), got {warmup_epochs}")


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LRScheduler:
    """Each group's rate from peak / (warmup_steps + 1) linearly to its peak, then as a cosine to 1e-8.

    The peak is the rate that the group has now; 1e-8 is reached at the last step. Call `scheduler.step()`
    after every optimiser step.
    """

    def factor(peak: float, step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        floor = FINAL_LR / peak
        share = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))

    factors: list[Callable[[int], float]] = [partial(factor, group["lr"]) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def _train_epoch(
    tuned: nn.Module,
    loader: Batches,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    device: torch.device,
    epoch: int,
    history: History,
) -> None:
    tuned.train()
    losses = _Losses(epoch)
    rate, prompt_rate = _rates(optimizer)
    started = time.perf_counter()
    for step, batch in enumerate(loader):
        where = f"batch {step} of train_loader"
        logits, labels, labelled = forward(tuned, batch, device, where)
        if labelled == 0:
            raise ValueError(f"{where} must hold a label other than {IGNORED_LABEL}, got none")
        loss = F.cross_entropy(logits, labels)
        rate, prompt_rate = _rates(optimizer)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.add(loss.detach(), labelled, step + 1, rate)
    history.loss.append(losses.mean())
    history.lr.append(rate)
    history.prompt_lr.append(prompt_rate)
    history.seconds.append(time.perf_counter() - started)


class _Losses:
    """The losses of an epoch, each read while the device is at the next step."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._total, self._count = 0.0, 0
        self._unread: deque[tuple[OnTheWay, int, int, float]] = deque()

    def add(self, loss: Tensor, labelled: int, step: int, rate: float) -> None:
        """Take the loss of a step, a mean over `labelled` images, and look at that of the step before."""
        self._unread.append((OnTheWay(loss), labelled, step, rate))
        if len(self._unread) > 1:
            self._read_next()

    def mean(self) -> float:
        """The mean over all images, once all losses are read."""
        while self._unread:
            self._read_next()
        if self._count == 0:
            raise ValueError("train_loader must give at least one image, got none")
        return self._total / self._count

    def _read_next(self) -> None:
        sent, labelled, step, rate = self._unread.popleft()
        loss = sent.read()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss} at epoch {self._epoch}, step {step}, learning rate {rate:.2g}; lower lr"
            )
        self._total += loss * labelled
        self._count += labelled


def _adamw(
    tuned: nn.Module,
    lr: float,
    prompt_lr: float | None,
    weight_decay: float,
    head_weight_decay: float | None,
) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient, in groups by rate and decay."""
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"tuned must learn parameters of float32 or bfloat16, but {name} is float16, in which "
                "AdamW divides by zero; keep the model in float32 and give weight_dtype='bf16' instead"
            )
    groups = parameter_groups(
        tuned, lr, prompt_lr, weight_decay=weight_decay, head_weight_decay=head_weight_decay
    )
    if not groups:
        raise ValueError("tuned must have a parameter that requires a gradient, got none to train")
    return torch.optim.AdamW(groups)


def _rates(optimizer: torch.optim.Optimizer) -> tuple[float, float | None]:
    """The rates of the next step: of everything but prompts, and of prompts, if they learn."""
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    prompts = rates.pop("prompts", None)
    return next(iter(rates.values()), prompts), prompts


def _learned(tuned: nn.Module) -> dict[str, Tensor]:
    """Copies of what training changes: parameters that require a gradient, and buffers."""
    return {name: tensor.detach().clone() for name, tensor in _changing(tuned)}


def _take_back(tuned: nn.Module, learned: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in _changing(tuned):
            tensor.copy_(learned[name])


def _changing(tuned: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, each) for name, each in tuned.named_parameters() if each.requires_grad)
    yield from tuned.named_buffers()


def _count_batches(train_loader: Batches) -> int:
    try:
        batches = len(train_loader)
    except TypeError as error:
        raise TypeError(
            "train_loader must have a length, as a list or a DataLoader over a data set with one has: the "
            f"learning rate of each step depends on it; got {type(train_loader).__name__} ({error})"
        ) from error
    if batches == 0:
        raise ValueError("train_loader must give at least one batch, got none")
    return batches


def _last_values(history: History) -> dict[str, str]:
    values = {"loss": f"{history.loss[-1]:.3f}"}
    if history.val_accuracy:
        values["val"] = f"{history.val_accuracy[-1]:.1%}"
    return values
