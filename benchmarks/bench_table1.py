"""Table 1 of the paper at full size: seconds to construct prompts, by strategy and share of the data.

    python -m benchmarks.bench_table1 --csv table1.csv                  # CPU, a loader that makes up tokens
    python -m benchmarks.bench_table1 --csv table1.csv --device cuda    # a real ViT-B; has never been run
    python -m benchmarks.bench_table1 --pruning --share 1.0             # exact, with pruned and plain passes

5,994 images (CUB-200-2011), 196 tokens each, 12 layers, D = 768, 20 prompts per layer. For k-means, printed
are seconds of the clustering alone: `build_prototypes` less the same pass over the same images without
clustering. "mean", "max" and "random" run over all images of the share (`sampling="all"`, as in the paper's
code), because the paper's times grow with the share. Most of that is the forward pass, which the paper's
times surely contain: with a real ViT (--device cuda) it is in ours too, and there is a ratio; with made-up
tokens there is no forward pass, and no ratio. The paper used other hardware, so its column is for scale.

On the CPU the images *are* tokens, drawn from a mixture of 300 unequal clusters, and the blocks hand them
through, so that every layer gets the same ones. "k-means, exact" is measured there on one layer, whose tokens
fit in memory, and multiplied by 12.

The CSV has the columns strategy, share (of the training data, 0 to 1), seconds (here) and paper_seconds. Rows
are added as they are measured, to a file that may be there already, so `--only` and `--share` can split the
table over several runs. (All of "k-means, exact" takes minutes.)

`--pruning` compares the pruned and the plain passes of one layer of "k-means, exact", in memory and from the
file: the sides take turns, an iteration each, so that whatever else the machine does meets both alike. Their
starts are left out. Both must end at the same centres, to the rounding of the sums.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from benchmarks.timing import synchronise
from spt_fast import build_prototypes
from spt_fast.backbones.token_extractor import TokenExtractor
from spt_fast.clustering.lloyd import MAX_ITER
from spt_fast.clustering.out_of_core import OutOfCoreKMeans
from spt_fast.data.batches import image_batches
from spt_fast.prototypes.token_store import TokenStore

IMAGES, TOKENS, LAYERS, WIDTH, NUM_PROMPTS = 5_994, 196, 12, 768, 20
BUDGET = 64 * 2**30  # holds the tokens of all layers
DAY = 86_400.0
SHARES = (0.1, 0.3, 0.5, 0.7, 1.0)
PAPER = {
    "kmeans": [days * DAY for days in (0.10, 0.30, 1.70, 6.20, 27.30)],
    "mean": [4.83, 13.20, 21.80, 29.19, 42.63],
    "max": [7.20, 19.93, 32.80, 45.11, 64.86],
    "random": [5.30, 14.65, 24.13, 32.50, 43.56],
}


@dataclass(frozen=True)
class Strategy:
    """A row of the table: its name, and what `build_prototypes` is called with."""

    name: str
    paper: str
    options: dict[str, Any]

    @property
    def is_exact(self) -> bool:
        return self.options.get("mode") == "exact"

    @property
    def is_kmeans(self) -> bool:
        return self.options["strategy"] == "kmeans"


STRATEGIES = (
    Strategy("k-means, stream", "kmeans", {"strategy": "kmeans"}),
    Strategy("k-means, exact", "kmeans", {"strategy": "kmeans", "mode": "exact", "memory_budget": BUDGET}),
    Strategy("mean pooling", "mean", {"strategy": "mean", "sampling": "all"}),
    Strategy("max pooling", "max", {"strategy": "max", "sampling": "all"}),
    Strategy("random sample", "random", {"strategy": "random", "sampling": "all"}),
)


class HandThrough(nn.Module):
    """A model whose images [B, 1, TOKENS, WIDTH] are the tokens that enter each of its blocks."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed_dim = WIDTH
        self.blocks = nn.Sequential(*(nn.Identity() for _ in range(layers)))

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images[:, 0])  # type: ignore[no-any-return]


class Loader:
    """Batches of `make(generator, size)`, the same on every pass; adds up the seconds of making them."""

    def __init__(self, make: Any, num_images: int, batch_size: int) -> None:
        self.make, self.num_images, self.batch_size = make, num_images, batch_size
        self.seconds = 0.0

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for first in range(0, self.num_images, self.batch_size):
            start = time.perf_counter()
            batch = self.make(generator, min(self.batch_size, self.num_images - first))
            self.seconds += time.perf_counter() - start
            yield batch


def token_mixture() -> Any:
    """Makes batches of tokens from 300 clusters of unequal weight in a space of decaying scales."""
    fixed = torch.Generator().manual_seed(7)
    scales = 4 * torch.arange(1.0, WIDTH + 1).rsqrt()
    means = torch.randn(300, WIDTH, generator=fixed) * scales
    weights = torch.rand(300, generator=fixed).square() + 0.01

    def make(generator: torch.Generator, size: int) -> Tensor:
        labels = torch.multinomial(weights, size * TOKENS, replacement=True, generator=generator)
        noise = torch.randn(size * TOKENS, WIDTH, generator=generator).mul_(scales).mul_(0.7)
        return noise.add_(means[labels]).view(size, 1, TOKENS, WIDTH)

    return make


