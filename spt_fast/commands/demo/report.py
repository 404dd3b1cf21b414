"""What came out of the demo: its table, its numbers and its figures."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spt_fast.commands.demo.budget import METHODS, Budget
from spt_fast.commands.demo.run import Run, is_frozen
from spt_fast.plots import MethodCurves, demo_figure, nmi_over_epochs
from spt_fast.support.results import png
from spt_fast.support.tables import csv_bytes, format_table

FIGURE_NAME = "spt_fast_demo.png"
NUMBERS_NAME = "spt_fast_demo.json"
NMI_FIGURE_NAME = "spt_fast_demo_nmi.png"
NMI_NAME = "spt_fast_demo_nmi.csv"
FILE_NAMES = (NUMBERS_NAME, NMI_NAME, FIGURE_NAME, NMI_FIGURE_NAME)


@dataclass
class DemoReport:
    """All runs of a demo, and what they were run on."""

    budget: Budget
    backbone: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    seconds: float = 0.0
    files: list[Path] = field(default_factory=list)

    def of(self, method: str) -> list[Run]:
        """The runs of one method, one per seed."""
        return [run for run in self.runs if run.method == method]

    @property
    def methods(self) -> list[str]:
        """The methods that have been run, in the order of the table."""
        return [method for method in METHODS if self.of(method)]

    def table(self) -> str:
        """One row per method; spread is the standard deviation over seeds, times are means over seeds."""
        header = (
            "method",
            "test accuracy %",
            "trainable",
            "prototypes s",
            "training s",
            "NMI at start",
            "prompt lr",
        )
        rows = [header, *(self._row(method) for method in self.methods)]
        return format_table(rows)

    def summary(self) -> str:
        """The table, what its columns mean, and where the files are."""
        seeds = len(self.budget.seeds)
        lines = [
            "",
            self.table(),
            "",
            self.comparison(),
            f"accuracy: mean ± standard deviation over {seeds} seeds; times: mean per seed",
            f"whole demo: {self.seconds:.0f} s on {torch.get_num_threads()} threads",
        ]
        return "\n".join([*lines, *(f"wrote {path}" for path in self.files)])

    def comparison(self) -> str:
        """SPT against VPT seed by seed: both had the same images, so this says more than two spreads."""
        tuned, frozen = self._gains("Deep"), self._gains("Deep, frozen")
        return f"SPT minus VPT, seed by seed, in points: tuned {tuned}; frozen {frozen}"

    def contents(self, names: Collection[str]) -> dict[str, bytes]:
        """The files by name: numbers always, figures (PNG) where they are among `names`."""
        contents = {NUMBERS_NAME: self.to_json().encode(), NMI_NAME: self.nmi_csv()}
        if FIGURE_NAME in names:
            budget = self.budget
            subtitle = (
                f"{budget.images_per_class} digits per class, {budget.epochs} epochs, "
                f"{budget.num_prompts} prompts per block; "
                f"ViT pretrained by masked autoencoding for {self.backbone['epochs']} epochs"
            )
            contents[FIGURE_NAME] = png(demo_figure(self.curves(), subtitle=subtitle))
            contents[NMI_FIGURE_NAME] = png(
                nmi_over_epochs(self.nmi_panels(), xlabel="epoch", title=subtitle)
            )
        return contents

    def curves(self) -> dict[str, MethodCurves]:
        """What the figure of accuracies draws."""
        return {method: _curves(self.of(method)) for method in self.methods}

    def nmi_csv(self) -> bytes:
        """NMI while tuning, in the columns run, seed, epoch, block, nmi."""
        rows = [
            (run.method, run.seed, epoch, block, f"{value:.6g}")
            for run in self.runs
            for epoch, values in enumerate(run.nmi_by_epoch or ())
            for block, value in enumerate(values, start=1)
        ]
        return csv_bytes(("run", "seed", "epoch", "block", "nmi"), rows)

    def nmi_panels(self) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """What the figure of NMI while tuning draws: all blocks together, then each by itself.

        Panel to method to (epochs [T + 1], NMI [seeds, T + 1, blocks of the panel]).
        """
        curves = {
            method: np.array([run.nmi_by_epoch for run in self.of(method)])
            for method in self.methods
            if self.of(method)[0].nmi_by_epoch is not None
        }
        panels = {"mean of the blocks": slice(None)} | {
            f"block {layer + 1}": slice(layer, layer + 1)
            for layer in range(self.backbone["architecture"]["depth"])
        }
        return {
            name: {
                method: (np.arange(values.shape[1]), values[:, :, blocks])
                for method, values in curves.items()
            }
            for name, blocks in panels.items()
        }

    def to_json(self) -> str:
        """All numbers, except NMI by epoch, which has a file of its own."""
        numbers = {
            "budget": asdict(self.budget),
            "backbone": self.backbone,
            "seconds": self.seconds,
            "machine": {
                "processor": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            "runs": [_without(asdict(run), "nmi_by_epoch") for run in self.runs],
        }
        return json.dumps(numbers, indent=1) + "\n"

    def _gains(self, variant: str) -> str:
        pairs = zip(self.of(f"SPT-{variant}"), self.of(f"VPT-{variant}"), strict=True)
        return ", ".join(f"{100 * (spt.test_accuracy - vpt.test_accuracy):+.1f}" for spt, vpt in pairs)

    def _row(self, method: str) -> tuple[str, ...]:
        runs = self.of(method)
        start = [statistics.fmean(run.nmi_start) for run in runs if run.nmi_start is not None]
        prototypes = statistics.fmean(run.prototype_seconds for run in runs)
        return (
            method,
            _mean_and_spread([100 * run.test_accuracy for run in runs]),
            f"{runs[0].trainable_parameters:,}",
            f"{prototypes:.2f}" if prototypes else "-",
            f"{statistics.fmean(run.train_seconds for run in runs):.1f}",
            f"{statistics.fmean(start):.2e}" if start else "-",
            f"{runs[0].rates.prompts or '-'}",
        )


def _curves(runs: Sequence[Run]) -> MethodCurves:
    def stacked(values: Sequence[list[float] | None]) -> np.ndarray | None:
        return None if values[0] is None else np.array(values, dtype=np.float64)

    return MethodCurves(
        epochs=runs[0].val_epochs,
        accuracy=np.array([run.val_accuracy for run in runs]),
        # Frozen prompts share their start with tuned ones, and have no end of their own.
        nmi_start=None if is_frozen(runs[0].method) else stacked([run.nmi_start for run in runs]),
        nmi_end=stacked([run.nmi_end for run in runs]),
    )


def _without(numbers: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if name != key}


def _mean_and_spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
