"""Choose the learning rates of `spt-fast demo` on the validation split; prints Markdown tables.

    python examples/tune_demo.py [--head-lrs 0.003 0.01 ...] [--prompt-lrs 0.01 0.03 ...] [--seeds 100 101]

First the head's rate, for the methods that train the head alone; then the prompts' rate of VPT-Deep and
SPT-Deep, with the best head's rate of the linear probe. Code and budget are the demo's own. The seeds are
not the demo's, so the training images are other draws, and test images are never used.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace

from spt_fast.commands.demo.budget import Budget, Rates, Task
from spt_fast.commands.demo.run import run_method
from spt_fast.data.shipped import backbone_facts, load_digits

HEAD_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
PROMPT_RATES = (1e-2, 2e-2, 5e-2, 1e-1, 2e-1, 5e-1, 1.0, 2.0)
HEAD_METHODS = ("linear probe", "VPT-Deep, frozen", "SPT-Deep, frozen")
PROMPT_METHODS = ("VPT-Deep", "SPT-Deep")


def validation_task() -> Task:
    """The shipped digits with the validation images in place of the test images."""
    val = load_digits("val")
    return Task(load_digits("train"), val=val, test=val)


def sweep(method: str, rates: Sequence[Rates], task: Task, budget: Budget) -> list[list[float]]:
    """Final validation accuracies in percent: for each of `rates` one per seed."""
    accuracies = []
    for rate in rates:
        runs = [run_method(method, task, budget, rate, seed=seed) for seed in budget.seeds]
        accuracies.append([100 * run.val_accuracy[-1] for run in runs])
        print(f"{method}, {rate}: {cell(accuracies[-1])}", flush=True)
    return accuracies


def markdown(title: str, rates: Sequence[float], rows: dict[str, list[list[float]]]) -> str:
    """One row per method, one column per learning rate; the best of each row is bold."""
    header = f"| {title} | " + " | ".join(f"{rate:g}" for rate in rates) + " |"
    lines = [header, "| --- |" + " ---: |" * len(rates)]
    for method, accuracies in rows.items():
        best = best_index(accuracies)
        cells = [f"**{cell(values)}**" if i == best else cell(values) for i, values in enumerate(accuracies)]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def best_index(accuracies: list[list[float]]) -> int:
    means = [statistics.fmean(values) for values in accuracies]
    return means.index(max(means))


def cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-lrs", type=float, nargs="+", default=HEAD_RATES)
    parser.add_argument("--prompt-lrs", type=float, nargs="+", default=PROMPT_RATES)
    parser.add_argument("--seeds", type=int, nargs="+", default=(100, 101, 102))
    for name in ("images_per_class", "epochs", "batch_size", "num_prompts"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Budget, name))
    args = parser.parse_args()

    budget = replace(
        Budget().scaled(epochs=args.epochs),
        seeds=tuple(args.seeds),
        images_per_class=args.images_per_class,
        batch_size=args.batch_size,
        num_prompts=args.num_prompts,
        val_every=args.epochs,
    )
    facts, task = backbone_facts(), validation_task()
    print(f"backbone of {facts['epochs']} epochs, loss {facts['loss']:.4f}\n{budget}", flush=True)

    head_rates = [Rates(head) for head in args.head_lrs]
    heads = {method: sweep(method, head_rates, task, budget) for method in HEAD_METHODS}
    head = args.head_lrs[best_index(heads["linear probe"])]
    rates = [Rates(head, prompts) for prompts in args.prompt_lrs]
    prompted = {method: sweep(method, rates, task, budget) for method in PROMPT_METHODS}

    print("\n" + markdown("head's rate", args.head_lrs, heads))
    print("\n" + markdown(f"prompts' rate, head {head:g}", args.prompt_lrs, prompted))


if __name__ == "__main__":
    main()
