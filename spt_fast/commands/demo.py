"""The demo: SPT-Deep, VPT-Deep (tuned, and frozen) and a linear probe on a few shipped digits.

How task, budget and learning rates were chosen, and what to expect, is in docs/demo.md. All numbers are
measured by the run that prints them.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from spt_fast.analysis.nmi_tracker import NMITracker
from spt_fast.data.shipped import DIGITS_SPLITS, backbone_facts, few_per_class, load_backbone, load_digits
from spt_fast.plots import MethodCurves, demo_figure, matplotlib_missing, nmi_over_epochs
from spt_fast.prompting.prompted_vit import PromptedViT
from spt_fast.prototypes.build import build_prototypes
from spt_fast.support.randomness import seeded
from spt_fast.support.results import png, result_folder, result_paths, write_results
from spt_fast.support.tables import csv_bytes, format_table
from spt_fast.training.loop import evaluate, fit, shuffled_loader

if TYPE_CHECKING:
    from spt_fast.prototypes.result import Prototypes
    from spt_fast.training.loop import History

Split = tuple[Tensor, Tensor]  # images (or features) [M, ...] and labels [M]

NUM_CLASSES = 10
FIGURE_NAME = "spt_fast_demo.png"
NUMBERS_NAME = "spt_fast_demo.json"
NMI_FIGURE_NAME = "spt_fast_demo_nmi.png"
NMI_NAME = "spt_fast_demo_nmi.csv"
FILE_NAMES = (NUMBERS_NAME, NMI_NAME, FIGURE_NAME, NMI_FIGURE_NAME)

_EVALUATION_BATCH = 100


@dataclass(frozen=True)
class Rates:
    """Highest learning rates of the head and of the prompts (None: there are none)."""

    head: float
    prompts: float | None = None


# Chosen on the validation split by examples/tune_demo.py; the whole sweep is in docs/demo.md.
LEARNING_RATES = {
    "linear probe": Rates(head=1e-2),
    "VPT-Deep, frozen": Rates(head=1e-2),
    "SPT-Deep, frozen": Rates(head=1e-2),
    "VPT-Deep": Rates(head=1e-2, prompts=1.0),
    "SPT-Deep": Rates(head=1e-2, prompts=1.0),
}
METHODS = tuple(LEARNING_RATES)


@dataclass(frozen=True)
class Budget:
    """What each method gets: the same images, in the same order, for as many epochs."""

    images_per_class: int = 10
    epochs: int = 30
    warmup_epochs: float = 3
    batch_size: int = 20
    num_prompts: int = 20
    weight_decay: float = 1e-4
    val_every: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)

    def scaled(self, *, epochs: int | None = None, seeds: int | None = None) -> Budget:
        """Another number of epochs (warm-up keeps its share) or of seeds; None leaves it.

        Raises:
            ValueError: a number below 1.
        """
        for name, value in (("epochs", epochs), ("seeds", seeds)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value}")
        epochs = epochs or self.epochs
        return replace(
            self,
            epochs=epochs,
            warmup_epochs=self.warmup_epochs * epochs / self.epochs,
            seeds=self.seeds if seeds is None else tuple(range(seeds)),
        )


@dataclass(frozen=True)
class Task:
    """The shipped digits in memory; `val` and `test` may be cut short to save time in tests."""

    train: Split
    val: Split
    test: Split

    @classmethod
    def load(cls) -> Task:
        return cls(load_digits("train"), load_digits("val"), load_digits("test"))

    def few(self, per_class: int, seed: int) -> Split:
        """The training images of one seed."""
        images, labels = self.train
        rows = few_per_class(labels, per_class, seed=seed)
        return images[rows], labels[rows]


@dataclass(frozen=True)
class Run:
    """One method, one seed. Accuracies in [0, 1]; NMI per block, mean over the training images.

    `nmi_by_epoch` is NMI before tuning and after each epoch, recorded by `NMITracker` over the batch that is
    trained on next; after the last epoch it is `nmi_end`.
    """

    method: str
    seed: int
    rates: Rates
    trainable_parameters: int
    prototype_seconds: float
    train_seconds: float
    val_epochs: list[int]
    val_accuracy: list[float]
    test_accuracy: float
    nmi_start: list[float] | None = None
    nmi_end: list[float] | None = None
    nmi_by_epoch: list[list[float]] | None = None


@dataclass
class DemoReport:
    """All runs of a demo, and what they were run on."""

    budget: Budget
    backbone: dict[str, Any]
    runs: list[Run] = field(default_factory=list)
    seconds: float = 0.0
    files: list[Path] = field(default_factory=list)

    def of(self, method: str) -> list[Run]:
        return [run for run in self.runs if run.method == method]

    @property
    def methods(self) -> list[str]:
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

    def _gains(self, variant: str) -> str:
        pairs = zip(self.of(f"SPT-{variant}"), self.of(f"VPT-{variant}"), strict=True)
        return ", ".join(f"{100 * (spt.test_accuracy - vpt.test_accuracy):+.1f}" for spt, vpt in pairs)

    def curves(self) -> dict[str, MethodCurves]:
        """What the figure draws."""
        return {method: _curves(self.of(method)) for method in self.methods}

    def nmi_csv(self) -> bytes:
        """NMI while tuning, in the columns run, seed, step, layer, nmi; a step is an epoch."""
        rows = [
            (run.method, run.seed, epoch, layer, f"{value:.6g}")
            for run in self.runs
            for epoch, values in enumerate(run.nmi_by_epoch or ())
            for layer, value in enumerate(values, start=1)
        ]
        return csv_bytes(("run", "seed", "step", "layer", "nmi"), rows)

    def nmi_panels(self) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
        """What the figure of NMI while tuning draws: all blocks together, then each by itself."""
        curves = {
            method: np.array([run.nmi_by_epoch for run in self.of(method)])
            for method in self.methods
            if self.of(method)[0].nmi_by_epoch is not None
        }
        parts = {"mean of the blocks": slice(None)} | {
            f"block {layer + 1}": slice(layer, layer + 1)
            for layer in range(self.backbone["architecture"]["depth"])
        }
        return {
            name: {
                method: (np.arange(values.shape[1]), values[:, :, part]) for method, values in curves.items()
            }
            for name, part in parts.items()
        }

    def to_json(self) -> str:
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
            # NMI by epoch has a file of its own.
            "runs": [_without(asdict(run), "nmi_by_epoch") for run in self.runs],
        }
        return json.dumps(numbers, indent=1) + "\n"

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
        contents = {NUMBERS_NAME: report.to_json().encode(), NMI_NAME: report.nmi_csv()}
        if FIGURE_NAME in paths:
            contents |= _figures(report)
        report.files += write_results(paths, contents, overwrite=overwrite)
    return report


def _run_all(
    budget: Budget, task: Task | None, learning_rates: dict[str, Rates] | None, progress: bool
) -> DemoReport:
    """Every method over every seed."""
    rates = LEARNING_RATES | (learning_rates or {})
    started = time.perf_counter()
    report = DemoReport(budget, backbone_facts())
    task = task or Task.load()
    bar = tqdm(total=len(budget.seeds) * len(METHODS) * budget.epochs, unit="epoch", disable=not progress)
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


def output_paths(out: str | Path, *, overwrite: bool) -> dict[str, Path]:
    """Where each file will go, figures left out without matplotlib; raises as `run_demo` says."""
    return result_paths(out, FILE_NAMES, overwrite=overwrite)


def run_method(
    method: str,
    task: Task,
    budget: Budget,
    rates: Rates,
    *,
    seed: int,
    on_epoch: Callable[[int, History], None] | None = None,
) -> Run:
    """Tune one method on one seed's images, in one order, from one head: the same for every method.

    Raises:
        ValueError: an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    model = load_backbone()
    head = classifier(model.num_features, seed=seed)
    train = task.few(budget.images_per_class, seed)
    recipe = _Recipe(method, budget, rates, seed, on_epoch)
    if method == "linear probe":
        return _train_head(model, head, train, task, recipe)
    prompts, seconds = _initial_prompts(method, model, train, budget, seed)
    tuned = _prompted(model, prompts, None if _is_frozen(method) else head, seed)
    start = _nmi(tuned, train[0])
    if _is_frozen(method):
        run = _train_head(tuned, head, train, task, recipe)
    else:
        run = _tune(tuned, train, task, recipe)
    return replace(run, prototype_seconds=seconds, nmi_start=start)


