"""Input of the figures: arrays and CSV files are checked and brought into one form.

CSV files hold one value per line; the columns task, run and seed may be missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spt_fast.support.arguments import check_number
from spt_fast.support.tables import csv_columns, read_csv

Values = NDArray[np.float64]
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class NmiCurve:
    """NMI of one run while it was trained.

    Attributes:
        steps: [S] ascending.
        blocks: [L] their numbers, from 1.
        values: [R, S, L], one row per seed.
        by_epoch: whether a step is an epoch.
    """

    steps: Values
    blocks: list[int]
    values: Values
    by_epoch: bool = False


def nmi_curves(source: Any, steps_per_epoch: Any = None) -> dict[str, dict[str, NmiCurve]]:
    """Task to run to curve, of a CSV file or a mapping of tasks to runs; see `nmi_over_epochs`.

    All are by epoch or all by step.
    """
    if isinstance(source, (str, os.PathLike)):
        curves = _read_nmi(source)
    else:
        _check_mapping("tasks", source, "tasks to runs")
        curves = {}
        for task, runs in source.items():
            _check_mapping(f"tasks[{task!r}]", runs, "runs to values")
            curves[task] = {name: _nmi_curve(f"tasks[{task!r}][{name!r}]", run) for name, run in runs.items()}
    if steps_per_epoch is not None:
        return _by_epoch(curves, steps_per_epoch)
    if len({curve.by_epoch for runs in curves.values() for curve in runs.values()}) == 2:
        raise ValueError(
            "steps_per_epoch must be given, since some of the runs are by epoch and others by step, got None"
        )
    return curves


def nmi_of_blocks(source: Any) -> dict[str, tuple[list[int], Values]]:
    """Run to (blocks, values [R, L]); of a CSV file, the last step."""
    if isinstance(source, (str, os.PathLike)):
        tasks = _read_nmi(source)
        return {
            ", ".join(name for name in (task, run) if name): (curve.blocks, curve.values[:, -1])
            for task, runs in tasks.items()
            for run, curve in runs.items()
        }
    _check_mapping("runs", source, "names to values")
    blocks: dict[str, tuple[list[int], Values]] = {}
    for name, values in source.items():
        if isinstance(values, (str, os.PathLike)):
            (found,) = _one_run(f"runs[{name!r}]", nmi_of_blocks(values)).values()
            blocks[name] = found
        else:
            array = check_array(f"runs[{name!r}]", values, "[L] or [R, L]", (1, 2))
            blocks[name] = list(range(1, array.shape[-1] + 1)), np.atleast_2d(array)
    return blocks


def cka_maps(source: Any) -> dict[str, Values]:
    """Name to map [L, L], rows prompts, columns tokens."""
    if not isinstance(source, Mapping):
        source = {"": source}
    _check_mapping("maps", source, "names to maps")
    return {name: _cka_map(f"maps[{name!r}]" if name else "maps", value) for name, value in source.items()}


def accuracy_of_lengths(source: Any) -> dict[str, tuple[Values, Values]]:
    """Run to (prompt lengths [X], accuracies [R, X])."""
    if isinstance(source, (str, os.PathLike)):
        rows = read_csv(source, ("num_prompts", "accuracy"), ("run", "seed"))
        groups = _grouped(source, [((run,), seed, numbers) for (run, seed), numbers in rows])
        return {run: (x, values) for (run,), (x, values) in groups.items()}
    return _pairs("runs", source, "lengths")


def times_of_shares(source: Any) -> tuple[dict[str, tuple[Values, Values]], dict[str, tuple[Values, Values]]]:
    """Strategy to (shares [X], seconds [R, X]): those measured, and the paper's, if the file holds any."""
    if not isinstance(source, (str, os.PathLike)):
        return _pairs("times", source, "shares"), {}
    rows = read_csv(source, ("share", "seconds", "paper_seconds"), ("strategy", "seed"))
    ours = [((strategy,), seed, (share, seconds)) for (strategy, seed), (share, seconds, _) in rows]
    paper = {((strategy,), "", (share, papers)) for (strategy, _), (share, _, papers) in rows}
    measured, published = (
        {name: pair for (name,), pair in _grouped(source, sorted(side)).items()}
        for side in (ours, [row for row in paper if row[2][1] is not None])
    )
    return measured, published


