"""The whole demo: every method over every seed, and the files that it leaves."""

from __future__ import annotations

import time
from pathlib import Path

from spt_fast.commands.demo.budget import LEARNING_RATES, METHODS, Budget, Rates, Task
from spt_fast.commands.demo.report import FILE_NAMES, DemoReport
from spt_fast.commands.demo.run import run_method
from spt_fast.data.shipped import DIGITS_SPLITS, backbone_facts
from spt_fast.support.progress import progress_bar
from spt_fast.support.results import matplotlib_missing, result_folder, write_results


def introduction(budget: Budget) -> str:
    """What is about to be run, in a few lines."""
    facts = backbone_facts()
    shape = facts["architecture"]
    lines = [
        f"backbone  ViT, {shape['depth']} blocks of width {shape['embed_dim']}, frozen; pretrained by masked "
        f"autoencoding for {facts['epochs']} epochs (loss {facts['loss']:.3f})",
        f"task      handwritten digits, {budget.images_per_class} training images per class, "
        f"{_rows('val')} for validation, {_rows('test')} to test",
        f"budget    {budget.epochs} epochs, {budget.num_prompts} prompts per block, "
        f"{len(budget.seeds)} seeds",
    ]
    missing = matplotlib_missing()
    return "\n".join(lines if missing is None else [*lines, f"figure    {missing}"])


def run_demo(
    out: str | Path = ".",
    *,
    overwrite: bool = False,
    budget: Budget | None = None,
    task: Task | None = None,
    learning_rates: dict[str, Rates] | None = None,
    progress: bool = True,
) -> DemoReport:
    """Run every method over every seed; write figures and numbers into the folder `out`, made if need be.

    Without matplotlib the figures are left out.

    Raises:
        FileExistsError: one of the files is there already, and not `overwrite`; before any work.
        NotADirectoryError: `out` is a file; before any work.
    """
    with result_folder(out, FILE_NAMES, overwrite=overwrite) as paths:
        report = _run_all(budget or Budget(), task, learning_rates, progress)
        report.files += write_results(paths, report.contents(paths), overwrite=overwrite)
    return report


def _run_all(
    budget: Budget, task: Task | None, learning_rates: dict[str, Rates] | None, progress: bool
) -> DemoReport:
    rates = LEARNING_RATES | (learning_rates or {})
    started = time.perf_counter()
    report = DemoReport(budget, backbone_facts())
    task = task or Task.load()
    epochs = len(budget.seeds) * len(METHODS) * budget.epochs
    bar = progress_bar(show=progress, total=epochs, unit="epoch")
    with bar:
        for seed in budget.seeds:
            for method in METHODS:
                bar.set_description(f"seed {seed}, {method}")
                run = run_method(
                    method, task, budget, rates[method], seed=seed, on_epoch=lambda *_: bar.update()
                )
                report.runs.append(run)
    report.seconds = time.perf_counter() - started
    return report


def _rows(split: str) -> int:
    first, last = DIGITS_SPLITS[split]
    return last - first