def _is_frozen(method: str) -> bool:
    return method.endswith("frozen")


def _prompted(model: Any, prompts: Prototypes | int, head: nn.Module | None, seed: int) -> PromptedViT:
    """The model with prompts and `head`; without a head, it gives pooled features with frozen prompts."""
    if head is not None:
        # Kept as the model's own head, so that every method starts from the same one.
        model.head = head
    with seeded(seed):
        return PromptedViT(model, prompts, freeze_prompts=head is None)


def classifier(width: int, *, seed: int) -> nn.Sequential:
    """A batch norm without weights and a linear layer, as MAE's linear probe has it.

    The backbone's pooled features vary little around a large mean; unscaled, they would make every
    method's learning rate a matter of the head.
    """
    with seeded(seed):
        linear = nn.Linear(width, NUM_CLASSES)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False), linear)


@dataclass(frozen=True)
class _Recipe:
    """How to train, the same for every method but for the learning rates."""

    method: str
    budget: Budget
    rates: Rates
    seed: int
    on_epoch: Callable[[int, History], None] | None

    def fit(self, net: nn.Module, train: Split, val: Split) -> History:
        return fit(
            net,
            shuffled_loader(*train, batch_size=self.budget.batch_size, seed=self.seed),
            _in_order(val),
            epochs=self.budget.epochs,
            lr=self.rates.head,
            prompt_lr=self.rates.prompts,
            weight_decay=self.budget.weight_decay,
            warmup_epochs=self.budget.warmup_epochs,
            seed=self.seed,
            val_every=self.budget.val_every,
            progress=False,
            on_epoch=self.on_epoch,
        )

    def run(self, net: nn.Module, history: History, more_seconds: float, test_accuracy: float) -> Run:
        """What came out of `fit`, as the record of this method and seed."""
        return Run(
            method=self.method,
            seed=self.seed,
            rates=self.rates,
            trainable_parameters=_trainable(net),
            prototype_seconds=0.0,
            train_seconds=more_seconds + history.train_seconds,
            val_epochs=history.val_epochs,
            val_accuracy=history.val_accuracy,
            test_accuracy=test_accuracy,
        )


