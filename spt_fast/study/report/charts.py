"""Line charts as SVG within HTML: small multiples whose colours come from the page, light or dark.

Limits: a chart is 320 wide and scales with its place; x values are positive where their scale is logarithmic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from spt_fast.study.report.html import Html, element, markup

# Colours of the style sheet; beyond them, lines are dashed too.
COLOURS = 8
PERCENT = (0.0, 100.0)
_WIDTH, _HEIGHT = 320, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 38
# Units of the drawing between labels of an axis, at least.
_APART = {"x": 34, "y": 26}
_MOST_MARKERS = 14
_MOST_POINTS = 120


@dataclass(frozen=True)
class Line:
    """What one name has in a chart.

    Attributes:
        name: as the legend has it.
        x: [X] ascending.
        values: [R][X], a row for each seed: their mean is the line, least and largest the band.
    """

    name: str
    x: Sequence[float]
    values: Sequence[Sequence[float]]

    @property
    def mean(self) -> list[float]:
        """[X]"""
        return [fmean(column) for column in zip(*self.values, strict=True)]

    @property
    def extremes(self) -> list[tuple[float, float]]:
        """[X] of (least, largest)."""
        return [(min(column), max(column)) for column in zip(*self.values, strict=True)]


@dataclass(frozen=True)
class Axis:
    """Attributes:
    label: what is on it.
    logarithmic: whether it is by powers.
    whole: whether it counts.
    from_zero: whether 0 is on it in any case.
    limits: beyond which it never reaches.
    """

    label: str
    logarithmic: bool = False
    whole: bool = False
    from_zero: bool = False
    limits: tuple[float, float] = (-math.inf, math.inf)


def line_chart(lines: Sequence[Line], looks: Mapping[str, int], *, x: Axis, y: Axis, title: str) -> Html:
    """A chart, with a value to each marker that is pointed at.

    Args:
        looks: the place of each name among the colours, the same in all charts of a page.
        title: what a screen reader says before the axes and the lines' ends.
    """
    lines = [_thinned(line) for line in lines]
    across = _scale([value for line in lines for value in line.x], x, (_LEFT, _WIDTH - _RIGHT))
    heights = [value for line in lines for pair in line.extremes for value in pair]
    up = _scale(heights, y, (_HEIGHT - _BOTTOM, _TOP))
    ends = ", ".join(f"{line.name} {line.mean[-1]:.3g}" for line in lines)
    return element(
        "svg",
        _frame(across, up, x, y),
        [_drawn(line, looks.get(line.name, 0), across, up) for line in lines],
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=f"{title}: {y.label} against {x.label}; at the right end: {ends}",
    )


def legend(names: Sequence[str], looks: Mapping[str, int]) -> Html:
    """Marker and line of each name."""
    items = []
    for name in names:
        look = looks.get(name, 0)
        line = element("line", x1=0, y1=6, x2=26, y2=6, class_="line", stroke_dasharray=_dashes(look))
        sample = element("g", line, _marker(look, 13, 6, ""), **_style(look))
        items.append(element("li", element("svg", sample, viewBox="0 0 26 12", aria_hidden="true"), name))
    return element("ul", items, class_="legend")


@dataclass(frozen=True)
class _Scale:
    """Values to places in the drawing, and the values that get a label."""

    place: Callable[[float], float]
    ticks: list[float]

    def labelled(self, least: float) -> list[float]:
        """The ticks whose labels do not overlap."""
        chosen: list[float] = []
        for tick in self.ticks:
            if not chosen or abs(self.place(tick) - self.place(chosen[-1])) >= least:
                chosen.append(tick)
        return chosen


def _scale(values: Sequence[float], axis: Axis, ends: tuple[float, float]) -> _Scale:
    low, high = min(values), max(values)
    distinct = sorted(set(values))
    # Few values are asked for by name, such as rates and lengths; many are a range, as are parts of epochs.
    counted = not axis.whole or all(float(value).is_integer() for value in distinct)
    by_name = len(distinct) <= 6 and counted and not axis.from_zero and axis.limits[0] == -math.inf
    if axis.logarithmic:
        ticks = distinct if by_name else _decades(low, high)
        low, high = _widened(math.log10(low), math.log10(high), 0.05)
        return _Scale(lambda value: _between(math.log10(value), low, high, ends), ticks)
    if axis.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    bottom, top = _widened(low, high, 0.04)
    if axis.from_zero and low == 0:
        bottom = 0.0
    bottom, top = max(bottom, axis.limits[0]), min(top, axis.limits[1])
    ticks = distinct if by_name else _round_values(bottom, top, axis.whole)
    return _Scale(lambda value: _between(value, bottom, top, ends), ticks)


def _widened(low: float, high: float, share: float) -> tuple[float, float]:
    """With room at both ends, and around a single value."""
    room = share * (high - low) or max(0.02 * abs(high), 1e-3)
    return low - room, high + room


def _between(value: float, low: float, high: float, ends: tuple[float, float]) -> float:
    return ends[0] + (value - low) / (high - low) * (ends[1] - ends[0])


def _round_values(low: float, high: float, whole: bool) -> list[float]:
    """About five values of few digits."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= rough * 0.999)
    if whole:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [tick for tick in (10.0**each for each in exponents) if low * 0.999 <= tick <= high * 1.001]


