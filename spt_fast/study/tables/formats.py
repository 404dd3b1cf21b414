"""Tables as Markdown, LaTeX and CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from spt_fast.study.tables.cells import Cell, Section, Table, TableRow
from spt_fast.support.arguments import check_choice
from spt_fast.support.tables import csv_bytes

_CSV_COLUMNS = (
    "table",
    "section",
    "row",
    "kind",
    "source",
    "column",
    "value",
    "unit",
    "spread",
    "low",
    "high",
    "text",
    "note",
)
# Of LaTeX's own signs, and of those outside ASCII that the tables have.
_LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
}


def format_tables(tables: Sequence[Table], form: str = "markdown") -> str:
    """The text of a file with these tables.

    Args:
        tables: of `make_tables`.
        form: "markdown", with a table for each section; "latex", with booktabs; or "csv", with a line for
            each cell and numbers in full, as pandas and R like it.

    Raises:
        ValueError: no such form.
    """
    check_choice("form", form, tuple(FORMATS))
    return FORMATS[form](tables)


def shown(cell: Cell) -> str:
    """A cell as plain text."""
    if cell.value is None:
        return cell.text
    sign = "+" if cell.signed else ""
    number = f"{cell.value:{sign}.{cell.digits}f}"
    if cell.spread is not None:
        number += f" ± {cell.spread:.{cell.digits}f}"
    if cell.interval is not None:
        low, high = (f"{end:{sign}.{cell.digits}f}" for end in cell.interval)
        number += f" [{low}, {high}]"
    number = f"{number} {cell.unit}".rstrip()
    return f"{number} ({cell.note})" if cell.note else number


def _markdown(tables: Sequence[Table]) -> str:
    return "\n".join(_markdown_table(table) for table in tables)


def _markdown_table(table: Table) -> str:
    lines = [f"## {_heading(table)}", ""]
    for section in table.sections:
        lines += [f"### {section.title}", "", *_markdown_section(section), ""]
        lines += [line for note in section.notes for line in (note, "")]
    lines += [line for note in table.notes for line in (note, "")]
    return "\n".join(lines)


def _markdown_section(section: Section) -> list[str]:
    """Rows padded to equal widths, so that they can be read as they are."""
    texts = [["", *section.columns], *([row.label, *map(shown, row.cells)] for row in section.rows)]
    texts = [[text.replace("|", r"\|") for text in row] for row in texts]
    widths = [max(3, *(len(row[column]) for row in texts)) for column in range(len(texts[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [
            row[0].ljust(widths[0]),
            *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)),
        ]
        for row in texts
    ]
    return [f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:])]


def _latex(tables: Sequence[Table]) -> str:
    return "% Needs \\usepackage{booktabs}.\n" + "\n".join(_latex_table(table) for table in tables)


def _latex_table(table: Table) -> str:
    parts = [_latex_section(table, section) for section in table.sections]
    return "\n".join([*parts, *(f"% {note}" for note in table.notes), ""])


def _latex_section(table: Table, section: Section) -> str:
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(f'{_caption(table)}. {section.title}.')}}}",
        rf"\begin{{tabular}}{{l{'r' * len(section.columns)}}}",
        r"\toprule",
        _latex_line(map(_escaped, ["", *section.columns])),
        r"\midrule",
        *(_latex_line([_escaped(row.label), *map(_latex_cell, row.cells)]) for row in section.rows),
        r"\bottomrule",
        r"\end{tabular}",
        *(f"% {note}" for note in section.notes),
        r"\end{table}",
    ]
    return "\n".join(lines)


def _latex_line(cells: Iterable[str]) -> str:
    text = " & ".join(cells)
    # LaTeX would take these for arguments of the line break before them.
    return f"{{}}{text} \\\\" if text.startswith(("[", "*")) else f"{text} \\\\"


def _latex_cell(cell: Cell) -> str:
    text = _escaped(shown(cell))
    return text if cell.value is None else text.replace("-", "$-$")


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _heading(table: Table) -> str:
    return table.title if table.name == "comparison" else f"Table {table.name.upper()}: {table.title}"


def _caption(table: Table) -> str:
    """LaTeX numbers tables by itself, and the paper's numbers are others."""
    return (
        table.title
        if table.name == "comparison"
        else f"{table.title} (Table {table.name.upper()} of the paper)"
    )


def _csv(tables: Sequence[Table]) -> str:
    lines = [
        _csv_line(table, section, row, column, cell)
        for table in tables
        for section in table.sections
        for row in section.rows
        for column, cell in zip(section.columns, row.cells, strict=True)
    ]
    return csv_bytes(_CSV_COLUMNS, lines).decode()


def _csv_line(table: Table, section: Section, row: TableRow, column: str, cell: Cell) -> tuple[object, ...]:
    low, high = cell.interval or (None, None)
    place = (table.name, section.title, row.label, row.kind, row.source, column)
    return (*place, cell.value, cell.unit, cell.spread, low, high, cell.text, cell.note)


FORMATS: Mapping[str, Callable[[Sequence[Table]], str]] = {
    "markdown": _markdown,
    "latex": _latex,
    "csv": _csv,
}
