"""Every method by its name: time of a training step, memory it keeps, and time of inference, merged or not.

`python -m benchmarks.bench_methods` alternates all methods within one process, so that other work of the
machine slows all of them alike, and prints a table with ratios to full fine-tuning and to the linear probe.
A step is forward, backward and AdamW on one batch in memory; memory is what autograd keeps for the backward
pass and what the optimiser keeps. `pytest benchmarks/bench_methods.py --benchmark-only` times a step of each
method for ViT-S by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

import spt_fast
from benchmarks.timing import alternate, finished, medians
from spt_fast.methods.registry import METHODS

MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
CLASSES, NUM_PROMPTS = 100, 20
Run = Callable[[], object]


def make(name: str, model_name: str, device: str) -> Any:
    """A random backbone tuned by a method, with 20 prompts where it has any."""
    torch.manual_seed(0)
    model: Any = timm.create_model(model_name, num_classes=0).to(device)
    start: dict[str, Any] = {}
    method = METHODS[name]
    if method.prompts == "prototypes":
        layers = len(model.blocks) if method.depth == "deep" else 1
        start["prompts"] = torch.randn(layers, NUM_PROMPTS, model.embed_dim, device=device)
    elif method.prompts is not None:
        start["prompts"] = NUM_PROMPTS
    return spt_fast.tune(model, name, num_classes=CLASSES, **start)


def batch_of(size: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 224, 224, generator=generator).to(device)
    return images, (torch.arange(size) % CLASSES).to(device)


def step_of(tuned: Any, batch: tuple[Tensor, Tensor]) -> Run:
    optimizer = torch.optim.AdamW(tuned.parameter_groups(1e-3))
    images, labels = batch

    def step() -> None:
        loss = F.cross_entropy(tuned(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    tuned.train()
    return step


def inference_of(model: Any, images: Tensor) -> Run:
    model.eval()

    def run() -> None:
        with torch.inference_mode():
            model(images)

    return run


def kept_bytes(tuned: Any, batch: tuple[Tensor, Tensor]) -> int:
    """What autograd keeps for one backward pass, beside weights, and the two moments of AdamW."""
    weights = {each.untyped_storage().data_ptr() for each in (*tuned.parameters(), *tuned.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        F.cross_entropy(tuned.train()(batch[0]), batch[1]).backward()
    tuned.zero_grad(set_to_none=True)
    return sum(kept.values()) + 2 * 4 * int(tuned.num_trainable())


@pytest.mark.parametrize("name", METHODS)
def test_step(benchmark: Any, name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    benchmark.group = f"a step of {MODELS[0]}, batch 4, {device}"
    step = step_of(make(name, MODELS[0], device), batch_of(4, device))
    benchmark.pedantic(finished(step, device), rounds=3, warmup_rounds=1)


def report(model_name: str, options: argparse.Namespace) -> None:
    device = options.device
    batch = batch_of(options.batch, device)
    tuned = {name: make(name, model_name, device) for name in METHODS}
    memory = {name: kept_bytes(each, batch) for name, each in tuned.items()}
    learned = {name: each.num_trainable(head=False) for name, each in tuned.items()}
    steps = medians(
        alternate({name: step_of(each, batch) for name, each in tuned.items()}, options.rounds, device=device)
    )
    runs = {name: inference_of(each, batch[0]) for name, each in tuned.items()}
    merged = {name: make(name, model_name, device).merge() for name, each in tuned.items() if each.merges}
    runs |= {f"{name}, merged": inference_of(model, batch[0]) for name, model in merged.items()}
    inference = medians(alternate(runs, options.rounds, device=device))
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}"
    print(f"{model_name}, batch {options.batch}, {device}, {threads}; median of {options.rounds}")
    print("| method | learned | step, ms | of full | of linear | kept, MiB | inference, ms | merged, ms |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, seconds in steps.items():
        cells = [f"{learned[name]:,}", f"{1e3 * seconds:.0f}"]
        cells += [f"{seconds / steps[other]:.2f}" for other in ("full", "linear")]
        cells += [f"{memory[name] / 2**20:.0f}", f"{1e3 * inference[name]:.0f}"]
        plain = inference.get(f"{name}, merged")
        cells.append("" if plain is None else f"{1e3 * plain:.0f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=64 if device == "cuda" else 4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default=device)
    options = parser.parse_args()
    for model_name in options.models:
        report(model_name, options)


if __name__ == "__main__":
    main()
