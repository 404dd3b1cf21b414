"""Whole batches of a data set, in which an image is cropped and flipped the same way whoever reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from spt_fast.data.datasets import DecodedImages, Unreadable
from spt_fast.support.randomness import seed_all, seed_of, seeded
from spt_fast.support.waiting import send

Readable = tuple[Any, list[Unreadable]]


class Asked(NamedTuple):
    """A batch to read; where an epoch has an image more than once, `draws` tells the times apart."""

    epoch: int
    indices: Sequence[int]
    draws: Sequence[int]


class BatchReader(Dataset[Any]):
    """Reads batches of a data set.

    The global generators start from (seed, epoch, index, draw) for each image, so that nothing else decides
    how it is cropped and flipped. Around a batch they stay as they are.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        self.is_random = is_random(dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("images are read in batches")

    def __getitems__(self, asked: Asked) -> Readable:
        """A batch of what is readable, None where nothing is, and what is unreadable."""
        epoch, indices, draws = asked
        if type(self._dataset) is TensorDataset:
            return _rows(self._dataset, indices), []
        if not self.is_random:
            return collate_readable([self._dataset[index] for index in indices])
        with seeded(self._seed):
            items = [self._seeded_item(epoch, *image) for image in zip(indices, draws, strict=True)]
        return collate_readable(items)

    def _seeded_item(self, epoch: int, index: int, draw: int) -> Any:
        seed_all(seed_of(self._seed, epoch, index, draw))
        return self._dataset[index]


def is_random(dataset: Any) -> bool:
    """Whether an image may come otherwise when it is read again."""
    if isinstance(dataset, DecodedImages):
        return dataset.is_random()
    return type(dataset) is not TensorDataset


def collate_readable(items: list[Any]) -> Readable:
    """A batch of what is readable, None where nothing is, and what is unreadable."""
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    readable = [item for item in items if not isinstance(item, Unreadable)]
    return default_collate(readable) if readable else None, unreadable


def empty_batch(dataset: Any) -> list[Tensor]:
    """Images [0, C, H, W] and labels [0], as a batch of the data set has them."""
    if type(dataset) is TensorDataset:
        return [values[:0] for values in dataset.tensors]
    # Crops of an image draw random numbers.
    with seeded(0):
        item = (dataset.blank(), 0) if isinstance(dataset, DecodedImages) else dataset[0]
    return [values[:0] for values in default_collate([item])]


def _rows(dataset: TensorDataset, indices: Sequence[int]) -> list[Tensor] | None:
    at = torch.tensor(indices, device="cpu")
    return [values[send(at, values.device)] for values in dataset.tensors] if len(indices) else None
