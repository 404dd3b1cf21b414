"""What a report is made of: the folder of a study, whose files may be damaged, missing or not yet there."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from spt_fast.study.runs import PROTOTYPES_FOLDER, RUNS_FOLDER, SWEEP_NAME, Row, read_runs, runs_path
from spt_fast.study.sweeps.plan import Plan
from spt_fast.study.sweeps.record import asked_for
from spt_fast.support.errors import one_line
from spt_fast.support.yaml_text import read_yaml
from spt_fast.training.folder import PROTOTYPES_NAME

Found = TypeVar("Found")


@dataclass(frozen=True)
class StudyFolder:
    """A study as it lies on disk.

    Attributes:
        path: its folder.
        rows: of its runs.csv, at least one.
        sweep: what its sweep.yaml says; empty where there is none.
        missing: lines about what could not be read, for the page and for the terminal. Readers add to it.
    """

    path: Path
    rows: tuple[Row, ...]
    sweep: Mapping[str, Any]
    missing: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, runs: str | os.PathLike[str]) -> StudyFolder:
        """The study in a folder, or that of a runs.csv.

        Raises:
            FileNotFoundError: there is no runs.csv.
            ValueError: it was not written whole or has no rows, or sweep.yaml is no YAML.
        """
        table = runs_path(runs)
        rows = read_runs(table)
        if not rows:
            raise ValueError(f"runs: {table} holds no run that is finished yet")
        source = table.parent / SWEEP_NAME
        there = source.is_file()
        sweep = read_yaml(source.read_text(encoding="utf-8"), str(source)) if there else {}
        study = cls(table.parent, tuple(rows), sweep)
        if not there:
            study.missing.append(f"{SWEEP_NAME} is missing: what was asked for is not known")
        if not (table.parent / RUNS_FOLDER).is_dir():
            study.missing.append(f"{RUNS_FOLDER}/ is missing: no curves, NMI, confusion and classes of runs")
        return study

    def run_file(self, row: Row, name: str) -> Path | None:
        """A file of a run's folder; None where it is not there."""
        path = self.path / RUNS_FOLDER / row.run / name
        return path if path.is_file() else None

    @property
    def root(self) -> str | None:
        """Where the data of the study lay; None where it does not say."""
        found = self.sweep.get("root")
        return None if found is None else str(found)

    def split(self, task: str) -> str | None:
        """The split of a task that the study names for training; None where it names none."""
        data = self.sweep.get("data")
        for entry in data if isinstance(data, list) else [data]:
            if isinstance(entry, Mapping) and entry.get("data") == task and entry.get("split") is not None:
                return str(entry["split"])
        return None

    def prototypes_file(self, row: Row) -> Path | None:
        """Of the prototypes that a run started from: its own, or the shared one that the sweep gave it."""
        own = self.run_file(row, PROTOTYPES_NAME)
        name = self._prototypes_names.get(row.run)
        if own is not None or name is None:
            return own
        path = self.path / PROTOTYPES_FOLDER / name
        return path if path.is_file() else None

    @cached_property
    def _prototypes_names(self) -> dict[str, str | None]:
        """{run: name of its shared prototypes} of the whole plan; empty where sweep.yaml holds none."""
        try:
            plan = Plan.read(asked_for(self.sweep))
        except (TypeError, ValueError):
            return {}
        return {run.name: run.prototypes_name for group in plan.groups for run in group.possible}

    def read(self, row: Row, name: str, reader: Callable[[Path], Found]) -> Found | None:
        """What `reader` makes of a file of a run; None where it is not there or damaged, which is noted."""
        path = self.run_file(row, name)
        if path is None:
            return None
        try:
            return reader(path)
        except (OSError, ValueError) as error:
            self.missing.append(f"left out: {one_line(error)}")
            return None


@dataclass(frozen=True)
class Confusion:
    """Images by label and predicted label: `counts[label][predicted]`."""

    class_names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def read_confusion(path: Path) -> Confusion:
    """A confusion.csv.

    Raises:
        ValueError: it is no square of whole numbers.
    """
    header, *rows = _csv_rows(path)
    names = tuple(header[1:])
    if not names or [row[0] for row in rows] != list(names):
        raise ValueError(f"{path} must have a row and a column for each class, in the same order")
    try:
        counts = tuple(tuple(int(cell) for cell in row[1:]) for row in rows)
    except ValueError as error:
        raise ValueError(f"{path} must hold numbers of images: {error}") from error
    if any(len(row) != len(names) for row in counts):
        raise ValueError(f"{path} must have {len(names)} numbers in each row")
    return Confusion(names, counts)


def read_classes(path: Path) -> dict[str, tuple[int, float | None]]:
    """A classes.csv as {class: (images, accuracy)}; None for a class without images.

    Raises:
        ValueError: a column is missing, or a cell is no number.
    """
    header, *rows = _csv_rows(path)
    wanted = ("class", "images", "accuracy")
    try:
        name, images, accuracy = (header.index(column) for column in wanted)
        return {
            row[name]: (int(row[images]), float(row[accuracy]) if row[accuracy] else None) for row in rows
        }
    except (IndexError, ValueError) as error:
        raise ValueError(f"{path} must have the columns {', '.join(wanted)}: {error}") from error


def _csv_rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.reader(file) if row]
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows
