"""Images per second into batches: kept in memory, and decoded from JPEG files, against a training step.

The files are made up, of the size and weight of photos. The step is forward and backward of a ViT-S with 20
prompts per block, random weights, at batch 32, on tensors that are there already. `python -m
benchmarks.bench_data` alternates the sides within one process, so that other work of the machine slows all of
them alike, and prints ratios to that step. `--fed` also times steps that are fed by each reader. `pytest
benchmarks/bench_data.py --benchmark-only` times each reader by itself, with fewer images.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks.bench_prompted_step import build, make_images, step_of
from benchmarks.timing import alternate, finished, medians
from spt_fast.data.cache import ImageCache
from spt_fast.data.images import open_labelled_images

MODEL, NUM_PROMPTS, BATCH = "vit_small_patch16_224", 20, 32
SIZE = (500, 375)
CLASSES = 2
# Whether images are kept, whether they are cropped and flipped at random, and how many workers read them.
READERS = {
    "kept": (True, False, 0),
    "kept, augmented, 0 workers": (True, True, 0),
    "kept, augmented, 2 workers": (True, True, 2),
    "decoded, 0 workers": (False, False, 0),
    "decoded, 1 worker": (False, False, 1),
    "decoded, 2 workers": (False, False, 2),
    "decoded, augmented, 2 workers": (False, True, 2),
}


def make_files(folder: Path, count: int) -> Path:
    """JPEG files in class folders: coarse shapes, fine ones, and noise, which together weigh as photos do."""
    generator = np.random.default_rng(0)
    width, height = SIZE
    for index in range(count):
        pixels = np.zeros((height, width, 3), np.float32)
        for coarseness, contrast in ((8, 60), (32, 25), (128, 12)):
            small = generator.normal(0, contrast, (coarseness, coarseness, 3)).astype(np.float32)
            layers = [
                np.asarray(Image.fromarray(small[:, :, channel]).resize(SIZE, Image.Resampling.BICUBIC))
                for channel in range(3)
            ]
            pixels += np.stack(layers, axis=2)
        pixels += generator.normal(0, 3, pixels.shape)
        path = folder / str(index % CLASSES) / f"{index}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((128 + pixels).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return folder


def make_loader(reader: str, folder: Path, device: str) -> Any:
    """The loader of a reader; one that keeps images has them all already."""
    kept, augmented, workers = READERS[reader]
    cache = ImageCache("auto", device=device) if kept else None
    loader = open_labelled_images(
        str(folder), _backbone(), batch_size=BATCH, workers=workers, training=augmented, cache=cache
    ).loader
    if kept:
        read(loader)
    return loader


@functools.cache
def _backbone() -> Any:
    """States its size, mean and standard deviation; it is never run."""
    with torch.device("meta"):
        return timm.create_model(MODEL)


def read(loader: Any) -> None:
    """One epoch of images, nothing done with them."""
    for _ in loader:
        pass


def fed_epoch(model: Any, loader: Any, device: str) -> None:
    """One epoch of steps on the batches of a loader."""
    for images, _ in loader:
        step_of(model, images.to(device))()


def check_same_batches(folder: Path, device: str) -> None:
    """Nothing is timed before images that are kept are those that are decoded."""
    loaders = [make_loader(reader, folder, device) for reader in ("kept", "decoded, 0 workers")]
    for (found, _), (expected, _) in zip(*loaders, strict=True):
        assert torch.equal(found.cpu(), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("jpeg"), 2 * BATCH)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_reading(benchmark: Any, folder: Path, reader: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    benchmark.group = f"{2 * BATCH} images of {SIZE[0]} x {SIZE[1]} into batches of {BATCH}, {device}"
    benchmark.extra_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if reader == "kept":
        check_same_batches(folder, device)
    loader = make_loader(reader, folder, device)
    benchmark.pedantic(finished(functools.partial(read, loader), device), rounds=3, warmup_rounds=1)


def report(options: argparse.Namespace, folder: Path) -> None:
    make_files(folder, options.images)
    weight = sum(path.stat().st_size for path in folder.rglob("*.jpg")) / options.images
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}, timm {timm.__version__}"
    print(
        f"{options.images} JPEG files of {SIZE[0]} x {SIZE[1]}, {weight / 1024:.0f} KiB each, to 224 x 224; "
        f"batches of {BATCH}; {options.device}, {threads}"
    )
    check_same_batches(folder, options.device)
    model = build("ours", MODEL, NUM_PROMPTS, options.device)
    images = make_images(BATCH, options.device)
    bare = "bare step"
    steps: dict[str, Callable[[], None]] = {bare: step_of(model, images)}
    loaders = {reader: make_loader(reader, folder, options.device) for reader in READERS}
    steps |= {reader: functools.partial(read, loader) for reader, loader in loaders.items()}
    counts = dict.fromkeys(steps, options.images) | {bare: BATCH}
    if options.fed:
        fed = {f"steps fed: {reader}": loader for reader, loader in loaders.items()}
        steps |= {
            name: functools.partial(fed_epoch, model, loader, options.device) for name, loader in fed.items()
        }
        counts |= dict.fromkeys(fed, options.images)
    timed = medians(alternate(steps, options.rounds, device=options.device))
    speeds = {name: counts[name] / seconds for name, seconds in timed.items()}
    for name, speed in speeds.items():
        print(f"{name:42s} {speed:10.1f} images/s   {speed / speeds[bare]:8.2f} x {bare}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fed", action="store_true", help="also time steps that are fed by each reader")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report(options, Path(folder))


if __name__ == "__main__":
    main()
