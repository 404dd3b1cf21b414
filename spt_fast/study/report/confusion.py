"""Sections of a report on classes: which are taken for which, and which go best and worst."""

from __future__ import annotations

from collections.abc import Mapping

from spt_fast.data.listing import some_names
from spt_fast.study.report.comparison import Comparison
from spt_fast.study.report.html import (
    Html,
    Section,
    element,
    figure,
    folded,
    grid,
    heat_table,
    markup,
    paragraph,
    table,
)
from spt_fast.study.report.input import Confusion, StudyFolder, read_classes, read_confusion
from spt_fast.study.report.results import NOTHING
from spt_fast.study.runs import RUNS_FOLDER, Row
from spt_fast.training.folder import TEST_CLASSES_NAME, TEST_CONFUSION_NAME

# Larger matrices are shown by their most frequent confusions.
_MOST_CLASSES = 12
_MOST_PAIRS = 8
# At each end.
_EXTREMES = 5


def confusion_section(study: StudyFolder, compared: Comparison) -> Section | None:
    """The confusion of each arm's first seed, the best arm of a task open."""
    parts = []
    for task in compared.tasks:
        found = {arm: each for arm, row in _first_runs(compared, task).items() if (each := _read(study, row))}
        if not found:
            continue
        best = compared.best(task, found) or next(iter(found))
        others = [_shown(arm, each) for arm, each in found.items() if arm != best]
        parts += [element("h3", task), grid([_shown(best, found[best])], "heats")]
        if others:
            title = "The other arm" if len(others) == 1 else f"The other {len(others)} arms"
            parts.append(folded(title, grid(others, "heats")))
    _note_lacking(study, compared)
    if not parts:
        return None
    told = paragraph(
        "Test images of each arm's first seed: rows are labels, columns what they were taken for, and the "
        f"shade is the share of a label's images. Of more than {_MOST_CLASSES} classes the most frequent "
        "confusions are listed instead. The best arm of a task comes first."
    )
    return Section("confusion", "Confusion", markup(told, parts))


def classes_section(study: StudyFolder, compared: Comparison) -> Section | None:
    """Accuracy of the classes that go best and worst by the best arm, beside the other arms'."""
    parts = []
    for task in compared.tasks:
        runs = _first_runs(compared, task)
        found = {
            arm: each
            for arm, row in runs.items()
            if (each := study.read(row, TEST_CLASSES_NAME, read_classes))
        }
        best = compared.best(task, found)
        if best is not None:
            parts += [element("h3", task), _extremes(task, best, found)]
    if not parts:
        return None
    told = paragraph(
        "Accuracy on test images in percent, first seed, from the worst class to the best as the best arm of "
        f"the task has it; of many classes the {_EXTREMES} at each end."
    )
    return Section("classes", "Classes", markup(told, parts))


def _note_lacking(study: StudyFolder, compared: Comparison) -> None:
    """Name the tested runs whose tables are gone, but not where runs have no folders at all."""
    if compared.measure != "test" or not (study.path / RUNS_FOLDER).is_dir():
        return
    runs = [row for task in compared.tasks for row in _first_runs(compared, task).values()]
    lacking = [row.run for row in runs if study.run_file(row, TEST_CONFUSION_NAME) is None]
    if lacking:
        study.missing.append(
            f"no confusion and no classes of {some_names(lacking)}: their tables are not there"
        )


def _first_runs(compared: Comparison, task: str) -> dict[str, Row]:
    return {arm: cells[task].rows[0] for arm, cells in compared.cells.items() if task in cells}


def _read(study: StudyFolder, row: Row) -> Confusion | None:
    return study.read(row, TEST_CONFUSION_NAME, read_confusion)


def _shown(arm: str, found: Confusion) -> Html:
    caption = [element("b", arm)]
    if len(found.class_names) > _MOST_CLASSES:
        return figure(caption, _pairs(arm, found))
    return figure(caption, _matrix(arm, found))


def _matrix(arm: str, found: Confusion) -> Html:
    numbers = [str(n) for n in range(1, len(found.class_names) + 1)]
    # Columns by number: names would not fit.
    same = all(name.isdecimal() for name in found.class_names)
    columns = list(found.class_names) if same else numbers
    rows = (
        list(found.class_names)
        if same
        else [f"{n} {name}" for n, name in zip(numbers, found.class_names, strict=True)]
    )
    shades = [[count / max(sum(counts), 1) for count in counts] for counts in found.counts]
    labels = [[str(count) if count else "" for count in counts] for counts in found.counts]
    return heat_table(f"Confusion of {arm}", (rows, columns), shades, labels, corner="label")


def _pairs(arm: str, found: Confusion) -> Html:
    wrong = [
        (count, label, predicted)
        for label, counts in enumerate(found.counts)
        for predicted, count in enumerate(counts)
        if count and label != predicted
    ]
    wrong.sort(key=lambda each: (-each[0] / sum(found.counts[each[1]]), each))
    if not wrong:
        return paragraph("No image was taken for another class.")
    names = found.class_names
    rows = [
        (names[label], names[predicted], f"{count} of {sum(found.counts[label])}")
        for count, label, predicted in wrong[:_MOST_PAIRS]
    ]
    header = ("label", "taken for", "images")
    return table(f"Most frequent confusions of {arm}", header, rows, names=2)


def _extremes(task: str, best: str, found: Mapping[str, Mapping[str, tuple[int, float | None]]]) -> Html:
    known = {name: value for name, (_, value) in found[best].items() if value is not None}
    order = sorted(known, key=lambda name: known[name])
    if len(order) > 2 * _EXTREMES + 2:
        order = [*order[:_EXTREMES], *order[-_EXTREMES:]]
    arms = [best, *(arm for arm in found if arm != best)]
    rows = [
        [name, str(found[best][name][0]), *(_percent(found[arm].get(name)) for arm in arms)] for name in order
    ]
    return table(f"Accuracy by class in {task}", ("class", "images", *arms), rows)


def _percent(found: tuple[int, float | None] | None) -> str:
    return NOTHING if found is None or found[1] is None else f"{100 * found[1]:.1f}"
