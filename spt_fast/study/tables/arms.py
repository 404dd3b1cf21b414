"""The final runs of studies, by backbone and arm: what a table compares."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from spt_fast.study.names import arm_names
from spt_fast.study.runs import Row, read_runs, runs_path
from spt_fast.study.statistics import mean
from spt_fast.study.tables.columns import one_name
from spt_fast.support.arguments import check_choice

Backbone = Literal["mae", "moco", "supervised"]
BACKBONES: tuple[Backbone, ...] = get_args(Backbone)
BACKBONE_TITLES: Mapping[str, str] = {
    "mae": "ViT-B, MAE, ImageNet-1K",
    "moco": "ViT-B, MoCo-v3, ImageNet-1K",
    "supervised": "ViT-B, supervised, ImageNet-21K",
}
# A ViT-B/16 without a head; other image sizes and class tokens change it by less than a hundredth.
_VIT_B = 85_798_656
_FACTS = ("method", "strategy", "source", "frozen_prompts")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """The final runs of an arm under one backbone.

    Attributes:
        name: of the arm, with what is compared and not the same in all runs, such as the number of prompts.
        backbone: as the runs name it.
        published_as: the published backbone that it is, or None.
        method, strategy, source, frozen_prompts: as in a run; the same in all of them.
        runs: {task: {seed: run}}, tasks by one name each.
    """

    name: str
    backbone: str
    published_as: Backbone | None
    method: str
    strategy: str
    source: str
    frozen_prompts: bool
    runs: Mapping[str, Mapping[int, Row]]

    def rows(self, tasks: Iterable[str] | None = None) -> list[Row]:
        """Its runs, of some tasks or of all."""
        wanted = self.runs if tasks is None else [task for task in tasks if task in self.runs]
        return [row for task in wanted for row in self.runs[task].values()]

    def accuracies(self) -> dict[str, dict[int, float]]:
        """{task: {seed: test accuracy in per cent}}."""
        return {
            task: {seed: _per_cent(row) for seed, row in seeds.items()} for task, seeds in self.runs.items()
        }

    def means(self, tasks: Sequence[str]) -> list[float]:
        """Accuracy in per cent, a value for each seed that all the tasks have: the mean over them."""
        found = [self.accuracies()[task] for task in tasks]
        if not found:
            return []
        seeds = [seed for seed in found[0] if all(seed in each for each in found)]
        return [mean([each[seed] for each in found]) for seed in seeds]


def _per_cent(row: Row) -> float:
    assert row.test_accuracy is not None
    return 100 * row.test_accuracy


def read_studies(runs: Sequence[str | os.PathLike[str]]) -> list[Row]:
    """The rows of several studies, in their order.

    Args:
        runs: folders of studies, or their runs.csv.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is not whole (`read_runs`), or given twice.
    """
    paths = [runs_path(each) for each in runs]
    for number, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:number]]:
            raise ValueError(f"runs must be different studies, got {path} twice")
    return [row for path in paths for row in read_runs(path)]


def arms_of(rows: Sequence[Row], backbone: str | None = None) -> list[Arm]:
    """The arms of final runs that have a test accuracy, in the order of the rows.

    Args:
        rows: of one study or several.
        backbone: which published backbone that of the runs is; None goes by `published_backbone`.

    Raises:
        ValueError: no run has a test accuracy, an arm has several runs of a task and a seed, or differs in
            what it is; or `backbone` is none of BACKBONES, or given for runs of several backbones.
    """
    finals = [row for row in rows if row.stage == "final" and row.test_accuracy is not None]
    if not finals:
        raise ValueError(_nothing_to_show(rows))
    names = list(dict.fromkeys(row.backbone for row in finals))
    if backbone is not None:
        check_choice("backbone", backbone, BACKBONES)
        if len(names) > 1:
            raise ValueError(
                f"backbone must be left out of runs of several backbones, which are {', '.join(names)}, "
                f"got {backbone!r}"
            )
    titles = arm_names(finals)
    by_arm: dict[tuple[str, str], list[Row]] = {}
    for row in finals:
        by_arm.setdefault((row.backbone, titles[row.run]), []).append(row)
    return [_arm(title, rows, backbone) for (_, title), rows in by_arm.items()]


def _nothing_to_show(rows: Sequence[Row]) -> str:
    needed = "runs must hold final runs with a test accuracy"
    if not rows:
        return f"{needed}, got no runs at all"
    arms = ", ".join(dict.fromkeys(row.arm for row in rows))
    stages = [row.stage for row in rows]
    counts = " and ".join(
        f"{stages.count(stage)} of stage {stage!r}" for stage in ("search", "final") if stage in stages
    )
    return (
        f"{needed}, got {counts} without one (arms {arms}); a search chooses values on validation images, "
        "the sweep's final runs test them"
    )


def _arm(name: str, rows: Sequence[Row], backbone: str | None) -> Arm:
    first = rows[0]
    for row in rows:
        for fact in _FACTS:
            if getattr(row, fact) != getattr(first, fact):
                raise ValueError(
                    f"runs of arm {name} differ in {fact}: {getattr(first, fact)!r} ({first.run}) and "
                    f"{getattr(row, fact)!r} ({row.run}); arms of several studies need names of their own"
                )
    runs: dict[str, dict[int, Row]] = {}
    for row in rows:
        seeds = runs.setdefault(one_name(row.task), {})
        if row.seed in seeds:
            raise ValueError(
                f"runs of arm {name} have {row.task}, seed {row.seed} twice ({seeds[row.seed].run} and "
                f"{row.run}); arms of several studies need names of their own"
            )
        seeds[row.seed] = row
    return Arm(
        name=name,
        backbone=first.backbone,
        published_as=_check(backbone) or published_backbone(first.backbone, first.backbone_parameters),
        runs=runs,
        **{fact: getattr(first, fact) for fact in _FACTS},
    )


def _check(backbone: str | None) -> Backbone | None:
    return next((each for each in BACKBONES if each == backbone), None)


def published_backbone(name: str, parameters: int) -> Backbone | None:
    """Which published backbone a model is, by its name; None where it is none of them.

    Models with about the parameters of a ViT-B/16, whose name contains, whatever the case: "moco" for
    "moco"; "mae" as a word of its own for "mae"; "in21k" for "supervised"; and not "ft", for what was
    fine-tuned afterwards.
    """
    words = "".join(letter if letter.isalnum() else " " for letter in name.lower()).split()
    if abs(parameters / _VIT_B - 1) > 0.01 or "ft" in words:
        return None
    if any("moco" in word for word in words):
        return "moco"
    if "mae" in words:
        return "mae"
    return "supervised" if "in21k" in words else None
