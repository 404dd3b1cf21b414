"""Studies as a sweep leaves them, written by hand: rows, tables of runs, and weights of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spt_fast.study.runs import Row, write_runs
from spt_fast.support.tables import csv_bytes
from spt_fast.support.yaml_text import write_yaml

RowMaker = Callable[..., Row]


@pytest.fixture(scope="session")
def make_row() -> RowMaker:
    """A row with every value that a test does not care about."""

    def make(run: str = "run", **values: Any) -> Row:
        given = {
            "stage": "final", "backbone": "tiny", "task": "birds", "arm": "spt-deep", "method": "spt-deep",
            "strategy": "kmeans", "source": "own", "num_prompts": 4, "lr": 0.01, "weight_decay": 1e-4,
            "epochs": 3, "prompt_lr": 0.3, "seed": 0, "train_images": 100, "learned": 384, "trainable": 500,
            "backbone_parameters": 10_000, "loss": 0.5, "seconds": 12.0,
        }  # fmt: skip
        return Row(run=run, **{**given, **values})

    return make


@pytest.fixture
def study(tmp_path: Path, make_row: RowMaker) -> Path:
    """SPT and a linear probe on one task: three searched rates, two seeds, tables of each run."""
    folder = tmp_path / "study"
    folder.mkdir()
    rows = []
    for arm, best in (("spt-deep", 0.8), ("linear", 0.5)):
        own = {"arm": arm, "method": arm} | (
            {"num_prompts": None, "strategy": "", "source": "", "prompt_lr": None, "learned": 0}
            if arm == "linear"
            else {}
        )
        for lr, loss in ((0.001, 0.1), (0.01, 0.0), (0.1, 0.2)):
            accuracy = best - loss
            row = make_row(f"{arm}-{lr}", stage="search", lr=lr, val_accuracy=accuracy, **own)
            rows.append(row)
            write_run(folder, row, accuracy)
        for seed in (0, 1):
            row = make_row(f"{arm}-final-{seed}", seed=seed, test_accuracy=best - 0.02 * seed, **own)
            rows.append(row)
            write_run(folder, row, None)
    write_runs(folder / "runs.csv", rows)
    (folder / "sweep.yaml").write_text(
        write_yaml({"model": "tiny", "data": ["birds"], "seeds": [0, 1], "versions": {"torch": "2.9"}})
    )
    return folder


def write_run(folder: Path, row: Row, accuracy: float | None) -> None:
    """The tables of a run of three epochs and two classes, as `spt_fast.train` writes them."""
    path = folder / "runs" / row.run
    path.mkdir(parents=True)
    history = [(epoch, 1 / epoch, "" if accuracy is None else accuracy * epoch / 3) for epoch in (1, 2, 3)]
    (path / "train.csv").write_bytes(csv_bytes(("epoch", "loss", "val_accuracy"), history))
    (path / "run.yaml").write_text(write_yaml({"recipe": {"batch_size": 50, "drop_last": False}}))
    if row.stage == "search":
        return
    (path / "test-confusion.csv").write_bytes(
        csv_bytes(("class", "wren", "owl"), [("wren", 8, 2), ("owl", 1, 9)])
    )
    (path / "test-classes.csv").write_bytes(
        csv_bytes(("class", "images", "correct", "accuracy"), [("wren", 10, 8, 0.8), ("owl", 10, 9, 0.9)])
    )
    if row.num_prompts is not None:
        nmi = [(step, block, 0.1 * block) for step in (2, 4, 6) for block in (1, 2, 3)]
        (path / "nmi.csv").write_bytes(csv_bytes(("step", "block", "nmi"), nmi))
