"""`build_prototypes` against a bare `model(images)` loop over the same images, and its memory.

    python -m benchmarks.bench_build              # time: pass and final solve apart, ratios to the bare loop
    python -m benchmarks.bench_build --memory     # peak memory for n and 4 n images, the reservoir being full

Time: in one process and batch by batch, first the bare model and then the pass of `build_prototypes` gets
the same images, so that whatever else the machine does meets both alike. The bare model is a copy with the
same weights, in eval mode and without gradients. The pass includes its set-up; nothing is left out but the
final solve, which stands beside it. `pytest benchmarks/bench_build.py --benchmark-only` times both sides by
themselves, on few images.

Memory: each count runs in a process of its own; images are made when asked for. What is printed is the most
memory that the process ever held (VmHWM), so growth from n to 4 n is what more images cost.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks.timing import synchronise
from spt_fast import build_prototypes
from spt_fast.backbones.anatomy import num_prefix_tokens

MODEL = "vit_small_patch16_224"
NUM_PROMPTS = 20


@dataclass
class Interleaved:
    """A loader that runs the bare model on each batch first, and times it and whoever takes the batch."""

    bare: Callable[[Tensor], object]
    images: Tensor
    batch_size: int
    bare_seconds: list[float] = field(default_factory=list)
    pass_seconds: list[float] = field(default_factory=list)
    finished: float = 0.0

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in torch.split(self.images, self.batch_size):
            start = time.perf_counter()
            with torch.no_grad(), as_in_the_pass(batch.device):
                self.bare(batch)
            synchronise(batch.device)
            middle = time.perf_counter()
            yield batch
            synchronise(batch.device)
            self.finished = time.perf_counter()
            self.bare_seconds.append(middle - start)
            self.pass_seconds.append(self.finished - middle)


@dataclass(frozen=True)
class Round:
    """Seconds of one round."""

    bare: float
    passed: float
    solve: float


def as_in_the_pass(device: torch.device) -> Any:
    """The precision in which `build_prototypes` runs a model by default."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def time_round(model: nn.Module, bare: nn.Module, images: Tensor, batch_size: int, **options: Any) -> Round:
    """One bare loop and one `build_prototypes`, interleaved batch by batch."""
    loader = Interleaved(bare, images, batch_size)
    start = time.perf_counter()
    build_prototypes(model, loader, progress=False, **options)
    end = time.perf_counter()
    bare_seconds = sum(loader.bare_seconds)
    # Everything up to the last batch but the bare model's share: set-up is in.
    passed = loader.finished - start - bare_seconds
    return Round(bare_seconds, passed, end - loader.finished)


def make_sides(name: str, device: str) -> tuple[Any, Any]:
    """The model and a copy of it, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().to(device)
    return model, copy.deepcopy(model)


def make_images(model: Any, num_images: int, device: str, size: int | None = None) -> Tensor:
    """Random images of the model's size: the time does not depend on what they show."""
    size = size or model.patch_embed.img_size[0]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(num_images, 3, size, size, generator=generator).to(device)


def report_time(options: argparse.Namespace) -> None:
    """Print a table of medians over rounds."""
    model, bare = make_sides(options.model, options.device)
    images = make_images(model, options.images, options.device)
    time_round(model, bare, images[: options.batch_size], options.batch_size, num_prompts=1)
    how = {"num_prompts": options.num_prompts, "capacity": options.capacity}
    rounds = [time_round(model, bare, images, options.batch_size, **how) for _ in range(options.rounds)]

    def median(value: Callable[[Round], float]) -> float:
        return statistics.median(value(r) for r in rounds)

    print(
        f"{options.images} images, batches of {options.batch_size}, N_p={options.num_prompts}, deep, stream"
    )
    print(f"{'':20s}{'seconds':>10s}{'x bare loop':>14s}")
    rows: dict[str, Callable[[Round], float]] = {
        "bare model(images)": lambda r: r.bare,
        "pass": lambda r: r.passed,
        "final solve": lambda r: r.solve,
        "pass + solve": lambda r: r.passed + r.solve,
    }
    for label, value in rows.items():
        ratio = median(lambda r, value=value: value(r) / r.bare)  # type: ignore[misc]
        print(f"{label:20s}{median(value):10.3f}{ratio:14.3f}")


def report_memory(options: argparse.Namespace) -> None:
    """Print the peak memory of processes that see n and 4 n images."""
    tokens_per_image = (options.memory_image_size // 16) ** 2
    # Twice what fills the reservoir, so that it is full long before the end.
    few = -(-2 * options.memory_capacity // tokens_per_image)
    peaks = {}
    for num_images in (few, 4 * few):
        # A fresh process each: a peak, once reached, hides every lower one.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            arguments = (options.model, num_images, options.memory_image_size, options.memory_capacity)
            peaks[num_images] = pool.submit(peak_memory, *arguments, options.batch_size).result()
        print(f"{num_images:8d} images: peak {peaks[num_images] / 2**20:9.1f} MiB", flush=True)
    growth = (peaks[4 * few] - peaks[few]) / 2**20
    print(
        f"growth from {few} to {4 * few} images: {growth:.1f} MiB ({100 * growth * 2**20 / peaks[few]:.2f} %)"
    )


def peak_memory(name: str, num_images: int, size: int, capacity: int, batch_size: int) -> int:
    """Bytes that this process held at most, after prototypes of `num_images` images."""
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size).eval()

    def loader() -> Iterator[Tensor]:
        for start in range(0, num_images, batch_size):
            yield torch.randn(min(batch_size, num_images - start), 3, size, size)

    build_prototypes(model, loader(), num_prompts=NUM_PROMPTS, capacity=capacity, progress=False)
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


@pytest.mark.parametrize("side", ["bare", "build"])
def test_build_prototypes(benchmark: Any, side: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    num_images, batch_size = (512, 64) if device == "cuda" else (16, 8)
    model, _ = make_sides(MODEL, device)
    images = make_images(model, num_images, device)
    batches = torch.split(images, batch_size)
    benchmark.group = f"prototypes {MODEL} {num_images} images P{NUM_PROMPTS} {device}"
    benchmark.extra_info |= {
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "tokens_per_image": model.patch_embed.num_patches,
        "prefix_tokens": num_prefix_tokens(model),
    }

    def bare() -> None:
        with torch.no_grad(), as_in_the_pass(images.device):
            for batch in batches:
                model(batch)
        synchronise(images.device)

    def build() -> None:
        build_prototypes(model, batches, num_prompts=NUM_PROMPTS, progress=False)

    benchmark.pedantic({"bare": bare, "build": build}[side], rounds=3, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL, help=f"timm's name (default: {MODEL})")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-prompts", type=int, default=NUM_PROMPTS)
    parser.add_argument("--capacity", type=int, help="tokens kept per layer (default: build_prototypes')")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", action="store_true", help="measure memory, not time (Linux, CPU)")
    parser.add_argument("--memory-image-size", type=int, default=64, help="pixels, for patches of 16")
    parser.add_argument("--memory-capacity", type=int, default=5_000)
    options = parser.parse_args()
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}"
    print(f"{options.model}, {options.device}, {threads}")
    if options.memory:
        report_memory(options)
    else:
        report_time(options)


if __name__ == "__main__":
    main()
