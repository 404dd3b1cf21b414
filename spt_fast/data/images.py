"""Loaders of images by name, for a model: unlabelled, labelled, and those to validate with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, TensorDataset

from spt_fast.data.cache import CachedImages, CachedLoader, ImageCache
from spt_fast.data.channels import fit_images
from spt_fast.data.datasets import DecodedImages, FileImages
from spt_fast.data.files import list_files
from spt_fast.data.identity import fingerprint_of, labels_of
from spt_fast.data.listing import some_names
from spt_fast.data.loading import BadImages, ImageLoader
from spt_fast.data.names import (
    Opened,
    Use,
    open_data,
)
from spt_fast.data.transforms import Preprocessing, channels_of, choose, default_augment, papers_rows, size_of
from spt_fast.support.arguments import check_bool, check_choice, check_int, check_seed
from spt_fast.support.distributed import ALONE, Processes

Balance = Literal["none", "loss", "sampler"]
BALANCES = ("none", "loss", "sampler")


def open_images(
    data: str,
    model: nn.Module,
    *,
    root: str | Path | None = None,
    split: str | None = None,
    download: bool = False,
    batch_size: int = 64,
    workers: int = 4,
    bad_images: BadImages = "error",
    seed: int = 0,
    resize: str | None = None,
    mean_std: str | None = None,
    tuned: Preprocessing | None = None,
    max_images: int | None = None,
    in_classes: bool = False,
    processes: Processes = ALONE,
    cache: ImageCache | None = None,
) -> ImageLoader:
    """Batches of images, shuffled by `seed`, in the size of `model` and not augmented.

    Several processes share the images: each gets its own, none twice, and their numbers differ by at most 1.

    Args:
        data: a folder of images (of any depth), a list, "vtab/TASK", "fgvc/SET", a timm data set name
            ("torch/cifar10", "hfds/..."), or "digits", the shipped images; see `names.open_data`.
        root, download: where the data lie, and whether timm may fetch them.
        split: of data that have several; None is the one to train on.
        bad_images: what to do with an image that cannot be read: "error", or "skip" to leave it out.
        resize, mean_std: as in `transforms.Preprocessing`; None is what `tuned` says or fits the data.
        tuned: what a file of prompts was made with.
        max_images: of all processes together; a data set that can only be iterated is not cut here.
        in_classes: read the images of a folder that `open_labelled_images` reads, and no others.
        cache: where decoded images are kept for the next pass; None decodes them in each pass. It has no
            effect on data sets that are in memory or can only be iterated, and on workers that are no forks.

    Raises:
        FileNotFoundError: `data` is neither a folder nor the name of a data set, or files are missing.
        TypeError: a number is not an integer.
        ValueError: the folder holds no image, or an argument is out of range or without effect.
    """
    seed = check_seed(seed)
    if max_images is not None:
        max_images = check_int("max_images", max_images, 1)
    opened = open_data(
        data,
        root=root,
        split=split,
        download=download,
        in_classes=in_classes,
        allow_missing=bad_images == "skip",
    )
    transform = _transformed(opened, model, resize, mean_std, tuned)
    order = _order(opened.dataset, seed, max_images, processes)
    return _loader(opened, transform, batch_size, workers, seed, bad_images, cache, **order)


@dataclass(frozen=True)
class LabelledImages:
    """Batches of images and labels, with what is known of them.

    Attributes:
        loader: batches of (images [B, C, H, W], labels [B]).
        num_images: in all batches together, with those that turn out to be unreadable.
        class_names: of the labels 0, 1, ... in this order.
        paths: of the images where these are files; empty for other data.
    """

    loader: ImageLoader
    num_images: int
    class_names: tuple[str, ...]
    paths: tuple[Path, ...] = ()

    @cached_property
    def labels(self) -> tuple[int, ...] | None:
        """Of these images, in the order of the data set; None where only reading the images would tell."""
        return labels_of(self.loader.dataset, self.loader.rows)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for the same images, by their names, labels and classes, wherever they lie; 16 hex digits.

        Pixels are not looked at. Images in memory are known by their labels and shapes.
        """
        return fingerprint_of(self.loader.dataset, self.class_names, self.loader.rows)


