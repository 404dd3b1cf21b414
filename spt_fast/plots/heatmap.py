"""Heat maps of CKA: one colour scale, frames where a row's maximum is clear, numbers that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from spt_fast.plots.data import Values
from spt_fast.plots.panels import Panels, block_ticks, inches_of, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CLEAR = 0.03
"""By how much CKA of a row's largest value must exceed the second to be framed.

Random prompts, which resemble no block, have rows whose largest value leads by up to 0.023 (`spt-fast nmi
--model shipped --data digits --random 20`, seeds 0 to 2); the range of such a row is as small, so a share of
it would frame chance. CKA of prototypes differs by up to 0.023 between machines and versions.
"""
# Contrasts with both ends of the map's colours.
_FRAME = "#D55E00"
# In points.
_LARGEST_NUMBER = 8.0
_SMALLEST_NUMBER = 5.0
# Of a cell with a number such as 0.12, and of one with -0.12, in units of the font size.
_NUMBER_WIDTH = 2.5
_MINUS_WIDTH = 2.9


def draw_maps(panels: Panels, maps: Mapping[str, Values], limits: tuple[float, float] | None) -> None:
    """A map [L, L] per panel, all on the scale `limits`; None is [0, 1], from below 0 where values are."""
    least = min(values.min() for values in maps.values())
    largest = max(values.max() for values in maps.values())
    low, high = limits or (min(0.0, least), max(1.0, largest))
    for axes, (name, values) in zip(panels.axes, maps.items(), strict=True):
        _draw_map(axes, values, (low, high))
        axes.set_xlabel("tokens entering block")
        if panels.starts_row(axes):
            axes.set_ylabel("prompts of block")
        if name:
            set_title(axes, name)
    beyond = {(True, True): "both", (True, False): "min", (False, True): "max"}
    extend = beyond.get((bool(least < low), bool(largest > high)), "neither")
    panels.axes[0].figure.colorbar(
        panels.axes[0].images[-1], ax=panels.axes, label="linear CKA", shrink=0.9, extend=extend
    )
    # Labels, a title and the bar of colours have taken their room then.
    panels.figure.draw_without_rendering()
    fontsize = min(map(_number_size, panels.axes, maps.values()))
    if fontsize >= _SMALLEST_NUMBER:
        for axes, values in zip(panels.axes, maps.values(), strict=True):
            _number_cells(axes, values, fontsize, dark_below=(low + high) / 2)


def _draw_map(axes: Axes, values: Values, limits: tuple[float, float]) -> None:
    """A square map with row and column 1 at the lower left."""
    from matplotlib.patches import Rectangle

    size = len(values)
    axes.imshow(values, origin="lower", cmap="viridis", vmin=limits[0], vmax=limits[1])
    for row, column in _clear_maxima(values):
        corner = (column - 0.46, row - 0.46)
        width = 1.8 if size <= 12 else 0.9
        axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=_FRAME, linewidth=width))
    ticks = block_ticks(range(1, size + 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([tick - 1 for tick in ticks], [str(tick) for tick in ticks])
    axes.tick_params(labelsize="small" if size > 6 else "medium")


def _clear_maxima(values: Values) -> list[tuple[int, int]]:
    """Row and column of each row's largest value, where it exceeds all others by more than CLEAR."""
    if len(values) == 1:
        return []
    second, largest = np.sort(values, axis=1)[:, -2:].T
    rows = np.flatnonzero(largest - second > CLEAR)
    return [(int(row), int(values[row].argmax())) for row in rows]


def _number_size(axes: Axes, values: Values) -> float:
    """The font size at which the number of a cell fills it, or the largest that is wanted."""
    widest = _MINUS_WIDTH if any(text.startswith("-") for text in _numbers(values)) else _NUMBER_WIDTH
    return min(_LARGEST_NUMBER, 72 * min(inches_of(axes)) / len(values) / widest)


def _number_cells(axes: Axes, values: Values, fontsize: float, *, dark_below: float) -> None:
    """The value in each cell."""
    for ((row, column), value), text in zip(np.ndenumerate(values), _numbers(values), strict=True):
        colour = "white" if value < dark_below else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=fontsize, color=colour)


def _numbers(values: Values) -> list[str]:
    return [f"{value:.2f}".replace("-0.00", "0.00") for value in values.flat]
