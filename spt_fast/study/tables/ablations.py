"""Tables 1, 4 and S2 of the paper: what prompts start from, what that takes, and whether they learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from spt_fast.study.runs import Row
from spt_fast.study.statistics import paired_difference
from spt_fast.study.tables.arms import BACKBONE_TITLES, Arm
from spt_fast.study.tables.cells import NOT_RUN, Section, Table, TableRow, on_task, over_seeds
from spt_fast.study.tables.columns import one_name, title
from spt_fast.study.tables.published import Block, PublishedRow, published, table_title
from spt_fast.study.tables.published_lines import figure_cell, not_run_line, published_line, sources

NAMES = ("1", "4", "s2")
_CUB = "fgvc/cub"
_DEPTHS = ("shallow", "deep")
# Each block from its own tokens.
_OWN = ("", "own")
_ACCURACY = (
    "Accuracy in per cent; ours are means ± sample standard deviation over seeds, on test images. In "
    "parentheses: how much more than the first row, of random prompts; ours by pairs of a seed, with a 95 % "
    "Student-t interval over seeds."
)
_NO_FIGURES = "Published figures of this part are missing in the text that ours were copied from."


def times_table(rows: Sequence[Row], *, show_published: bool = True) -> Table:
    """Table 1: the time of construction, of each run of "spt-deep" that built its prototypes.

    Runs of a search count too: often they are those that build what later runs share. Ours stand in the
    column of all images, those that the run learned from.

    Args:
        rows: of any stage, with or without a test accuracy.
        show_published: False leaves out the published rows.
    """
    (block,) = published("1")
    lines: list[TableRow] = []
    for row in block.rows:
        if show_published:
            lines.append(published_line(row, block.columns))
        built = [run for run in rows if _built_prototypes(run) and run.strategy == row.strategy]
        lines += _times(row, built, len(block.columns))
    return Table(
        name="1",
        title=table_title("1"),
        sections=(
            Section(
                title="Published: CUB-200-2011, ViT-B. Ours: as each row says",
                columns=block.columns,
                rows=tuple(lines),
                notes=sources(block.rows) if show_published else (),
            ),
        ),
        notes=("Ours: mean ± sample standard deviation over the runs that built prototypes, in seconds.",),
    )


def _built_prototypes(run: Row) -> bool:
    return run.method == "spt-deep" and run.source in _OWN and run.prototype_seconds is not None


def _times(row: PublishedRow, runs: Sequence[Row], columns: int) -> list[TableRow]:
    if not runs:
        return [not_run_line(f"{row.name}, ours", columns)]
    groups: dict[tuple[str, str, str, int, int | None], list[float]] = {}
    for run in runs:
        # Arms of one strategy may read other images, or fewer.
        key = (run.arm, run.backbone, one_name(run.task), run.train_images, run.num_prompts)
        groups.setdefault(key, []).append(run.prototype_seconds or 0.0)
    return [
        TableRow(
            label=f"{row.name}, ours ({arm}, {task}, {images} images, {prompts} prompts, {backbone})",
            kind="ours",
            source=backbone,
            cells=(*[NOT_RUN] * (columns - 1), over_seeds(seconds, unit="s")),
        )
        for (arm, backbone, task, images, prompts), seconds in groups.items()
    ]


@dataclass(frozen=True, kw_only=True)
class _Column:
    """A column of Table 4 or S2.

    Attributes:
        name: what it is called.
        task: of our runs in it.
        fits: whether it has an arm.
        backbone, published: of the figures in it; None without any.
    """

    name: str
    task: str
    fits: Callable[[Arm], bool]
    backbone: str | None = None
    published: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What Tables 4 and S2 differ in.

    Attributes:
        blocks: of published figures, none where they are not shown.
        starts: {value of `start`: name of the row}, the row of random prompts first.
        start: what the row of an arm goes by.
        together: arms that agree in it share a line, as far as they do not claim the same place.
    """

    blocks: tuple[Block, ...]
    starts: Mapping[str, str]
    start: Callable[[Arm], str]
    together: Callable[[Arm], str]


