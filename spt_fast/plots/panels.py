"""Where figures are drawn: panels of a new figure or the caller's Axes; titles, limits and ticks of them.

Nothing here depends on what is drawn. matplotlib is imported when the first figure is made.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spt_fast.support.arguments import check_number
from spt_fast.support.results import matplotlib_missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_TICKS = 12
# Of a letter of matplotlib's standard font, in units of the font size.
_LETTER_WIDTH = 0.56


@dataclass(frozen=True)
class Panels:
    """Axes to draw into.

    Attributes:
        axes: one per panel.
        own: whether they are those of a new figure; otherwise they are the caller's.
    """

    axes: list[Axes]
    own: bool

    @property
    def figure(self) -> Figure:
        return self.axes[0].figure.figure

    def starts_row(self, axes: Axes) -> bool:
        """Whether one of `axes` is the first of its row, and so the one that names the y-axis."""
        place = axes.get_subplotspec()
        return axes is self.axes[0] or (place is not None and place.is_first_col())

    def add_title(self, title: str) -> None:
        """Above the figure; above the Axes where the caller gave one; TypeError where it is no text."""
        if not isinstance(title, str):
            raise TypeError(f"title must be a string, got {title!r}")
        if not title:
            return
        if not self.own and len(self.axes) == 1:
            set_title(self.axes[0], title)
            return
        text = wrapped(title, self.figure.get_figwidth(), "small")
        if self.own:
            self.grow((text.count("\n") + 1) * 1.3 * points("small") / 72)
        self.figure.suptitle(text, fontsize="small", color="#333333")

    def grow(self, inches: float) -> None:
        """Make the figure higher."""
        self.figure.set_figheight(self.figure.get_figheight() + inches)


def open_panels(
    count: int, ax: Any, *, width: float, height: float, per_row: int = 4, sharey: bool = False
) -> Panels:
    """`count` panels: the Axes `ax`, or where it is None those of a new figure, of that many inches each.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that brings it.
        TypeError: `ax` is neither Axes nor a sequence of them.
        ValueError: `ax` holds another number of Axes.
    """
    _check_matplotlib()
    if ax is not None:
        return Panels(_given_axes(count, ax), own=False)
    rows = math.ceil(count / per_row)
    columns = math.ceil(count / rows)
    figure = new_figure(width * columns, height * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for spare in axes[count:]:
        spare.remove()
    return Panels(axes[:count], own=True)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of that many inches, which no window shows.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that brings it.
    """
    _check_matplotlib()
    from spt_fast.plots.truetype import TrueTypeFigure

    return TrueTypeFigure(figsize=(width, height), dpi=160, layout="constrained")


def check_limits(name: str, limits: Any) -> tuple[float, float] | None:
    """`limits` as (low, high), or None.

    Raises:
        TypeError: not a pair of numbers.
        ValueError: one is not finite, or the first is not below the second.
    """
    if limits is None:
        return None
    if isinstance(limits, str) or not isinstance(limits, Sequence | np.ndarray) or len(limits) != 2:
        raise TypeError(f"{name} must be a pair (low, high) or None, got {limits!r}")
    low, high = (check_number(f"{name}[{place}]", limit) for place, limit in enumerate(limits))
    if low >= high:
        raise ValueError(f"{name} must be a pair (low, high) with low < high, got ({low:g}, {high:g})")
    return low, high


def set_title(axes: Axes, title: str) -> None:
    axes.set_title(wrapped(title, inches_of(axes)[0], "medium"), fontsize="medium")


def _check_matplotlib() -> None:
    reason = matplotlib_missing()
    if reason is not None:
        raise ImportError(reason)


def _given_axes(count: int, ax: Any) -> list[Axes]:
    from matplotlib.axes import Axes

    given = [ax] if isinstance(ax, Axes) else list(np.asarray(ax, dtype=object).flat)
    wanted = "one Axes" if count == 1 else f"{count} Axes, one for each panel"
    strange = [type(one).__name__ for one in given if not isinstance(one, Axes)]
    if strange:
        raise TypeError(f"ax must be {wanted}, got {strange[0]}")
    if len(given) != count:
        raise ValueError(f"ax must be {wanted}, got {len(given)}")
    return given


def tidy(*axes: Axes) -> None:
    """No frame above and to the right, and light lines to read values by."""
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        one.set_axisbelow(True)


def limit_from_zero(all_axes: Sequence[Axes], limits: tuple[float, float] | None) -> None:
    """The same y-axis for all: `limits`, or from 0 (from below, where values are) to the largest of all.

    Without `limits` the axes still move with lines that are added later.
    """
    low = min(0.0, *(axes.dataLim.y0 for axes in all_axes))
    high = max(axes.dataLim.y1 for axes in all_axes)
    for axes in all_axes:
        if limits is not None:
            axes.set_ylim(limits)
            continue
        axes.update_datalim([(axes.dataLim.x0, low), (axes.dataLim.x0, high)])
        # No margin below 0.
        axes.lines[-1].sticky_edges.y.append(0.0)
        axes.autoscale_view()


def count_ticks(axes: Axes) -> None:
    """Ticks of the x-axis at whole numbers only: it counts epochs or steps."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))


def block_ticks(blocks: Sequence[int]) -> list[int]:
    """Those of `blocks` that get a tick: all, or the first and every 4th (8th, ...) where there are many."""
    step = 1
    while len(blocks) > step * _MOST_TICKS:
        step = max(4, 2 * step)
    return [block for block in blocks if block == blocks[0] or block % step == 0]


def inches_of(axes: Axes) -> tuple[float, float]:
    """Width and height of the Axes as they stand, before the layout makes room for labels."""
    extent, dpi = axes.get_window_extent(), axes.figure.figure.dpi
    return float(extent.width / dpi), float(extent.height / dpi)


def points(fontsize: str | float) -> float:
    """A font size such as "small" in points."""
    from matplotlib.font_manager import FontProperties

    return float(FontProperties(size=fontsize).get_size_in_points())


def text_inches(length: int, fontsize: str | float) -> float:
    """Roughly how wide a text of `length` letters is."""
    return length * _LETTER_WIDTH * points(fontsize) / 72


def wrapped(text: str, inches: float, fontsize: str | float) -> str:
    """`text` in lines that are no wider than `inches`."""
    letters = int(inches / text_inches(1, fontsize))
    return "\n".join(textwrap.fill(line, max(letters, 8)) for line in text.split("\n"))
