"""`sigmoid_nmi` against eq. 7 and 8 in eager PyTorch and under torch.compile; what NMITracker costs a step.

`pytest benchmarks/bench_nmi.py --benchmark-only` times each side by itself, at one size without a GPU and at
all sizes with one. The ratios to quote are those of `python -m benchmarks.bench_nmi` (`--full` for all sizes)
and `python -m benchmarks.bench_nmi --tracker`, which alternate the sides within one process.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from benchmarks.timing import Rotating, alternate, finished, medians
from spt_fast import NMITracker, PromptedViT, sigmoid_nmi

# N_p, N_e, D, B
ALL_SIZES = list(itertools.product((20, 100), (196, 576), (768, 1024), (32, 256)))
SMALL_SIZES = [(20, 196, 768, 8), (20, 196, 768, 32), (100, 196, 768, 32), (100, 576, 1024, 32)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL, BATCH, NUM_PROMPTS = "vit_base_patch16_224", 8, 20

Side = Callable[[Tensor, Tensor], Tensor]


def eager_nmi(prompts: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 7 and 8 as one would write them."""
    s = torch.sigmoid(prompts @ tokens.mT)
    pi = s / s.sum(dim=(1, 2), keepdim=True)
    r, c = pi.sum(dim=2, keepdim=True), pi.sum(dim=1, keepdim=True)
    information = (pi * torch.log(pi / (r * c))).sum(dim=(1, 2))
    entropies = -(r * torch.log(r)).sum(dim=(1, 2)) - (c * torch.log(c)).sum(dim=(1, 2))
    return 2 * information / entropies


@functools.cache
def compiled_nmi() -> Side:
    return torch.compile(eager_nmi)


SIDES: dict[str, Callable[[], Side]] = {
    "ours": lambda: sigmoid_nmi,
    "eager": lambda: eager_nmi,
    "compiled": compiled_nmi,
}


def make_inputs(num_prompts: int, num_tokens: int, width: int, batch: int) -> tuple[Tensor, Tensor]:
    """Prompts, and tokens behind a class token as in a ViT; scores of about 1 in size."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(num_prompts, width, generator=generator) / width**0.5
    tokens = torch.randn(batch, 1 + num_tokens, width, generator=generator)
    return prompts.to(DEVICE), tokens.to(DEVICE)[:, 1:]


def run(side: Side, rotating: Rotating) -> None:
    with torch.no_grad():
        side(*rotating())


def check(prompts: Tensor, tokens: Tensor) -> None:
    """Nothing is timed before it gives the right value."""
    expected = eager_nmi(prompts.double(), tokens[:2].double())
    torch.testing.assert_close(sigmoid_nmi(prompts, tokens)[:2].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", ALL_SIZES if DEVICE == "cuda" else SMALL_SIZES[:1], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_nmi(benchmark: Any, side: str, size: tuple[int, int, int, int]) -> None:
    benchmark.group = f"sigmoid_nmi N_p, N_e, D, B = {size} {DEVICE}"
    benchmark.extra_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    inputs = make_inputs(*size)
    if side == "ours":
        check(*inputs)
    step = functools.partial(run, SIDES[side](), Rotating(inputs))
    benchmark.pedantic(finished(step, DEVICE), rounds=5, warmup_rounds=2)


def peak_memory(side: Side, prompts: Tensor, tokens: Tensor) -> str:
    """MiB that one call allocates at most beyond its inputs; "-" on the CPU, which does not count it."""
    if DEVICE != "cuda":
        return "-"
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        side(prompts, tokens)
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"


def compare(sizes: list[tuple[int, int, int, int]], rounds: int) -> None:
    print("  N_p   N_e     D     B  side          ms   of ours  peak MiB")
    for size in sizes:
        inputs = make_inputs(*size)
        check(*inputs)
        sides = {name: make() for name, make in SIDES.items()}
        rotating = Rotating(inputs)
        steps = {name: functools.partial(run, side, rotating) for name, side in sides.items()}
        timed = medians(alternate(steps, rounds, device=DEVICE, warmup=2, launched_ahead=True))
        for name, median in timed.items():
            numbers = "".join(f"{value:6d}" for value in size)
            memory = peak_memory(sides[name], *inputs)
            ratio = median / timed["ours"]
            print(f"{numbers[1:]}  {name:9s} {1e3 * median:7.2f}  {ratio:7.2f}x  {memory:>8s}", flush=True)


def training_step() -> tuple[Callable[[], None], PromptedViT]:
    """One step, and the model that it trains."""
    torch.manual_seed(0)
    tuned = PromptedViT(timm.create_model(MODEL), NUM_PROMPTS, num_classes=200).to(DEVICE).train()
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-3)
    images = torch.randn(BATCH, 3, 224, 224).to(DEVICE)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(tuned(images).square().mean())
        optimizer.step()

    return step, tuned


def track(rounds: int) -> None:
    """A training step (forward, backward, optimiser) of a ViT-B/16 with and without a tracker, in turn.

    Each has a model of its own: attaching and detaching a tracker is no part of a step, and waits for a GPU.
    """
    plain, (tracked, observed) = training_step()[0], training_step()
    with NMITracker(observed):
        timed = alternate({"plain": plain, "tracked": tracked}, rounds, device=DEVICE, warmup=2)
    pairs = zip(timed["plain"].device, timed["tracked"].device, strict=True)
    paired = statistics.median(tracked / plain for plain, tracked in pairs)
    print(f"training step of {MODEL}, batch {BATCH}, {NUM_PROMPTS} prompts in each of 12 blocks")
    for name, seconds in timed.items():
        host = "" if DEVICE == "cpu" else f", host {1e3 * seconds.host_median:.1f} ms"
        print(f"{name:8s} {1e3 * seconds.median:9.1f} ms{host}")
    print(f"overhead {100 * (timed['tracked'].median / timed['plain'].median - 1):8.2f} % of medians")
    print(f"overhead {100 * (paired - 1):8.2f} % median of ratios of neighbouring steps, {rounds} pairs")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tracker", action="store_true", help="time a training step with and without tracker"
    )
    parser.add_argument("--full", action="store_true", help="all sizes, as on a GPU by default")
    parser.add_argument("--rounds", type=int, default=11, help="counted rounds (default: 11)")
    options = parser.parse_args()
    print(f"{DEVICE}, float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if options.tracker:
        track(options.rounds)
    else:
        compare(ALL_SIZES if options.full or DEVICE == "cuda" else SMALL_SIZES, options.rounds)


if __name__ == "__main__":
    main()
