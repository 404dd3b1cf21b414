"""What rounding tokens to bfloat16 before they are clustered does to the inertia over the full tokens.

    python -m benchmarks.bench_token_dtype IMAGE_FOLDER

IMAGE_FOLDER holds one sub-folder per class (the results committed are for CIFAR-10's test images). The tokens
are those of `bench_stream_quality`: of the shipped backbone, of an untrained ViT, and made-up ones with heavy
tails. A line gives the inertia over all full tokens of centres found on rounded tokens, divided by that of
centres found on full ones. "same": Lloyd's algorithm goes on from its own result, so this is rounding alone.
"exact", "stream": whole runs from the same seeds, in which other starts matter more than rounding.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.bench_stream_quality import (
    block_inputs,
    heavy_tailed_tokens,
    inertia_of,
    load_images,
    stream,
    untrained_vit,
)
from spt_fast import KMeans
from spt_fast.data.shipped import load_backbone


def exact(images: Tensor, n_clusters: int, seed: int, init: Tensor | str = "k-means++") -> Tensor:
    """Centres of one exact run over tokens [images, tokens, D]."""
    fitted = KMeans(n_clusters, init=init, n_init=1, seed=seed).fit(images.flatten(0, 1))
    return fitted.cluster_centers_.float()


def streamed(images: Tensor, n_clusters: int, seed: int) -> Tensor:
    return stream(images, n_clusters, "shuffled", seed)[0].float()


def rounding_ratios(
    images: Tensor, dtype: torch.dtype, n_clusters: int, seeds: int
) -> dict[str, list[float]]:
    """Inertia with rounding over inertia without, for each seed."""
    tokens, rounded = images.flatten(0, 1), images.to(dtype).float()
    ratios: dict[str, list[float]] = {"same": [], "exact": [], "stream": []}

    def ratio(of_rounded: Tensor, of_full: Tensor) -> float:
        return inertia_of(of_rounded, tokens) / inertia_of(of_full, tokens)

    for seed in range(seeds):
        full = exact(images, n_clusters, seed)
        again = exact(images, n_clusters, seed, init=full)
        ratios["same"].append(ratio(exact(rounded, n_clusters, seed, init=full), again))
        ratios["exact"].append(ratio(exact(rounded, n_clusters, seed), full))
        ratios["stream"].append(ratio(*(streamed(x, n_clusters, seed) for x in (rounded, images))))
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="IMAGE_FOLDER")
    parser.add_argument("--per-class", type=int, default=100)
    parser.add_argument("--clusters", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    pictures = load_images(args.folder, args.per_class)
    sets: dict[str, Callable[[], Tensor]] = {
        "mae-b2": lambda: block_inputs(load_backbone(), pictures, 2),
        "mae-b5": lambda: block_inputs(load_backbone(), pictures, 5),
        "rnd-b4": lambda: block_inputs(untrained_vit(), pictures, 4),
        "heavy": lambda: heavy_tailed_tokens(0).view(-1, 60, 256),
    }
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{args.seeds} seeds: mean (lowest to highest)"
    )
    for name, make in sets.items():
        images = make()
        for dtype in (torch.bfloat16, torch.float16):
            for n_clusters in args.clusters:
                found = rounding_ratios(images, dtype, n_clusters, args.seeds)
                shown = "  ".join(
                    f"{side} {np.mean(r):.5f} ({min(r):.5f} to {max(r):.5f})" for side, r in found.items()
                )
                print(f"{name:7} {str(dtype)[6:]:8} K={n_clusters:<4} {shown}", flush=True)


if __name__ == "__main__":
    main()
