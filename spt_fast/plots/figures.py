"""The figures: NMI over training and per layer, CKA between layers, accuracy, time, training and the demo.

Each takes arrays or CSV files and returns a matplotlib Figure; `figure.savefig(path)` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from spt_fast.plots import data
from spt_fast.plots.parts import (
    Style,
    Values,
    draw_heatmap,
    draw_line,
    is_leftmost,
    legend,
    new_figure,
    panels,
    styles,
    tidy,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NMI_LABEL = "NMI of prompts and patch tokens"
_STARTED: Style = {"linestyle": "--", "markerfacecolor": "white"}
_PAPERS: Style = {"linestyle": ":", "markerfacecolor": "white", "linewidth": 1.2}
_DURATIONS = (
    (1e-3, "1 ms"), (1e-2, "10 ms"), (0.1, "0.1 s"), (1.0, "1 s"), (10.0, "10 s"), (60.0, "1 min"),
    (600.0, "10 min"), (3600.0, "1 h"), (36000.0, "10 h"), (86400.0, "1 day"), (864000.0, "10 days"),
    (8640000.0, "100 days"),
)  # fmt: skip


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


def nmi_over_epochs(tasks: Any, *, xlabel: str = "epoch", title: str = "") -> Figure:
    """NMI while prompts are tuned (Fig. 2): a panel per task, a line per run, the mean over layers.

    A band shows the range over seeds where there are several.

    Args:
        tasks: maps each task to its runs, and each run to a CSV file with the columns step, layer, nmi, as
            `NMITracker` writes it, or to a pair (steps [S], values [S, L] or, with seeds, [R, S, L]); or one
            CSV file that also has columns task, run and seed, or some of them, as the demo writes it.
        xlabel: what a step is.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that brings it.
        FileNotFoundError, TypeError, ValueError: what was given is not of one of these forms.
    """
    curves = data.nmi_curves(tasks)
    figure, all_axes = panels(len(curves), width=3.0 if len(curves) > 1 else 4.6, height=2.7)
    looks = styles(_names(runs for runs in curves.values()))
    for axes, (task, runs) in zip(all_axes, curves.items(), strict=True):
        for name, curve in runs.items():
            draw_line(axes, curve.steps, curve.values.mean(axis=2), looks[name], label=name)
        axes.set_title(task, fontsize=10)
        axes.set_xlabel(xlabel)
        _from_zero(axes)
        if is_leftmost(axes):
            axes.set_ylabel("NMI (eq. 8)")
    tidy(*all_axes)
    if any(looks):
        legend(all_axes[0])
    _add_title(figure, title)
    return figure


def nmi_per_layer(runs: Any, *, title: str = "") -> Figure:
    """NMI of each layer's prompts and patch tokens; a line per run, a band for its range over rows.

    Args:
        runs: maps names to arrays [L] or [R, L] or to CSV files as in `nmi_over_epochs`; or one CSV file.
            Of a file, the last step is drawn.

    Raises:
        ImportError, FileNotFoundError, TypeError, ValueError: as `nmi_over_epochs`.
    """
    layers = data.nmi_of_layers(runs)
    figure = new_figure(4.8, 3.4)
    axes = figure.subplots()
    _draw_layers(axes, layers)
    tidy(axes)
    _add_title(figure, title)
    return figure


def cka_heatmap(maps: Any, *, title: str = "") -> Figure:
    """CKA of the prompts of each layer (rows) and the patch tokens of each (columns), Fig. S4.

    The largest value of a row has a frame. Where that is off the diagonal, the prompts resemble the tokens
    of another layer more than those of their own. All maps share one scale.

    Args:
        maps: an array [L, L] or a CSV file with the columns prompt_layer, token_layer, cka, as
            `spt-fast nmi` writes it; or a mapping of names to such, drawn side by side.

    Raises:
        ImportError, FileNotFoundError, TypeError, ValueError: as `nmi_over_epochs`.
    """
    values = data.cka_maps(maps)
    figure, all_axes = panels(len(values), width=3.9, height=3.4)
    _draw_maps(figure, all_axes, values)
    _add_title(figure, title)
    return figure


def analysis_figure(nmi: Any, cka: Any, *, title: str = "") -> Figure:
    """`nmi_per_layer` and `cka_heatmap` of one set of prompts side by side; arguments as there."""
    layers, values = data.nmi_of_layers(nmi), data.cka_maps(cka)
    figure = new_figure(9.0, 3.8)
    left, *rest = figure.subplots(1, 1 + len(values))
    _draw_layers(left, layers)
    left.set_title("NMI (eq. 8)", fontsize=10)
    tidy(left)
    _draw_maps(figure, rest, {name or "CKA": value for name, value in values.items()})
    _add_title(figure, title)
    return figure


def accuracy_against_prompt_length(runs: Any, *, title: str = "") -> Figure:
    """Accuracy for each number of prompts per block (Fig. 3c): a line per run, a band for its seeds.

    Args:
        runs: maps names to (lengths [X], accuracies in [0, 1], [X] or [R, X]); or a CSV file with the columns
            num_prompts, accuracy and, if there are several, run and seed.

    Raises:
        ImportError, FileNotFoundError, TypeError, ValueError: as `nmi_over_epochs`.
    """
    pairs = data.accuracy_of_lengths(runs)
    for name, (_, accuracy) in pairs.items():
        if accuracy.min() < 0 or accuracy.max() > 1:
            raise ValueError(
                f"accuracies of {name!r} must be in [0, 1], got up to {np.abs(accuracy).max():g}"
            )
    figure = new_figure(4.8, 3.4)
    axes = figure.subplots()
    looks = styles(list(pairs))
    for name, (lengths, accuracy) in pairs.items():
        draw_line(axes, lengths, 100 * accuracy, looks[name], label=name, markevery=1)
    _ticks_at(axes, sorted({int(x) for lengths, _ in pairs.values() for x in lengths}))
    axes.set_xlabel("prompts per block")
    axes.set_ylabel("accuracy (%)")
    tidy(axes)
    if any(pairs):
        legend(axes, loc="best")
    _add_title(figure, title)
    return figure


def construction_time(times: Any, paper: Any = None, *, title: str = "") -> Figure:
    """Seconds to build prompts from a share of the training data, on a log scale (Table 1, Fig. 3a).

    Args:
        times: maps strategies to (shares in (0, 1], seconds [X] or [R, X]); or a CSV file with the columns
            strategy, share, seconds, paper_seconds (empty where the paper has none).
        paper: what the paper reports, in the same form; drawn dotted. Of a file, its column paper_seconds.

    Raises:
        ImportError, FileNotFoundError, TypeError, ValueError: as `nmi_over_epochs`.
    """
    measured, published = data.times_of_shares(times)
    if paper is not None:
        published = data.times_of_shares(paper)[0]
    for name, (shares, seconds) in [*measured.items(), *published.items()]:
        if shares.min() <= 0 or shares.max() > 1:
            raise ValueError(f"shares of {name!r} must be above 0 and at most 1, got {shares.tolist()}")
        if seconds.min() <= 0:
            raise ValueError(f"seconds of {name!r} must be above 0, got {seconds.min():g}")
    figure = new_figure(5.6, 3.8)
    axes = figure.subplots()
    looks = styles(_names((measured, published)))
    for pairs, suffix, look in ((measured, "", {}), (published, ", paper", _PAPERS)):
        for name, (shares, seconds) in pairs.items():
            label = f"{name}{suffix}"
            draw_line(axes, 100 * shares, seconds, looks[name], label=label, markevery=1, **look)
    axes.set_yscale("log")
    _ticks_in_words(axes)
    axes.set_xticks(sorted({round(100 * x, 6) for pair in measured.values() for x in pair[0]}))
    axes.set_xlabel("share of the training data (%)")
    axes.set_ylabel("time to build prompts")
    tidy(axes)
    legend(axes, loc="center left", bbox_to_anchor=(1, 0.5))
    _add_title(figure, title)
    return figure


def demo_figure(methods: Mapping[str, MethodCurves], *, subtitle: str = "") -> Figure:
    """Two panels: accuracy per epoch (mean and range over seeds), NMI per block at start and end.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that brings it.
        ValueError: no method was given.
    """
    if not methods:
        raise ValueError("methods must hold at least one method, got none")
    figure = new_figure(9.5, 3.9)
    accuracy, nmi = figure.subplots(1, 2)
    _draw_accuracy(accuracy, methods)
    _draw_start_and_end(nmi, methods)
    tidy(accuracy, nmi)
    _add_title(figure, subtitle)
    return figure


def training_curves(source: data.PathLike, *, title: str = "") -> Figure:
    """Training loss and, where there is any, validation accuracy per epoch.

    Args:
        source: a CSV file with the columns epoch, loss, val_accuracy, as `spt-fast train` writes it.

    Raises:
        ImportError, FileNotFoundError, ValueError: as `nmi_over_epochs`.
    """
    loss, accuracy = data.training_of_epochs(source)
    shown = [(loss, 1.0, "training loss"), (accuracy, 100.0, "validation accuracy (%)")]
    shown = [curve for curve in shown if len(curve[0])]
    figure, all_axes = panels(len(shown), width=4.2, height=2.9)
    look = styles(["SPT-Deep"])["SPT-Deep"]
    for axes, (points, scale, label) in zip(all_axes, shown, strict=True):
        draw_line(axes, points[:, 0], scale * points[:, 1][None], look)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
    tidy(*all_axes)
    _add_title(figure, title)
    return figure


def _draw_accuracy(axes: Axes, methods: Mapping[str, MethodCurves]) -> None:
    looks = styles(list(methods))
    for name, curves in methods.items():
        draw_line(axes, curves.epochs, 100 * curves.accuracy, looks[name], label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy (%)")
    seeds = len(next(iter(methods.values())).accuracy)
    axes.set_title(f"Accuracy: mean and range over {seeds} seed{'s' if seeds != 1 else ''}", fontsize=10)
    legend(axes, fontsize=9, loc="lower right")


def _draw_start_and_end(axes: Axes, methods: Mapping[str, MethodCurves]) -> None:
    """The mean over seeds: four bands would hide each other."""
    looks = styles(list(methods))
    axes.set_title("Shared information per block (eq. 8)", fontsize=10)
    _label_layers(axes)
    for name, curves in methods.items():
        for moment, nmi, look in (("start", curves.nmi_start, _STARTED), ("end", curves.nmi_end, {})):
            if nmi is not None and curves.nmi_start is not None:
                layers = range(1, nmi.shape[1] + 1)
                mean = nmi.mean(axis=0, keepdims=True)
                label = f"{name}, {moment}"
                draw_line(axes, layers, mean, looks[name], label=label, markersize=5, markevery=1, **look)
                whole_ticks(axes, layers)
    if axes.lines:
        _from_zero(axes)
        legend(axes)


def _draw_layers(axes: Axes, runs: Mapping[str, tuple[list[int], Values]]) -> None:
    looks = styles(list(runs))
    for name, (layers, values) in runs.items():
        draw_line(axes, layers, values, looks[name], label=name, markevery=1, markersize=5)
    whole_ticks(axes, max((layers for layers, _ in runs.values()), key=len))
    _label_layers(axes)
    _from_zero(axes)
    if any(runs):
        legend(axes)


def _draw_maps(figure: Figure, all_axes: Sequence[Axes], maps: Mapping[str, Values]) -> None:
    limits = (
        min(0.0, *(value.min() for value in maps.values())),
        max(value.max() for value in maps.values()),
    )
    for axes, (name, values) in zip(all_axes, maps.items(), strict=True):
        draw_heatmap(axes, values, limits)
        axes.set_xlabel("patch tokens entering block")
        axes.set_title(name, fontsize=10)
    all_axes[0].set_ylabel("prompts of block")
    figure.colorbar(all_axes[0].images[0], ax=list(all_axes), label="linear CKA, unbiased", shrink=0.9)


def _label_layers(axes: Axes) -> None:
    axes.set_xlabel("block")
    axes.set_ylabel(_NMI_LABEL)


def _from_zero(axes: Axes) -> None:
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if axes.dataLim.y0 < 0 else 0.0)


def _ticks_at(axes: Axes, lengths: Sequence[int]) -> None:
    """A tick at each prompt length; on a log scale where they span a decade."""
    from matplotlib.ticker import NullLocator

    logarithmic = lengths[0] > 0 and lengths[-1] >= 10 * lengths[0]
    if logarithmic:
        axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    shown = [lengths[0]]
    for length in lengths[1:]:
        # Closer labels would run into each other.
        apart = length / shown[-1] >= 1.3 if logarithmic else length - shown[-1] >= 0.04 * lengths[-1]
        if apart:
            shown.append(length)
    axes.set_xticks(shown, [str(length) for length in shown])


def _ticks_in_words(axes: Axes) -> None:
    from matplotlib.ticker import NullLocator

    low, high = axes.get_ylim()
    inside = [(at, text) for at, text in _DURATIONS if low <= at <= high]
    axes.yaxis.set_minor_locator(NullLocator())
    if len(inside) >= 2:
        axes.set_yticks([at for at, _ in inside], [text for _, text in inside])
        axes.set_ylim(low, high)


def _names(groups: Any) -> list[str]:
    """Every name once, in order of first use."""
    return list(dict.fromkeys(name for group in groups for name in group))


def _add_title(figure: Figure, title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=9, color="#333333")
