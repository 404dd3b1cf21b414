"""Prompts as pictures: for each, the patches of the task's own images that are nearest to it."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from spt_fast.plots.data import Values, check_array
from spt_fast.plots.panels import Panels, open_panels
from spt_fast.support.arguments import check_int

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_PROMPTS = 20
_INCHES = 0.55  # of a picture
_GAP = 0.12  # between pictures, as a share of their size


@runtime_checkable
class Found(Protocol):
    """What is drawn of `spt_fast.analysis.NearestPatches`."""

    @property
    def pictures(self) -> Tensor: ...
    @property
    def context(self) -> int: ...


def nearest_patches(
    found: Found,
    layer: int = 0,
    *,
    prompts: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    title: str = "",
    ax: Any = None,
) -> Figure:
    """A row per prompt: the patches nearest to it, the nearest first, framed where more is shown around them.

    Args:
        found: what `spt_fast.nearest_patches` returned.
        layer: which layer of it, from 0; layer i holds the prompts of block i + 1.
        prompts: which prompts, from 0; None is the first 20.
        mean, std: what the images were normalised with, one number per channel; None spreads what is there
            over the whole range of brightness.
        ax: matplotlib Axes to draw into; None makes a new figure.

    Raises:
        ImportError: matplotlib is missing.
        TypeError: `found` is something else, `prompts`, `mean` or `std` are no numbers, or `ax` is not Axes.
        ValueError: there is no such layer or prompt; `mean` and `std` are not given together, or not for
            each channel.
    """
    if not isinstance(found, Found):
        raise TypeError(f"found must be what spt_fast.nearest_patches returns, got {type(found).__name__}")
    layers, count = found.pictures.shape[:2]
    check_int("layer", layer, 0)
    if layer >= layers:
        raise ValueError(f"layer must be 0 to {layers - 1}, got {layer}")
    chosen = _chosen(prompts, count)
    pictures = as_colours(found.pictures[layer, chosen].numpy(), mean, std)
    rows, k = pictures.shape[:2]
    size = _INCHES * (1 + _GAP)
    panels = open_panels(1, ax, width=size * k + 0.7, height=size * rows + 0.25)
    _draw_mosaic(panels, pictures, chosen, found.context)
    panels.add_title(title)
    return panels.figure


def _chosen(prompts: Sequence[int] | None, count: int) -> list[int]:
    """The prompts to draw, of `count`."""
    if prompts is None:
        return list(range(min(count, _MOST_PROMPTS)))
    try:
        chosen = [operator.index(prompt) for prompt in prompts]
    except TypeError:
        raise TypeError(f"prompts must be integers, such as [0, 3], or None, got {prompts!r}") from None
    if not chosen or not all(0 <= prompt < count for prompt in chosen):
        raise ValueError(f"prompts must be some of 0 to {count - 1}, got {prompts}")
    return chosen


def _per_channel(name: str, values: Sequence[float], channels: int) -> Values:
    """[C, 1, 1]"""
    array = check_array(name, values, "[C]", (1,))
    if len(array) != channels:
        raise ValueError(f"{name} must hold a number for each of {channels} channels, got {len(array)}")
    return array.reshape(-1, 1, 1)


def as_colours(pixels: Values, mean: Sequence[float] | None, std: Sequence[float] | None) -> Values:
    """[P, k, C, H, W] to [P, k, H, W, 3] in [0, 1]; arguments and errors as in `nearest_patches`."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std must be given together")
    if mean is None or std is None:
        low, high = pixels.min(), pixels.max()
        pixels = (pixels - low) / max(high - low, 1e-12)
    else:
        channels = pixels.shape[2]
        pixels = pixels * _per_channel("std", std, channels) + _per_channel("mean", mean, channels)
    if pixels.shape[2] != 3:
        # One channel, or some that are no colours: grey.
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    return np.moveaxis(pixels, 2, -1).clip(0, 1)


def _draw_mosaic(panels: Panels, pictures: Values, prompts: list[int], context: int) -> None:
    """Pictures [P, k, H, W, 3] in P rows; white frames around the patches themselves."""
    rows, k, height, width = pictures.shape[:4]
    step_y, step_x = (round(side * (1 + _GAP)) for side in (height, width))
    canvas = np.ones((rows * step_y, k * step_x, 3))
    for row, column in np.ndindex(rows, k):
        top, left = row * step_y, column * step_x
        canvas[top : top + height, left : left + width] = pictures[row, column]
    (axes,) = panels.axes
    axes.imshow(canvas, interpolation="nearest")
    if context:
        patch_height, patch_width = (side / (2 * context + 1) for side in (height, width))
        for row, column in np.ndindex(rows, k):
            left, top = column * step_x + context * patch_width, row * step_y + context * patch_height
            _draw_frame(axes, left - 0.5, top - 0.5, patch_width, patch_height)
    places = [row * step_y + height / 2 for row in range(rows)]
    axes.set_yticks(places, [str(prompt) for prompt in prompts], fontsize="x-small")
    axes.set_ylabel("prompt", fontsize="small")
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _draw_frame(axes: Axes, left: float, top: float, width: float, height: float) -> None:
    """White within black, which shows on any colour."""
    from matplotlib.patches import Rectangle

    for colour, linewidth in (("black", 1.6), ("white", 0.8)):
        axes.add_patch(
            Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=linewidth)
        )
