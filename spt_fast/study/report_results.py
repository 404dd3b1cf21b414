"""Sections of a report that are made of runs.csv alone: what was run, what came out, and against what."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from spt_fast.study.charts import Axis, Line, legend, line_chart
from spt_fast.study.comparison import Cell, Comparison, chosen_rows
from spt_fast.study.html import Html, Section, element, figure, folded, grid, markup, note, paragraph, table
from spt_fast.study.report_input import StudyFolder
from spt_fast.study.runs import Row
from spt_fast.support.yaml_text import write_yaml

PERCENT = (0.0, 100.0)
NOTHING = "–"


def summary(study: StudyFolder, compared: Comparison) -> Section:
    """Model, tasks, arms, seeds, versions and what it cost."""
    rows = study.rows
    facts = [
        ("Model", ", ".join(_distinct(row.backbone for row in rows))),
        ("Its parameters", ", ".join(f"{n:,}" for n in _distinct(row.backbone_parameters for row in rows))),
        ("Tasks", ", ".join(compared.tasks)),
        ("Arms", ", ".join(_distinct(row.arm for row in rows))),
        ("Runs", _runs(rows)),
        ("Seeds", ", ".join(map(str, sorted({row.seed for row in rows})))),
        ("Epochs", ", ".join(map(str, sorted({row.epochs for row in rows})))),
        ("Training time", _duration(sum(row.seconds for row in rows))),
        ("Building prototypes", _duration(sum(row.prototype_seconds or 0.0 for row in rows))),
        *_versions(study.sweep),
    ]
    parts = [table("What was run", ("", ""), [(name, value) for name, value in facts], names=2)]
    parts += [element("h3", "Cost"), _costs(rows)]
    if study.sweep:
        text = element("pre", write_yaml(study.sweep))
        parts.append(folded("sweep.yaml: all that was asked for", text))
    return Section("summary", "What was run", markup(parts))


def results(compared: Comparison) -> Section:
    """Accuracy by arm and task."""
    tasks = compared.tasks
    header = ["arm", "learned", *tasks, *(["mean"] if len(tasks) > 1 else [])]
    rows = []
    for arm, cells in compared.cells.items():
        accuracies = [_accuracy(cells.get(task)) for task in tasks]
        mean = compared.mean(arm)
        rows.append(
            [
                arm,
                _range([row.learned for cell in cells.values() for row in cell.rows]),
                *accuracies,
                *([NOTHING if mean is None else f"{100 * mean:.2f}"] if len(tasks) > 1 else []),
            ]
        )
    test = compared.measure == "test"
    what = (
        "Accuracy on test images in percent, of the final runs"
        if test
        else "Accuracy on validation images in percent, of the run that each search chose"
    )
    parts = [
        paragraph(
            f"{what}: mean ± standard deviation over seeds. The best mean over tasks comes first. “learned” is "
            "the number of parameters that learn, without the head."
        )
    ]
    if not test:
        parts.append(
            note(
                "No run was tested, so this is the accuracy by which values were chosen. It is too high by the "
                "choice; compare arms with care."
            )
        )
    elif lacking := [row.run for row in study_rows(compared) if row.test_accuracy is None]:
        parts.append(note(f"Without test accuracy, and left out: {', '.join(lacking)}."))
    parts.append(table("Accuracy by arm and task", header, rows))
    return Section("results", "Results", markup(parts))


def chosen_values(compared: Comparison, rows: Sequence[Row]) -> Section:
    """The values with which each arm was run, and what chose them."""
    search = {(row.task, row.arm): row for row in chosen_rows(rows)}
    header = (
        "task", "arm", "rate", "prompts' rate", "weight decay", "prompts", "other values", "images", "seeds",
        "validation", "s per run",
    )  # fmt: skip
    lines = []
    for task in compared.tasks:
        for arm, cells in compared.cells.items():
            if task not in cells:
                continue
            found = cells[task].rows
            row, chose = found[0], search.get((task, found[0].arm))
            lines.append(
                (
                    task, arm, f"{row.lr:g}", _optional(row.prompt_lr, ".3g"), f"{row.weight_decay:g}",
                    _optional(row.num_prompts, "d"), row.options.replace(";", ", "), f"{row.train_images:,}",
                    ", ".join(str(each.seed) for each in found),
                    _percent(None if chose is None else chose.val_accuracy),
                    f"{fmean(each.seconds for each in found):.0f}",
                )
            )  # fmt: skip
    told = paragraph(
        "What the runs above were made with. “validation” is the accuracy in percent for which the search "
        "chose these values, on images that were not learned from."
    )
    return Section("values", "Chosen values", markup(told, table("Chosen values", header, lines, names=2)))


def against_lengths(study: StudyFolder) -> Section | None:
    """Accuracy against the number of prompts."""
    charts = _against(study, "prompts per block", lambda row: row.num_prompts)
    told = paragraph("Accuracy in percent; of test images where runs with several lengths were tested.")
    return Section("lengths", "Prompt length", markup(told, charts)) if charts else None


def against_shares(study: StudyFolder) -> Section | None:
    """Accuracy against the share or number of images, and against any other number that varied."""
    names = _distinct(name for row in study.rows for name in _options(row))
    parts = [
        _against(study, name, lambda row, name=name: _options(row).get(name, _DEFAULTS.get(name)))
        for name in names
    ]
    parts.append(_against(study, "training images", lambda row: row.train_images))
    parts = [part for part in parts if part]
    told = paragraph(
        "Accuracy in percent against the numbers that the study varied, such as the share of the images; of "
        "test images where such runs were tested."
    )
    return Section("shares", "Share of the data", markup(told, parts)) if parts else None


# Of options that only some arms state: what the others have.
_DEFAULTS = {"share": 1.0}


@dataclass(frozen=True)
class _Measured:
    """Accuracies by x and seed, of one family of runs in one task."""

    values: Mapping[float, Mapping[int, float]]

    def line(self, name: str) -> Line | None:
        """Over the seeds that have all x; None where that is fewer than two points."""
        seeds = set.intersection(*(set(by_seed) for by_seed in self.values.values()))
        if len(self.values) < 2 or not seeds:
            return None
        x = sorted(self.values)
        rows = [[100 * self.values[each][seed] for each in x] for seed in sorted(seeds)]
        return Line(name, x, rows)


def _against(study: StudyFolder, label: str, x_of: Callable[[Row], float | None]) -> Html | None:
    """Charts, a task each, of what differs in nothing but x; final runs where there are any, else the search."""
    lines: dict[str, list[Line]] = {}
    for stage in ("final", "search"):
        lines = _families([row for row in study.rows if row.stage == stage], x_of)
        if lines:
            break
    if not lines:
        return None
    names = _distinct(line.name for found in lines.values() for line in found)
    looks = {name: place for place, name in enumerate(names)}
    wide = all(each > 0 for found in lines.values() for line in found for each in line.x)
    span = max(max(line.x) / max(min(line.x), 1e-9) for found in lines.values() for line in found)
    axis = Axis(label, logarithmic=wide and span >= 8)
    what = "test" if stage == "final" else "validation"
    accuracy = Axis(f"{what} accuracy (%)", limits=PERCENT)
    charts = [
        figure(
            [element("b", task), f" {what} accuracy (%)"],
            line_chart(found, looks, x=axis, y=accuracy, title=task),
        )
        for task, found in lines.items()
    ]
    return markup(element("h3", f"Against {label}"), legend(names, looks), grid(charts))


def _families(rows: Sequence[Row], x_of: Callable[[Row], float | None]) -> dict[str, list[Line]]:
    """{task: lines}: runs that are alike but for x and the rates; of several rates the best."""
    found: dict[tuple[str, str], dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    of_row = {row.run: x_of(row) for row in rows}
    for row in rows:
        accuracy = row.test_accuracy if row.stage == "final" else row.val_accuracy
        x = of_row[row.run]
        if accuracy is None or x is None:
            continue
        by_seed = found[row.task, _family(row, rows, of_row)][x]
        by_seed[row.seed] = max(accuracy, by_seed.get(row.seed, 0.0))
    lines: dict[str, list[Line]] = defaultdict(list)
    for (task, family), values in found.items():
        line = _Measured(values).line(family)
        if line is not None:
            lines[task].append(line)
    return dict(lines)


def _family(row: Row, rows: Sequence[Row], x_of: Mapping[str, float | None]) -> str:
    """What a run is beside its x: the arm, where that has several x itself, else what makes it."""
    own = {x_of[each.run] for each in rows if (each.task, each.arm) == (row.task, row.arm)}
    if len(own) > 1:
        return row.arm
    words = [row.method]
    if row.strategy not in ("", "kmeans"):
        words.append(row.strategy)
    if row.source not in ("", "own"):
        words.append(f"{row.source} block")
    return ", ".join([*words, *(["frozen"] if row.frozen_prompts else [])])


def _options(row: Row) -> dict[str, float]:
    """Those of its options that are numbers."""
    found = {}
    for pair in filter(None, row.options.split(";")):
        name, _, value = pair.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found


def study_rows(compared: Comparison) -> list[Row]:
    """The runs that are compared."""
    return [row for cells in compared.cells.values() for cell in cells.values() for row in cell.rows]


def _costs(rows: Sequence[Row]) -> Html:
    by_arm: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_arm[row.arm].append(row)
    header = ("arm", "method", "runs", "learned", "training", "building prototypes")
    lines = [
        (
            arm,
            ", ".join(_distinct(row.method for row in found)),
            str(len(found)),
            _range([row.learned for row in found]),
            _duration(sum(row.seconds for row in found)),
            _duration(sum(row.prototype_seconds or 0.0 for row in found)),
        )
        for arm, found in by_arm.items()
    ]
    told = paragraph(
        "Training without validation and tests. Prototypes that several runs share are counted once, in the arm "
        "that built them.",
        class_="quiet",
    )
    return markup(told, table("Cost by arm", header, lines, names=2))


def _runs(rows: Sequence[Row]) -> str:
    final = sum(row.stage == "final" for row in rows)
    return f"{len(rows)}: {len(rows) - final} to choose values, {final} final ones"


def _versions(sweep: Mapping[str, object]) -> list[tuple[str, str]]:
    versions = sweep.get("versions")
    if not isinstance(versions, Mapping):
        return []
    return [("Versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]


def _accuracy(cell: Cell | None) -> str:
    if cell is None or cell.mean is None:
        return NOTHING
    spread = "" if cell.spread is None else f" ± {100 * cell.spread:.2f}"
    return f"{100 * cell.mean:.2f}{spread}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.2f}"


def _optional(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _distinct(values: object) -> list[str]:
    return list(dict.fromkeys(values))  # type: ignore[call-overload, no-any-return]
