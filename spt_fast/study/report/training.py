"""Sections of a report on how runs went: the search, loss and accuracy by epoch, NMI by epoch and block."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from spt_fast.plots.data import NmiCurve, Values, nmi_curves, training_of_epochs
from spt_fast.study.names import arm_names
from spt_fast.study.report.charts import PERCENT, Axis, Line, legend, line_chart
from spt_fast.study.report.comparison import chosen_rows
from spt_fast.study.report.html import Html, Section, element, figure, grid, markup, paragraph
from spt_fast.study.report.input import StudyFolder
from spt_fast.study.runs import Row
from spt_fast.study.sweeps.choice import diverged
from spt_fast.support.yaml_text import read_yaml
from spt_fast.training.folder import HISTORY_NAME, NMI_NAME, RUN_NAME

Looks = Mapping[str, int]
ByTask = dict[str, list[Line]]

_EPOCH = Axis("epoch", whole=True)
_ACCURACY = Axis("validation accuracy (%)", limits=PERCENT)


def search_section(study: StudyFolder, looks: Looks) -> Section | None:
    """Validation accuracy against the rate, as the search saw it."""
    found: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in study.rows:
        if row.stage == "search" and row.val_accuracy is not None:
            by_rate = found[row.task][row.arm]
            by_rate[row.lr] = max(row.val_accuracy, by_rate.get(row.lr, 0.0))
    lines = {task: [_of_rates(arm, by_rate) for arm, by_rate in arms.items()] for task, arms in found.items()}
    if not lines:
        return None
    told = paragraph(
        "Accuracy on validation images after the last epoch, against the learning rate: what values were "
        "chosen by. Where a search tried other values too, a point is the best of them. A best value at the "
        "end of a line says that the search was too narrow."
    )
    charts = task_charts(lines, looks, Axis("learning rate", logarithmic=True), _ACCURACY)
    return Section("search", "Search", markup(told, charts))


def curves_section(study: StudyFolder, looks: Looks) -> Section | None:
    """Loss, and validation accuracy where there is any, epoch by epoch."""
    final = [row for row in study.rows if row.stage == "final"] or chosen_rows(study.rows)
    # A run that diverged has a curve of fewer epochs, which would cut the others.
    final = [row for row in final if not diverged(row)]
    loss = _curves(study, final, lambda found: found[0])
    accuracy = _curves(study, final, lambda found: found[1])
    whose = "of the same runs"
    if not accuracy:
        accuracy = _curves(study, chosen_rows(study.rows), lambda found: found[1])
        whose = "of the runs that the search chose, as final runs learn from validation images too"
    if not loss:
        return None
    parts = [
        paragraph("Mean over seeds, with a band from the least to the largest."),
        element("h3", "Training loss"),
        task_charts(loss, looks, _EPOCH, Axis("training loss", from_zero=True)),
    ]
    # Some runs are validated once, at their end.
    if any(len(line.x) > 1 for lines in accuracy.values() for line in lines):
        scaled = {task: [_in_percent(line) for line in lines] for task, lines in accuracy.items()}
        parts += [
            element("h3", "Validation accuracy"),
            paragraph(f"It is {whose}.", class_="quiet"),
            task_charts(scaled, looks, _EPOCH, _ACCURACY),
        ]
    return Section("curves", "Training curves", markup(parts))


def nmi_charts(study: StudyFolder, looks: Looks) -> Html | None:
    """NMI of prompts and tokens by epoch, the mean over blocks, and by block after the last epoch."""
    measured = [row for row in study.rows if not diverged(row) and study.run_file(row, NMI_NAME) is not None]
    final = [row for row in measured if row.stage == "final"] or measured
    over_time: ByTask = {}
    by_block: ByTask = {}
    curves = {row.run: study.read(row, NMI_NAME, _only_curve) for row in final}
    for (task, name), rows in _grouped(study, final).items():
        found = [(row, curve) for row in rows if (curve := curves[row.run]) is not None]
        if not found:
            continue
        over_time.setdefault(task, []).append(_nmi_by_epoch(study, name, found))
        by_block.setdefault(task, []).append(_nmi_by_block(name, [curve for _, curve in found]))
    if not over_time:
        return None
    nmi = Axis("NMI (eq. 8)", from_zero=True)
    by_epoch = all(_steps_per_epoch(study, row) for row in final)
    return markup(
        element("h3", "While training, mean over blocks"),
        task_charts(over_time, looks, Axis("epoch" if by_epoch else "step", whole=True), nmi),
        element("h3", "By block, at the end"),
        task_charts(by_block, looks, Axis("block", whole=True), nmi),
    )


def _of_rates(arm: str, by_rate: Mapping[float, float]) -> Line:
    rates = sorted(by_rate)
    return Line(arm, rates, [[100 * by_rate[rate] for rate in rates]])


def task_charts(lines: ByTask, looks: Looks, x: Axis, y: Axis) -> Html:
    """A legend, and a chart for each task."""
    names = list(dict.fromkeys(line.name for found in lines.values() for line in found))
    charts = [
        figure([element("b", task), f" {y.label}"], line_chart(found, looks, x=x, y=y, title=task))
        for task, found in lines.items()
    ]
    return markup(legend(names, looks), grid(charts))


def _grouped(study: StudyFolder, rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows that differ in the seed only, by task and name."""
    names = arm_names(study.rows)
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row.task, names[row.run]), []).append(row)
    return grouped


