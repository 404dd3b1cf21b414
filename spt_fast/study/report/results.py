"""Sections of a report on what was run, what came out of it, with which values, and what it cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from spt_fast.data.listing import some_names
from spt_fast.study.names import common_values
from spt_fast.study.report.comparison import Cell, Comparison, chosen_rows
from spt_fast.study.report.html import Section, element, facts, folded, markup, note, paragraph, table
from spt_fast.study.report.input import StudyFolder
from spt_fast.study.runs import Row
from spt_fast.study.sweeps.record import without_root
from spt_fast.support.yaml_text import write_yaml

NOTHING = "–"
# Longer tables are folded.
_MOST_LINES = 40


def summary(study: StudyFolder, compared: Comparison) -> Section:
    """Model, tasks, arms, seeds, versions and what it cost."""
    rows = study.rows
    told = facts(
        {
            "Model": _listed(row.backbone for row in rows),
            "Its parameters": _listed((row.backbone_parameters for row in rows), ","),
            "Tasks": ", ".join(compared.tasks),
            "Arms": _listed(row.arm for row in rows),
            "Runs": _runs(rows),
            "Seeds": _listed(sorted(row.seed for row in rows)),
            "Epochs": _listed(sorted(row.epochs for row in rows)),
            **({"All runs have": ", ".join(common)} if (common := common_values(rows)) else {}),
            "Training": _duration(sum(row.seconds for row in rows)),
            "Building prototypes": _duration(sum(row.prototype_seconds or 0.0 for row in rows)),
            **_versions(study.sweep),
        }
    )
    parts = [told]
    if study.sweep:
        asked = write_yaml(without_root(study.sweep))
        parts.append(folded("sweep.yaml: all that was asked for", element("pre", asked)))
    return Section("summary", "What was run", markup(parts))


def results(compared: Comparison) -> Section:
    """Accuracy by arm and task."""
    tasks = compared.tasks
    several = len(tasks) > 1
    # Beside the names: of many tasks the last are out of sight.
    header = ["arm", "learned", *(["mean"] if several else []), *_short(tasks)]
    rows = [
        [
            arm,
            _range([row.learned for cell in cells.values() for row in cell.rows]),
            *([_percent(compared.mean(arm))] if several else []),
            *(_accuracy(cells.get(task)) for task in tasks),
        ]
        for arm, cells in compared.cells.items()
    ]
    test = compared.measure == "test"
    what = (
        "Accuracy on test images in percent, of the final runs"
        if test
        else "Accuracy on validation images in percent, of the run that each search chose"
    )
    parts = [
        paragraph(
            f"{what}: mean ± standard deviation over seeds. The best mean over tasks comes first. “learned” "
            "is the number of parameters that learn, without the head."
        )
    ]
    if not test:
        parts.append(
            note(
                "No run was tested, so this is the accuracy by which values were chosen, which the choice "
                "makes too high."
            )
        )
    elif lacking := [row.run for row in _compared_rows(compared) if row.test_accuracy is None]:
        parts.append(note(f"Without test accuracy, and left out: {some_names(lacking)}."))
    parts.append(table("Accuracy by arm and task", header, rows))
    return Section("results", "Results", markup(parts))


def chosen_values(compared: Comparison, rows: Sequence[Row]) -> Section:
    """The values with which each arm was run, and what chose them."""
    search = {(row.task, row.arm, row.num_prompts, row.options): row for row in chosen_rows(rows)}
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
            row = found[0]
            chose = search.get((task, row.arm, row.num_prompts, row.options))
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
    shown = table("Chosen values", header, lines, names=2)
    if len(lines) > _MOST_LINES:
        shown = folded(f"{len(lines)} configurations", shown)
    return Section("values", "Chosen values", markup(told, shown))


def costs(rows: Sequence[Row]) -> Section:
    """Time and parameters by arm."""
    by_arm: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_arm[row.arm].append(row)
    header = ("arm", "method", "runs", "learned", "training", "building prototypes")
    lines = [
        (
            arm,
            _listed(row.method for row in found),
            str(len(found)),
            _range([row.learned for row in found]),
            _duration(sum(row.seconds for row in found)),
            _duration(sum(row.prototype_seconds or 0.0 for row in found)),
        )
        for arm, found in by_arm.items()
    ]
    told = paragraph(
        "All runs of an arm together; training without validation and tests. Prototypes that several runs "
        "share are counted once, in the arm that built them."
    )
    return Section("cost", "Cost", markup(told, table("Cost by arm", header, lines, names=2)))


def _compared_rows(compared: Comparison) -> list[Row]:
    """The runs that are compared."""
    return [row for cells in compared.cells.values() for cell in cells.values() for row in cell.rows]


def _runs(rows: Sequence[Row]) -> str:
    final = sum(row.stage == "final" for row in rows)
    return f"{len(rows)}: {len(rows) - final} to choose values, {final} final ones"


def _versions(sweep: Mapping[str, object]) -> dict[str, str]:
    versions = sweep.get("versions")
    if not isinstance(versions, Mapping):
        return {}
    return {"Versions": ", ".join(f"{name} {version}" for name, version in versions.items())}


def _accuracy(cell: Cell | None) -> str:
    if cell is None or cell.mean is None:
        return NOTHING
    spread = "" if cell.spread is None else f" ± {100 * cell.spread:.2f}"
    return f"{100 * cell.mean:.2f}{spread}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.2f}"


def _short(tasks: Sequence[str]) -> list[str]:
    """Without the folder that all of them lie in, such as vtab/."""
    folders = {task.rpartition("/")[0] for task in tasks}
    return [task.rpartition("/")[2] for task in tasks] if len(folders) == 1 else list(tasks)


def _optional(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _listed(values: Iterable[object], form: str = "") -> str:
    """Each once, in the order in which they come."""
    return ", ".join(format(value, form) for value in dict.fromkeys(values))
