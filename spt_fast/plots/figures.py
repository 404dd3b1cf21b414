"""The figures of the paper: NMI over training and per block, CKA between blocks, accuracy, construction time.

Each takes arrays or CSV files and returns a matplotlib Figure; `figure.savefig(path)` writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spt_fast.plots import data
from spt_fast.plots.data import Values
from spt_fast.plots.heatmap import draw_maps
from spt_fast.plots.lines import NMI_LABEL, Style, draw_line, finish, styles
from spt_fast.plots.panels import (
    Panels,
    block_ticks,
    check_limits,
    count_ticks,
    inches_of,
    limit_from_zero,
    open_panels,
    points,
    set_title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PAPERS: Style = {"linestyle": ":", "markerfacecolor": "white", "linewidth": 1.2}
_DURATIONS = (
    (1e-3, "1 ms"), (1e-2, "10 ms"), (0.1, "0.1 s"), (1.0, "1 s"), (10.0, "10 s"), (60.0, "1 min"),
    (600.0, "10 min"), (3600.0, "1 h"), (36000.0, "10 h"), (86400.0, "1 day"), (864000.0, "10 days"),
    (8640000.0, "100 days"),
)  # fmt: skip


def nmi_over_epochs(
    tasks: Any,
    *,
    steps_per_epoch: float | Mapping[str, float] | None = None,
    xlabel: str | None = None,
    ylim: Sequence[float] | None = None,
    title: str = "",
    ax: Any = None,
) -> Figure:
    """NMI while prompts are tuned (Fig. 2): a panel per task, a line per run, the mean over blocks.

    A band shows the range over seeds where there are several. All panels have the same y-axis.

    Args:
        tasks: maps each task to its runs, and each run to a CSV file with the columns step, block, nmi, as
            `NMITracker` writes it, or to a pair (steps [S], values [S, L] or, with seeds, [R, S, L]), as
            `NMITracker.history` returns it; or one CSV file that also has columns task, run and seed, or some
            of them. A file with a column epoch in place of step, as the demo writes it, is by epoch.
        steps_per_epoch: how many steps an epoch has, or a mapping from each task to that; the x-axis is then
            in epochs. None draws training steps.
        xlabel: what the x-axis shows, where it is neither "step" nor "epoch".
        ylim: least and largest value of the y-axis; None takes them from the values.
        ax: matplotlib Axes to draw into, one per task; None makes a new figure.

    Returns:
        The figure; with `ax`, the one that it belongs to.

    Raises:
        ImportError: matplotlib is missing; the message names the extra that brings it.
        FileNotFoundError, TypeError, ValueError: what was given is not of one of these forms.
    """
    curves = data.nmi_curves(tasks, steps_per_epoch)
    limits = check_limits("ylim", ylim)
    runs = [(task, name, curve) for task, named in curves.items() for name, curve in named.items()]
    by_epoch = runs[0][2].by_epoch
    averaged = all(len(curve.blocks) > 1 for _, _, curve in runs)
    width, height = (2.4, 2.3) if len(curves) > 1 else (4.6, 3.0)
    panels = open_panels(len(curves), ax, width=width, height=height, sharey=True)
    looks = styles(list(dict.fromkeys(name for _, name, _ in runs)))
    for axes, task in zip(panels.axes, curves, strict=True):
        for name, curve in curves[task].items():
            draw_line(axes, curve.steps, curve.values.mean(axis=2), looks[name], label=name)
        if task:
            set_title(axes, task)
        axes.set_xlabel(xlabel if xlabel is not None else "epoch" if by_epoch else "step")
        count_ticks(axes)
        if panels.starts_row(axes):
            axes.set_ylabel("NMI, mean of blocks" if averaged else NMI_LABEL)
    limit_from_zero(panels.axes, limits)
    return finish(panels, title)


def nmi_per_layer(
    runs: Any,
    *,
    rows: str = "seeds",
    ylim: Sequence[float] | None = None,
    title: str = "",
    ax: Any = None,
) -> Figure:
    """NMI of each block's prompts and patch tokens; a line per run, a band for its range over rows.

    Args:
        runs: maps names to arrays [L] or [R, L] or to CSV files as in `nmi_over_epochs`; or one CSV file.
            Of a file, the last step is drawn.
        rows: what the R rows are, in the plural, for the legend.
        ylim, ax: as in `nmi_over_epochs`; `ax` is one Axes.

    Returns, Raises:
        As `nmi_over_epochs`.
    """
    blocks, limits = data.nmi_of_blocks(runs), check_limits("ylim", ylim)
    panels = open_panels(1, ax, width=4.6, height=3.2)
    _draw_blocks(panels.axes[0], blocks, rows, limits)
    return finish(panels, title)


def cka_heatmap(
    maps: Any, *, limits: Sequence[float] | None = None, title: str = "", ax: Any = None
) -> Figure:
    """CKA of the prompts of each block (rows) and the patch tokens of each (columns), Fig. S4.

    The largest value of a row has a frame where it exceeds all others of the row by more than 0.03, which
    chance and another machine do not bring about (`spt_fast.plots.heatmap.CLEAR`). Where the frame is off the
    diagonal, the prompts resemble the tokens of another block more than those of their own. Cells hold their
    values where these can be read.

    Args:
        maps: an array [L, L] or a CSV file with the columns prompt_block, token_block, cka, as
            `spt-fast nmi` writes it; or a mapping of names to such, drawn side by side.
        limits: values at both ends of the colours, for all maps; None is (0, 1), or from the least value
            where that is negative.
        ax: matplotlib Axes to draw into, one per map; None makes a new figure.

    Returns, Raises:
        As `nmi_over_epochs`.
    """
    values, ends = data.cka_maps(maps), check_limits("limits", limits)
    sizes = {len(value) for value in values.values()}
    width, height = (3.9, 3.4) if max(sizes) <= 12 else (4.6, 4.0)
    panels = open_panels(len(values), ax, width=width, height=height, sharey=len(sizes) == 1)
    draw_maps(panels, values, ends)
    panels.add_title(title)
    return panels.figure


def analysis_figure(
    nmi: Any,
    cka: Any,
    *,
    rows: str = "seeds",
    ylim: Sequence[float] | None = None,
    limits: Sequence[float] | None = None,
    title: str = "",
    ax: Any = None,
) -> Figure:
    """`nmi_per_layer` and `cka_heatmap` of one set of prompts side by side; arguments as there.

    Args:
        ax: Axes for NMI, and one for each map; None makes a new figure.
    """
    blocks, values = data.nmi_of_blocks(nmi), data.cka_maps(cka)
    heights, ends = check_limits("ylim", ylim), check_limits("limits", limits)
    panels = open_panels(1 + len(values), ax, width=4.5, height=3.8)
    left, *rest = panels.axes
    _draw_blocks(left, blocks, rows, heights)
    set_title(left, "NMI of prompts and patch tokens")
    finish(Panels([left], panels.own), "")
    draw_maps(Panels(rest, panels.own), {name or "CKA": value for name, value in values.items()}, ends)
    panels.add_title(title)
    return panels.figure


def accuracy_against_prompt_length(
    runs: Any, *, ylim: Sequence[float] | None = None, title: str = "", ax: Any = None
) -> Figure:
    """Accuracy for each number of prompts per block (Fig. 3c): a line per run, a band for its seeds.

    Args:
        runs: maps names to (lengths [X], accuracies in [0, 1], [X] or [R, X]); or a CSV file with the columns
            num_prompts, accuracy and, if there are several, run and seed.
        ylim, ax: as in `nmi_over_epochs`; `ylim` is in percent, `ax` is one Axes.

    Returns, Raises:
        As `nmi_over_epochs`.
    """
    pairs, limits = data.accuracy_of_lengths(runs), check_limits("ylim", ylim)
    for name, (lengths, accuracy) in pairs.items():
        if accuracy.min() < 0 or accuracy.max() > 1:
            raise ValueError(
                f"accuracies of {name!r} must be in [0, 1], got {accuracy.min():g} to {accuracy.max():g}"
            )
        if (lengths % 1 != 0).any():
            raise ValueError(f"lengths of {name!r} must be whole numbers, got {lengths.tolist()}")
    panels = open_panels(1, ax, width=4.6, height=3.2)
    (axes,) = panels.axes
    looks = styles(list(pairs))
    for name, (lengths, accuracy) in pairs.items():
        draw_line(axes, lengths, 100 * accuracy, looks[name], label=name, markevery=1)
    _ticks_at(axes, sorted({int(x) for lengths, _ in pairs.values() for x in lengths}))
    axes.set_xlabel("prompts per block")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(limits)
    return finish(panels, title)


def construction_time(
    times: Any, paper: Any = None, *, ylim: Sequence[float] | None = None, title: str = "", ax: Any = None
) -> Figure:
    """Seconds to build prompts from a share of the training data, on a log scale (Table 1, Fig. 3a).

    Args:
        times: maps strategies to (shares in (0, 1], seconds [X] or [R, X]); or a CSV file with the columns
            strategy, share, seconds, paper_seconds (empty where the paper has none).
        paper: what the paper reports, in the same form; drawn dotted. Of a file, its column paper_seconds.
            None takes that column of `times`, if it is a file.
        ylim, ax: as in `nmi_over_epochs`; `ylim` is in seconds, above 0, `ax` is one Axes.

    Returns, Raises:
        As `nmi_over_epochs`.
    """
    measured, published = data.times_of_shares(times)
    if paper is not None:
        given, published = data.times_of_shares(paper)
        published = published or given
    for name, (shares, seconds) in [*measured.items(), *published.items()]:
        if shares.min() <= 0 or shares.max() > 1:
            raise ValueError(f"shares of {name!r} must be above 0 and at most 1, got {shares.tolist()}")
        if seconds.min() <= 0:
            raise ValueError(f"seconds of {name!r} must be above 0, got {seconds.min():g}")
    limits = check_limits("ylim", ylim)
    if limits is not None and limits[0] <= 0:
        raise ValueError(f"ylim must be above 0, since the y-axis is logarithmic, got {limits}")
    panels = open_panels(1, ax, width=5.0, height=3.8)
    (axes,) = panels.axes
    looks = styles(list(dict.fromkeys([*measured, *published])))
    for name, (shares, seconds) in measured.items():
        draw_line(axes, 100 * shares, seconds, looks[name], label=name, markevery=1)
    for name, (shares, seconds) in published.items():
        # One entry of the legend is enough for all that have the colour of a strategy that was measured.
        label = f"_{name}, paper" if name in measured else f"{name}, paper"
        draw_line(axes, 100 * shares, seconds, looks[name], label=label, markevery=1, **_PAPERS)
    if measured.keys() & published.keys():
        axes.plot([], [], color="#555555", marker="o", markersize=4, label="paper", **_PAPERS)
    axes.set_yscale("log")
    axes.set_ylim(limits)
    _ticks_in_words(axes)
    drawn = [*measured.values(), *published.values()]
    axes.set_xticks(sorted({round(100 * x, 6) for shares, _ in drawn for x in shares}))
    axes.set_xlabel("share of the training data (%)")
    axes.set_ylabel("time to build prompts")
    return finish(panels, title, crowded=True)


def _draw_blocks(
    axes: Axes,
    runs: Mapping[str, tuple[list[int], Values]],
    rows: str,
    limits: tuple[float, float] | None,
) -> None:
    looks = styles(list(runs))
    for name, (blocks, values) in runs.items():
        draw_line(axes, blocks, values, looks[name], rows=rows, label=name, markevery=1)
    axes.set_xticks(block_ticks(max((blocks for blocks, _ in runs.values()), key=len)))
    axes.set_xlabel("block")
    axes.set_ylabel(NMI_LABEL)
    limit_from_zero([axes], limits)


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
    """Durations with their units, as many as do not run into each other."""
    from matplotlib.ticker import NullLocator

    low, high = axes.get_ylim()
    apart = 1.1 * points(axes.yaxis.get_major_ticks(1)[0].label1.get_fontsize()) / 72 / inches_of(axes)[1]
    shown: list[tuple[float, str]] = []
    for at, text in _DURATIONS:
        if low <= at <= high and (not shown or math.log(at / shown[-1][0]) >= apart * math.log(high / low)):
            shown.append((at, text))
    axes.yaxis.set_minor_locator(NullLocator())
    if len(shown) >= 2:
        axes.set_yticks([at for at, _ in shown], [text for _, text in shown])
        axes.set_ylim(low, high)
