"""One run of the demo: one method on the training images of one seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from spt_fast.analysis.nmi_tracker import NMITracker
from spt_fast.commands.demo.budget import METHODS, Budget, Rates, Split, Task
from spt_fast.data.shipped import DIGITS_CLASSES, load_backbone
from spt_fast.prompting.prompted_vit import PromptedViT
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
    model = load_backbone()
    head = classifier(model.num_features, seed=seed)
    train = task.few(budget.images_per_class, seed)
    recipe = _Recipe(method, budget, rates, seed, on_epoch)
    if method == "linear probe":
        return _train_head(model, head, train, task, recipe)
    prompts, seconds = _initial_prompts(method, model, train, budget, seed)
    tuned = _prompted(model, prompts, None if is_frozen(method) else head, seed)
    start = _nmi(tuned, train[0])
    if is_frozen(method):
        run = _train_head(tuned, head, train, task, recipe)
    else:
        run = _tune(tuned, train, task, recipe)
    return replace(run, prototype_seconds=seconds, nmi_start=start)


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


@dataclass(frozen=True)
class _Recipe:
    """How to train: the same for every method, except for the learning rates."""

    method: str
    budget: Budget
    rates: Rates
    seed: int
    on_epoch: Callable[[int, History], None] | None

    def fit(self, net: nn.Module, train: Split, val: Split) -> History:
        return fit(
            net,
            shuffled_loader(*train, batch_size=self.budget.batch_size, seed=self.seed),
            _in_order(val),
            epochs=self.budget.epochs,
            lr=self.rates.head,
            prompt_lr=self.rates.prompts,
            weight_decay=self.budget.weight_decay,
            warmup_epochs=self.budget.warmup_epochs,
            seed=self.seed,
            val_every=self.budget.val_every,
            progress=False,
            on_epoch=self.on_epoch,
        )

    def run(self, net: nn.Module, history: History, more_seconds: float, test_accuracy: float) -> Run:
        """The record of this method and seed, from what `fit` returned."""
        return Run(
            method=self.method,
            seed=self.seed,
            rates=self.rates,
            trainable_parameters=_trainable(net),
            prototype_seconds=0.0,
            train_seconds=more_seconds + history.train_seconds,
            val_epochs=history.val_epochs,
            val_accuracy=history.val_accuracy,
            test_accuracy=test_accuracy,
        )


def _initial_prompts(
    method: str, model: nn.Module, train: Split, budget: Budget, seed: int
) -> tuple[Prototypes | int, float]:
    """Prompts to start from, and the seconds that it took to build them."""
    if method.startswith("VPT"):
        return budget.num_prompts, 0.0
    started = time.perf_counter()
    prototypes = build_prototypes(
        model, _in_order(train), num_prompts=budget.num_prompts, seed=seed, progress=False
    )
    return prototypes, time.perf_counter() - started


def _prompted(model: Any, prompts: Prototypes | int, head: nn.Module | None, seed: int) -> PromptedViT:
    """The model with prompts and `head`; without a head, it gives pooled features with frozen prompts."""
    if head is not None:
        # Kept as the model's own head, so that every method starts from the same one.
        model.head = head
    with seeded(seed):
        return PromptedViT(
            model, prompts, freeze_prompts=head is None, num_classes=0 if head is None else None
        )


def _train_head(net: nn.Module, head: nn.Module, train: Split, task: Task, recipe: _Recipe) -> Run:
    """Train the head alone; the features before it do not change, so they are computed once per image."""
    started = time.perf_counter()
    train_features = _features(net, train)
    feature_seconds = time.perf_counter() - started
    history = recipe.fit(head, train_features, _features(net, task.val))
    return recipe.run(head, history, feature_seconds, evaluate(head, _in_order(_features(net, task.test))))


def _tune(tuned: PromptedViT, train: Split, task: Task, recipe: _Recipe) -> Run:
    """Train prompts and head, and record NMI in each epoch."""
    steps_per_epoch = math.ceil(len(train[0]) / recipe.budget.batch_size)
    with NMITracker(tuned, every=steps_per_epoch) as tracker:
        history = recipe.fit(tuned, train, task.val)
    run = recipe.run(tuned, history, 0.0, evaluate(tuned, _in_order(task.test)))
    end = _nmi(tuned, train[0])
    return replace(run, nmi_end=end, nmi_by_epoch=[*tracker.history().values.tolist(), end])


@torch.no_grad()
def _features(model: nn.Module, split: Split) -> Split:
    """Pooled features [M, D] instead of images."""
    images, labels = split
    model.eval()
    return torch.cat([model(batch) for batch in torch.split(images, _EVALUATION_BATCH)]), labels


def _in_order(split: Split) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*split), batch_size=_EVALUATION_BATCH)


def _trainable(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def _nmi(tuned: PromptedViT, images: Tensor) -> list[float]:
    per_image = torch.cat([tuned.layer_nmi(batch) for batch in torch.split(images, _EVALUATION_BATCH)], dim=1)
    means: list[float] = per_image.double().mean(dim=1).tolist()
    return means
