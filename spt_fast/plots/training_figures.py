"""Figures of training: loss and accuracy of a run, and the demo's comparison of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spt_fast.plots import data
from spt_fast.plots.data import Values
from spt_fast.plots.lines import NMI_LABEL, Style, draw_line, finish, styles
from spt_fast.plots.panels import (
    Panels,
    block_ticks,
    check_limits,
    count_ticks,
    limit_from_zero,
    open_panels,
    set_title,
    tidy,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STARTED: Style = {"linestyle": "--", "markerfacecolor": "white"}


@dataclass(frozen=True)
class MethodCurves:
    """What the demo's figure shows of one method; the arrays have one row per seed.

    Attributes:
        epochs: [T] epochs at which accuracy was measured.
        accuracy: [S, T] in [0, 1].
        nmi_start, nmi_end: [S, L] NMI of eq. 8 per block, before and after tuning; None without prompts.
    """

    epochs: Sequence[int]
    accuracy: Values
    nmi_start: Values | None = None
    nmi_end: Values | None = None


def demo_figure(
    methods: Mapping[str, MethodCurves],
    *,
    accuracy_ylim: Sequence[float] | None = None,
    nmi_ylim: Sequence[float] | None = None,
    subtitle: str = "",
    ax: Any = None,
) -> Figure:
    """Two panels: accuracy per epoch (mean and range over seeds), NMI per block at start and end.

    Args:
        accuracy_ylim, nmi_ylim: least and largest value of each y-axis, accuracy in percent.
        ax: two matplotlib Axes to draw into; None makes a new figure.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that brings it.
        TypeError, ValueError: no method was given, or limits or `ax` are not of that form.
    """
    if not methods:
        raise ValueError("methods must hold at least one method, got none")
    limits = check_limits("accuracy_ylim", accuracy_ylim), check_limits("nmi_ylim", nmi_ylim)
    panels = open_panels(2, ax, width=4.75, height=3.9)
    accuracy, nmi = panels.axes
    _draw_accuracy(accuracy, methods)
    accuracy.set_ylim(limits[0])
    _draw_start_and_end(nmi, methods)
    if nmi.lines:
        limit_from_zero([nmi], limits[1])
    for axes in panels.axes:
        finish(Panels([axes], panels.own), "")
    panels.add_title(subtitle)
    return panels.figure


def training_curves(
    source: data.PathLike,
    *,
    loss_ylim: Sequence[float] | None = None,
    accuracy_ylim: Sequence[float] | None = None,
    title: str = "",
    ax: Any = None,
) -> Figure:
    """Training loss and, where there is any, validation accuracy per epoch.

    Args:
        source: a CSV file with the columns epoch, loss, val_accuracy, as `spt-fast train` writes it.
        loss_ylim, accuracy_ylim: least and largest value of each y-axis, accuracy in percent.
        ax: matplotlib Axes to draw into, two where there are validation accuracies; None makes a new figure.

    Raises:
        ImportError, FileNotFoundError, TypeError, ValueError: as `nmi_over_epochs`.
    """
    loss, accuracy = data.training_of_epochs(source)
    shown = [
        (loss, 1.0, "training loss", check_limits("loss_ylim", loss_ylim)),
        (accuracy, 100.0, "validation accuracy (%)", check_limits("accuracy_ylim", accuracy_ylim)),
    ]
    shown = [curve for curve in shown if len(curve[0])]
    panels = open_panels(len(shown), ax, width=4.2, height=2.9)
    look = styles(["SPT-Deep"])["SPT-Deep"]
    for axes, (points, scale, label, limits) in zip(panels.axes, shown, strict=True):
        draw_line(axes, points[:, 0], scale * points[:, 1][None], look)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.set_ylim(limits)
        count_ticks(axes)
    tidy(*panels.axes)
    panels.add_title(title)
    return panels.figure


def _draw_accuracy(axes: Axes, methods: Mapping[str, MethodCurves]) -> None:
    looks = styles(list(methods))
    for name, curves in methods.items():
        draw_line(axes, curves.epochs, 100 * curves.accuracy, looks[name], label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy (%)")
    count_ticks(axes)
    set_title(axes, "Accuracy")


def _draw_start_and_end(axes: Axes, methods: Mapping[str, MethodCurves]) -> None:
    """The mean over seeds: four bands would hide each other."""
    looks = styles(list(methods))
    seeds = max(len(curves.accuracy) for curves in methods.values())
    set_title(axes, f"NMI per block, mean of {seeds} seeds" if seeds > 1 else "NMI per block")
    axes.set_xlabel("block")
    axes.set_ylabel(NMI_LABEL)
    for name, curves in methods.items():
        for moment, nmi, look in (("start", curves.nmi_start, _STARTED), ("end", curves.nmi_end, {})):
            if nmi is not None and curves.nmi_start is not None:
                blocks = range(1, nmi.shape[1] + 1)
                mean = nmi.mean(axis=0, keepdims=True)
                label = f"{name}, {moment}"
                draw_line(axes, blocks, mean, looks[name], label=label, markersize=5, markevery=1, **look)
                axes.set_xticks(block_ticks(blocks))
