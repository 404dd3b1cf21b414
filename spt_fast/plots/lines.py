"""Lines of runs: a style for each name, the mean with a band, and a legend that says what the band spans."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spt_fast.plots.data import Values
from spt_fast.plots.panels import Panels, inches_of, points, text_inches, tidy, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Style = dict[str, Any]

NMI_LABEL = "NMI (eq. 8)"

# Okabe and Ito's palette, safe for all common kinds of colour vision; markers and widths serve grey print.
_STYLES: dict[str, Style] = {
    "SPT-Deep": {"color": "#D55E00", "marker": "o", "linewidth": 2.2},
    "VPT-Deep": {"color": "#0072B2", "marker": "s", "linewidth": 1.6},
    "SPT-Deep, frozen": {"color": "#E69F00", "marker": "v", "linewidth": 1.6},
    "VPT-Deep, frozen": {"color": "#56B4E9", "marker": "P", "linewidth": 1.2},
    "linear probe": {"color": "#555555", "marker": "^", "linewidth": 1.2},
}
_SPARE_COLOURS = ("#009E73", "#CC79A7", "#000000", "#56B4E9")
_SPARE_LINES = (("-", "DXv<"), ("--", "ph*>"), ("-.", "d8H^"))
_MOST_MARKERS = 10
# A legend inside covers at most this share of its Axes' width, of their height, and of their area.
_WIDEST_INSIDE = 0.75
_TALLEST_INSIDE = 0.45
_LARGEST_INSIDE = 0.2
_LEGEND: dict[str, Any] = {
    "fontsize": "small",
    "frameon": True,
    "edgecolor": "none",
    "handlelength": 1.8,
    "handletextpad": 0.6,
    "columnspacing": 1.2,
}
# Of an entry besides its text, and of a line of it, in units of the font size.
_HANDLE_WIDTH = 3.6
_LINE_HEIGHT = 1.5
# Of a tick and the gap to its label, in points.
_TICK_DEPTH = 9.0


def styles(names: Sequence[str]) -> dict[str, Style]:
    """One style per name; names that start with SPT or VPT have the same colour in every figure.

    Of several such names one gets that colour. Beyond twelve other names, styles repeat.
    """
    chosen = {name: _STYLES[name] for name in names if name in _STYLES}
    spare = _spare_styles()
    for name in names:
        kind = next((f"{kind}-Deep" for kind in ("SPT", "VPT") if name.startswith(kind)), None)
        if name not in chosen:
            free = kind is not None and _STYLES[kind] not in chosen.values()
            chosen[name] = _STYLES[kind] if kind is not None and free else next(spare)
    return chosen


def _spare_styles() -> Iterator[Style]:
    looks = [
        {"color": colour, "marker": marker, "linewidth": 1.6, "linestyle": line}
        for line, markers in _SPARE_LINES
        for colour, marker in zip(_SPARE_COLOURS, markers, strict=True)
    ]
    return itertools.cycle(looks)


def draw_line(
    axes: Axes,
    x: Sequence[float] | Values,
    values: Values,
    style: Style,
    *,
    rows: str = "seeds",
    **look: Any,
) -> None:
    """The mean over the rows of `values` [R, X], and a band from the least to the largest row.

    The band's label says what it spans, for `add_legend`; `rows` is what the rows are, in the plural.
    """
    if len(values) > 1:
        axes.fill_between(
            x,
            values.min(axis=0),
            values.max(axis=0),
            color=style["color"],
            alpha=0.15,
            linewidth=0,
            # Matplotlib's legends leave out labels that start with an underscore.
            label=f"_min to max of {len(values)} {rows}",
        )
    every = max(1, len(x) // _MOST_MARKERS)
    axes.plot(x, values.mean(axis=0), **{"markersize": 4, "markevery": every} | style | look)


def finish(panels: Panels, title: str = "", *, crowded: bool = False) -> Figure:
    """What all figures of lines end with: light axes, a legend, the title; the figure.

    `crowded`: lines fill the panel, so that the legend goes beneath.
    """
    tidy(*panels.axes)
    add_legend(panels, crowded=crowded)
    panels.add_title(title)
    return panels.figure


def add_legend(panels: Panels, *, crowded: bool = False) -> None:
    """One legend for all panels: names of lines, and what bands span.

    Inside, where there is one panel, not `crowded`, and room for the legend beside the lines; beneath
    otherwise.
    """
    handles = _handles(panels.axes)
    if not handles:
        return
    axes, figure, labels = panels.axes[0], panels.figure, list(handles)
    if len(panels.axes) > 1 and panels.own:
        columns, texts = _columns(labels, figure.get_figwidth())
        _make_room(panels, columns, texts)
        figure.legend(handles.values(), texts, loc="outside lower center", ncols=columns, **_LEGEND)
    elif crowded or not _fits_inside(axes, labels) or not _add_inside(axes, handles):
        right = axes.get_window_extent().x1 / figure.dpi
        columns, texts = _columns(labels, min(right, 1.25 * inches_of(axes)[0]))
        _make_room(panels, columns, texts)
        axes.legend(handles.values(), texts, ncols=columns, **_beneath(axes), **_LEGEND)


def _handles(all_axes: Sequence[Axes]) -> dict[str, Any]:
    """What a legend names, in order of first use: lines with a name, then a grey band for each span."""
    from matplotlib.patches import Patch

    lines: dict[str, Any] = {}
    bands: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, handle)
        for band in axes.collections:
            text = str(band.get_label())
            if text.startswith("_min to max"):
                bands[text[1:]] = Patch(color="#555555", alpha=0.25, linewidth=0)
    return lines | bands


def _fits_inside(axes: Axes, labels: list[str]) -> bool:
    width, height = inches_of(axes)
    wide, tall = _entry_width(labels) / width, len(labels) * _LINE_HEIGHT * _size() / height
    return wide <= _WIDEST_INSIDE and tall <= _TALLEST_INSIDE and wide * tall <= _LARGEST_INSIDE


def _add_inside(axes: Axes, handles: Mapping[str, Any]) -> bool:
    """Whether there was a place for a legend that hides no line."""
    legend = axes.legend(handles.values(), list(handles), loc="best", framealpha=0.7, **_LEGEND)
    axes.figure.figure.draw_without_rendering()
    box = legend.get_window_extent()
    paths = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]
    if any(path.intersects_bbox(box, filled=False) for path in paths):
        legend.remove()
        return False
    return True


def _columns(labels: list[str], inches: float) -> tuple[int, list[str]]:
    """The largest number of columns that fits, and the labels in lines that fit."""
    for columns in range(len(labels), 1, -1):
        rows = math.ceil(len(labels) / columns)
        filled = [labels[start : start + rows] for start in range(0, len(labels), rows)]
        if len(filled) == columns and sum(map(_entry_width, filled)) <= inches:
            return columns, labels
    return 1, [wrapped(label, inches - _HANDLE_WIDTH * _size(), _LEGEND["fontsize"]) for label in labels]


def _entry_width(labels: list[str]) -> float:
    """Inches that a column of these entries takes."""
    return text_inches(max(map(len, labels)), _LEGEND["fontsize"]) + _HANDLE_WIDTH * _size()


def _size() -> float:
    """The legend's font size in inches."""
    return points(_LEGEND["fontsize"]) / 72


def _make_room(panels: Panels, columns: int, texts: list[str]) -> None:
    """A new figure grows by the height of the legend that hangs beneath its panels."""
    if panels.own:
        lines = sum(text.count("\n") + 1 for text in texts) / columns
        panels.grow(math.ceil(lines) * _LINE_HEIGHT * _size())


def _beneath(axes: Axes) -> dict[str, Any]:
    """Options of a legend that hangs below the labels of the x-axis."""
    from matplotlib.transforms import ScaledTranslation

    texts = (axes.xaxis.get_major_ticks(1)[0].label1, axes.xaxis.label)
    depth = 1.3 * sum(points(text.get_fontsize()) for text in texts) + axes.xaxis.labelpad + _TICK_DEPTH
    below = ScaledTranslation(0, -depth / 72, axes.figure.dpi_scale_trans)
    return {
        "loc": "upper right",
        "bbox_to_anchor": (1.0, 0.0),
        "bbox_transform": axes.transAxes + below,
        "borderaxespad": 0.0,
    }
