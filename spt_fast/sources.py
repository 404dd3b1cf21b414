"""Models and images by the names a user gives on the command line.

Both come from timm: any model and any data set it can make; besides, what ships with this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from spt_fast.distributed import ALONE, Processes
from spt_fast.samples import load_backbone, load_digits

SHIPPED_MODEL = "shipped"
SHIPPED_IMAGES = "digits"
_HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")
_DATASET_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")


def open_model(name: str, *, pretrained: bool = True, checkpoint: str | Path | None = None) -> nn.Module:
    """A Vision Transformer without a head, in eval mode.

    Args:
        name: a timm model name ("vit_base_patch16_224.mae"; hub names too), "shipped" for this package's
            backbone, or a file that examples/pretrain_backbone.py wrote.
        pretrained: fetch timm's weights, from cache or network; without effect with `checkpoint`.
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
            see `timm.data.create_dataset`), or "digits", the shipped training images.
        root, split, download: where a timm data set lies, its split, and whether timm may fetch it.
        max_images: of all processes together; a data set that can only be iterated is not cut here.

    Raises:
        FileNotFoundError: neither a folder nor the name of a data set.
        ValueError: the folder holds no image, or an argument is out of range.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be an integer >= 1, got {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must be an integer >= 0, got {workers}")
    dataset = (
        _shipped_images() if data == SHIPPED_IMAGES else _timm_images(data, model, root, split, download)
    )
    if isinstance(dataset, TensorDataset):
        workers = 0
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=_order(dataset, seed, max_images, processes),
        generator=torch.Generator().manual_seed(seed),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


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


def _shipped_images() -> TensorDataset:
    return TensorDataset(*load_digits("train"))


def _timm_images(data: str, model: nn.Module, root: str | Path | None, split: str, download: bool) -> Any:
    from timm.data.config import resolve_model_data_config
    from timm.data.dataset_factory import create_dataset
    from timm.data.transforms_factory import create_transform

    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    transform = create_transform(**config, is_training=False)
    if data.lower().startswith(_DATASET_PREFIXES):
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
