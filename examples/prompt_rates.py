"""Measure which learning rate prompts need, on tasks with validation images; appends to a CSV file.

    python examples/prompt_rates.py rates.csv --data vtab/flowers17 digits --root data [--num-prompts 20 5]
    python examples/prompt_rates.py rates.csv --table

Each run tunes k-means prototypes (SPT-Deep) or random prompts (VPT-Deep) on the shipped backbone with `fit`
and writes a row: accuracy on the validation images, and the root mean square of the prompts at the start.
Runs whose row is there are left out, so that a stopped study goes on, and two processes with other tasks may
share the file. VTAB's tasks are trained on `train800` and validated on `val200`; no test image is read.

`--table` prints mean accuracies by two rules: one rate for all prompts, and a rate in proportion to `lr` and
the prompts' root mean square. For the second it takes the run whose rate is nearest, and within 15 %.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from spt_fast import PromptedViT, build_prototypes
from spt_fast.backbones.open import open_model
from spt_fast.data.images import open_labelled_images
from spt_fast.data.names import kind_of
from spt_fast.training.loop import fit, shuffled_loader

LR = 1e-2
# The rates that tell most come first.
RATES = {"SPT": (0.1, 1.0, 0.3, 0.03, 3.0, 0.01), "VPT": (0.1, 1.0, 0.03, 0.3, 0.01, 3.0)}
FACTORS = (10.0, 30.0, 100.0, 300.0)


@dataclass(frozen=True)
class Row:
    """One run; `rms` is the root mean square of its prompts at the start, `val_accuracy` in [0, 1]."""

    task: str
    start: str
    num_prompts: int
    seed: int
    epochs: int
    batch_size: int
    prompt_lr: float
    rms: float
    loss: float
    val_accuracy: float

    @property
    def key(self) -> tuple[object, ...]:
        """What was asked for."""
        return astuple(self)[: COLUMNS.index("rms")]


COLUMNS = tuple(field.name for field in fields(Row))


def read_rows(path: Path) -> list[Row]:
    """The runs so far."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(
                row["task"],
                row["start"],
                *(int(row[name]) for name in ("num_prompts", "seed", "epochs", "batch_size")),
                *(float(row[name]) for name in ("prompt_lr", "rms", "loss", "val_accuracy")),
            )
            for row in csv.DictReader(file)
        ]


def append(path: Path, row: Row) -> None:
    """Add a row, after a header in a new file."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow(COLUMNS)
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in astuple(row)])


@cache
def images_and_labels(task: str, root: Path | None, *, training: bool) -> tuple[Tensor, Tensor, int]:
    """Images [M, C, H, W], labels [M], number of classes; nothing augments the digits or tasks of VTAB."""
    if kind_of(task) == "digits":
        root, split = None, "train" if training else "val"
    else:
        split = "train800" if training else "val200"
    data = open_labelled_images(
        task, open_model("shipped"), root=root, split=split, workers=0, training=training
    )
    images, labels = zip(*data.loader, strict=True)
    return torch.cat(images), torch.cat(labels), len(data.class_names)


@cache
def prototypes(task: str, root: Path | None, num_prompts: int, seed: int) -> Tensor:
    """K-means prompts [L, N_p, D] of the training images."""
    images, _, _ = images_and_labels(task, root, training=True)
    loader = [(batch,) for batch in images.split(100)]
    return build_prototypes(
        open_model("shipped"), loader, num_prompts=num_prompts, seed=seed, progress=False
    ).prompts


def run(
    root: Path | None,
    task: str,
    start: str,
    num_prompts: int,
    seed: int,
    epochs: int,
    batch_size: int,
    rate: float,
) -> Row:
    """Tune one start on one task with one rate for the prompts."""
    train_images, train_labels, classes = images_and_labels(task, root, training=True)
    val_images, val_labels, _ = images_and_labels(task, root, training=False)
    prompts = prototypes(task, root, num_prompts, seed) if start == "SPT" else num_prompts
    torch.manual_seed(seed)
    tuned = PromptedViT(open_model("shipped"), prompts, num_classes=classes)
    rms = tuned.prompts.detach().square().mean().sqrt().item()
    history = fit(
        tuned,
        shuffled_loader(train_images, train_labels, batch_size=batch_size, seed=seed),
        DataLoader(TensorDataset(val_images, val_labels), batch_size=100),
        epochs=epochs,
        lr=LR,
        prompt_lr=rate,
        seed=seed,
        val_every=epochs,
        progress=False,
    )
    found = rms, history.loss[-1], history.val_accuracy[-1]
    return Row(task, start, num_prompts, seed, epochs, batch_size, rate, *found)


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, str, int, int, int, int, float]]:
    """The runs in their order: a stopped study has all tasks for the rates it came to."""
    for num_prompts in args.num_prompts:
        for seed in args.seeds:
            for turn in range(len(args.rates or RATES["SPT"])):
                for task in args.data:
                    for start, rates in RATES.items():
                        rate = (args.rates or rates)[turn]
                        yield task, start, num_prompts, seed, args.epochs, args.batch_size, rate


def curves(rows: list[Row]) -> dict[tuple[object, ...], list[Row]]:
    """The runs that differ in the rate alone, in its order."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.prompt_lr):
        found.setdefault(row.key[:-1], []).append(row)
    return found