def _frame(across: _Scale, up: _Scale, x: Axis, y: Axis) -> Html:
    """Light lines, numbers and the name of the x-axis; that of the y-axis is in the caption."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in up.labelled(_APART["y"]):
        height = f"{up.place(tick):.1f}"
        parts.append(element("line", x1=_LEFT, x2=right, y1=height, y2=height, class_="rule"))
        parts.append(element("text", _number(tick), x=_LEFT - 6, y=height, dy="0.35em", class_="end"))
    for tick in across.labelled(_APART["x"]):
        place = f"{across.place(tick):.1f}"
        parts.append(element("line", x1=place, x2=place, y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(element("text", _number(tick), x=place, y=bottom + 16, class_="middle"))
    parts.append(element("line", x1=_LEFT, x2=right, y1=bottom, y2=bottom, class_="axis"))
    parts.append(element("text", x.label, x=(_LEFT + right) / 2, y=_HEIGHT - 6, class_="middle label"))
    return markup(parts)


def _drawn(line: Line, look: int, across: _Scale, up: _Scale) -> Html:
    mean = line.mean
    points = [(across.place(x), up.place(y)) for x, y in zip(line.x, mean, strict=True)]
    parts = []
    if len(line.values) > 1 and len(points) > 1:
        band = [(across.place(x), up.place(low)) for x, (low, _) in zip(line.x, line.extremes, strict=True)]
        back = [(across.place(x), up.place(high)) for x, (_, high) in zip(line.x, line.extremes, strict=True)]
        parts.append(element("polygon", points=_points([*band, *reversed(back)]), class_="band"))
    parts.append(element("polyline", points=_points(points), class_="line", stroke_dasharray=_dashes(look)))
    every = -(-len(points) // _MOST_MARKERS)
    # The last point always has one.
    for index in range((len(points) - 1) % every, len(points), every):
        told = f"{line.name}: {mean[index]:.4g} at {_number(line.x[index])}"
        parts.append(_marker(look, *points[index], told))
    return element("g", parts, **_style(look))


def _thinned(line: Line) -> Line:
    """With fewer points where there are more than can be seen."""
    every = -(-len(line.x) // _MOST_POINTS)
    chosen = range((len(line.x) - 1) % every, len(line.x), every)
    return Line(line.name, [line.x[i] for i in chosen], [[row[i] for i in chosen] for row in line.values])


def _marker(look: int, x: float, y: float, told: str) -> Html:
    """A shape of its own for each colour, for those who do not see colours, and for grey print."""
    title = element("title", told) if told else Html()
    if look % COLOURS == 0:
        return element("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=3.4)
    shape = _SHAPES[look % COLOURS]
    return element("polygon", title, points=_points([(x + dx, y + dy) for dx, dy in shape]))


def _regular(corners: int, radius: float, turn: float, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners of a regular shape around 0; every second one nearer to the centre makes it a star."""
    angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
    radii = [radius * (inner if i % 2 else 1.0) for i in range(corners)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in zip(radii, angles, strict=True)]


_SHAPES = {
    1: _regular(4, 4.4, math.pi / 4),
    2: _regular(3, 4.8, 0),
    3: _regular(4, 4.8, 0),
    4: _regular(3, 4.8, math.pi),
    5: _regular(10, 5.2, 0, inner=0.45),
    6: _regular(8, 5.4, math.pi / 4, inner=0.4),
    7: _regular(6, 4.4, 0),
}


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _style(look: int) -> dict[str, str | None]:
    """Its colour; beyond the colours, markers are hollow."""
    return {"style": f"--c:var(--c{look % COLOURS})", "class_": None if look < COLOURS else "hollow"}


def _dashes(look: int) -> str | None:
    return None if look < COLOURS else "4 2.5"


def _number(value: float) -> str:
    """Short, and the same for all machines: 0.001 as 1e-3."""
    if value and not 0.01 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.4g}"
