"""Tables 2, 3, S3 and S4 of the paper: methods by tasks, our runs below the published rows."""

from __future__ import annotations

from collections.abc import Sequence

from spt_fast.study.statistics import mean
from spt_fast.study.tables.arms import BACKBONE_TITLES, Arm
from spt_fast.study.tables.cells import NOT_RUN, Cell, Section, Table, TableRow, mean_of_tasks, on_task
from spt_fast.study.tables.columns import GROUPS, PARAMETERS, title
from spt_fast.study.tables.published import Block, PublishedRow, published, table_title
from spt_fast.study.tables.published_lines import not_run_line, published_line, sources

NAMES = ("2", "3", "s3", "s4")
_NOTES = (
    "Accuracy in per cent; ours are means ± sample standard deviation over seeds, on test images, of values "
    "that validation images chose. Parameters in millions, with the head.",
)


def methods_table(name: str, arms: Sequence[Arm], *, show_published: bool = True) -> Table:
    """One of the tables in `NAMES`.

    A section for each backbone of the published table, and one for each other backbone of the runs. Below the
    published row of a method come our arms of this method, or a row that says "not run"; methods that the
    table does not have come last. Arms of Tables 4 and S2, with frozen prompts or those of one block for all,
    are left out.

    Args:
        name: of the table.
        arms: of `arms_of`.
        show_published: False leaves out the published rows.
    """
    blocks = published(name)
    columns = blocks[0].columns
    arms = [arm for arm in arms if arm.source in ("", "own") and not arm.frozen_prompts]
    backbones = list(dict.fromkeys(block.backbone for block in blocks))
    here = [
        _section(
            columns,
            [block for block in blocks if block.backbone == backbone],
            [arm for arm in arms if arm.published_as == backbone],
            show_published,
        )
        for backbone in backbones
    ]
    return Table(
        name=name,
        title=table_title(name),
        sections=(
            *here,
            *_other_backbones(columns, [arm for arm in arms if arm.published_as not in backbones]),
        ),
        notes=_NOTES,
    )


def _section(
    columns: tuple[str, ...], blocks: Sequence[Block], arms: Sequence[Arm], show_published: bool
) -> Section:
    rows = [row for block in blocks for row in block.rows if show_published or row.of_paper]
    lines: list[TableRow] = []
    for row in rows:
        if show_published:
            lines.append(published_line(row, columns))
        # Ours come once, below the last row of the paper with this method, or else of a later paper.
        alike = [other for other in rows if other.method == row.method and row.method is not None]
        alike = [other for other in alike if other.of_paper] or alike
        if alike and row is alike[-1]:
            lines += _ours(row, arms, columns)
    published_methods = {row.method for row in rows}
    lines += [_line(arm, arm.name, columns) for arm in arms if arm.method not in published_methods]
    backbone = blocks[0].backbone
    return Section(
        title=BACKBONE_TITLES[str(backbone)],
        columns=tuple(map(title, columns)),
        rows=tuple(lines),
        notes=(*(sources(rows) if show_published else ()), *_known_as(arms)),
    )


def _ours(row: PublishedRow, arms: Sequence[Arm], columns: Sequence[str]) -> list[TableRow]:
    name = row.name if row.of_paper else row.method
    found = [arm for arm in arms if arm.method == row.method]
    if not found:
        return [not_run_line(f"{name}, ours", len(columns))]
    return [_line(arm, f"{name}, ours ({arm.name})", columns) for arm in found]


def _line(arm: Arm, label: str, columns: Sequence[str]) -> TableRow:
    return TableRow(
        label=label, kind="ours", source=arm.backbone, cells=tuple(_cell(arm, column) for column in columns)
    )


def _cell(arm: Arm, column: str) -> Cell:
    if column in GROUPS:
        return mean_of_tasks(arm, GROUPS[column])
    if column in PARAMETERS:
        return _parameters(arm, GROUPS[PARAMETERS[column]])
    return on_task(arm, column)


def _parameters(arm: Arm, tasks: Sequence[str]) -> Cell:
    """What learns, with the head: the mean over the tasks that were run."""
    run = [task for task in tasks if task in arm.runs]
    if not run:
        return NOT_RUN
    of_tasks = [mean([row.trainable for row in arm.rows([task])]) for task in run]
    note = f"{len(run)} of {len(tasks)} tasks" if len(run) < len(tasks) else ""
    return Cell(value=mean(of_tasks) / 1e6, note=note)


def _other_backbones(columns: Sequence[str], arms: Sequence[Arm]) -> list[Section]:
    """Ours under backbones that the table does not have, where they have a task of it."""
    tasks = {task for column in columns for task in GROUPS.get(column, (column,))}
    arms = [arm for arm in arms if tasks & arm.runs.keys()]
    return [
        Section(
            title=f"Backbone {backbone}, which the published table does not have",
            columns=tuple(map(title, columns)),
            rows=tuple(_line(arm, arm.name, columns) for arm in arms if arm.backbone == backbone),
        )
        for backbone in dict.fromkeys(arm.backbone for arm in arms)
    ]


def _known_as(arms: Sequence[Arm]) -> tuple[str, ...]:
    if not arms:
        return ()
    names = ", ".join(dict.fromkeys(arm.backbone for arm in arms))
    epochs = ", ".join(map(str, sorted({row.epochs for arm in arms for row in arm.rows()})))
    return (f"Our runs here: backbone {names}; epochs: {epochs} (the paper: 100).",)