def accuracy_at(curve: list[Row], rate: float) -> float:
    """In percent, at the measured rate that is nearest; NaN where none is within 15 %."""
    distances = np.abs(np.log([row.prompt_lr / rate for row in curve]))
    nearest = int(distances.argmin())
    return 100 * curve[nearest].val_accuracy if distances[nearest] <= np.log(1.15) else float("nan")


def table(rows: list[Row]) -> str:
    """Markdown: both rules by mean accuracy, points below the best measured rate of each curve, and rank."""
    found = curves(rows)
    rules = {f"rate {rate:g}": rate for rate in sorted(RATES["SPT"])}
    rules |= {f"{factor:g} lr rms": factor for factor in FACTORS}
    accuracy = np.array(
        [
            [
                accuracy_at(curve, LR * value * curve[0].rms if name.endswith("rms") else value)
                for name, value in rules.items()
            ]
            for curve in found.values()
        ]
    )
    whole = ~np.isnan(accuracy).any(axis=0)
    below = np.array([max(100 * row.val_accuracy for row in curve) for curve in found.values()])
    lines = [
        "| prompts' rate | " + " | ".join(RATES) + " | both | below the best | most below | rank |",
        "| --- |" + " ---: |" * (len(RATES) + 4),
    ]
    for index in np.flatnonzero(whole):
        column, others = accuracy[:, [index]], accuracy[:, whole]
        ranks = 0.5 + (others > column).sum(axis=1) + 0.5 * (others == column).sum(axis=1)
        missing = below - column[:, 0]
        means = [statistics.fmean(column[[key[1] == start for key in found], 0]) for start in RATES]
        cells = [*(f"{mean:.1f}" for mean in (*means, column.mean()))]
        cells += [f"{missing.mean():.1f} ± {missing.std(ddof=1):.1f}", f"{missing.max():.1f}"]
        lines.append(f"| {list(rules)[index]} | " + " | ".join([*cells, f"{ranks.mean():.1f}"]) + " |")
    left_out = [name for name, there in zip(rules, whole, strict=True) if not there]
    return "\n".join([*lines, "", f"{len(found)} curves; not measured on all: {', '.join(left_out) or '-'}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--data", nargs="+", default=[], help="vtab/TASK or digits")
    parser.add_argument("--root", type=Path, help="where the tasks of VTAB lie")
    parser.add_argument("--num-prompts", type=int, nargs="+", default=[20])
    parser.add_argument("--rates", type=float, nargs="+", help="of the prompts (default: six)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--table", action="store_true", help="print what the file holds, and train nothing")
    args = parser.parse_args()
    if args.table:
        print(table(read_rows(args.csv)))
        return
    done = {row.key for row in read_rows(args.csv)}
    for key in wanted(args):
        if key not in done:
            row = run(args.root, *key)
            append(args.csv, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