def _curves(
    study: StudyFolder, rows: Sequence[Row], part: Callable[[tuple[Values, Values]], Values]
) -> ByTask:
    """{task: lines} of a column of train.csv, which not all runs have."""
    lines: ByTask = {}
    for (task, name), group in _grouped(study, rows).items():
        found = [study.read(row, HISTORY_NAME, training_of_epochs) for row in group]
        curves = [part(each) for each in found if each is not None]
        curves = [curve for curve in curves if len(curve) and np.isfinite(curve).all()]
        if curves:
            lines.setdefault(task, []).append(
                _stacked(name, [(curve[:, 0], curve[:, 1]) for curve in curves])
            )
    return lines


def _stacked(name: str, curves: Sequence[tuple[Values, Values]]) -> Line:
    """A row for each curve; one that ended early cuts the others."""
    length = min(len(x) for x, _ in curves)
    x = curves[0][0][:length]
    same = [values[:length].tolist() for other, values in curves if np.array_equal(other[:length], x)]
    return Line(name, x.tolist(), same)


def _in_percent(line: Line) -> Line:
    return Line(line.name, line.x, [[100 * value for value in row] for row in line.values])


def _only_curve(path: Path) -> NmiCurve:
    curves = [curve for runs in nmi_curves(path).values() for curve in runs.values()]
    if len(curves) != 1:
        raise ValueError(f"{path} must hold one run, got {len(curves)}")
    return curves[0]


def _nmi_by_epoch(study: StudyFolder, name: str, found: Sequence[tuple[Row, NmiCurve]]) -> Line:
    scaled = []
    for row, curve in found:
        steps = 1 if curve.by_epoch else _steps_per_epoch(study, row) or 1
        scaled.append((curve.steps / steps, curve.values[0].mean(axis=1)))
    return _stacked(name, scaled)


def _nmi_by_block(name: str, curves: Sequence[NmiCurve]) -> Line:
    blocks = curves[0].blocks
    rows = [curve.values[0, -1].tolist() for curve in curves if curve.blocks == blocks]
    return Line(name, list(map(float, blocks)), rows)


def _steps_per_epoch(study: StudyFolder, row: Row) -> int | None:
    """Batches of an epoch; None where run.yaml is not there to tell."""
    found = study.read(row, RUN_NAME, lambda path: read_yaml(path.read_text(encoding="utf-8"), str(path)))
    recipe = (found or {}).get("recipe")
    if not isinstance(recipe, Mapping):
        return None
    size = recipe.get("batch_size")
    if not isinstance(size, int) or size < 1:
        return None
    whole = row.train_images // size
    return max(whole, 1) if recipe.get("drop_last") else math.ceil(row.train_images / size)
