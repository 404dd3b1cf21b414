"""Images and labels in the batches of any loader.

Limits: pixels must be floating-point and scaled already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spt_fast.support.errors import NonFiniteError

IMAGE_KEYS = ("pixel_values", "image", "images")
LABEL_KEYS = ("labels", "label")
# As in torch's cross entropy: an image with this label counts nowhere.
IGNORED_LABEL = -100


def image_batches(loader: Iterable[Any], max_images: int | None = None) -> Iterator[Tensor]:
    """The image tensors [B, C, H, W] of a loader's batches, checked; `max_images` cuts the last one.

    A batch is an image tensor, a tuple or list whose first item is one, or a mapping with "pixel_values",
    "image" or "images". No batch is read beyond `max_images`.

    Raises:
        TypeError: `loader` is not iterable, a batch holds no image tensor, or pixels are not floating-point.
        ValueError: images are not [B, C, H, W], or a batch is empty.
        NonFiniteError: an image holds NaN or infinity; `image` is its number in the whole pass.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(f"loader must be an iterable of image batches, got {type(loader).__name__}")
    seen = 0
    for index, batch in enumerate(loader):
        images = images_of(batch, f"batch {index} of loader")
        if max_images is not None:
            images = images[: max_images - seen]
        _check_pixels(images, seen)
        yield images
        seen += len(images)
        if seen == max_images:
            return


def images_of(batch: object, argument: str = "batch") -> Tensor:
    """The image tensor [B, C, H, W] in one batch of a loader; errors as in `image_batches`."""
    images = _find(batch, 0, IMAGE_KEYS)
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{argument} must be an image tensor [B, C, H, W], a tuple or list whose first item is one, or a "
            f"dict with 'pixel_values', 'image' or 'images' as one; got {_describe(batch)}"
        )
    _check_floating(images, argument)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"{argument} must hold images [B, C, H, W], at least one, got shape {list(images.shape)}"
        )
    return images


def labelled_batch(
    batch: object, argument: str = "batch", *, may_be_empty: bool = False
) -> tuple[Tensor, Tensor]:
    """Images, or other inputs [B, ...] of a floating-point dtype, and labels [B] int64 in a loader's batch.

    A batch is a tuple or list that begins with the two, or a mapping with "pixel_values", "image" or "images"
    and "labels" or "label". Labels may be of any integer dtype; IGNORED_LABEL stands for none.

    Args:
        may_be_empty: allow B = 0, as for the share that a process has of a short batch.

    Raises:
        TypeError: no such batch, or another dtype.
        ValueError: no image, or labels of another shape than [B].
    """
    images, labels = _find(batch, 0, IMAGE_KEYS), _find(batch, 1, LABEL_KEYS)
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        raise TypeError(
            f"{argument} must be a tuple or list that begins with images [B, ...] and labels [B], or a "
            f"dict with 'pixel_values', 'image' or 'images' and 'labels' or 'label'; got {_describe(batch)}"
        )
    _check_floating(images, argument)
    if images.ndim < 2 or 0 in images.shape[may_be_empty:]:
        raise ValueError(
            f"{argument} must hold images [B, ...], at least one, got shape {list(images.shape)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{argument} must hold labels of an integer dtype, got {labels.dtype}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{argument} must hold labels [{len(images)}], one for each image, got shape {list(labels.shape)}"
        )
    return images, labels.long()


def count_given(labels: Tensor) -> int:
    """How many of the labels [B] are not IGNORED_LABEL.

    On a CUDA device this waits for it: call it before the labels are copied there.
    """
    return int((labels != IGNORED_LABEL).sum())


def count_labels(labels: Tensor, num_classes: int, argument: str = "batch") -> int:
    """`count_given`, once all labels that are given are found to be classes; it waits likewise.

    Raises:
        ValueError: a label is neither in 0 ... num_classes - 1 nor IGNORED_LABEL.
    """
    given = labels[labels != IGNORED_LABEL]
    foreign = given[(given < 0) | (given >= num_classes)]
    if len(foreign):
        raise ValueError(
            f"{argument} must hold labels from 0 to {num_classes - 1}, the classes of the model, or "
            f"{IGNORED_LABEL} for none, got {int(foreign[0])}"
        )
    return len(given)


def _check_floating(images: Tensor, argument: str) -> None:
    if not images.is_floating_point():
        hint = "; scale to floats and normalise as the model expects" if images.dtype == torch.uint8 else ""
        raise TypeError(f"{argument} must hold images of a floating-point dtype, got {images.dtype}{hint}")


def _find(batch: object, place: int, keys: Sequence[str]) -> object:
    """The item of a tuple or list at `place`, of a mapping at one of `keys`; None if there is none."""
    if isinstance(batch, Mapping):
        return next((batch[key] for key in keys if key in batch), None)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return batch[place] if len(batch) > place else None
    return batch if place == 0 else None


def _describe(batch: object) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with the keys {list(batch)}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {[type(item).__name__ for item in batch]}"
    return type(batch).__name__


def _check_pixels(images: Tensor, first: int) -> None:
    # The extremes are NaN or infinite if any pixel is; unlike a mask, they need no memory.
    low, high = torch.aminmax(images)
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    bad = int((~images.isfinite()).flatten(1).any(1).nonzero()[0])
    raise NonFiniteError(
        f"loader must give finite pixels, but image {first + bad} (counted from 0) holds NaN or infinity",
        image=first + bad,
    )
