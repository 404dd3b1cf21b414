"""Sections of a report on accuracy against what varied: prompt length, share of the data, and others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spt_fast.study.report.charts import PERCENT, Axis, Line, legend, line_chart
from spt_fast.study.report.html import Html, Section, element, figure, grid, markup, paragraph
from spt_fast.study.report.input import StudyFolder
from spt_fast.study.runs import Row, read_values

_LENGTH, _IMAGES, _SHARE = "prompts per block", "training images", "share"
# Of options that only some arms state: what the others have.
_DEFAULTS = {_SHARE: 1.0}
# Largest x over smallest, from which a scale by powers is easier to read.
_WIDE = 8

Values = Mapping[str, float]


def lengths_section(study: StudyFolder) -> Section | None:
    """Accuracy against the number of prompts."""
    charts = _against(study, _LENGTH)
    told = paragraph("Runs that differ in the number of prompts per block and in nothing else but rates.")
    return Section("lengths", "Prompt length", markup(told, charts)) if charts else None


def shares_section(study: StudyFolder) -> Section | None:
    """Accuracy against the share or number of images, and against any other number that varied."""
    names = [*dict.fromkeys(name for row in study.rows for name in _options(row)), _IMAGES]
    parts = [part for name in names if (part := _against(study, name)) is not None]
    told = paragraph(
        "Runs that differ in one number, such as the share of the images, and in nothing else but rates."
    )
    return Section("shares", "Share of the data", markup(told, parts)) if parts else None


@dataclass(frozen=True)
class _Family:
    """What runs have in common that differ in x.

    Attributes:
        name: the arm, or the method and how its prompts start, where x tells arms apart.
        others: all else that a study varies or arms state, but for rates that were chosen.
    """

    name: str
    others: tuple[tuple[str, str], ...]


def _against(study: StudyFolder, x: str) -> Html | None:
    """Charts, a task each: test accuracy of final runs if these have several x, or else of the search."""
    for stage, measure in (("final", "test"), ("search", "validation")):
        lines = _lines([row for row in study.rows if row.stage == stage], x)
        if lines:
            return _charts(lines, x, f"{measure} accuracy (%)")
    return None


def _charts(lines: Mapping[str, Sequence[Line]], x: str, y: str) -> Html:
    names = list(dict.fromkeys(line.name for found in lines.values() for line in found))
    looks = {name: place for place, name in enumerate(names)}
    every = [value for found in lines.values() for line in found for value in line.x]
    across = Axis(x, logarithmic=min(every) > 0 and max(every) >= _WIDE * min(every))
    charts = [
        figure(
            [element("b", task), f" {y}"],
            line_chart(found, looks, x=across, y=Axis(y, limits=PERCENT), title=task),
        )
        for task, found in lines.items()
    ]
    return markup(element("h3", f"Against {x}"), legend(names, looks), grid(charts))


def _lines(rows: Sequence[Row], x: str) -> dict[str, list[Line]]:
    """{task: lines}, one for each family that has two x or more."""
    found: dict[str, list[tuple[_Family, Line]]] = defaultdict(list)
    for (task, family), members in _families(rows, x).items():
        line = _line(family.name, members, x)
        if line is not None:
            found[task].append((family, line))
    return {task: [_told_apart(*each, pairs) for each in pairs] for task, pairs in found.items()}


def _told_apart(family: _Family, line: Line, pairs: Sequence[tuple[_Family, Line]]) -> Line:
    """With what else tells it apart in its name, where another family of the task has the same one."""
    if sum(other.name == line.name for _, other in pairs) == 1:
        return line
    others = ", ".join(f"{name} {value}" for name, value in family.others)
    return Line(f"{line.name}, {others}", line.x, line.values)


def _families(rows: Sequence[Row], x: str) -> dict[tuple[str, _Family], list[Row]]:
    """Runs of an arm for which the study varied x; and runs of arms that x alone tells apart."""
    within = _varying(rows, x)
    found: dict[tuple[str, _Family], list[Row]] = defaultdict(list)
    for row in rows:
        if x in _numbers(row):
            found[row.task, (_within if (row.task, row.arm) in within else _across)(row, x)].append(row)
    return {
        (task, family): members
        for (task, family), members in found.items()
        # Arms with the same x are told apart by something that runs.csv does not have.
        if (task, members[0].arm) in within
        or len({row.arm for row in members}) == len({_numbers(row)[x] for row in members})
    }


def _varying(rows: Sequence[Row], x: str) -> set[tuple[str, str]]:
    """Task and arm where an arm has several x: compared ones, or in a search ones to choose from."""
    values: dict[tuple[str, str], set[float | None]] = defaultdict(set)
    for row in rows:
        if row.stage == "search" or _key(x) in read_values(row.compared):
            values[row.task, row.arm].add(_numbers(row).get(x))
    return {place for place, found in values.items() if len(found) > 1}


def _within(row: Row, x: str) -> _Family:
    compared = read_values(row.compared).items()
    return _Family(row.arm, tuple((name, value) for name, value in compared if name not in _keys(x)))


def _across(row: Row, x: str) -> _Family:
    strategy = "" if row.strategy == "kmeans" else row.strategy
    source = "" if row.source in ("", "own") else f"{row.source} block"
    words = (row.method, strategy, source, "frozen" if row.frozen_prompts else "")
    stated = {
        "num_prompts": str(row.num_prompts),
        "share": str(row.train_images),
        "epochs": str(row.epochs),
        "weight_decay": f"{row.weight_decay:g}",
        **read_values(row.options),
    }
    others = tuple((name, value) for name, value in sorted(stated.items()) if name not in _keys(x))
    return _Family(", ".join(filter(None, words)), others)


def _key(x: str) -> str:
    """The name of x in the columns `options` and `compared`."""
    return "num_prompts" if x == _LENGTH else x


def _keys(x: str) -> tuple[str, ...]:
    """Of a share of the images, their number is another word."""
    return ("share", "per_class") if x in (_SHARE, _IMAGES) else (_key(x),)


def _line(name: str, rows: Sequence[Row], x: str) -> Line | None:
    """Over the seeds that have all x; of a search the best of each x. None for fewer than two x."""
    found: dict[float, dict[int, float]] = defaultdict(dict)
    for row in rows:
        accuracy = row.test_accuracy if row.stage == "final" else row.val_accuracy
        if accuracy is not None:
            by_seed = found[_numbers(row)[x]]
            by_seed[row.seed] = max(accuracy, by_seed.get(row.seed, 0.0))
    if len(found) < 2:
        return None
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
    places = sorted(found)
    return (
        Line(name, places, [[100 * found[each][seed] for each in places] for seed in seeds])
        if seeds
        else None
    )


def _numbers(row: Row) -> Values:
    """What may vary, by name."""
    length = {} if row.num_prompts is None else {_LENGTH: float(row.num_prompts)}
    return {**length, _IMAGES: float(row.train_images), **_DEFAULTS, **_options(row)}


def _options(row: Row) -> dict[str, float]:
    """Those of its options that are numbers."""
    found = {}
    for name, value in read_values(row.options).items():
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found
