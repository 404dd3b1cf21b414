"""What tests of sweeps share: a small plan, and a workshop that trains nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spt_fast.study.runs import Row
from spt_fast.study.sweeps.plan import PlannedRun
from spt_fast.support.randomness import seed_of

PLAN: dict[str, Any] = {
    "model": "shipped",
    "data": ["digits", "vtab/cars"],
    "arms": {"spt-deep": {}, "linear": {}},
    "search": {"lr": [1e-3, 1e-2, 1e-1]},
    "seeds": [0, 1],
}


def row_of(planned: PlannedRun) -> Row:
    """A row whose accuracies are decided by the run's name; a rate above 1 diverges."""
    recipe = planned.recipe
    accuracy = seed_of(planned.name) % 1000 / 1000
    is_search = planned.stage == "search"
    lost = recipe.lr > 1
    return Row(
        run=planned.name,
        stage=planned.stage,
        backbone="tiny",
        task=planned.task.data,
        arm=planned.arm.name,
        method=planned.arm.method,
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        epochs=recipe.epochs,
        options=planned.options,
        compared=planned.compared,
        seed=recipe.seed,
        train_images=10,
        learned=1,
        trainable=2,
        backbone_parameters=3,
        loss=math.nan if lost else 1.0,
        val_accuracy=accuracy if is_search and not lost else None,
        test_accuracy=None if is_search or lost else accuracy,
        seconds=1.0,
        prototype_seconds=0.5 if planned.prototypes_name else None,
    )


class StubWorkshop:
    """Notes the runs it is asked for; `before` may raise in the place of one."""

    row_of = staticmethod(row_of)
    done: list[str]
    before: Callable[[PlannedRun], None]
    images = 100

    def __init__(self, *_: Any) -> None:
        pass

    def run(self, planned: PlannedRun) -> Row:
        type(self).before(planned)
        type(self).done.append(planned.name)
        return row_of(planned)

    def facts(self, task: Any, recipe: Any) -> dict[str, Any]:
        return {"train": {"images": type(self).images, "classes": 10, "fingerprint": f"of {task.name}"}}

    def check_subsets(self, runs: Any) -> None:
        pass

    def check_models(self, runs: Any) -> None:
        pass

    def description(self, task: Any, recipe: Any) -> tuple[str, ...]:
        return (f"training: {task.data}",)

    def backbone(self, recipe: Any) -> dict[str, str]:
        return {"architecture": "tiny", "width": "32"}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[StubWorkshop]:
    """The class of workshops that `sweep` makes in the test."""
    fresh = type("Fresh", (StubWorkshop,), {"done": [], "before": staticmethod(lambda planned: None)})
    monkeypatch.setattr("spt_fast.study.sweeps.sweep.Workshop", fresh)
    return fresh


@pytest.fixture
def plan() -> dict[str, Any]:
    """Two tasks, two arms, three rates, two seeds: 20 runs."""
    return dict(PLAN)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder that is not there yet."""
    return tmp_path / "study"
