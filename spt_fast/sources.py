"""Models and images by the names a user gives on the command line.

Both come from timm: any model and any data set it can make; besides, what ships with this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from spt_fast.distributed import ALONE, Processes
from spt_fast.randomness import seeded
from spt_fast.samples import DIGITS_CLASSES, load_backbone, load_digits

SHIPPED_MODEL = "shipped"
SHIPPED_IMAGES = "digits"
_HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
_DATASET_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


def open_model(name: str, *, pretrained: bool = True, checkpoint: str | Path | None = None) -> nn.Module:
    """A Vision Transformer without a head, in eval mode.

    Args:
        name: a timm model name ("vit_base_patch16_224.mae"; hub names too), "shipped" for this package's
            backbone, or a file that examples/pretrain_backbone.py wrote.
        pretrained: fetch timm's weights, from cache or network; without effect with `checkpoint`. False:
            random weights, the same in every process. The caller's random state is not touched either way.
        checkpoint: file with weights for the timm model `name`.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: no such model, or a checkpoint that does not fit it.
        RuntimeError: the pretrained weights cannot be had.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {checkpoint}")
    if name == SHIPPED_MODEL:
        return load_backbone()
    if Path(name).is_file():
        return load_backbone(name)
    _check_timm_name(name)
    return _timm_model(name, pretrained, checkpoint).eval()


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

    Each of several processes gets its part of the same order, none twice; the parts may differ by one image.

    Args:
        data: a folder of images (sub-folders welcome), a timm data set name ("torch/cifar10", "hfds/...";
            see `timm.data.create_dataset`), or "digits", the shipped images.
        root, download: where a timm data set lies, and whether timm may fetch it.
        split: of a timm data set or the digits ("train", "val", "test"); a folder has none.
        max_images: of all processes together; a data set that can only be iterated is not cut here.

    Raises:
        FileNotFoundError: neither a folder nor the name of a data set.
        ValueError: the folder holds no image, or an argument is out of range.
    """
    dataset = _open_dataset(data, model, root, split, download)
    order = _order(dataset, seed, max_images, processes)
    return _loader(dataset, batch_size, workers, seed, sampler=order)


@dataclass(frozen=True)
class LabelledImages:
    """Batches of (images, labels), their number, and the names of the classes in the order of the labels."""

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
        training: every epoch in a new order, which depends on `seed` alone, with timm's random resized crops
            and horizontal flips (Sec. 4.1, FGVC), but for the digits; else in the order of the data set, with
            timm's transform of evaluation. Crops and flips are drawn from the global generators of Python
            and torch: with `workers`, theirs, which `seed` decides, else this process's, as `fit` seeds them.
        class_names: classes of the model; labels are then places in it. None takes those of the data.
        num_classes: size of the model's head, where there is one to agree with.

    Raises:
        FileNotFoundError: neither a folder nor the name of a data set.
        ValueError: the data set does not name its classes or can only be iterated, has a class that is not
            in `class_names`, has images outside the folders of its classes, has fewer classes than two to
            train on or another number than `num_classes`, or an argument is out of range.
    """
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


def has_splits(data: str) -> bool:
    """Whether `split` means something for `data`, as it does not for a folder."""
    return data == SHIPPED_IMAGES or data.lower().startswith(_DATASET_PREFIXES)


def are_same_images(data: str, split: str, other: str, other_split: str) -> bool:
    """Whether two pairs of names lead to the same images; a folder may be written in several ways."""
    if has_splits(data) and has_splits(other):
        return (data.lower(), split) == (other.lower(), other_split)
    return not (has_splits(data) or has_splits(other)) and Path(data).resolve() == Path(other).resolve()


def _loader(dataset: Any, batch_size: int, workers: int, seed: int, **order: Any) -> DataLoader[Any]:
    if batch_size < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must be an integer >= 0, got {workers}")
    return DataLoader(
        dataset,
        batch_size=batch_size,
        generator=torch.Generator().manual_seed(seed),
        num_workers=0 if isinstance(dataset, TensorDataset) else workers,
        pin_memory=torch.cuda.is_available(),
        **order,
    )


def _class_names(dataset: Any, data: str) -> tuple[str, ...]:
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"data: {data} can only be iterated; give a folder or a torch/ data set")
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
            "move them away, or into the folder of their class"
        )
    return tuple(map(str, names))


def _renumber(dataset: Any, data: str, found: Sequence[str], class_names: Sequence[str]) -> None:
    """Make labels places in `class_names`."""
    foreign = [name for name in found if name not in class_names]
    if foreign:
        raise ValueError(
            f"data: {data} has {len(foreign)} classes that the model has not ({', '.join(foreign[:3])}); "
            f"it has {len(class_names)} ({', '.join(class_names[:3])}, ...)"
        )
    places = [class_names.index(name) for name in found]
    if isinstance(dataset, TensorDataset):
        images, labels = dataset.tensors
        dataset.tensors = (images, torch.tensor(places)[labels])
    else:
        dataset.target_transform = places.__getitem__


def _order(dataset: Any, seed: int, max_images: int | None, processes: Processes) -> list[int] | None:
    """Which images, and in which order; None where timm's reader decides, which knows of the processes."""
    if isinstance(dataset, IterableDataset):
        return None
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()[:max_images]
    part = processes.part_of(len(order))
    return order[part.start : part.stop]


def _check_timm_name(name: str) -> None:
    import timm

    if name.startswith(_HUB_PREFIXES) or timm.is_model(name):
        return
    if "/" in name or name.endswith((".safetensors", ".pth", ".pt", ".bin")):
        raise FileNotFoundError(f"model: there is no file {name}")
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
    hint = f"; close names: {', '.join(close)}" if close else ""
    raise ValueError(f"model: timm has no model named {name!r}{hint}")


@seeded(0)
def _timm_model(name: str, pretrained: bool, checkpoint: str | Path | None) -> nn.Module:
    import timm

    if checkpoint is not None:
        return _with_checkpoint(timm.create_model(name, pretrained=False, num_classes=0), checkpoint)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    # What a hub client raises without a network depends on its version; all of it means the same here.
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"pretrained weights of {name} could not be had ({_first_line(error)}); "
            "offline, give --checkpoint FILE, or --no-pretrained for random weights"
        ) from error
    return model


def _with_checkpoint(model: nn.Module, checkpoint: str | Path) -> nn.Module:
    from timm.models import load_state_dict

    try:
        state = {
            name: value for name, value in load_state_dict(str(checkpoint)).items() if not _of_head(name)
        }
        missing, foreign = model.load_state_dict(state, strict=False)
    # timm picks a reader by the file's ending, and each raises something else for a broken file.
    except Exception as error:
        raise ValueError(
            f"checkpoint {checkpoint} cannot be read into this model: {_first_line(error)}"
        ) from error
    missing = [name for name in missing if not _of_head(name)]
    if missing or foreign:
        raise ValueError(
            f"checkpoint {checkpoint} does not fit this model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(foreign)} unknown {foreign[:3]}"
        )
    return model


def _of_head(name: str) -> bool:
    return name.startswith(("head.", "head_dist."))


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
        raise ValueError(f"data: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
