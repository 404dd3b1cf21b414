"""What every figure consists of: panels, one style per method, lines with their range, a heat map.

Nothing here depends on what is drawn. matplotlib is imported when the first figure is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spt_fast.support.results import matplotlib_missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = NDArray[np.float64]
Style = dict[str, Any]

# Okabe and Ito's palette, safe for all common kinds of colour vision; markers and widths serve grey print.
_STYLES: dict[str, Style] = {
    "SPT-Deep": {"color": "#D55E00", "marker": "o", "linewidth": 2.2},
    "VPT-Deep": {"color": "#0072B2", "marker": "s", "linewidth": 1.6},
    "SPT-Deep, frozen": {"color": "#E69F00", "marker": "v", "linewidth": 1.6},
    "VPT-Deep, frozen": {"color": "#56B4E9", "marker": "P", "linewidth": 1.2},
    "linear probe": {"color": "#555555", "marker": "^", "linewidth": 1.2},
}
_SPARE_STYLES: tuple[Style, ...] = (
    {"color": "#009E73", "marker": "D", "linewidth": 1.6},
    {"color": "#CC79A7", "marker": "X", "linewidth": 1.6},
    {"color": "#000000", "marker": "v", "linewidth": 1.2},
    {"color": "#56B4E9", "marker": "P", "linewidth": 1.2},
)
_MOST_MARKERS = 10
_MOST_TICKS = 12
# Contrasts with both ends of the map's colours.
_FRAME = "#D55E00"
# Above this many rows the numbers in the cells of a heat map would be too small to read.
_MOST_NUMBERED_ROWS = 12


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, which no window shows.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that brings it.
    """
    reason = matplotlib_missing()
    if reason is not None:
        raise ImportError(reason)
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=160, layout="constrained")


def panels(count: int, *, width: float, height: float, per_row: int = 4) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of that many inches each, in rows as even as can be."""
    rows = math.ceil(count / per_row)
    columns = math.ceil(count / rows)
    figure = new_figure(width * columns, height * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def styles(names: Sequence[str]) -> dict[str, Style]:
    """One style per name; names that start with SPT or VPT have the same colour in every figure."""
    chosen: dict[str, Style] = {}
    for name in names:
        relative = next((f"{kind}-Deep" for kind in ("SPT", "VPT") if name.startswith(kind)), None)
        free = [style for style in (*_STYLES.values(), *_SPARE_STYLES) if style not in chosen.values()]
        wanted = _STYLES.get(name) or (_STYLES[relative] if relative else None)
        if wanted is None or (wanted not in free and name not in _STYLES):
            spare = [style for style in _SPARE_STYLES if style in free]
            wanted = (spare or free or [_SPARE_STYLES[0]])[0]
        chosen[name] = wanted
    return chosen


def draw_line(axes: Axes, x: Sequence[float] | Values, values: Values, style: Style, **look: Any) -> None:
    """The mean over the rows of `values` [R, X], and a band from the least to the largest row."""
    if len(values) > 1:
        axes.fill_between(
            x, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0
        )
    every = max(1, len(x) // _MOST_MARKERS)
    axes.plot(x, values.mean(axis=0), **{"markersize": 4, "markevery": every} | style | look)


def draw_heatmap(axes: Axes, values: Values, limits: tuple[float, float]) -> None:
    """A square map with row and column 1 at the lower left; the largest value of a row is framed."""
    from matplotlib.patches import Rectangle

    size = len(values)
    axes.imshow(values, origin="lower", cmap="viridis", vmin=limits[0], vmax=limits[1])
    for row, column in enumerate(values.argmax(axis=1)):
        corner = (column - 0.46, row - 0.46)
        axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=_FRAME, linewidth=1.8))
    ticks = list(range(0, size, _tick_step(size)))
    labels = [str(tick + 1) for tick in ticks]
    axes.set_xticks(ticks, labels)
    axes.set_yticks(ticks, labels)
    if size <= _MOST_NUMBERED_ROWS:
        _number_cells(axes, values, dark_below=sum(limits) / 2)


def _number_cells(axes: Axes, values: Values, dark_below: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        axes.text(
            column,
            row,
            f"{value:.2f}".replace("-0.00", "0.00"),
            ha="center",
            va="center",
            fontsize=8 if len(values) <= 6 else 5.5,
            color="white" if value < dark_below else "black",
        )


def is_leftmost(axes: Axes) -> bool:
    """Whether a panel is the first of its row."""
    place = axes.get_subplotspec()
    return place is not None and place.is_first_col()


def tidy(*axes: Axes) -> None:
    """No frame above and to the right, and light lines to read values by."""
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        one.set_axisbelow(True)


def legend(axes: Axes, **options: Any) -> None:
    axes.legend(**{"frameon": False, "fontsize": 8} | options)


def whole_ticks(axes: Axes, numbers: Sequence[int]) -> None:
    """A tick at every layer, or at every n-th where there are too many for that."""
    axes.set_xticks(list(numbers)[:: _tick_step(len(numbers))])


def _tick_step(count: int) -> int:
    return math.ceil(count / _MOST_TICKS)