def starts_table(arms: Sequence[Arm], *, show_published: bool = True) -> Table:
    """Table 4: strategies, with prompts that stay as they start (a) and prompts that learn (b).

    Args:
        arms: of `arms_of`; those of "spt-deep", each block from its own tokens, and of "vpt-deep" count.
        show_published: False leaves out the published rows.
    """
    blocks = published("4")
    starts = {str(row.strategy): row.name for row in blocks[0].rows}
    sections: list[Section] = []
    for frozen, part in ((True, "(a) prompts stay as they start"), (False, "(b) prompts learn")):
        layout = _Layout(
            blocks=tuple(block for block in blocks if show_published and block.frozen_prompts == frozen),
            starts=starts,
            start=lambda arm: arm.strategy,
            together=lambda arm: arm.name,
        )
        those = [arm for arm in arms if arm.frozen_prompts == frozen and _is_start(arm)]
        columns = [_of_block(block, task, task, title(task)) for block in blocks for task in block.columns]
        missing = () if layout.blocks or not show_published else (_NO_FIGURES,)
        sections.append(_section(f"{part}; the paper's tasks", layout, columns, those, missing))
        for name, own in _own_columns(those, columns, lambda task, name: [_of_task(task, name)]).items():
            sections.append(_section(f"{part}; backbone {name}", replace(layout, blocks=()), own, those))
    return Table(name="4", title=table_title("4"), sections=tuple(sections), notes=(_ACCURACY,))


def _is_start(arm: Arm) -> bool:
    return arm.method in ("spt-deep", "vpt-deep") and arm.source in _OWN


def blocks_table(arms: Sequence[Arm], *, show_published: bool = True) -> Table:
    """Table S2: prompts of the first block's tokens, of the last output, or of each block's own.

    Args:
        arms: of `arms_of`; those of SPT and VPT count whose prompts learn.
        show_published: False leaves out the published rows.
    """
    blocks = published("s2")
    layout = _Layout(
        blocks=blocks if show_published else (),
        starts={str(row.tokens): row.name for row in blocks[0].rows},
        start=lambda arm: arm.source,
        together=lambda arm: arm.strategy,
    )
    methods = [f"{method}-{depth}" for method in ("spt", "vpt") for depth in _DEPTHS]
    # Prompts that start from VIPAMIN's values are neither random nor prototypes.
    those = [
        arm for arm in arms if arm.method in methods and not arm.frozen_prompts and arm.strategy != "vipamin"
    ]
    columns = [
        _of_block(block, depth, _CUB, title(depth), depth) for block in blocks for depth in block.columns
    ]
    sections = [_section("CUB-200-2011", layout, columns, those)]

    def by_depth(task: str, backbone: str) -> list[_Column]:
        return [_of_task(task, backbone, depth) for depth in _DEPTHS]

    for name, own in _own_columns(those, columns, by_depth).items():
        sections.append(_section(f"Backbone {name}", replace(layout, blocks=()), own, those))
    return Table(name="s2", title=table_title("s2"), sections=tuple(sections), notes=(_ACCURACY,))


def _of_block(block: Block, column: str, task: str, name: str, depth: str = "") -> _Column:
    backbone = str(block.backbone)
    return _Column(
        name=f"{BACKBONE_TITLES[backbone]}: {name}",
        task=task,
        fits=lambda arm: arm.published_as == backbone and arm.method.endswith(depth),
        backbone=backbone,
        published=column,
    )


def _of_task(task: str, backbone: str, depth: str = "") -> _Column:
    return _Column(
        name=f"{task} {depth}".strip(),
        task=task,
        fits=lambda arm: arm.backbone == backbone and arm.method.endswith(depth),
    )