def open_labelled_images(
    data: str,
    model: nn.Module,
    *,
    root: str | Path | None = None,
    split: str | None = None,
    download: bool = False,
    batch_size: int = 64,
    workers: int = 4,
    bad_images: BadImages = "error",
    seed: int = 0,
    resize: str | None = None,
    mean_std: str | None = None,
    augment: str | None = None,
    drop_last: bool = False,
    tuned: Preprocessing | None = None,
    training: bool = False,
    use: Use | None = None,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    processes: Processes = ALONE,
    balance: Balance = "none",
    cache: ImageCache | None = None,
) -> LabelledImages:
    """Images with labels, in the size of `model`.

    A folder has one class for each folder directly in it that holds images, in `listing.name_order`.

    Several processes share the images. With `training` each of them has its share of every batch, so that
    together they read what one would. Shares differ by at most one image; a process that has none of a short
    last batch gets images [0, C, H, W]. Without `training` each image is read by one process, and processes
    may have different numbers of batches.

    Args:
        data, root, split, download, bad_images, resize, mean_std, tuned, cache: as in `open_images`.
        augment: with `training` only: "resized-crop", "crop" or "none", as in `Preprocessing.transform`; None
            is random resized crops and flips (Sec. 4.1, FGVC), and nothing on VTAB. The digits have none.
        batch_size: of all processes together.
        drop_last: with `training` only: leave out a last batch that is smaller than the others, as the
            paper's released code does; others are left out in each epoch.
        training: True gives every epoch in a new order, which depends on `seed` alone, and augments images.
            False gives the order of the data set. Order, crops and flips are those of `ImageLoader`: `seed`,
            epoch and image decide them, and `workers` and `processes` do not.
        use: what `split` is where it is None: the one to "train" on (None with `training`), to "val"idate
            with, or to "test" with (None without).
        class_names: classes of the model; a label is then the place of its class in them. None takes the
            classes of the data.
        num_classes: size of the model's head, if the data must have as many classes.
        processes: those that share the images.
        balance: with `training` only: "sampler" draws as many images as there are for each epoch, with
            replacement, and every class as often as every other; "none" and "loss" read each image once.

    Raises:
        FileNotFoundError: `data` is neither a folder nor the name of a data set, or files are missing.
        TypeError: a number is not an integer.
        ValueError: the data set does not name its classes or can only be iterated, has a class that is not
            in `class_names`, holds images deeper than its classes or in folders with names of splits, has one
            class only to train on or another number of classes than `num_classes`, or an argument is out of
            range or without effect.
    """
    seed = check_seed(seed)
    if augment is not None and not training:
        raise ValueError(f"augment is for training images, got {augment!r}")
    if check_bool("drop_last", drop_last) and not training:
        raise ValueError("drop_last is for training images, got True")
    if check_choice("balance", balance, BALANCES) != "none" and not training:
        raise ValueError(f"balance is for training images, got {balance!r}")
    use = use or ("train" if training else "test")
    opened = open_data(
        data,
        root=root,
        split=split,
        use=use,
        download=download,
        known=class_names or (),
        allow_missing=bad_images == "skip",
    )
    transform = _transformed(opened, model, resize, mean_std, tuned, augment, training=training, use=use)
    found = _class_names(opened, data)
    if training and len(found) < 2:
        raise ValueError(f"data: {data} must hold images of two classes or more, got {list(found)}")
    if class_names is not None and tuple(class_names) != found:
        _renumber(opened.dataset, data, found, class_names)
        found = tuple(class_names)
    if num_classes is not None and len(found) != num_classes:
        raise ValueError(
            f"data: {data} has {len(found)} classes, but the head of the model is for {num_classes}"
        )
    order = {
        "processes": processes,
        "in_step": training,
        "shuffle": training,
        "drop_last": drop_last,
        "weights": balanced_weights(opened.dataset, data) if balance == "sampler" else None,
    }
    if not training:
        batch_size = -(-check_int("batch_size", batch_size, 1) // processes.size)
    loader = _loader(opened, transform, batch_size, workers, seed, bad_images, cache, **order)
    if drop_last and len(loader) == 0:
        count = len(opened.dataset)
        raise ValueError(f"drop_last leaves nothing of {count} images with batch_size {batch_size}")
    return LabelledImages(loader, len(opened.dataset), found, opened.paths)


@dataclass(frozen=True)
class ImageFiles:
    """Batches of images from files, of which nothing else is known.

    Attributes:
        loader: batches of (images [B, C, H, W], places [B] in `paths`), in their order.
        paths: of the images.
    """

    loader: ImageLoader
    paths: tuple[Path, ...]


def open_files(
    data: Sequence[str | Path],
    model: nn.Module,
    *,
    batch_size: int = 64,
    workers: int = 4,
    bad_images: BadImages = "error",
    resize: str | None = None,
    mean_std: str | None = None,
    tuned: Preprocessing | None = None,
) -> ImageFiles:
    """The images of files and folders, in the order given, with the transform of `open_labelled_images`.

    Args:
        data: files, which are read whatever their names are, and folders, of any depth, whose images come in
            `listing.name_order`.
        resize, mean_std, tuned: as in `open_images`.
        bad_images: as in `open_images`; a batch comes without the images that are left out.

    Raises:
        FileNotFoundError: one of `data` does not exist.
        TypeError: a number is not an integer, or `data` is a single name.
        ValueError: `data` is empty, a folder holds no image, or an argument is out of range.
    """
    listing = list_files(data)
    dataset = FileImages(listing)
    # The first line is of groups, which say nothing here.
    description = (f"{len(dataset)} images", *listing.description()[1:])
    opened = Opened(dataset, "folder", "files", description, None, listing.paths)
    transform = _transformed(opened, model, resize, mean_std, tuned)
    batch_size, workers = check_int("batch_size", batch_size, 1), check_int("workers", workers, 0)
    if len(dataset) <= batch_size:
        # To start workers takes longer than to read one batch.
        workers = 0
    loader = _loader(opened, transform, batch_size, workers, 0, bad_images, None)
    return ImageFiles(loader, listing.paths)


def _transformed(
    opened: Opened,
    model: nn.Module,
    resize: str | None,
    mean_std: str | None,
    tuned: Preprocessing | None,
    augment: str | None = None,
    *,
    training: bool = False,
    use: Use = "train",
) -> tuple[Preprocessing | None, str, list[str]]:
    """Give the data set its transform; what that is, how it augments, and lines that say so.

    The digits are resized alone.
    """
    if opened.kind == "digits":
        for name, value in (("resize", resize), ("mean_std", mean_std), ("augment", augment)):
            if value is not None:
                raise ValueError(f"{name} is for images in files, got {value!r} for the digits")
        images, labels = opened.dataset.tensors
        opened.dataset.tensors = fit_images(images, channels_of(model), size_of(model)), labels
        return None, "none", []
    chosen = choose(opened.kind, resize, mean_std, tuned)
    augment = (augment or default_augment(opened.kind)) if training else "none"
    opened.dataset.transform = chosen.transform(model, augment)
    # Once in a run: training images are read beside those of validation.
    rows = [] if use == "val" else papers_rows(opened.kind)
    return chosen, augment, [chosen.describe(model, augment), *rows]


def _loader(
    opened: Opened,
    transform: tuple[Preprocessing | None, str, list[str]],
    batch_size: int,
    workers: int,
    seed: int,
    bad_images: str,
    cache: ImageCache | None,
    **order: Any,
) -> ImageLoader:
    workers = check_int("workers", workers, 0)
    dataset = opened.dataset
    preprocessing, augment, lines = transform
    options = {
        "num_images": None if isinstance(dataset, IterableDataset) else len(dataset),
        "description": [*opened.description, *lines],
        "preprocessing": preprocessing,
        "augment": augment,
        "bad_images": bad_images,
        "batch_size": check_int("batch_size", batch_size, 1),
        "seed": seed,
        "num_workers": 0 if isinstance(dataset, TensorDataset) else workers,
        "pin_memory": torch.cuda.is_available(),
        **order,
    }
    return (
        ImageLoader(dataset, **options)
        if cache is None
        else cached_loader(dataset, opened.title, cache, **options)
    )


def cached_loader(dataset: Any, title: str, cache: ImageCache, **options: Any) -> ImageLoader:
    """An `ImageLoader` that keeps decoded images, where there are any to keep and its workers can share them.

    Args:
        title: of the data set, as `ImageCache.summary` calls it.
        options: of `ImageLoader`.
    """
    if isinstance(dataset, CachedImages):
        return CachedLoader(dataset, cache, **options)
    if not isinstance(dataset, DecodedImages) or not cache.works_with(options.get("num_workers", 0)):
        return ImageLoader(dataset, **options)
    return CachedLoader(cache.wrap(dataset, title), cache, **options)


def _class_names(opened: Opened, data: str) -> tuple[str, ...]:
    if isinstance(opened.dataset, IterableDataset):
        raise ValueError(
            f"data: {data} can only be iterated, not read by index; give a folder or a torch/ data set"
        )
    if not opened.class_names:
        raise ValueError(f"data: {data} does not name its classes; give a folder with one folder per class")
    return opened.class_names


def _renumber(dataset: Any, data: str, found: Sequence[str], class_names: Sequence[str]) -> None:
    """Make each label the place of its class in `class_names`."""
    foreign = [name for name in found if name not in class_names]
    if foreign:
        raise ValueError(
            f"data: {data} has {len(foreign)} classes that the model does not know "
            f"({some_names(foreign)}); it knows {len(class_names)} ({some_names(class_names)})"
        )
    places = [class_names.index(name) for name in found]
    if isinstance(dataset, TensorDataset):
        images, labels = dataset.tensors
        dataset.tensors = (images, torch.tensor(places, device="cpu")[labels])
    else:
        dataset.target_transform = partial(_place_of, places)


def _place_of(places: Sequence[int], label: int) -> int:
    """Of a class in those of the model; a label below 0 is that of no class, and is none of them."""
    return places[label] if label >= 0 else label


def balanced_weights(dataset: Any, data: str, rows: Sequence[int] | None = None) -> Tensor:
    """For each image of a data set 1 / (images of its class among `rows`, which are all by default).

    Raises:
        ValueError: the labels are not known without the images; `data` is the name.
    """
    labels = labels_of(dataset)
    if labels is None:
        raise ValueError(
            f"balance='sampler' needs the labels of all images, but {data} gives them only with the images"
        )
    counts = Counter(labels if rows is None else [labels[row] for row in rows])
    return torch.tensor([1 / max(1, counts[label]) for label in labels], dtype=torch.float64, device="cpu")


def _order(dataset: Any, seed: int, max_images: int | None, processes: Processes) -> dict[str, list[int]]:
    """The images of this process, in order; nothing for a data set that timm divides among the processes."""
    if isinstance(dataset, IterableDataset):
        return {}
    order = torch.randperm(
        len(dataset), generator=torch.Generator().manual_seed(seed), device="cpu"
    ).tolist()[:max_images]
    share = processes.share_of(len(order))
    return {"images": order[share.start : share.stop]}
