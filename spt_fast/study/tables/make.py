"""The tables of studies by name: our runs by themselves, and beside what the paper has printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from spt_fast.study.runs import Row
from spt_fast.study.tables import ablations, paper_tables
from spt_fast.study.tables.arms import arms_of
from spt_fast.study.tables.cells import Table
from spt_fast.study.tables.comparison import NAME as COMPARISON
from spt_fast.study.tables.comparison import comparison
from spt_fast.support.arguments import check_choice
from spt_fast.support.names import nearest

TABLES = (COMPARISON, "1", "2", "3", "4", "s2", "s3", "s4")


def make_tables(
    rows: Sequence[Row],
    names: Sequence[str] = (COMPARISON,),
    *,
    against: str | None = None,
    backbone: str | None = None,
    published: bool = True,
    tasks: Sequence[str] | None = None,
) -> list[Table]:
    """Tables of runs, as plain data; `spt_fast.study.tables.format_tables` writes them.

    >>> rows = read_studies(["study"])
    >>> print(format_tables(make_tables(rows, ["comparison", "2"]), "markdown"))

    Only final runs with a test accuracy count, but for Table 1, which has the time of any run that built
    prototypes.

    Args:
        rows: of `spt_fast.study.tables.read_studies`.
        names: of TABLES, in any case; "comparison" has the study's own arms and tasks, the others are tables
            of the paper.
        against: the arm that "comparison" compares the others with; None is "vpt-deep", or else the first.
        backbone: which published backbone that of the runs is: "mae", "moco" or "supervised"; None goes by
            its name (`spt_fast.study.tables.arms.published_backbone`).
        published: whether the paper's rows, and those of later papers, stand beside ours.
        tasks: of the runs, those that count, as they name them; None is all.

    Raises:
        ValueError: there is no such table, task or arm, no run has a test accuracy, an arm has two runs of a
            task and a seed, or `backbone` cannot be.
    """
    wanted = list(dict.fromkeys(map(_table_name, names)))
    if against is not None and COMPARISON not in wanted:
        raise ValueError(f"against is for the table {COMPARISON}, which is not among {', '.join(wanted)}")
    if tasks is not None:
        known = list(dict.fromkeys(row.task for row in rows))
        for task in tasks:
            check_choice("tasks", task, known)
        rows = [row for row in rows if row.task in tasks]
    # Table 1 alone needs no test.
    arms = [] if wanted == ["1"] else arms_of(rows, backbone)
    made: Mapping[str, Callable[[], Table]] = {
        COMPARISON: partial(comparison, arms, against),
        "1": partial(ablations.times_table, rows, show_published=published),
        "4": partial(ablations.starts_table, arms, show_published=published),
        "s2": partial(ablations.blocks_table, arms, show_published=published),
        **{
            name: partial(paper_tables.methods_table, name, arms, show_published=published)
            for name in paper_tables.NAMES
        },
    }
    return [_with_notes(made[name](), rows) for name in wanted]


def _with_notes(table: Table, rows: Sequence[Row]) -> Table:
    """The table, with sentences about runs that are not in it."""
    notes = list(table.notes)
    lost = [row.run for row in rows if row.stage == "final" and row.test_accuracy is None]
    if lost and table.name != "1":
        notes.append(f"Final runs without a test accuracy are left out: {', '.join(lost)}.")
    ours = (row for section in table.sections for row in section.rows if row.kind == "ours")
    if all(cell.value is None for row in ours for cell in row.cells):
        tasks = ", ".join(dict.fromkeys(row.task for row in rows))
        notes.append(f"None of the runs is for this table; theirs are the tasks {tasks}.")
    return replace(table, notes=tuple(notes))


def _table_name(name: str) -> str:
    known = name.lower()
    if known not in TABLES:
        raise ValueError(f"table must be one of {', '.join(TABLES)}, got {name!r}{nearest(known, TABLES)}")
    return known
