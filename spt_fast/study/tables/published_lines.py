"""Rows and cells of published figures, and where they come from in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from spt_fast.study.tables.cells import EMPTY, NOT_RUN, Cell, Kind, TableRow
from spt_fast.study.tables.published import Figure, PublishedRow


def published_line(row: PublishedRow, columns: Sequence[str]) -> TableRow:
    """A published row; what was left blank there is blank here."""
    kind: Kind = "published" if row.of_paper else "other papers"
    cells = tuple(figure_cell(row.figures.get(column)) for column in columns)
    return TableRow(label=f"{row.name}, {kind}", kind=kind, source=row.source, cells=cells)


def figure_cell(figure: Figure | None) -> Cell:
    """A published number as it was printed."""
    if figure is None:
        return EMPTY
    note = "" if figure.gain is None else f"{figure.gain:+.1f}"
    return Cell(value=figure.value, digits=figure.digits, unit=figure.unit, note=note)


def not_run_line(label: str, columns: int) -> TableRow:
    """A row of ours that there are no runs for."""
    return TableRow(label=label, kind="ours", source="", cells=(NOT_RUN,) * columns)


def sources(rows: Iterable[PublishedRow]) -> tuple[str, ...]:
    """One sentence: where each published row was copied from."""
    by_source: dict[str, list[str]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row.name)
    parts = [f"{', '.join(dict.fromkeys(names))}: {source}" for source, names in by_source.items()]
    return (f"Sources. {'; '.join(parts)}.",)