def time_building(
    model: nn.Module, loader: Loader, device: torch.device, with_forward: bool, options: dict[str, Any]
) -> float:
    """Seconds of `build_prototypes` less those of the loader, and of the model unless `with_forward`."""

    def timed(work: Any) -> float:
        loader.seconds = 0.0
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        return time.perf_counter() - start - loader.seconds

    def bare_pass() -> None:
        with TokenExtractor(model, lambda _, __: None) as extractor:
            for images in image_batches(loader):
                extractor.run(images)

    built = timed(lambda: build_prototypes(model, loader, num_prompts=NUM_PROMPTS, progress=False, **options))
    return built if with_forward else built - timed(bare_pass)


def measure(strategy: Strategy, share: float, options: argparse.Namespace) -> float:
    device = torch.device(options.device)
    num_images = round(share * options.images)
    if device.type == "cuda":
        torch.manual_seed(0)
        model = timm.create_model("vit_base_patch16_224").eval().to(device)
        loader = Loader(
            lambda generator, size: torch.randn(size, 3, 224, 224, generator=generator).to(device),
            num_images,
            options.batch_size,
        )
        return time_building(model, loader, device, not strategy.is_kmeans, strategy.options)
    layers = 1 if strategy.is_exact else LAYERS
    loader = Loader(token_mixture(), num_images, options.batch_size)
    seconds = time_building(HandThrough(layers), loader, device, False, strategy.options)
    return seconds * LAYERS / layers


def compare_pruning(share: float, tier: str, budget: int, options: argparse.Namespace) -> None:
    """Print seconds of all iterations of one layer, with pruned and with plain passes, and their ratio."""
    with TokenStore(1, budget) as store:
        for images in Loader(token_mixture(), round(share * options.images), options.batch_size):
            store.append(0, images)
        sides = {
            side: OutOfCoreKMeans(
                store.layer(0), NUM_PROMPTS, np.random.default_rng(0), prune=side == "pruned"
            )
            for side in ("pruned", "plain")
        }
        seconds, iterations, settled = dict.fromkeys(sides, 0.0), 0, False
        while not settled and iterations < MAX_ITER:
            iterations += 1
            results = {}
            for side, fit in sides.items():
                start = time.perf_counter()
                results[side] = fit.run(max_iter=iterations)
                seconds[side] += time.perf_counter() - start
            settled = all(result.n_iter < iterations for result in results.values())
    torch.testing.assert_close(results["pruned"].centers, results["plain"].centers, rtol=1e-5, atol=1e-5)
    print(
        f"{tier:8s}{share:8.0%}{results['pruned'].n_iter:12d}{seconds['pruned']:10.2f}{seconds['plain']:10.2f}"
        f"{seconds['plain'] / seconds['pruned']:8.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, help="also write the figures here")
    parser.add_argument("--only", choices=[strategy.name for strategy in STRATEGIES], action="append")
    parser.add_argument("--share", type=float, choices=SHARES, action="append")
    parser.add_argument("--pruning", action="store_true", help="compare pruned with plain passes instead")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=int, default=IMAGES, help="fewer for a trial")
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    print(
        f"{options.images} images, {TOKENS} tokens, {LAYERS} layers, D={WIDTH}, N_p={NUM_PROMPTS}; "
        f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if options.pruning:
        print(
            f"{'tokens in':8s}{'share':>7s}{'iterations':>12s}{'pruned s':>10s}{'plain s':>10s}{'ratio':>8s}"
        )
        for share in options.share or SHARES:
            for tier, budget in (("memory", BUDGET), ("file", 0)):
                compare_pruning(share, tier, budget, options)
        return
    if options.device == "cpu":
        print("k-means, exact: one layer measured, times 12")
    print(f"{'strategy':16s}{'share':>8s}{'seconds':>12s}{'paper':>14s}{'ratio':>12s}", flush=True)
    for strategy in (s for s in STRATEGIES if options.only is None or s.name in options.only):
        for share, paper in zip(SHARES, PAPER[strategy.paper], strict=True):
            if options.share is not None and share not in options.share:
                continue
            seconds = measure(strategy, share, options)
            if options.csv is not None:
                add_row(options.csv, (strategy.name, share, round(seconds, 2), paper))
            alike = strategy.is_kmeans or options.device != "cpu"
            ratio = f"{paper / seconds:.0f}" if alike else "no forward"
            print(f"{strategy.name:16s}{share:8.0%}{seconds:12.2f}{paper:14.2f}{ratio:>12s}", flush=True)


def add_row(path: Path, row: tuple[str, float, float, float]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow(("strategy", "share", "seconds", "paper_seconds"))
        writer.writerow(row)


if __name__ == "__main__":
    main()
