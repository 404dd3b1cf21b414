"""Tables as plain data: cells that are numbers or words, rows, sections with columns of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from spt_fast.study.statistics import Difference, deviation, mean
from spt_fast.study.tables.arms import Arm

Kind = Literal["published", "other papers", "ours"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a table shows in one place.

    Attributes:
        value: a number, or None where there are words.
        digits: decimals that it is shown with.
        signed: whether a plus is shown.
        unit: shown behind the number.
        spread: sample standard deviation over seeds; None of a single one.
        interval: ends of a 95 % interval.
        text: the words, where there is no number; "" leaves the place empty.
        note: shown in parentheses behind it.
    """

    value: float | None = None
    digits: int = 2
    signed: bool = False
    unit: str = ""
    spread: float | None = None
    interval: tuple[float, float] | None = None
    text: str = ""
    note: str = ""


NOT_RUN = Cell(text="not run")
EMPTY = Cell()


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row of a table.

    Attributes:
        label: its first cell.
        kind: whose numbers they are.
        source: where published ones were copied from, or which runs ours are of.
        cells: one for each column of its section.
    """

    label: str
    kind: Kind
    source: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Section:
    """Rows with the same columns.

    Attributes:
        title: says of which backbone they are.
        columns: their names, but for that of the labels.
        rows: at least one.
        notes: sentences that belong below.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table: its name on the command line, what it shows, its sections, and sentences on all of them."""

    name: str
    title: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()


def on_task(arm: Arm, task: str) -> Cell:
    """Mean and spread over the seeds of a task."""
    return over_seeds(arm.means([task])) if task in arm.runs else NOT_RUN


def mean_of_tasks(arm: Arm, tasks: Sequence[str]) -> Cell:
    """The mean over tasks, of those that were run; the cell says how many, where these are not all.

    Every run counts: each task is the mean over its seeds. The spread is over the seeds that all tasks have.
    """
    run = [task for task in tasks if task in arm.runs]
    if not run:
        return NOT_RUN
    note = f"{len(run)} of {len(tasks)} tasks" if len(run) < len(tasks) else ""
    of_tasks = [mean(arm.means([task])) for task in run]
    return Cell(value=mean(of_tasks), spread=deviation(arm.means(run)), note=note)


def over_seeds(values: Sequence[float], *, unit: str = "", note: str = "") -> Cell:
    """Mean and spread of one number for each seed; "not run" of none."""
    if not values:
        return NOT_RUN
    return Cell(value=mean(values), spread=deviation(values), unit=unit, note=note)


def of_difference(difference: Difference | None) -> Cell:
    """A difference in percentage points with its interval, and what that is over."""
    if difference is None:
        return Cell(text="no pairs")
    one = difference.of.removesuffix("s")
    pairs = f"{difference.pairs} {difference.of if difference.pairs > 1 else one}"
    return Cell(value=difference.mean, signed=True, interval=difference.interval, note=pairs)
