"""Compare every method on the shipped digits under one budget; each method's rate is chosen by validation.

    python examples/compare_methods.py runs.csv [--methods ssf lora ...] [--seeds 0 1 2]
    python examples/compare_methods.py runs.csv --table

A run tunes the shipped backbone on ten images of each digit for 30 epochs in batches of 20, as `spt-fast
demo` does, and appends a row: accuracy on the validation images and on the test images. Runs whose row is
there are left out, so that a stopped comparison goes on. Rates are tried with the first seed. The one that is
best by validation there is run with all seeds, and the table shows its test accuracy. Test images choose
nothing.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from torch import Tensor

import spt_fast
from spt_fast import Recipe, build_prototypes
from spt_fast.backbones.open import open_model
from spt_fast.data.shipped import few_per_class, load_digits
from spt_fast.methods.registry import METHODS
from spt_fast.training import build, evaluate, fit
from spt_fast.training.loop import shuffled_loader

RATES = (1e-3, 1e-2, 1e-1)
PER_CLASS, EPOCHS, BATCH, NUM_PROMPTS = 10, 30, 20, 20
CLASSES = tuple(str(digit) for digit in range(10))
Split = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    """One run; accuracies in [0, 1], `learned` without the head."""

    method: str
    lr: float
    seed: int
    learned: int
    seconds: float
    val_accuracy: float
    test_accuracy: float


def recipe_of(method: str, lr: float, seed: int) -> Recipe:
    """The budget, the same for every method but for the rate."""
    prompts = {"num_prompts": NUM_PROMPTS} if METHODS[method].prompts else {}
    options = {"epochs": EPOCHS, "batch_size": BATCH, "val_every": EPOCHS, "head_norm": "batch"}
    return Recipe(method=method, lr=lr, seed=seed, **prompts, **options)


def run(method: str, lr: float, seed: int) -> Row:
    """Tune one method with one rate on the images of one seed."""
    images, labels = load_digits("train")
    rows = few_per_class(labels, PER_CLASS, seed=seed)
    recipe = recipe_of(method, lr, seed)
    train = shuffled_loader(images[rows], labels[rows], batch_size=BATCH, seed=seed)
    val, test = (in_batches(load_digits(split)) for split in ("val", "test"))
    started = time.perf_counter()
    model = open_model("shipped", pool="avg-with-prompts" if recipe.has_prompts else "avg")
    prompts = None
    if recipe.needs_prototypes:
        depth, number = recipe.depth, recipe.num_prompts
        prompts = build_prototypes(model, train, num_prompts=number, depth=depth, seed=seed, progress=False)
    tuned = build(model, recipe, prompts, class_names=CLASSES)
    history = fit(tuned, train, val, recipe, progress=False)
    seconds = time.perf_counter() - started
    accuracy = history.val_accuracy[-1], evaluate(tuned, test)
    return Row(method, lr, seed, tuned.num_trainable(head=False), seconds, *accuracy)


def in_batches(split: Split) -> list[Split]:
    return list(zip(*(tensor.split(100) for tensor in split), strict=True))


def read_rows(path: Path) -> list[Row]:
    """The runs so far."""
    if not path.exists():
        return []
    kinds = (str, float, int, int, float, float, float)
    with path.open(newline="", encoding="utf-8") as file:
        cells = [[row[field.name] for field in fields(Row)] for row in csv.DictReader(file)]
    return [Row(*(kind(cell) for kind, cell in zip(kinds, row, strict=True))) for row in cells]


def append(path: Path, row: Row) -> None:
    """Add a row, after a header in a new file."""
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if file.tell() == 0:
            writer.writerow([field.name for field in fields(Row)])
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in astuple(row)])


def chosen_rate(rows: Sequence[Row], method: str, seed: int) -> float:
    """The rate that is best by validation, and of equals the smaller one, as in VPT's selection."""
    tried = [row for row in rows if (row.method, row.seed) == (method, seed)]
    return max(tried, key=lambda row: (row.val_accuracy, -row.lr)).lr


def compare(path: Path, methods: Sequence[str], seeds: Sequence[int]) -> None:
    """Do the runs that are missing: all rates with the first seed, and the chosen one with all."""
    for method in methods:
        wanted = [(rate, seeds[0]) for rate in RATES]
        do_missing(path, method, wanted)
        rate = chosen_rate(read_rows(path), method, seeds[0])
        do_missing(path, method, [(rate, seed) for seed in seeds])


def do_missing(path: Path, method: str, wanted: Sequence[tuple[float, int]]) -> None:
    done = {(row.method, row.lr, row.seed) for row in read_rows(path)}
    for lr, seed in wanted:
        if (method, lr, seed) not in done:
            row = run(method, lr, seed)
            append(path, row)
            print(f"{method:12s} lr {lr:g} seed {seed}: val {row.val_accuracy:.1%}", flush=True)


def table(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """Markdown: a row for each method, by its mean test accuracy over the seeds."""
    lines = ["| method | learned | lr | test accuracy, % | seconds |", "| --- | ---: | ---: | ---: | ---: |"]
    found = []
    for method in dict.fromkeys(row.method for row in rows):
        rate = chosen_rate(rows, method, seeds[0])
        runs = [row for row in rows if (row.method, row.lr) == (method, rate) and row.seed in seeds]
        accuracy = [100 * row.test_accuracy for row in runs]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else float("nan")
        seconds = statistics.median(row.seconds for row in runs)
        mean = statistics.fmean(accuracy)
        cells = f"{runs[0].learned:,} | {rate:g} | {mean:.1f} ± {spread:.1f} | {seconds:.1f}"
        found.append((mean, f"| `{method}` | {cells} |"))
    return "\n".join([*lines, *(line for _, line in sorted(found, reverse=True))])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, metavar="RUNS.csv")
    parser.add_argument("--methods", nargs="+", default=spt_fast.methods.names())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="print the table of the runs so far")
    args = parser.parse_args()
    if not args.table:
        compare(args.runs, args.methods, args.seeds)
    print(table(read_rows(args.runs), args.seeds))


if __name__ == "__main__":
    main()
