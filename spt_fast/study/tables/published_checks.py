"""Which printed figures do not add up: means, gains, figures in two tables, counts of parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from spt_fast.data.fgvc import SETS
from spt_fast.data.vtab import TASKS
from spt_fast.study.statistics import mean
from spt_fast.study.tables.columns import GROUPS, PARAMETERS
from spt_fast.study.tables.published import FILES, Block, Figure, PublishedRow, published

_WIDTH = 768  # of ViT-B
# What methods learn of ViT-B/16, without the head, where the paper's settings are known (docs/methods.md); of
# SNF with 1 flow on FGVC and 6 on VTAB-1k, which come nearest. MP's second classifier depends on the classes.
_LEARNED = {
    "full": {"fgvc": 85_798_656, "vtab": 85_798_656},
    "linear": {"fgvc": 0, "vtab": 0},
    "bias": {"fgvc": 102_912, "vtab": 102_912},
    "adapter": {"fgvc": 230_544, "vtab": 230_544},
    "lora": {"vtab": 294_912},
    "ssf": {"fgvc": 205_824, "vtab": 205_824},
    "snf": {"fgvc": 73_752, "vtab": 258_192},
    "mp": {"fgvc": 394_146},
    "vpt-shallow": {"fgvc": 76_800, "vtab": 76_800},
    "spt-shallow": {"fgvc": 76_800, "vtab": 76_800},
    "spt-deep": {"fgvc": 184_320, "vtab": 184_320},
}
_MP_PER_CLASS = 2_884
# Rows of Table S2 are those of CUB-200-2011 in Tables 2 and 3: {(tokens, depth): method}.
_OF_TABLE_S2 = {
    ("", "shallow"): "vpt-shallow",
    ("", "deep"): "vpt-deep",
    ("own", "shallow"): "spt-shallow",
    ("own", "deep"): "spt-deep",
}


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """A printed figure that others contradict by more than rounding.

    Attributes:
        where: table, backbone, row and column.
        printed: the figure.
        computed: what the other figures make it.
        out_of: what these are.
        allowed: by how much rounding could move them apart.
    """

    where: str
    printed: float
    computed: float
    out_of: str
    allowed: float

    def __str__(self) -> str:
        return f"{self.where}: printed {self.printed:g}, but {self.computed:.3f} by {self.out_of}"


def mismatches() -> list[Mismatch]:
    """Every printed figure that is not, to rounding, what other printed figures make it.

    Means of groups against the rows of their tasks, which Tables 2 and 3 hold themselves for FGVC, and Table
    S3 for VTAB-1k; gains against the row that they are above; the same figure in two tables; and parameters
    against what the methods learn of ViT-B/16, with heads of as many classes as the tasks have on average.
    """
    compared = [*_means(), *_gains(), *_in_two_tables(), *_parameters()]
    return [each for each in compared if abs(each.printed - each.computed) > each.allowed + 1e-9]


def _means() -> Iterator[Mismatch]:
    for table in FILES:
        for block in published(table):
            for row in block.rows:
                for group in GROUPS.keys() & row.figures.keys():
                    found = _tasks_of(block, row, GROUPS[group])
                    if found is not None:
                        where = f"{_where(table, block, row)}, {group}"
                        yield _mean_mismatch(where, row.figures[group], found)


def _tasks_of(block: Block, row: PublishedRow, tasks: tuple[str, ...]) -> list[Figure] | None:
    """The figures of the tasks: of the row itself, or of its counterpart in Table S3."""
    places = [row.figures, *(other.figures for other in _counterparts("s3", block, row))]
    return next(([place[task] for task in tasks] for place in places if set(tasks) <= set(place)), None)


def _mean_mismatch(where: str, printed: Figure, tasks: list[Figure]) -> Mismatch:
    return Mismatch(
        where=where,
        printed=printed.value,
        computed=mean([task.value for task in tasks]),
        out_of=f"the mean of {len(tasks)} tasks",
        allowed=_rounding(printed) + max(map(_rounding, tasks)),
    )


def _gains() -> Iterator[Mismatch]:
    for table in ("4", "s2"):
        for block in published(table):
            first = block.rows[0]
            for row in block.rows:
                for column, figure in row.figures.items():
                    if figure.gain is not None:
                        base = first.figures[column]
                        yield Mismatch(
                            where=f"{_where(table, block, row)}, gain in {column}",
                            printed=figure.gain,
                            computed=figure.value - base.value,
                            out_of=f"{first.name}",
                            # The difference of two rounded numbers, itself rounded to as many decimals.
                            allowed=2 * _rounding(figure) + _rounding(base),
                        )


def _in_two_tables() -> Iterator[Mismatch]:
    """Figures of Table S4 that Table 3 has too, and those of Table S2 that Tables 2 and 3 have."""
    for block in published("s4"):
        for row in block.rows:
            for other in _counterparts("3", block, row):
                for column in row.figures.keys() & other.figures.keys():
                    where = f"{_where('s4', block, row)}, {column}"
                    yield _same(where, row.figures[column], other.figures[column], "Table 3")
    for block in published("s2"):
        table = "3" if block.backbone == "supervised" else "2"
        for row in block.rows:
            for depth, figure in row.figures.items():
                method = _OF_TABLE_S2.get((str(row.tokens), depth))
                for other in _rows_of(table, block.backbone, method):
                    where = f"{_where('s2', block, row)}, {depth}"
                    yield _same(where, figure, other.figures["fgvc/cub"], f"Table {table}")


def _same(where: str, printed: Figure, other: Figure, table: str) -> Mismatch:
    allowed = _rounding(printed) + _rounding(other)
    return Mismatch(where=where, printed=printed.value, computed=other.value, out_of=table, allowed=allowed)


def _parameters() -> Iterator[Mismatch]:
    for table in ("3", "s4"):
        for block in published(table):
            for row in block.rows:
                for column, benchmark in PARAMETERS.items():
                    learned = _LEARNED.get(str(row.method), {}).get(benchmark)
                    if column in row.figures and learned is not None:
                        yield Mismatch(
                            where=f"{_where(table, block, row)}, {column}",
                            printed=row.figures[column].value,
                            computed=(learned + _of_classes(row, benchmark)) / 1e6,
                            out_of="what it learns of ViT-B/16",
                            allowed=_rounding(row.figures[column]),
                        )


def _of_classes(row: PublishedRow, benchmark: str) -> float:
    """Parameters that depend on the classes: the head, and what MP has beside it."""
    classes = [facts.classes for facts in (SETS if benchmark == "fgvc" else TASKS).values()]
    return mean(classes) * (_WIDTH + 1 + (_MP_PER_CLASS if row.method == "mp" else 0))


def _counterparts(table: str, block: Block, row: PublishedRow) -> Iterator[PublishedRow]:
    """The rows of the same method under the same backbone in another table of the paper."""
    return _rows_of(table, block.backbone, row.method if row.of_paper else None)


def _rows_of(table: str, backbone: str | None, method: str | None) -> Iterator[PublishedRow]:
    """The rows of the paper for a method under a backbone; none where the method is None."""
    for block in published(table):
        if block.backbone == backbone and method is not None:
            yield from (row for row in block.rows if row.of_paper and row.method == method)


def _rounding(figure: Figure) -> float:
    return 0.5 * 10.0**-figure.digits


def _where(table: str, block: Block, row: PublishedRow) -> str:
    of = f"Table {table.upper()}" if row.of_paper else row.source
    return ", ".join(part for part in (of, block.backbone, row.name) if part)
