"""The images to tune on and to validate with as one data set, so that any of them are decoded once.

A study takes other images of it in each run: those of training, those of validation, both, or a share drawn
by the seed. All that is known of an image by its place in the pool, such as its features, serves every run.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from spt_fast.data.cache import ImageCache
from spt_fast.data.datasets import DecodedImages
from spt_fast.data.identity import labels_of
from spt_fast.data.images import Balance, LabelledImages, balanced_weights, cached_loader
from spt_fast.data.loading import ImageLoader
from spt_fast.data.shipped import few_per_class
from spt_fast.data.task import TaskImages
from spt_fast.support.arguments import check_number, check_seed

Part = Literal["train", "val", "train+val"]


class JoinedImages(DecodedImages):
    """Data sets behind each other, as one with one transform; labels are those that their batches have."""

    def __init__(self, parts: Sequence[DecodedImages], transform: Any) -> None:
        self._parts = tuple(parts)
        self._places = [(part, index) for part in self._parts for index in range(len(part))]
        self.transform = transform

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """As its data set calls it."""
        part, place = self._places[index]
        return part.name(place)

    def read(self, index: int) -> tuple[Any, Any]:
        """As its data set reads it, with the label in the classes of all."""
        part, place = self._places[index]
        image, label = part.read(place)
        return image, label if part.target_transform is None else part.target_transform(label)

    def identity(self) -> Hashable:
        """That of each data set, and the labels."""
        return tuple((part.identity(), labels_of(part)) for part in self._parts)

    def labels(self) -> list[int] | None:
        """Of all images, where each data set knows them."""
        found = [labels_of(part) for part in self._parts]
        return None if None in found else [label for part in found for label in part or ()]

    def portable_names(self) -> list[str]:
        """Those of each data set."""
        return [name for part in self._parts for name in part.portable_names()]


@dataclass(frozen=True)
class Pool:
    """The images of a task, opened for many runs.

    Attributes:
        images: the task as `open_task` gives it without a cache; its own loaders are not used.
        cache: where decoded images are kept, or None.
        batch_size, workers, bad_images: as in `open_labelled_images`.
    """

    images: TaskImages
    cache: ImageCache | None
    batch_size: int
    workers: int = 0
    bad_images: str = "error"

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labels 0, 1, ..."""
        return self.images.train.class_names

    def rows(
        self, part: Part, *, share: float | None = None, per_class: int | None = None, seed: int = 0
    ) -> list[int]:
        """The places of the images of a part, or of as many of them as are asked for, drawn by `seed`.

        Args:
            share: of each class, rounded, and at least one image, above 0 and up to 1.
            per_class: images of each class.

        Raises:
            ValueError: there are no validation images; both `share` and `per_class` are given, or one is out
                of range; the labels are not known without reading the images.
        """
        return self.drawn(self._part(part), share=share, per_class=per_class, seed=seed)

    def drawn(
        self,
        rows: Sequence[int],
        *,
        share: float | None = None,
        per_class: int | None = None,
        seed: int = 0,
    ) -> list[int]:
        """As many of these places as are asked for, in their order; the rest is as in `rows`."""
        if share is None and per_class is None:
            return list(rows)
        if share is not None and per_class is not None:
            raise ValueError(f"images must be share or per_class, got {share} and {per_class}")
        known = labels_of(self._plain)
        if known is None:
            raise ValueError(
                "images: share and per_class need the labels of all images, which these data give only with "
                "the images"
            )
        labels = torch.tensor([known[row] for row in rows], device="cpu")
        if per_class is not None:
            places = few_per_class(labels, per_class, seed=seed)
        else:
            assert share is not None
            places = draw_share(labels, share, seed=seed)
        return [rows[place] for place in sorted(places.tolist())]

    def training(
        self,
        rows: Sequence[int],
        *,
        seed: int,
        drop_last: bool = False,
        balance: Balance = "none",
    ) -> LabelledImages:
        """Images to learn from, as `open_labelled_images(..., training=True)` gives them."""
        weights = balanced_weights(self._augmented, "data", rows) if balance == "sampler" else None
        loader = self._loader(
            self._augmented,
            rows,
            augment=self.images.train.loader.augment,
            seed=seed,
            in_step=True,
            shuffle=True,
            drop_last=drop_last,
            weights=weights,
        )
        if drop_last and len(loader) == 0:
            raise ValueError(
                f"drop_last leaves nothing of {len(rows)} images with batch_size {self.batch_size}"
            )
        return self._labelled(loader, rows)

    def validation(self) -> LabelledImages:
        """Images to validate with."""
        rows = list(self._part("val"))
        return self._labelled(self._loader(self._plain, rows), rows)

    def plain(self, rows: Sequence[int], *, seed: int) -> ImageLoader:
        """Batches of these images, not augmented, in the order in which `open_images` shuffles them."""
        order = torch.randperm(
            len(rows), generator=torch.Generator().manual_seed(check_seed(seed)), device="cpu"
        )
        taken = [rows[place] for place in order.tolist()]
        return self._loader(self._plain, taken, seed=seed)

    @cached_property
    def test(self) -> LabelledImages | None:
        """Images to test with."""
        found = self.images.test
        if found is None:
            return None
        loader = self._loader(found.loader.dataset, None)
        return LabelledImages(loader, found.num_images, found.class_names, found.paths)

    def _part(self, part: Part) -> range:
        train = self.images.train.num_images
        val = 0 if self.images.val is None else self.images.val.num_images
        if part == "val" and not val:
            raise ValueError("val_data or val_split must name images to validate with, got none")
        return {"train": range(train), "val": range(train, train + val), "train+val": range(train + val)}[
            part
        ]

    @cached_property
    def _plain(self) -> Any:
        source = self.images.val or self.images.test
        return self._joined(None if source is None else source.loader.dataset)

    @cached_property
    def _augmented(self) -> Any:
        train = self.images.train.loader
        # Without augmentation both are the same, and so are the features of their images.
        return self._joined(train.dataset) if train.is_random else self._plain

    def _joined(self, like: Any) -> Any:
        """All images with the transform of the data set `like`, kept in the cache where there is one."""
        sets = [self.images.train, *([] if self.images.val is None else [self.images.val])]
        parts = [each.loader.dataset for each in sets]
        in_memory = [isinstance(part, TensorDataset) for part in parts]
        if all(in_memory):
            return TensorDataset(*map(torch.cat, zip(*(part.tensors for part in parts), strict=True)))
        if any(in_memory):
            raise ValueError("val_data must be files where data are, and the shipped digits where data are")
        joined = JoinedImages(parts, parts[0].transform if like is None else like.transform)
        if self.cache is None or not self.cache.works_with(self.workers):
            return joined
        return self.cache.wrap(joined, "images to tune on")

    def _loader(self, dataset: Any, rows: Sequence[int] | None, **order: Any) -> ImageLoader:
        first = self.images.train.loader
        options = {
            "num_images": len(dataset) if rows is None else len(rows),
            "batch_size": self.batch_size,
            "preprocessing": first.preprocessing,
            "bad_images": self.bad_images,
            "num_workers": 0 if isinstance(dataset, TensorDataset) else self.workers,
            "pin_memory": torch.cuda.is_available(),
            "images": rows,
            **order,
        }
        if self.cache is None:
            return ImageLoader(dataset, **options)
        return cached_loader(dataset, "test images", self.cache, **options)

    def _labelled(self, loader: ImageLoader, rows: Sequence[int]) -> LabelledImages:
        paths = (*self.images.train.paths, *(self.images.val.paths if self.images.val else ()))
        taken = tuple(paths[row] for row in sorted(rows)) if len(paths) == len(loader.dataset) else ()
        return LabelledImages(loader, len(rows), self.class_names, taken)


def draw_share(labels: Tensor, share: float, *, seed: int) -> Tensor:
    """Indices of a random draw of a share of every class: rounded, but at least one image.

    With one seed, the images of a share are among those of every larger one.

    Raises:
        ValueError: `share` is not above 0 and at most 1.
    """
    share = check_number("share", share, above=0, maximum=1)
    generator = torch.Generator().manual_seed(check_seed(seed))
    drawn = []
    for label in torch.unique(labels).tolist():
        rows = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(rows), generator=generator, device="cpu")
        drawn.append(rows[order[: max(1, round(share * len(rows)))]])
    return torch.cat(drawn)
