"""What the loop asks of its loaders: what is refused, how many batches they have, what orders them."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, default_collate

from spt_fast.data.loading import ImageLoader
from spt_fast.support.user_warnings import warn_user
from spt_fast.training.recipe import Recipe


def check_loaders(train_loader: Any, val_loader: Any, recipe: Recipe) -> None:
    """Refuse loaders that cannot do what the recipe asks of them."""
    if isinstance(val_loader, Iterator):
        raise TypeError(
            "val_loader must start anew after each epoch, as a list or a DataLoader does, "
            f"got {type(val_loader).__name__}"
        )
    for name, value in (("keep", recipe.keep == "best"), ("patience", recipe.patience is not None)):
        if value and val_loader is None:
            shown = f"{name}={getattr(recipe, name)!r}"
            raise ValueError(f"{shown} is chosen by validation images, but there is no val_loader")
    if recipe.balance == "sampler" and not getattr(train_loader, "is_balanced", False):
        raise ValueError(
            "balance='sampler' needs a loader that draws classes equally often, as open_labelled_images(..., "
            f"balance='sampler') opens it, got {type(train_loader).__name__}"
        )


def check_two_images(loader: Any, argument: str = "train_loader") -> None:
    """ValueError where a process is known to get a batch of one image, of which a batch norm learns nothing.

    Of a user's own loader, that is so where it puts the items of a data set together as torch does.
    """
    if isinstance(loader, ImageLoader):
        images, share = loader.num_images, loader.smallest_share
    else:
        images, share = _smallest_of_torch(loader)
    if share is None or not 0 < share[0] < 2 * share[1]:
        return
    each = "" if share[1] == 1 else f", shared by {share[1]} processes"
    raise ValueError(
        f"{argument} must hold two images or more in every batch for the batch norm before the head, but of "
        f"{images} images in batches of {loader.batch_size} the last has {share[0]}{each}; leave out a last "
        "batch that is not full (drop_last=True, --drop-last), or take another batch_size"
    )


def _smallest_of_torch(loader: Any) -> tuple[int | None, tuple[int, int] | None]:
    """The images of a DataLoader, and of its smallest batch, for one process."""
    if type(loader) is not DataLoader or loader.collate_fn is not default_collate or not loader.batch_size:
        return None, None
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.sampler, Sized):
        return None, None
    images = len(loader.sampler)
    last = 0 if loader.drop_last else images % loader.batch_size
    return images, (last or loader.batch_size, 1)


def count_batches(train_loader: Any) -> int:
    """The batches of an epoch; TypeError where the loader has no length, ValueError where it is 0."""
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


def warn_of_one_order(loader: Any) -> None:
    """Warn the user where a loader of ours does not shuffle."""
    if isinstance(loader, ImageLoader) and not loader.is_shuffled and len(loader) > 1:
        warn_user(
            "train_loader gives its images in the same order in every epoch; open_labelled_images(..., "
            "training=True) and shuffled_loader shuffle them"
        )


def generators(loader: Any) -> list[torch.Generator]:
    """The generators that decide the order of a DataLoader of the user's own, each of them once."""
    if hasattr(loader, "set_epoch"):
        return []
    sampler, batch_sampler = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    holders = (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())
