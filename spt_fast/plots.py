"""Figures. Needs matplotlib, the extra `plots`; it is imported when a figure is asked for, not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = NDArray[np.float64]

# Okabe and Ito's palette, safe for all common kinds of colour vision; markers and widths serve grey print.
_STYLES: dict[str, dict[str, Any]] = {
    "SPT-Deep": {"color": "#D55E00", "marker": "o", "linewidth": 2.2},
    "VPT-Deep": {"color": "#0072B2", "marker": "s", "linewidth": 1.6},
    "SPT-Deep, frozen": {"color": "#E69F00", "marker": "v", "linewidth": 1.6},
    "VPT-Deep, frozen": {"color": "#56B4E9", "marker": "P", "linewidth": 1.2},
    "linear probe": {"color": "#555555", "marker": "^", "linewidth": 1.2},
}
_SPARE_STYLE: dict[str, Any] = {"color": "#009E73", "marker": "D", "linewidth": 1.4}


@dataclass(frozen=True)
class MethodCurves:
    """What the figure shows of one method, one row per seed.

    Attributes:
        epochs: [T] epochs at which accuracy was measured.
        accuracy: [S, T] in [0, 1].
        nmi_start, nmi_end: [S, L] NMI of eq. 8 per block, before and after tuning; None without prompts.
    """

    epochs: Sequence[int]
    accuracy: Values
    nmi_start: Values | None = None
    nmi_end: Values | None = None


def matplotlib_missing() -> str | None:
    """Why no figure can be drawn here, in one line; None where one can."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return 'matplotlib is not installed: no figure; pip install "spt_fast[plots]" adds it'
    return None


def demo_figure(methods: Mapping[str, MethodCurves], *, subtitle: str = "") -> Figure:
    """Two panels: accuracy per epoch (mean and range over seeds), NMI per block at start and end.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that brings it.
        ValueError: no method was given.
    """
    if not methods:
        raise ValueError("methods must hold at least one method, got none")
    reason = matplotlib_missing()
    if reason is not None:
        raise ImportError(reason)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.9), dpi=160, layout="constrained")
    accuracy, nmi = figure.subplots(1, 2)
    _draw_accuracy(accuracy, methods)
    _draw_nmi(nmi, {name: curves for name, curves in methods.items() if curves.nmi_start is not None})
    for axes in (accuracy, nmi):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
    if subtitle:
        figure.suptitle(subtitle, fontsize=9, color="#333333")
    return figure


def _draw_accuracy(axes: Axes, methods: Mapping[str, MethodCurves]) -> None:
    for name, curves in methods.items():
        percent = 100 * curves.accuracy
        style = _STYLES.get(name, _SPARE_STYLE)
        axes.fill_between(
            curves.epochs, percent.min(axis=0), percent.max(axis=0), color=style["color"], alpha=0.15, lw=0
        )
        axes.plot(
            curves.epochs,
            percent.mean(axis=0),
            label=name,
            markersize=4,
            markevery=_every(curves.epochs),
            **style,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy (%)")
    seeds = len(next(iter(methods.values())).accuracy)
    axes.set_title(f"Accuracy: mean and range over {seeds} seed{'s' if seeds != 1 else ''}", fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _draw_nmi(axes: Axes, methods: Mapping[str, MethodCurves]) -> None:
    values = []
    for name, curves in methods.items():
        style = _STYLES.get(name, _SPARE_STYLE)
        for moment, nmi, look in (
            ("start", curves.nmi_start, {"linestyle": "--", "markerfacecolor": "white"}),
            ("end", curves.nmi_end, {"linestyle": "-"}),
        ):
            if nmi is None:
                continue
            mean = nmi.mean(axis=0)
            values.append(mean)
            label = f"{name}, {moment}"
            axes.plot(range(1, len(mean) + 1), mean, label=label, markersize=5, **(style | look))
    axes.set_xlabel("block")
    axes.set_ylabel("NMI of prompts and patch tokens")
    axes.set_title("Shared information per block (eq. 8)", fontsize=10)
    if not values:
        return
    axes.set_xticks(range(1, len(values[0]) + 1))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def _every(points: Sequence[int]) -> int:
    return max(1, len(points) // 10)