def training_of_epochs(source: PathLike) -> tuple[Values, Values]:
    """Pairs [T, 2] of epoch and loss, and pairs of epoch and validation accuracy, if the file holds any."""
    rows = [numbers for _, numbers in read_csv(source, ("epoch", "loss", "val_accuracy"))]
    loss = [_no_blank(source, (epoch, value)) for epoch, value, _ in rows]
    accuracy = [_no_blank(source, (epoch, value)) for epoch, _, value in rows if value is not None]
    return np.array(loss), np.array(accuracy).reshape(-1, 2)


def check_array(name: str, values: Any, layout: str, ranks: tuple[int, ...]) -> Values:
    """`values` as a finite float64 array that is not empty; `layout` is what errors call its shape.

    Raises:
        TypeError: it does not consist of numbers.
        ValueError: it has another rank, is empty, or holds NaN or infinity.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be numbers {layout}, got {type(values).__name__}") from None
    if array.ndim not in ranks or array.size == 0:
        raise ValueError(f"{name} must have shape {layout}, no size of it 0, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return array


def _nmi_curve(name: str, run: Any) -> NmiCurve:
    if isinstance(run, (str, os.PathLike)):
        (runs,) = _one_run(name, _read_nmi(run)).values()
        curves: list[NmiCurve] = list(_one_run(name, runs).values())
        return curves[0]
    if not isinstance(run, tuple) or len(run) != 2:
        raise TypeError(
            f"{name} must be a CSV file or a pair (steps [S], values [S, L] or [R, S, L]), "
            f"got {type(run).__name__}"
        )
    steps = check_array(f"steps of {name}", run[0], "[S]", (1,))
    values = check_array(f"values of {name}", run[1], "[S, L] or [R, S, L]", (2, 3))
    if values.shape[-2] != len(steps):
        raise ValueError(
            f"values of {name} must hold {len(steps)} steps as its steps do, got {values.shape[-2]}"
        )
    if (np.diff(steps) <= 0).any():
        raise ValueError(f"steps of {name} must ascend, got {steps.tolist()}")
    return NmiCurve(steps, list(range(1, values.shape[-1] + 1)), values if values.ndim == 3 else values[None])


def _by_epoch(curves: dict[str, dict[str, NmiCurve]], steps_per_epoch: Any) -> dict[str, dict[str, NmiCurve]]:
    """The same with steps in epochs; `steps_per_epoch` is a number, or one for each task."""
    lengths = (
        steps_per_epoch if isinstance(steps_per_epoch, Mapping) else dict.fromkeys(curves, steps_per_epoch)
    )
    lacking = [task for task in curves if task not in lengths]
    if lacking:
        raise ValueError(f"steps_per_epoch must hold a number for each task, got none for {lacking[0]!r}")
    found = {}
    for task, runs in curves.items():
        length = check_number(f"steps_per_epoch of {task!r}", lengths[task], above=0)
        found[task] = {
            name: run if run.by_epoch else replace(run, steps=run.steps / length, by_epoch=True)
            for name, run in runs.items()
        }
    return found


def _read_nmi(path: PathLike) -> dict[str, dict[str, NmiCurve]]:
    columns = csv_columns(path)
    moment = "epoch" if "epoch" in columns and "step" not in columns else "step"
    rows = read_csv(path, (moment, "block", "nmi"), ("task", "run", "seed"))
    grouped: dict[str, dict[str, dict[str, dict[tuple[float, float], float]]]] = {}
    for (task, run, seed), numbers in rows:
        step, block, nmi = _no_blank(path, numbers)
        cells = grouped.setdefault(task, {}).setdefault(run, {}).setdefault(seed, {})
        if (step, block) in cells:
            raise ValueError(f"{path} holds {moment} {step:g}, block {block:g} twice")
        cells[step, block] = nmi
    return {
        task: {run: _curve_of_cells(path, moment, list(seeds.values())) for run, seeds in runs.items()}
        for task, runs in grouped.items()
    }


def _curve_of_cells(path: PathLike, moment: str, seeds: list[dict[tuple[float, float], float]]) -> NmiCurve:
    steps, blocks = (sorted({key[place] for cells in seeds for key in cells}) for place in (0, 1))
    try:
        values = [[[cells[step, block] for block in blocks] for step in steps] for cells in seeds]
    except KeyError as error:
        step, block = error.args[0]
        raise ValueError(f"{path} lacks {moment} {step:g}, block {block:g}") from None
    return NmiCurve(
        np.array(steps),
        [int(block) for block in blocks],
        check_array(f"column nmi of {path}", values, "[R, S, L]", (3,)),
        by_epoch=moment == "epoch",
    )


def _cka_map(name: str, value: Any) -> Values:
    if isinstance(value, (str, os.PathLike)):
        rows = read_csv(value, ("prompt_block", "token_block", "cka"))
        cells = {}
        for _, numbers in rows:
            row, column, cka = _no_blank(value, numbers)
            cells[row, column] = cka
        blocks = sorted({block for key in cells for block in key})
        if len(cells) != len(blocks) ** 2 or len(cells) != len(rows):
            raise ValueError(f"{value} must hold each pair of its {len(blocks)} blocks once")
        value = [[cells[row, column] for column in blocks] for row in blocks]
    array = check_array(name, value, "[L, L]", (2,))
    if array.shape[0] != array.shape[1]:
        raise ValueError(f"{name} must have shape [L, L], got {array.shape}")
    return array


def _pairs(name: str, source: Any, axis: str) -> dict[str, tuple[Values, Values]]:
    _check_mapping(name, source, f"names to ({axis} [X], values [X] or [R, X])")
    pairs = {}
    for key, pair in source.items():
        where = f"{name}[{key!r}]"
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"{where} must be a pair ({axis} [X], values [X] or [R, X])")
        x = check_array(f"{axis} of {where}", pair[0], "[X]", (1,))
        values = np.atleast_2d(check_array(f"values of {where}", pair[1], "[X] or [R, X]", (1, 2)))
        if values.shape[1] != len(x):
            raise ValueError(
                f"values of {where} must have the length of its {axis}, {len(x)}, got {values.shape[1]}"
            )
        order = np.argsort(x)
        pairs[key] = x[order], values[:, order]
    return pairs


def _grouped(
    path: PathLike, rows: Iterable[tuple[tuple[str, ...], str, tuple[float | None, ...]]]
) -> dict[tuple[str, ...], tuple[Values, Values]]:
    """Rows (key, seed, (x, y)) to key -> (x [X], y [R, X])."""
    cells: dict[tuple[str, ...], dict[str, dict[float, float]]] = {}
    for key, seed, numbers in rows:
        x, y = _no_blank(path, numbers)
        found = cells.setdefault(key, {}).setdefault(seed, {})
        if x in found:
            raise ValueError(f"{path} holds {', '.join(key)} at {x:g} twice")
        found[x] = y
    grouped = {}
    for key, seeds in cells.items():
        points = sorted({x for seed in seeds.values() for x in seed})
        if any(len(seed) != len(points) for seed in seeds.values()):
            raise ValueError(f"{path} must hold {', '.join(key)} at the same values for each seed")
        values = [[seed[x] for x in points] for seed in seeds.values()]
        grouped[key] = np.array(points), check_array(f"values in {path}", values, "[R, X]", (2,))
    return grouped


def _no_blank(path: PathLike, numbers: tuple[float | None, ...]) -> tuple[float, ...]:
    present = tuple(number for number in numbers if number is not None)
    if len(present) < len(numbers):
        raise ValueError(f"{path} has an empty cell where a number must be")
    return present


def _one_run(name: str, runs: Mapping[str, Any]) -> Mapping[str, Any]:
    if len(runs) != 1:
        raise ValueError(f"{name} must be a file of one run, got {len(runs)}: {', '.join(runs)}")
    return runs


def _check_mapping(name: str, value: Any, what: str) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a CSV file or map {what}, got {type(value).__name__}")
    if not value:
        raise ValueError(f"{name} must hold at least one entry, got none")
    strange = [key for key in value if not isinstance(key, str)]
    if strange:
        raise TypeError(f"{name} must map {what} by names, which are strings, got {strange[0]!r}")
