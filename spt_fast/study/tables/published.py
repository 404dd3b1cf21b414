"""What the paper and later papers have printed: their tables as data, each figure with its source.

The figures lie in `published/*.yaml`, as printed, so that each keeps its number of decimals.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from spt_fast.support.yaml_text import read_yaml

# {table: (files, of the paper first)}
FILES: Mapping[str, tuple[str, ...]] = {
    "1": ("table1",),
    "2": ("table2", "others_table2"),
    "3": ("table3",),
    "4": ("table4",),
    "s2": ("table_s2",),
    "s3": ("table_s3",),
    "s4": ("table_s4", "others_table_s4"),
}
_OTHERS = "others"
_NUMBER = re.compile(r"(?P<value>\d+(?:\.(?P<decimals>\d+))?)(?P<unit>[ds]?)(?:\((?P<gain>[+-][\d.]+)\))?")


class Figure(NamedTuple):
    """A printed number: per cent, millions of parameters, or a time.

    Attributes:
        value: the number.
        digits: decimals that it was printed with.
        unit: "d" for days, "s" for seconds, or "".
        gain: what was printed behind it: how much it is above the table's first row.
    """

    value: float
    digits: int
    unit: str = ""
    gain: float | None = None


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of a published table.

    Attributes:
        name: of the row, as printed but for "(ours)" and citations.
        source: where it was copied from.
        of_paper: whether the paper has it, and not a later one.
        figures: {column: number}; what was left blank is not there.
        method: of `spt_fast.methods.names()`; None of one that is not among them, and where all have one.
        strategy, tokens: of Tables 1 and 4, and of Table S2; as `strategy` and `source` of a run. None
            elsewhere.
    """

    name: str
    source: str
    of_paper: bool
    figures: Mapping[str, Figure]
    method: str | None = None
    strategy: str | None = None
    tokens: str | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """Rows of a table under one backbone.

    Attributes:
        backbone: "mae", "moco" or "supervised"; None where the table names none.
        columns: tasks, groups of tasks, and others.
        rows: in their order.
        frozen_prompts: whether prompts did not learn, Table 4 (a).
    """

    backbone: str | None
    columns: tuple[str, ...]
    rows: tuple[PublishedRow, ...]
    frozen_prompts: bool = False


@cache
def published(table: str) -> tuple[Block, ...]:
    """The blocks of one of the tables in `FILES`, those of the paper first.

    Raises:
        KeyError: there is no such table.
    """
    return tuple(block for name in FILES[table] for block in _read(name))


def table_title(table: str) -> str:
    """What a table of the paper shows."""
    return str(_load(FILES[table][0])["title"])


def _load(name: str) -> dict[str, Any]:
    path = Path(__file__).parent / "published" / f"{name}.yaml"
    return read_yaml(path.read_text(encoding="utf-8"), path.name)


def _read(name: str) -> Iterator[Block]:
    file = _load(name)
    columns = tuple(file["columns"])
    of_paper = not name.startswith(_OTHERS)
    for block in file["blocks"]:
        yield Block(
            backbone=block.get("backbone"),
            columns=columns,
            rows=tuple(_row(row, columns, file["source"], of_paper) for row in block["rows"]),
            frozen_prompts=block.get("frozen_prompts", False),
        )


def _row(row: Mapping[str, Any], columns: tuple[str, ...], source: str, of_paper: bool) -> PublishedRow:
    figures = zip(columns, map(_figure, row["values"].split()), strict=True)
    return PublishedRow(
        figures={column: figure for column, figure in figures if figure is not None},
        of_paper=of_paper,
        **{"source": source, **{key: value for key, value in row.items() if key != "values"}},
    )


def _figure(text: str) -> Figure | None:
    if text == "-":
        return None
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"a published figure must be a number such as 83.26 or 85.1(+3.5), got {text!r}")
    gain = None if match["gain"] is None else float(match["gain"])
    return Figure(float(match["value"]), len(match["decimals"] or ""), match["unit"], gain)
