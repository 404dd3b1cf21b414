"""One training step of a prompted ViT-B/16: prompts as keys and values, as tokens, no prompts, linear probe.

`pytest benchmarks/bench_prompted_step.py --benchmark-only` times each side by itself. The ratios to quote are
those of `python -m benchmarks.bench_prompted_step`, which alternates the sides within one process, so that
whatever else the machine does meets all of them alike. A step is forward and backward, without the optimiser:
that is the same for both engines, and the plain model has none.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from spt_fast.prompted_vit import PromptedViT

MODEL, IMAGE_SIZE, NUM_CLASSES = "vit_base_patch16_224", 224, 200
BATCH = 4
PROMPT_COUNTS = (20, 100)

Step = Callable[[], None]


@functools.lru_cache(maxsize=1)
def _first_model() -> Any:
    torch.manual_seed(0)
    return timm.create_model(MODEL, num_classes=NUM_CLASSES).eval()


def make_model() -> Any:
    """A new model with the same weights each time; initialising them takes longer than several steps."""
    return copy.deepcopy(_first_model())


def step_of(run: Callable[[Tensor], Tensor], parameters: list[nn.Parameter], device: str) -> Step:
    """Forward and backward; gradients start at None each time, as after `zero_grad()`."""
    images = torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1)).to(
        device
    )

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.backward(run(images).square().mean())
        if device != "cpu":
            torch.cuda.synchronize()

    return step


def prompted_step(engine: Any, num_prompts: int, device: str = "cpu") -> Step:
    tuned = PromptedViT(make_model().to(device), num_prompts, num_classes=NUM_CLASSES, engine=engine).train()
    return step_of(tuned, tuned.trainable_parameters(), device)


def plain_step(device: str = "cpu") -> Step:
    """The model without prompts, with the same way back: a gradient for the tokens that enter block 1."""
    model = make_model().to(device).requires_grad_(False)
    head = model.get_classifier().requires_grad_(True)
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: inputs[0].requires_grad_())
    return step_of(model, list(head.parameters()), device)


def linear_probe_step(device: str = "cpu") -> Step:
    tuned = PromptedViT(make_model().to(device), 0, num_classes=NUM_CLASSES).train()
    return step_of(tuned, tuned.trainable_parameters(), device)


SIDES: dict[str, Callable[[int, str], Step]] = {
    "kv": lambda num_prompts, device: prompted_step("kv", num_prompts, device),
    "concat": lambda num_prompts, device: prompted_step("concat", num_prompts, device),
    "plain": lambda _, device: plain_step(device),
    "linear-probe": lambda _, device: linear_probe_step(device),
}


def check_engines_agree(num_prompts: int, device: str) -> None:
    """Nothing is timed before both engines give the same logits."""
    prompts = 0.1 * torch.randn(12, num_prompts, 768, generator=torch.Generator().manual_seed(2))
    images = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        kv, concat = (
            PromptedViT(make_model().to(device), prompts, engine=e)(images) for e in ("kv", "concat")
        )
    torch.testing.assert_close(kv, concat, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("num_prompts", PROMPT_COUNTS)
def test_prompted_step(benchmark: Any, side: str, num_prompts: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    benchmark.group = f"prompted step {MODEL} B{BATCH} P{num_prompts} {device}"
    benchmark.extra_info |= {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
    }
    benchmark.extra_info |= {
        "dtype": "float32",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    if side == "kv":
        check_engines_agree(num_prompts, device)
    benchmark.pedantic(SIDES[side](num_prompts, device), rounds=5, warmup_rounds=1)


def interleaved_medians(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds per step, one step of each side in turn; the first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11, help="counted steps of each side (default: 11)")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), metavar="SIDE")
    parser.add_argument("--prompts", nargs="+", type=int, default=list(PROMPT_COUNTS), metavar="N")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{MODEL}, batch {BATCH}, float32, {options.device}, {threads}")
    for num_prompts in options.prompts:
        check_engines_agree(num_prompts, options.device)
        steps = {name: SIDES[name](num_prompts, options.device) for name in options.sides}
        medians = interleaved_medians(steps, options.rounds)
        base = medians.get("kv", min(medians.values()))
        for name, median in medians.items():
            print(f"N_p={num_prompts:<4d} {name:13s} {1e3 * median:9.1f} ms   {median / base:6.3f} x kv")


if __name__ == "__main__":
    main()
