"""One run of the demo: one method on the training images of one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from spt_fast.analysis.nmi_tracker import NMITracker
from spt_fast.commands.demo.budget import METHODS, Budget, Rates, Split, Task
from spt_fast.data.shipped import DIGITS_CLASSES, load_backbone
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.prototypes.build import build_prototypes
from spt_fast.support.arguments import check_choice
from spt_fast.support.randomness import seeded
from spt_fast.training.evaluation import evaluate
from spt_fast.training.loop import fit, shuffled_loader

if TYPE_CHECKING:
    from spt_fast.prototypes.result import Prototypes
    from spt_fast.training.history import History

_EVALUATION_BATCH = 100


@dataclass(frozen=True)
class Run:
    """One method, one seed. Accuracies in [0, 1]; NMI per block, mean over the training images.

    `nmi_by_epoch` is NMI before tuning and after each epoch, recorded by `NMITracker` over the batch that is
    trained on next; after the last epoch it is `nmi_end`.
    """

    method: str
    seed: int
    rates: Rates
    trainable_parameters: int
    prototype_seconds: float
    train_seconds: float
    val_epochs: list[int]
    val_accuracy: list[float]
    test_accuracy: float
    nmi_start: list[float] | None = None
    nmi_end: list[float] | None = None
    nmi_by_epoch: list[list[float]] | None = None


def run_method(
    method: str,
    task: Task,
    budget: Budget,
    rates: Rates,
    *,
    seed: int,
    on_epoch: Callable[[int, History], None] | None = None,
) -> Run:
    """Tune one method on one seed's images; their order and the initial head are the same for all methods.

    Raises:
        ValueError: an unknown method.
    """
    check_choice("method", method, METHODS)
    model: Any = load_backbone()
    # The model's own head, so that every method starts from a copy of the same one.
    model.head = classifier(model.num_features, seed=seed)
    train = task.few(budget.images_per_class, seed)
    prompts, seconds = _initial_prompts(method, model, train, budget, seed)
    with seeded(seed):
        tuned = PromptedViT(model, prompts, freeze_prompts=is_frozen(method))
    learns = tuned.prompts.requires_grad
    start = _nmi(tuned, train[0]) if tuned.prompts.numel() else None
    tracker = NMITracker(tuned, every=math.ceil(len(train[0]) / budget.batch_size)) if learns else None
    with tracker or nullcontext():
        history = _fit(tuned, train, task, budget, rates, seed=seed, on_epoch=on_epoch)
    end = _nmi(tuned, train[0]) if tracker else None
    by_epoch = [*tracker.history().values.tolist(), end] if tracker else None
    return Run(
        method=method,
        seed=seed,
        rates=rates,
        trainable_parameters=tuned.num_trainable(),
        prototype_seconds=seconds,
        train_seconds=history.train_seconds,
        val_epochs=history.val_epochs,
        val_accuracy=history.val_accuracy,
        test_accuracy=evaluate(tuned, _in_order(task.test)),
        nmi_start=start,
        nmi_end=end,
        nmi_by_epoch=by_epoch,
    )


def is_frozen(method: str) -> bool:
    """Whether a method trains the head only."""
    return method.endswith("frozen")


def classifier(width: int, *, seed: int) -> nn.Sequential:
    """The head [B, width] -> [B, 10]: a batch norm without weights and a linear layer, as MAE's probe has it.

    The backbone's pooled features vary little around a large mean; without the norm, the head alone would
    decide which learning rate each method needs.
    """
    with seeded(seed):
        linear = nn.Linear(width, len(DIGITS_CLASSES))
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False), linear)


def _fit(
    tuned: PromptedViT,
    train: Split,
    task: Task,
    budget: Budget,
    rates: Rates,
    *,
    seed: int,
    on_epoch: Callable[[int, History], None] | None,
) -> History:
    """Train as the budget says: the same for every method, except for the learning rates."""
    return fit(
        tuned,
        shuffled_loader(*train, batch_size=budget.batch_size, seed=seed),
        shuffled_loader(*task.val, batch_size=_EVALUATION_BATCH, seed=seed),
        epochs=budget.epochs,
        lr=rates.head,
        prompt_lr=rates.prompts,
        weight_decay=budget.weight_decay,
        warmup_epochs=budget.warmup_epochs,
        seed=seed,
        val_every=budget.val_every,
        progress=False,
        on_epoch=on_epoch,
    )


def _initial_prompts(
    method: str, model: nn.Module, train: Split, budget: Budget, seed: int
) -> tuple[Prototypes | int, float]:
    """Prompts to start from, and the seconds that it took to build them."""
    if method == "linear probe":
        return 0, 0.0
    if method.startswith("VPT"):
        return budget.num_prompts, 0.0
    started = time.perf_counter()
    prototypes = build_prototypes(
        model, _in_order(train), num_prompts=budget.num_prompts, seed=seed, progress=False
    )
    return prototypes, time.perf_counter() - started


def _in_order(split: Split) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*split), batch_size=_EVALUATION_BATCH)


def _nmi(tuned: PromptedViT, images: Tensor) -> list[float]:
    per_image = torch.cat([tuned.layer_nmi(batch) for batch in torch.split(images, _EVALUATION_BATCH)], dim=1)
    means: list[float] = per_image.double().mean(dim=1).tolist()
    return means
