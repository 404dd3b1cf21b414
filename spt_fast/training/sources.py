"""What the steps of an epoch are made of: images for the whole model, or features for its head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spt_fast.support.distributed import Processes
from spt_fast.training.features import Features, FeatureStore, HeadOnly, fits_memory, trains_head_only
from spt_fast.training.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """A module and what it is given.

    Attributes:
        module: what is trained, compiled and distributed as it has to be.
        evaluated: the same by itself, for validation.
        batches: those of an epoch, from 1, from the batch on that is its second argument.
        validation: batches to validate with, or None.
    """

    module: nn.Module
    evaluated: nn.Module
    batches: Callable[[int, int], Iterator[Any]]
    validation: Iterable[Any] | None


def find_source(
    tuned: nn.Module,
    train_loader: Any,
    val_loader: Iterable[Any] | None,
    recipe: Recipe,
    processes: Processes,
    store: FeatureStore | None = None,
) -> Source:
    """Features where they do not change while `tuned` is trained, and otherwise images.

    Args:
        store: of features that other runs have left; None is an empty one.
    """
    if processes.size == 1 and _keeps_features(tuned, train_loader, recipe):
        store = store or FeatureStore()
        features = store.of(tuned, train_loader)
        if features is not None:
            return _of_features(tuned, features, train_loader, val_loader, store)
    module = torch.compile(tuned) if recipe.compile else tuned
    return Source(
        processes.parallel(module),  # type: ignore[arg-type]
        tuned,
        lambda epoch, skip: _batches_of(train_loader, epoch, skip),
        val_loader,
    )


def kept_images(tuned: nn.Module, images: Any, store: FeatureStore | None) -> tuple[nn.Module, Iterable[Any]]:
    """What to evaluate and on what: the head on features of `store`, where no more learns, else all."""
    if store is not None and fits_memory(tuned, images) and trains_head_only(tuned):
        features = store.of(tuned, images)
        if features is not None:
            return HeadOnly(tuned), features.in_order(images.rows)
    return tuned, images


def _keeps_features(tuned: nn.Module, train_loader: Any, recipe: Recipe) -> bool:
    images_change = recipe.mixup > 0 or recipe.cutmix > 0 or recipe.drop_path > 0
    return not images_change and fits_memory(tuned, train_loader) and trains_head_only(tuned)


def _of_features(
    tuned: nn.Module, features: Features, train_loader: Any, val_loader: Any, store: FeatureStore
) -> Source:
    head = HeadOnly(tuned)

    def batches(epoch: int, skip: int) -> Iterator[Any]:
        train_loader.set_epoch(epoch, skip)
        return features.batches(train_loader.index_batches())

    if val_loader is None or not fits_memory(tuned, val_loader):
        return Source(head, tuned, batches, val_loader)
    of_val = store.of(tuned, val_loader)
    if of_val is None:
        return Source(head, tuned, batches, val_loader)
    return Source(head, head, batches, of_val.in_order(val_loader.rows))


def _batches_of(loader: Any, epoch: int, skip: int) -> Iterator[Any]:
    """The batches of an epoch from one of them on; other loaders than ours read those before it too.

    Of ours, a batch of which no image is readable comes empty: what goes on later counts it too.
    """
    if hasattr(loader, "index_batches"):
        loader.set_epoch(epoch, skip)
        return _every_batch_of(loader)
    sampler = getattr(loader, "sampler", None)
    for each in (loader, sampler):
        if each is not None and hasattr(each, "set_epoch"):
            each.set_epoch(epoch)
    batches: Iterator[Any] = iter(loader)
    for _ in range(skip):
        next(batches, None)
    return batches


def _every_batch_of(loader: Any) -> Iterator[Any]:
    before, loader.every_batch = loader.every_batch, True
    try:
        yield from loader
    finally:
        loader.every_batch = before
