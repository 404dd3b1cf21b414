"""Training by a recipe against the bare step, and a linear probe by features against the plain loop.

`python -m benchmarks.bench_train` alternates the sides within one process, so that other work of the machine
slows all of them alike, and prints ratios:

- an epoch of `fit` (SPT-Deep, ViT-S) on images in memory, on JPEG files that are kept, and on JPEG files that
  two workers decode, against the same number of bare steps: forward, backward and AdamW, written out, on
  tensors that are on the device already;
- a linear probe, many epochs over features, against one forward pass over its images, and against the plain
  loop, of which a few epochs are timed.

On a GPU, `--batch-sizes 32 64 128 --compile` adds these. `pytest benchmarks/bench_train.py --benchmark-only`
times an epoch of each side by itself.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_fast
from benchmarks.bench_data import make_files
from benchmarks.timing import alternate, finished, medians
from spt_fast.data.cache import ImageCache
from spt_fast.data.images import open_labelled_images
from spt_fast.data.loading import shuffled_loader
from spt_fast.training import fit

MODEL, NUM_PROMPTS, CLASSES = "vit_small_patch16_224", 20, 2
PROBE_EPOCHS, PLAIN_EPOCHS = 100, 1
Run = Callable[[], object]


def make_model(device: str) -> Any:
    torch.manual_seed(0)
    return timm.create_model(MODEL, num_classes=0).to(device)


def make_tuned(method: str, device: str) -> Any:
    model = make_model(device)
    prompts = torch.randn(len(model.blocks), NUM_PROMPTS, model.embed_dim, device=device)
    return spt_fast.tune(
        model, method, num_classes=CLASSES, **({"prompts": prompts} if method.startswith("spt") else {})
    )


def make_images(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 224, 224), torch.arange(count) % CLASSES


def bare_steps(tuned: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Run:
    """Steps as one would write them, over tensors that are on the device."""
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    def run() -> None:
        tuned.train()
        for images, labels in batches:
            loss = F.cross_entropy(tuned(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return run


def epochs_of(tuned: nn.Module, loader: Any, count: int = 1, **fields: Any) -> Run:
    return functools.partial(fit, tuned, loader, epochs=count, amp="off", progress=False, **fields)


def sides(tuned: Any, folder: Path, count: int, batch: int, device: str, **fields: Any) -> dict[str, Run]:
    """An epoch over `count` images by each way to feed it."""
    images, labels = make_images(count)
    pairs = zip(images.split(batch), labels.split(batch), strict=True)
    there = [(pixels.to(device), of_pixels.to(device)) for pixels, of_pixels in pairs]
    in_memory = shuffled_loader(images, labels, batch_size=batch, seed=0)
    opened = functools.partial(
        open_labelled_images, str(folder), tuned.model, batch_size=batch, training=True, augment="none"
    )
    kept = opened(workers=0, cache=ImageCache("auto", device=device)).loader
    for _ in kept:
        pass
    return {
        "bare steps": bare_steps(tuned, there),
        "fit, in memory": epochs_of(tuned, in_memory, **fields),
        "fit, files kept": epochs_of(tuned, kept, **fields),
        "fit, files decoded by 2 workers": epochs_of(tuned, opened(workers=2).loader, **fields),
    }


def probe_sides(count: int, batch: int, device: str) -> dict[str, Run]:
    """One forward pass over images, and a linear probe of them by features and by the plain loop."""
    images, labels = make_images(count)
    tuned = make_tuned("linear", device)
    loader = shuffled_loader(images, labels, batch_size=batch, seed=0)
    changing = shuffled_loader(images, labels, batch_size=batch, seed=0)
    # The plain loop: as if images were augmented.
    changing.is_random = True

    def forward() -> None:
        tuned.eval()
        with torch.no_grad():
            for each in images.split(batch):
                tuned(each.to(device))

    return {
        "forward pass": forward,
        f"probe, {PROBE_EPOCHS} epochs by features": epochs_of(tuned, loader, PROBE_EPOCHS),
        f"probe, {PLAIN_EPOCHS} epochs by the plain loop": epochs_of(tuned, changing, PLAIN_EPOCHS),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("jpeg"), 16)


@pytest.mark.parametrize("side", ["bare steps", "fit, in memory", "fit, files kept"])
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_epoch(benchmark: Any, folder: Path, side: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    benchmark.group = f"an epoch of 16 images, {MODEL}, {NUM_PROMPTS} prompts, batch 8, {device}"
    run = sides(make_tuned("spt-deep", device), folder, 16, 8, device)[side]
    benchmark.pedantic(finished(run, device), rounds=3, warmup_rounds=1)


def print_ratios(title: str, runs: dict[str, Run], rounds: int, device: str) -> None:
    timed = medians(alternate(runs, rounds, device=device))
    first = next(iter(timed))
    print(title)
    for name, seconds in timed.items():
        speed = timed[first] / seconds
        print(f"  {name:42s} {seconds:9.3f} s   {speed:7.3f} x the speed of {first}", flush=True)


def report(options: argparse.Namespace, folder: Path) -> None:
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}"
    print(f"{MODEL}, SPT-Deep with {NUM_PROMPTS} prompts; {options.device}, {threads}")
    make_files(folder, options.images)
    for batch in options.batch_sizes:
        for compiled in (False, True) if options.compile else (False,):
            title = f"an epoch of {options.images} images, batches of {batch}" + ", compiled" * compiled
            tuned = make_tuned("spt-deep", options.device)
            runs = sides(tuned, folder, options.images, batch, options.device, compile=compiled)
            print_ratios(title, runs, options.rounds, options.device)
    title = f"a linear probe of {options.probe_images} images"
    runs = probe_sides(options.probe_images, options.batch_sizes[0], options.device)
    print_ratios(title, runs, options.rounds, options.device)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--probe-images", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32])
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(options, Path(folder))


if __name__ == "__main__":
    main()
