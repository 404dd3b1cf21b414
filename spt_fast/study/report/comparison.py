"""Accuracies of a study's runs, by what was compared and by task: means and spread over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spt_fast.study.names import arm_names
from spt_fast.study.runs import Row
from spt_fast.study.statistics import deviation, mean
from spt_fast.study.sweeps.choice import best


@dataclass(frozen=True)
class Cell:
    """What one arm reached in one task.

    Attributes:
        rows: its runs, one for each seed, in order of seed.
        accuracies: in [0, 1], of those of them that have one.
    """

    rows: tuple[Row, ...]
    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float | None:
        """Over seeds; None where no run has an accuracy."""
        return mean(self.accuracies) if self.accuracies else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of a sample over seeds; None for fewer than two."""
        return deviation(self.accuracies)


@dataclass(frozen=True)
class Comparison:
    """Arms by tasks.

    Attributes:
        measure: "test" where any run was tested, else "validation".
        tasks: in the order of the runs.
        cells: {arm: {task: its cell}}; best mean over all tasks first, then those that lack a task.
    """

    measure: str
    tasks: tuple[str, ...]
    cells: dict[str, dict[str, Cell]]

    def mean(self, arm: str) -> float | None:
        """Of the arm's accuracies over all tasks; None where it lacks one."""
        means = [cell.mean for cell in self.cells[arm].values()]
        known = [mean for mean in means if mean is not None]
        return mean(known) if len(known) == len(self.tasks) else None

    def best(self, task: str, arms: Iterable[str]) -> str | None:
        """The one of `arms` with the highest accuracy in a task, the first of equal ones."""
        means = {arm: cell.mean for arm in arms if (cell := self.cells.get(arm, {}).get(task)) is not None}
        known = {arm: mean for arm, mean in means.items() if mean is not None}
        return max(known, key=lambda arm: known[arm]) if known else None


def comparison(rows: Sequence[Row]) -> Comparison:
    """Test accuracy of the final runs; where none was tested, validation accuracy of the best of each search.

    An arm that has several lengths of prompts or options in one task counts as several arms.
    """
    tested = any(row.test_accuracy is not None for row in rows)
    chosen = [row for row in rows if row.stage == "final"] if tested else chosen_rows(rows)
    names = arm_names(rows)
    grouped: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(chosen, key=lambda row: row.seed):
        grouped.setdefault(names[row.run], {}).setdefault(row.task, []).append(row)
    cells = {
        arm: {task: _cell(found, tested) for task, found in tasks.items()} for arm, tasks in grouped.items()
    }
    whole = Comparison(
        "test" if tested else "validation", tuple(dict.fromkeys(row.task for row in rows)), cells
    )
    order = sorted(cells, key=lambda arm: (whole.mean(arm) is None, -(whole.mean(arm) or 0.0), arm))
    return Comparison(whole.measure, whole.tasks, {arm: cells[arm] for arm in order})


def chosen_rows(rows: Sequence[Row]) -> list[Row]:
    """The runs of the search with the values that were chosen: those of the final runs.

    Of an arm without final runs in a task it is the best by validation accuracy; of equals that of least lr.
    """
    chosen = {_values(row) for row in rows if row.stage == "final"}
    settled = {(row.task, row.arm) for row in rows if row.stage == "final"}
    searched = [row for row in rows if row.stage == "search" and row.val_accuracy is not None]
    open_ones: dict[tuple[str, str], list[Row]] = {}
    for row in searched:
        if (row.task, row.arm) not in settled:
            open_ones.setdefault((row.task, row.arm), []).append(row)
    found = [best(tried) for tried in open_ones.values()]
    return [*(row for row in searched if _values(row) in chosen), *(row for row in found if row is not None)]


def _values(row: Row) -> tuple[object, ...]:
    """What tells apart the runs of an arm, but for stage and seed."""
    return row.task, row.arm, row.num_prompts, row.lr, row.weight_decay, row.options


def _cell(rows: Sequence[Row], tested: bool) -> Cell:
    accuracies = [row.test_accuracy if tested else row.val_accuracy for row in rows]
    return Cell(tuple(rows), tuple(each for each in accuracies if each is not None))
