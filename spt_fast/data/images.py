"""Images by name: folders, timm's data sets, and the digits that ship with the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from spt_fast.data.folder import list_folder, printable, spread
from spt_fast.data.loading import BadImages, FolderImages, ImageLoader, NamedImages
from spt_fast.data.shipped import DIGITS_CLASSES, load_digits
from spt_fast.support.arguments import check_int, check_seed
from spt_fast.support.distributed import ALONE, Processes

SHIPPED_IMAGES = "digits"
TRAIN = "train"
_DATASET_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


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
    max_images: int | None = None,
    in_classes: bool = False,
    processes: Processes = ALONE,
) -> ImageLoader:
    """Batches of images, shuffled by `seed`, in the size and scale `model` expects (timm's eval transform).

    Several processes share the images: each gets its own, none twice, and their numbers differ by at most 1.

    Args:
        data: a folder of images (of any depth), a timm data set name ("torch/cifar10", "hfds/...";
            see `timm.data.create_dataset`), or "digits", the shipped images.
        root, download: where a timm data set lies, and whether timm may fetch it.
        split: of a timm data set or the digits ("train", which None stands for, "val", "test").
        bad_images: what to do with an image that cannot be read: "error", or "skip" to leave it out.
        max_images: of all processes together; a data set that can only be iterated is not cut here.
        in_classes: read the images of a folder that `open_labelled_images` reads, and no others.

    Raises:
        FileNotFoundError: `data` is neither a folder nor the name of a data set.
        TypeError: a number is not an integer.
        ValueError: the folder holds no image, or an argument is out of range or without effect.
    """
    seed = check_seed(seed)
    if max_images is not None:
        max_images = check_int("max_images", max_images, 1)
    dataset = _open_dataset(data, model, root, split, download, in_classes=in_classes)
    order = _order(dataset, seed, max_images, processes)
    return _loader(
        dataset, _describe(dataset, data, split), batch_size, workers, seed, bad_images, sampler=order
    )


@dataclass(frozen=True)
class LabelledImages:
    """Batches of images and labels, with what is known of them.

    Attributes:
        loader: batches of (images [B, C, H, W], labels [B]).
        num_images: in all batches together, with those that turn out to be unreadable.
        class_names: of the labels 0, 1, ... in this order.
        paths: of the images of a folder; empty for other data.
    """

    loader: ImageLoader
    num_images: int
    class_names: tuple[str, ...]
    paths: tuple[Path, ...] = ()


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
    training: bool = False,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> LabelledImages:
    """Images with labels, in the size and scale `model` expects.

    A folder has one class for each folder directly in it that holds images, in `folder.name_order`.

    Args:
        data, root, split, download, bad_images: as in `open_images`.
        training: True gives every epoch in a new order, which depends on `seed` alone, with timm's random
            resized crops and horizontal flips (Sec. 4.1, FGVC), except for the digits. False gives the order
            of the data set and timm's transform of evaluation. Crops and flips come from the global
            generators of Python and torch: those of the workers, which `seed` decides, or, without workers,
            those of this process, which `fit` seeds.
        class_names: classes of the model; a label is then the place of its class in them. None takes the
            classes of the data.
        num_classes: size of the model's head, if the data must have as many classes.

    Raises:
        FileNotFoundError: `data` is neither a folder nor the name of a data set.
        TypeError: a number is not an integer.
        ValueError: the data set does not name its classes or can only be iterated, has a class that is not
            in `class_names`, holds images deeper than its classes or in folders with names of splits, has one
            class only to train on or another number of classes than `num_classes`, or an argument is out of
            range or without effect.
    """
    seed = check_seed(seed)
    known = class_names or ()
    dataset = _open_dataset(
        data, model, root, split, download, training=training, in_classes=True, known=known
    )
    found = _class_names(dataset, data)
    if training and len(found) < 2:
        raise ValueError(f"data: {data} must hold images of two classes or more, got {list(found)}")
    if class_names is not None and tuple(class_names) != found:
        _renumber(dataset, data, found, class_names)
        found = tuple(class_names)
    if num_classes is not None and len(found) != num_classes:
        raise ValueError(
            f"data: {data} has {len(found)} classes, but the head of the model is for {num_classes}"
        )
    loader = _loader(
        dataset, _describe(dataset, data, split), batch_size, workers, seed, bad_images, shuffle=training
    )
    paths = dataset.listing.paths if isinstance(dataset, FolderImages) else ()
    return LabelledImages(loader, len(dataset), found, paths)


def open_validation_images(
    data: str,
    model: nn.Module,
    *,
    val_data: str | None = None,
    val_split: str | None = None,
    split: str | None = None,
    class_names: Sequence[str] | None = None,
    **options: Any,
) -> LabelledImages | None:
    """Labelled images to validate with, beside those to train on; None where neither is asked for.

    Args:
        data, split: name the training images.
        val_data, val_split: name the validation images; where one is None, it is that of training.
        class_names, options: as in `open_labelled_images`.

    Raises:
        FileNotFoundError: `val_data` is neither a folder nor the name of a data set.
        ValueError: `val_split` without a data set that has splits; the images are those of training; or as
            `open_labelled_images`.
    """
    if val_data is None and val_split is None:
        return None
    if val_data is None and not has_splits(data):
        raise ValueError(f"val_split is for data sets with splits, but data is the folder {data}")
    val_data = val_data or data
    if not has_splits(val_data):
        options["root"] = None
    elif val_split is None:
        val_split = split
    if are_same_images(val_data, val_split, data, split):
        raise ValueError(
            f"val_data and val_split must name other images than those of training, got {val_data}"
            + ("" if val_split is None else f", split {val_split}")
        )
    return open_labelled_images(val_data, model, split=val_split, class_names=class_names, **options)


def has_splits(data: str) -> bool:
    """Whether `data` is divided by `split`; a folder is not."""
    return data == SHIPPED_IMAGES or data.lower().startswith(_DATASET_PREFIXES)


def are_same_images(data: str, split: str | None, other: str, other_split: str | None) -> bool:
    """Whether two pairs of names are of the same images; paths are compared as the folders they lead to."""
    if has_splits(data) and has_splits(other):
        return (data.lower(), split or TRAIN) == (other.lower(), other_split or TRAIN)
    return not (has_splits(data) or has_splits(other)) and Path(data).resolve() == Path(other).resolve()


def _loader(
    dataset: Any,
    description: Sequence[str],
    batch_size: int,
    workers: int,
    seed: int,
    bad_images: str,
    **order: Any,
) -> ImageLoader:
    workers = check_int("workers", workers, 0)
    return ImageLoader(
        dataset,
        num_images=None if isinstance(dataset, IterableDataset) else len(dataset),
        description=description,
        bad_images=bad_images,
        batch_size=check_int("batch_size", batch_size, 1),
        seed=seed,
        num_workers=0 if isinstance(dataset, TensorDataset) else workers,
        pin_memory=torch.cuda.is_available(),
        **order,
    )


def _describe(dataset: Any, data: str, split: str | None) -> list[str]:
    """Lines that say what is read: images, classes or folders, images in each, and what is left out."""
    if isinstance(dataset, FolderImages):
        return [f"{printable(data)}: {line}" for line in dataset.listing.description()]
    name = f"{data}, split {split or TRAIN}"
    if isinstance(dataset, IterableDataset):
        return [f"{name}: number of images not known"]
    labels = dataset.tensors[1].tolist() if isinstance(dataset, TensorDataset) else dataset.labels()
    each = "" if labels is None else f" of {len(set(labels))} classes, {spread(labels)} in each"
    return [f"{name}: {len(dataset)} images{each}"]


def _class_names(dataset: Any, data: str) -> tuple[str, ...]:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"data: {data} can only be iterated, not read by index; give a folder or a torch/ data set"
        )
    if isinstance(dataset, TensorDataset):
        return DIGITS_CLASSES
    if isinstance(dataset, FolderImages):
        return dataset.listing.group_names
    names = dataset.class_names()
    if not names:
        raise ValueError(f"data: {data} does not name its classes; give a folder with one folder per class")
    return tuple(map(str, names))


def _renumber(dataset: Any, data: str, found: Sequence[str], class_names: Sequence[str]) -> None:
    """Make each label the place of its class in `class_names`."""
    foreign = [name for name in found if name not in class_names]
    if foreign:
        raise ValueError(
            f"data: {data} has {len(foreign)} classes that the model does not know "
            f"({', '.join(foreign[:3])}); it knows {len(class_names)} ({', '.join(class_names[:3])}, ...)"
        )
    places = [class_names.index(name) for name in found]
    if isinstance(dataset, TensorDataset):
        images, labels = dataset.tensors
        dataset.tensors = (images, torch.tensor(places)[labels])
    else:
        dataset.target_transform = places.__getitem__


def _order(dataset: Any, seed: int, max_images: int | None, processes: Processes) -> list[int] | None:
    """The images of this process, in order; None for a data set that timm divides among the processes."""
    if isinstance(dataset, IterableDataset):
        return None
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()[:max_images]
    share = processes.share_of(len(order))
    return order[share.start : share.stop]


def _open_dataset(
    data: str,
    model: nn.Module,
    root: str | Path | None,
    split: str | None,
    download: bool,
    *,
    training: bool = False,
    in_classes: bool = False,
    known: Sequence[str] = (),
) -> Any:
    if data == SHIPPED_IMAGES:
        return TensorDataset(*load_digits(split or TRAIN))
    if has_splits(data):
        dataset = _named(data, root, split or TRAIN, download)
    else:
        for name, value in (("split", split), ("root", root)):
            if value is not None:
                raise ValueError(f"{name} is for data sets with splits, got {value} for the folder {data}")
        dataset = _folder(data, in_classes, known)
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    dataset.transform = create_transform(**config, is_training=training, color_jitter=0.0)
    return dataset


def _named(data: str, root: str | Path | None, split: str, download: bool) -> Any:
    from timm.data.dataset_factory import create_dataset

    dataset = create_dataset(data, root=None if root is None else str(root), split=split, download=download)
    return dataset if isinstance(dataset, IterableDataset) else NamedImages(dataset, data)


def _folder(data: str, in_classes: bool, known: Sequence[str]) -> FolderImages:
    if not Path(data).is_dir():
        raise FileNotFoundError(
            f"data: there is no folder {data}; give a folder of images, a timm data set such as "
            f"torch/cifar10, or {SHIPPED_IMAGES!r}"
        )
    return FolderImages(list_folder(data, classes=in_classes, known=known))