def _initial_prompts(
    method: str, model: nn.Module, train: Split, budget: Budget, seed: int
) -> tuple[Prototypes | int, float]:
    """Prompts to start from, and the seconds that it took to build them."""
    if method.startswith("VPT"):
        return budget.num_prompts, 0.0
    started = time.perf_counter()
    prototypes = build_prototypes(
        model, _in_order(train), num_prompts=budget.num_prompts, seed=seed, progress=False
    )
    return prototypes, time.perf_counter() - started


def _train_head(net: nn.Module, head: nn.Module, train: Split, task: Task, recipe: _Recipe) -> Run:
    """The head alone. What comes before it does not change, so each image passes through it once."""
    started = time.perf_counter()
    train_features = _features(net, train)
    feature_seconds = time.perf_counter() - started
    history = recipe.fit(head, train_features, _features(net, task.val))
    return recipe.run(head, history, feature_seconds, evaluate(head, _in_order(_features(net, task.test))))


def _tune(tuned: PromptedViT, train: Split, task: Task, recipe: _Recipe) -> Run:
    """Prompts and head, with NMI recorded on the way."""
    steps_per_epoch = math.ceil(len(train[0]) / recipe.budget.batch_size)
    with NMITracker(tuned, every=steps_per_epoch) as tracker:
        history = recipe.fit(tuned, train, task.val)
    run = recipe.run(tuned, history, 0.0, evaluate(tuned, _in_order(task.test)))
    end = _nmi(tuned, train[0])
    return replace(run, nmi_end=end, nmi_by_epoch=[*tracker.history().values.tolist(), end])


@torch.no_grad()
def _features(model: nn.Module, split: Split) -> Split:
    """Pooled features [M, D] instead of images."""
    images, labels = split
    model.eval()
    return torch.cat([model(part) for part in torch.split(images, _EVALUATION_BATCH)]), labels


def _in_order(split: Split) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*split), batch_size=_EVALUATION_BATCH)


def _trainable(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def _nmi(tuned: PromptedViT, images: Tensor) -> list[float]:
    per_image = torch.cat([tuned.layer_nmi(part) for part in torch.split(images, _EVALUATION_BATCH)], dim=1)
    means: list[float] = per_image.double().mean(dim=1).tolist()
    return means


def _rows(split: str) -> int:
    first, last = DIGITS_SPLITS[split]
    return last - first


def _curves(runs: Sequence[Run]) -> MethodCurves:
    def stacked(values: Sequence[list[float] | None]) -> np.ndarray | None:
        return None if values[0] is None else np.array(values, dtype=np.float64)

    return MethodCurves(
        epochs=runs[0].val_epochs,
        accuracy=np.array([run.val_accuracy for run in runs]),
        # Frozen prompts share their start with tuned ones, and have no end of their own.
        nmi_start=None if _is_frozen(runs[0].method) else stacked([run.nmi_start for run in runs]),
        nmi_end=stacked([run.nmi_end for run in runs]),
    )


def _figures(report: DemoReport) -> dict[str, bytes]:
    """The figures as PNG, by name."""
    budget = report.budget
    subtitle = (
        f"{budget.images_per_class} digits per class, {budget.epochs} epochs, "
        f"{budget.num_prompts} prompts per block; "
        f"ViT pretrained by masked autoencoding for {report.backbone['epochs']} epochs"
    )
    return {
        FIGURE_NAME: png(demo_figure(report.curves(), subtitle=subtitle)),
        NMI_FIGURE_NAME: png(nmi_over_epochs(report.nmi_panels(), title=subtitle)),
    }


def _without(numbers: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if name != key}


def _mean_and_spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
