"""Images by name: folders, timm's data sets, and the digits that ship with the package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from spt_fast.data.shipped import DIGITS_CLASSES, load_digits
from spt_fast.support.arguments import check_int, check_seed
from spt_fast.support.distributed import ALONE, Processes
from spt_fast.support.errors import first_line

SHIPPED_IMAGES = "digits"
_DATASET_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


def open_images(
    data: str,
    model: nn.Module,
    *,
    root: str | Path | None = None,
    split: str = "train",
    download: bool = False,
    batch_size: int = 64,
    workers: int = 4,
    seed: int = 0,
    max_images: int | None = None,
    processes: Processes = ALONE,
) -> Iterable[Any]:
    """Batches of images, shuffled by `seed`, in the size and scale `model` expects (timm's eval transform).

    Several processes share the images: each gets its own, none twice, and their numbers differ by at most 1.

    Args:
        data: a folder of images (sub-folders welcome), a timm data set name ("torch/cifar10", "hfds/...";
            see `timm.data.create_dataset`), or "digits", the shipped images.
        root, download: where a timm data set lies, and whether timm may fetch it.
        split: of a timm data set or the digits ("train", "val", "test"); a folder has none.
        max_images: of all processes together; a data set that can only be iterated is not cut here.

    Raises:
        FileNotFoundError: `data` is neither a folder nor the name of a data set.
        TypeError: a number is not an integer.
        ValueError: the folder holds no image, or an argument is out of range.
    """
    seed = check_seed(seed)
    if max_images is not None:
        max_images = check_int("max_images", max_images, 1)
    dataset = _open_dataset(data, model, root, split, download)
    order = _order(dataset, seed, max_images, processes)
    return _loader(dataset, batch_size, workers, seed, sampler=order)


@dataclass(frozen=True)
class LabelledImages:
    """Batches of images and labels, with what is known of them.

    Attributes:
        loader: batches of (images [B, C, H, W], labels [B]).
        num_images: in all batches together.
        class_names: of the labels 0, 1, ... in this order.
    """

    loader: DataLoader[Any]
    num_images: int
    class_names: tuple[str, ...]


def open_labelled_images(
    data: str,
    model: nn.Module,
    *,
    root: str | Path | None = None,
    split: str = "train",
    download: bool = False,
    batch_size: int = 64,
    workers: int = 4,
    seed: int = 0,
    training: bool = False,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> LabelledImages:
    """Images with labels, in the size and scale `model` expects; of a folder, one class for each sub-folder.

    Args:
        data, root, split, download: as in `open_images`.
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
            in `class_names`, has images outside the folders of its classes, has one class only to train on
            or another number of classes than `num_classes`, or an argument is out of range.
    """
    seed = check_seed(seed)
    dataset = _open_dataset(data, model, root, split, download, training=training)
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
    loader = _loader(dataset, batch_size, workers, seed, shuffle=training)
    return LabelledImages(loader, len(dataset), found)


def open_validation_images(
    data: str,
    model: nn.Module,
    *,
    val_data: str | None = None,
    val_split: str | None = None,
    split: str = "train",
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
    val_data, val_split = val_data or data, val_split or split
    if are_same_images(val_data, val_split, data, split):
        raise ValueError(
            f"val_data and val_split must name other images than those of training, got {val_data}, "
            f"split {val_split}"
        )
    return open_labelled_images(val_data, model, split=val_split, class_names=class_names, **options)


def has_splits(data: str) -> bool:
    """Whether `data` is divided by `split`; a folder is not."""
    return data == SHIPPED_IMAGES or data.lower().startswith(_DATASET_PREFIXES)


def are_same_images(data: str, split: str, other: str, other_split: str) -> bool:
    """Whether two pairs of names are of the same images; paths are compared as the folders they lead to."""
    if has_splits(data) and has_splits(other):
        return (data.lower(), split) == (other.lower(), other_split)
    return not (has_splits(data) or has_splits(other)) and Path(data).resolve() == Path(other).resolve()


def _loader(dataset: Any, batch_size: int, workers: int, seed: int, **order: Any) -> DataLoader[Any]:
    workers = check_int("workers", workers, 0)
    return DataLoader(
        dataset,
        batch_size=check_int("batch_size", batch_size, 1),
        generator=torch.Generator().manual_seed(seed),
        num_workers=0 if isinstance(dataset, TensorDataset) else workers,
        pin_memory=torch.cuda.is_available(),
        **order,
    )


def _class_names(dataset: Any, data: str) -> tuple[str, ...]:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"data: {data} can only be iterated, not read by index; give a folder or a torch/ data set"
        )
    if isinstance(dataset, TensorDataset):
        return DIGITS_CLASSES
    numbers = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    names = sorted(numbers, key=numbers.get) if numbers else getattr(dataset, "classes", None)
    if not names:
        raise ValueError(f"data: {data} does not name its classes; give a folder with one folder per class")
    stray = [] if has_splits(data) else [name for name in names if not name or name.startswith(".")]
    if stray:
        places = ", ".join(name or "no folder" for name in stray)
        raise ValueError(
            f"data: {data} must hold its images in one folder per class, but some are in {places}; "
            "move them away or into the folder of their class"
        )
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
    split: str,
    download: bool,
    *,
    training: bool = False,
) -> Any:
    if data == SHIPPED_IMAGES:
        return TensorDataset(*load_digits(split))
    from timm.data.config import resolve_model_data_config
    from timm.data.dataset_factory import create_dataset
    from timm.data.transforms_factory import create_transform

    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    transform = create_transform(**config, is_training=training, color_jitter=0.0)
    if has_splits(data):
        where = None if root is None else str(root)
        dataset = create_dataset(data, root=where, split=split, download=download)
    else:
        dataset = _folder(data)
    dataset.transform = transform
    return dataset


def _folder(data: str) -> Any:
    from timm.data.dataset_factory import create_dataset

    if not Path(data).is_dir():
        raise FileNotFoundError(
            f"data: there is no folder {data}; give a folder of images, a timm data set such as "
            f"torch/cifar10, or {SHIPPED_IMAGES!r}"
        )
    try:
        return create_dataset("", root=data, search_split=False)
    except RuntimeError as error:
        raise ValueError(f"data: {first_line(error)}") from error