def _own_columns(
    arms: Sequence[Arm], columns: Sequence[_Column], of_task: Callable[[str, str], list[_Column]]
) -> dict[str, list[_Column]]:
    """{backbone: columns} of the tasks that the published columns do not have."""
    found: dict[str, list[_Column]] = {}
    for backbone in dict.fromkeys(arm.backbone for arm in arms):
        tasks = dict.fromkeys(
            task
            for arm in arms
            if arm.backbone == backbone
            for task in arm.runs
            if not any(column.fits(arm) and column.task == task for column in columns)
        )
        if tasks:
            found[backbone] = [column for task in tasks for column in of_task(task, backbone)]
    return found


def _section(
    name: str,
    layout: _Layout,
    columns: Sequence[_Column],
    arms: Sequence[Arm],
    notes: tuple[str, ...] = (),
) -> Section:
    lines: list[TableRow] = []
    nothing: list[Arm | None] = [None] * len(columns)
    random: list[Arm | None] | None = None
    for start, label in layout.starts.items():
        if layout.blocks:
            lines.append(_published_line(layout, columns, start, label))
        found = [arm for arm in arms if layout.start(arm) == start]
        shown = [chosen for group in _groups(found, layout) if any(chosen := _shown(group, columns))]
        lines += [_line(label, chosen, random or nothing, columns) for chosen in shown] or [
            not_run_line(f"{label}, ours", len(columns))
        ]
        if random is None:
            random = shown[0] if shown else nothing
    rows = [row for block in layout.blocks for row in block.rows]
    return Section(
        title=name,
        columns=tuple(column.name for column in columns),
        rows=tuple(lines),
        notes=(*notes, *(sources(rows) if rows else ())),
    )


def _published_line(layout: _Layout, columns: Sequence[_Column], start: str, label: str) -> TableRow:
    rows = {
        block.backbone: row
        for block in layout.blocks
        for row in block.rows
        if (row.strategy if row.tokens is None else row.tokens) == start
    }
    figures = [rows[column.backbone].figures.get(str(column.published)) for column in columns]
    source = next(iter(rows.values())).source
    cells = tuple(map(figure_cell, figures))
    return TableRow(label=f"{label}, published", kind="published", source=source, cells=cells)


def _groups(arms: Sequence[Arm], layout: _Layout) -> list[list[Arm]]:
    """Arms that share a line: no two of them claim the same place."""
    groups: list[list[Arm]] = []
    for arm in arms:
        fitting = [
            group
            for group in groups
            if layout.together(group[0]) == layout.together(arm)
            and _place(arm) not in [_place(other) for other in group]
        ]
        if fitting:
            fitting[0].append(arm)
        else:
            groups.append([arm])
    return groups


def _place(arm: Arm) -> tuple[str, str]:
    return arm.published_as or arm.backbone, arm.method


def _shown(arms: Sequence[Arm], columns: Sequence[_Column]) -> list[Arm | None]:
    """The arm that has a run in each column, of those that share a line."""
    return [
        next((arm for arm in arms if column.fits(arm) and column.task in arm.runs), None)
        for column in columns
    ]


def _line(
    label: str, arms: Sequence[Arm | None], random: Sequence[Arm | None], columns: Sequence[_Column]
) -> TableRow:
    """A line of ours, with what each cell is above that of random prompts, where both were run."""
    there = [arm for arm in arms if arm is not None]
    names = dict.fromkeys(arm.name for arm in there)
    backbones = dict.fromkeys(arm.backbone for arm in there)
    return TableRow(
        label=f"{label}, ours ({', '.join(names)})",
        kind="ours",
        source=", ".join(backbones),
        cells=tuple(
            NOT_RUN if arm is None else replace(on_task(arm, column.task), note=_gain(arm, base, column.task))
            for arm, base, column in zip(arms, random, columns, strict=True)
        ),
    )


def _gain(arm: Arm, base: Arm | None, task: str) -> str:
    """The mean difference over the seeds that both have, with its interval; "" where there are none."""
    if base is None or task not in base.runs:
        return ""
    found = paired_difference({task: arm.accuracies()[task]}, base.accuracies())
    if found is None:
        return "no pairs"
    interval = "" if found.interval is None else " [{:+.2f}, {:+.2f}]".format(*found.interval)
    return f"{found.mean:+.2f}{interval}"
