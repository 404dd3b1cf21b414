"""A study's folder, and the table in it: runs.csv has a row for each finished run, read and written whole."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from spt_fast.support.files import check_input_path, write_bytes
from spt_fast.support.tables import csv_bytes

# What lies in a study's folder beside each other: what it is of, the table of its runs, and folders with a
# folder for each run, and with the prototypes that runs share.
SWEEP_NAME, RUNS_NAME = "sweep.yaml", "runs.csv"
RUNS_FOLDER, PROTOTYPES_FOLDER = "runs", "prototypes"
Stage = Literal["search", "final"]
STAGES: tuple[Stage, ...] = get_args(Stage)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run. Accuracies are shares of the images, in [0, 1]; None is an empty cell.

    Attributes:
        run: its name, and that of its folder; no other run of the study has it.
        stage: "search" for a run by which values are chosen, on validation images; "final" for one with the
            values that were chosen, on test images.
        backbone: name of the frozen model.
        task: name of the data.
        arm: what is compared, as the study names it: a method with its options and its prompts' start.
        method: of `spt_fast.methods.names()`.
        strategy: of `build_prototypes`; "vipamin" where prompts start from VIPAMIN's values; else "".
        source: the blocks whose tokens the prototypes are of: "own", "first" or "last" for all blocks
            (Table S2), or "" likewise.
        frozen_prompts: whether prompts stayed as they started (Table 4).
        num_prompts: per block; None where there are none.
        lr, weight_decay, epochs: of the recipe.
        prompt_lr: highest rate of the prompts in the run; None where no prompts learn.
        options: other values that the study varied, as "name=value;name=value" in alphabetical order.
        compared: of all values that it varied those that it compares and does not choose, likewise.
        seed: of the recipe.
        train_images: images that were learned from.
        learned: parameters that learn, without the head.
        trainable: parameters that learn, with the head.
        backbone_parameters: of the frozen model, without a head.
        loss: mean training loss of the last epoch.
        val_accuracy: on validation images after the last epoch; None where there are none.
        test_accuracy: on test images, with the weights that were kept; None in a search.
        seconds: training, without validation and tests.
        prototype_seconds: building the prototypes, if this run did; shared ones cost a later run nothing.
    """

    run: str
    stage: Stage
    backbone: str
    task: str
    arm: str
    method: str
    strategy: str = ""
    source: str = ""
    frozen_prompts: bool = False
    num_prompts: int | None = None
    lr: float
    weight_decay: float
    epochs: int
    prompt_lr: float | None = None
    options: str = ""
    compared: str = ""
    seed: int
    train_images: int
    learned: int
    trainable: int
    backbone_parameters: int
    loss: float
    val_accuracy: float | None = None
    test_accuracy: float | None = None
    seconds: float
    prototype_seconds: float | None = None


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def runs_path(runs: str | os.PathLike[str]) -> Path:
    """The runs.csv that a name stands for: a study's folder, or the file itself.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(runs)
    return check_input_path(path / RUNS_NAME if path.is_dir() else path, argument="runs")


def read_runs(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a runs.csv, in their order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing or unknown, a line is not whole, a cell is of the wrong kind, or a run
            comes twice; file and line are named.
    """
    source = check_input_path(path, argument="runs")
    # Universal newlines are off: a line without its end is a line that was cut.
    text = source.read_text(encoding="utf-8")
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    if tuple(header) != COLUMNS:
        raise ValueError(f"{source} must have the columns {', '.join(COLUMNS)}, {_odd(header)}")
    rows: list[Row] = []
    for cells in reader:
        where = f"{source}, line {reader.line_num}"
        if len(cells) != len(COLUMNS):
            raise ValueError(
                f"{where}: must have {len(COLUMNS)} cells, got {len(cells)}: it was not written whole; "
                "remove the line, and the sweep does that run again"
            )
        rows.append(_row(dict(zip(COLUMNS, cells, strict=True)), where))
    if not text.endswith("\n"):
        raise ValueError(
            f"{source}, line {reader.line_num}: has no end: it was not written whole; remove the line, and "
            "the sweep does that run again"
        )
    names = [row.run for row in rows]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{source}: run {twice} comes twice")
    return rows


def _odd(header: Sequence[str]) -> str:
    """What is wrong with the columns of a file."""
    if not header:
        return "got none"
    lacking = [name for name in COLUMNS if name not in header]
    unknown = [name for name in header if name not in COLUMNS]
    parts = [("lacks", lacking), ("has", unknown)]
    found = " and ".join(f"{what} {', '.join(map(repr, names))}" for what, names in parts if names)
    return f"but {found}" if found else "in this order and once each"


def read_values(text: str) -> dict[str, str]:
    """{name: value} of the columns `options` and `compared`."""
    pairs = (pair.partition("=") for pair in text.split(";") if pair)
    return {name: value for name, _, value in pairs}


def write_runs(path: str | os.PathLike[str], rows: Iterable[Row]) -> None:
    """Replace the file by these rows, as a whole: whoever is killed here leaves the file before."""
    content = csv_bytes(COLUMNS, [[_cell(value) for value in dataclasses.astuple(row)] for row in rows])
    write_bytes(Path(path), content, overwrite=True)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return "" if value is None else value


def _row(cells: dict[str, str], where: str) -> Row:
    values: dict[str, Any] = {}
    for field in dataclasses.fields(Row):
        cell = cells[field.name]
        try:
            values[field.name] = _KINDS[str(field.type)](cell)
        except ValueError:
            raise ValueError(f"{where}: {field.name} must be {field.type}, got {cell!r}") from None
    for name in ("val_accuracy", "test_accuracy"):
        if values[name] is not None and not 0 <= values[name] <= 1:
            raise ValueError(f"{where}: {name} must be in [0, 1], got {cells[name]!r}")
    return Row(**values)


def _optional(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda cell: kind(cell) if cell else None


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    def check(cell: str) -> str:
        if cell not in choices:
            raise ValueError(cell)
        return cell

    return check


# By the types as they stand above.
_KINDS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "Stage": _one_of(STAGES),
    "bool": lambda cell: _one_of("01")(cell) == "1",
    "int": int,
    "float": float,
    "int | None": _optional(int),
    "float | None": _optional(float),
}
