"""Images in as many channels as a model takes, colour or grey, and images in memory in its size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

COLOUR, GREY = 3, 1


def fit_transform(transform: Callable[[Any], Any], channels: int) -> Callable[[Any], Any]:
    """`transform` of images in RGB, for a model of `channels` channels; grey is ITU-R 601 luma, as in Pillow.

    Raises:
        ValueError: neither 1 nor 3 channels.
    """
    if _check(channels) == COLOUR:
        return transform
    from torchvision.transforms import Compose, Grayscale

    steps = transform.transforms if isinstance(transform, Compose) else [transform]
    return cast(Callable[[Any], Any], Compose([Grayscale(), *steps]))


def fit_images(images: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Grey images [B, 3, H, W], whose channels are equal up to scale, as [B, channels, *size]; bilinear."""
    if tuple(images.shape[-2:]) != size:
        images = F.interpolate(images, size=size, mode="bilinear")
    return images if _check(channels) == COLOUR else images.mean(1, keepdim=True)


def _check(channels: int) -> int:
    if channels not in (COLOUR, GREY):
        raise ValueError(
            f"images are read in {COLOUR} channels (RGB) or in {GREY} (grey), but the model takes {channels}"
        )
    return channels
