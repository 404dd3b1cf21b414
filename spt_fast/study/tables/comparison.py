"""The table of a study's own arms and tasks: accuracy, parameters, time, differences to one of the arms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from spt_fast.study.names import common_values
from spt_fast.study.runs import Row
from spt_fast.study.statistics import mean, paired_difference
from spt_fast.study.tables.arms import Arm
from spt_fast.study.tables.cells import (
    EMPTY,
    Cell,
    Section,
    Table,
    TableRow,
    mean_of_tasks,
    of_difference,
    on_task,
)
from spt_fast.support.names import nearest

NAME = "comparison"
_NOTES = (
    "Test accuracy in per cent: mean ± sample standard deviation over seeds, of the values that validation "
    "images chose.",
    "Differences are in percentage points, by pairs of the same task and seed, with a 95 % Student-t "
    "interval: over tasks, each the mean over its seeds; over seeds, where there is one task.",
    "Parameters in millions and seconds of training are means over runs; per cent is of the backbone, "
    "without the head.",
)


def comparison(arms: Sequence[Arm], against: str | None = None) -> Table:
    """A section for each backbone, a row for each arm.

    Args:
        against: the arm that others are compared with; None is "vpt-deep", or else the first arm.

    Raises:
        ValueError: there is no such arm.
    """
    names = list(dict.fromkeys(arm.name for arm in arms))
    if against is not None and against not in names:
        raise ValueError(
            f"against must be one of the arms {', '.join(names)}, got {against!r}{nearest(against, names)}"
        )
    backbones = dict.fromkeys(arm.backbone for arm in arms)
    return Table(
        name=NAME,
        title="Arms of the study",
        sections=tuple(
            _section([arm for arm in arms if arm.backbone == backbone], against) for backbone in backbones
        ),
        notes=_NOTES,
    )


def _section(arms: Sequence[Arm], against: str | None) -> Section:
    tasks = list(dict.fromkeys(task for arm in arms for task in arm.runs))
    reference = _reference(arms, against)
    several = len(tasks) > 1
    columns = (
        *tasks,
        *((f"mean of {len(tasks)} tasks",) if several else ()),
        *((f"against {reference.name}",) if reference is not None else ()),
        "lr",
        "learned (M)",
        "with head (M)",
        "learned (%)",
        "seconds",
    )
    return Section(
        title=f"Backbone {arms[0].backbone}",
        columns=columns,
        rows=tuple(
            TableRow(label=arm.name, kind="ours", source=arm.backbone, cells=_cells(arm, tasks, reference))
            for arm in arms
        ),
        notes=(_seeds(arms), *_common(arms), *_missing(arms, against)),
    )


def _common(arms: Sequence[Arm]) -> list[str]:
    """What the names of arms leave out, as all have it."""
    values = common_values(row for arm in arms for row in arm.rows())
    return [f"All runs have {' and '.join(values)}."] if values else []


def _missing(arms: Sequence[Arm], against: str | None) -> list[str]:
    if against is None or any(arm.name == against for arm in arms):
        return []
    return [f"No run of {against} has this backbone."]


def _reference(arms: Sequence[Arm], against: str | None) -> Arm | None:
    """The arm that others are compared with; None where there is none, or are no others."""
    by_name = {arm.name: arm for arm in arms}
    if len(arms) == 1:
        return None
    return by_name.get("vpt-deep", arms[0]) if against is None else by_name.get(against)


def _cells(arm: Arm, tasks: Sequence[str], reference: Arm | None) -> tuple[Cell, ...]:
    return (
        *(on_task(arm, task) for task in tasks),
        *([mean_of_tasks(arm, tasks)] if len(tasks) > 1 else []),
        *([_against(arm, reference)] if reference is not None else []),
        Cell(text=", ".join(f"{lr:g}" for lr in sorted({row.lr for row in arm.rows()}))),
        _mean(arm, lambda row: row.learned / 1e6, digits=3),
        _mean(arm, lambda row: row.trainable / 1e6, digits=3),
        _mean(arm, lambda row: 100 * row.learned / row.backbone_parameters, digits=3),
        _mean(arm, lambda row: row.seconds, digits=1),
    )


def _against(arm: Arm, reference: Arm) -> Cell:
    if arm is reference:
        return EMPTY
    return of_difference(paired_difference(arm.accuracies(), reference.accuracies()))


def _mean(arm: Arm, value: Callable[[Row], float], digits: int) -> Cell:
    return Cell(value=mean([value(row) for row in arm.rows()]), digits=digits)


def _seeds(arms: Sequence[Arm]) -> str:
    """How many seeds stand behind a task's number."""
    counts = {len(seeds) for arm in arms for seeds in arm.runs.values()}
    low, high = min(counts), max(counts)
    if low == high:
        return f"{low} seed{'s' if low > 1 else ''} of each task."
    return f"{low} to {high} seeds of each task."
