"""Small tables: as text for a terminal, and as CSV files with named columns.

Limits: everything is held in memory; CSV cells are numbers and short names, one row a line.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence

from spt_fast.support.files import check_input_path


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first flush left, the others right; a rule below row 0."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        lines.append("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A CSV file with a header line; numbers come back as they were."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    # Names of files keep their bytes.
    return text.getvalue().encode("utf-8", "surrogateescape")


def csv_columns(path: str | os.PathLike[str]) -> list[str]:
    """What the header line of a CSV file names; nothing of an empty file.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
    """
    with check_input_path(path).open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return next(csv.reader(file), [])


def read_csv(
    path: str | os.PathLike[str], numbers: Sequence[str], names: Sequence[str] = ()
) -> list[tuple[tuple[str, ...], tuple[float | None, ...]]]:
    """Rows of a CSV file with a header line, as (names, numbers) in the order asked for.

    Args:
        numbers: columns that must be there; an empty cell is None.
        names: columns that may be there; "" where one is not.

    Raises:
        FileNotFoundError, IsADirectoryError: there is no such file.
        ValueError: a column is missing, a cell is no number, or there are no rows; file and line are named.
    """
    source = check_input_path(path)
    with source.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        reader = csv.DictReader(file)
        missing = [column for column in numbers if column not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{source} must have the columns {', '.join(numbers)}, "
                f"got {', '.join(reader.fieldnames or ['none'])}"
            )
        rows = [
            (
                tuple(row.get(name) or "" for name in names),
                tuple(
                    _number(row[column], column, f"{source}, line {reader.line_num}") for column in numbers
                ),
            )
            for row in reader
        ]
    if not rows:
        raise ValueError(f"{source} has no rows below its header")
    return rows


def _number(cell: str | None, column: str, where: str) -> float | None:
    if not cell:
        return None
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{where}: {column} must be a number, got {cell!r}") from None
