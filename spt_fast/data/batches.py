"""The image tensors in the batches of any loader.

Limits: labels are ignored; pixels must be floating-point and scaled already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from spt_fast.support.errors import NonFiniteError

IMAGE_KEYS = ("pixel_values", "image", "images")


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
    images = _find_images(batch)
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{argument} must be an image tensor [B, C, H, W], a tuple or list whose first item is one, or a "
            f"dict with 'pixel_values', 'image' or 'images' as one; got {_describe(batch)}"
        )
    if not images.is_floating_point():
        hint = "; scale to floats and normalise as the model expects" if images.dtype == torch.uint8 else ""
        raise TypeError(f"{argument} must hold images of a floating-point dtype, got {images.dtype}{hint}")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"{argument} must hold images [B, C, H, W], at least one, got shape {list(images.shape)}"
        )
    return images


def _find_images(batch: object) -> object:
    if isinstance(batch, Mapping):
        return next((batch[key] for key in IMAGE_KEYS if key in batch), None)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return batch[0] if len(batch) else None
    return batch


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
