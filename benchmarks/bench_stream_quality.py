"""Inertia of one-pass clustering over exact Lloyd, best of ten starts, on real tokens.

    python -m benchmarks.bench_stream_quality IMAGE_FOLDER --out results.json

IMAGE_FOLDER holds one sub-folder per class (the results committed are for CIFAR-10's test images). Tokens
are what enters a late block of the shipped backbone, and a middle block of an untrained ViT. For each set, K,
order (shuffled, sorted by class) and seed it prints the inertia over *all* tokens of the streamed centres
divided by the lowest inertia of ten exact runs.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from spt_fast import KMeans, StreamingKMeans
from spt_fast.ops.kmeans import assign_accumulate
from spt_fast.samples import backbone_facts, load_backbone
from spt_fast.tokens import TokenTap

IMAGES_PER_BATCH = 32


def load_images(folder: str, per_class: int) -> Tensor:
    """The first images of every class, in class order, as the shipped backbone wants them."""
    samples, facts = ImageFolder(folder), backbone_facts()
    taken: dict[int, int] = {}
    images = []
    for path, label in samples.samples:
        taken[label] = taken.get(label, 0) + 1
        if taken[label] <= per_class:
            image = samples.loader(path).resize((32, 32))
            images.append(pil_to_tensor(image).float() / 255)
    mean, std = (torch.tensor(facts[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (torch.stack(images) - mean) / std


def untrained_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3, class_token=False, global_pool="avg"
    )


def block_inputs(model: nn.Module, images: Tensor, block: int) -> Tensor:
    """Patch tokens [images, tokens, D] that enter a block, counted from 1."""
    kept: list[Tensor] = []
    tap = TokenTap(model, lambda layer, tokens: kept.append(tokens.clone()) if layer == block - 1 else None)
    with tap:
        for batch in images.split(200):
            tap.run(batch)
    return torch.cat(kept)


def best_of_ten(tokens: Tensor, n_clusters: int) -> float:
    runs = (KMeans(n_clusters, seed=seed).fit(tokens) for seed in range(10))
    return min(float(run.inertia_) for run in runs)


def stream(images: Tensor, n_clusters: int, order: str, seed: int) -> tuple[Tensor, float, float]:
    """Centres, seconds of the pass and seconds of the solve."""
    if order == "shuffled":
        images = images[torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))]
    estimator = StreamingKMeans(n_clusters, seed=seed)
    started = time.perf_counter()
    for batch in images.split(IMAGES_PER_BATCH):
        estimator.partial_fit(batch, group=0)
    passed = time.perf_counter()
    centers = estimator.cluster_centers_
    return centers, passed - started, time.perf_counter() - passed


def inertia_of(centers: Tensor, tokens: Tensor) -> float:
    return float(assign_accumulate(tokens[None], centers[None], shift=tokens.mean(0)[None]).inertia[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="IMAGE_FOLDER")
    parser.add_argument("--per-class", type=int, default=160)
    parser.add_argument("--clusters", type=int, nargs="+", default=[5, 20, 100])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    rows = []
    pictures = load_images(args.folder, args.per_class)
    sets = {
        "mae-b5": block_inputs(load_backbone(), pictures, 5),
        "rnd-b4": block_inputs(untrained_vit(), pictures, 4),
    }
    for name, images in sets.items():
        tokens = images.flatten(0, 1)
        for n_clusters in args.clusters:
            best = best_of_ten(tokens, n_clusters)
            for order in ("shuffled", "sorted"):
                ratios, times = [], []
                for seed in range(args.seeds):
                    centers, pass_s, solve_s = stream(images, n_clusters, order, seed)
                    ratios.append(inertia_of(centers, tokens) / best)
                    times.append((pass_s, solve_s))
                pass_s, solve_s = np.median(np.array(times), axis=0)
                rows.append(
                    {
                        "set": name,
                        "M": len(tokens),
                        "D": tokens.shape[-1],
                        "K": n_clusters,
                        "order": order,
                        "ratios": ratios,
                        "pass_s": pass_s,
                        "solve_s": solve_s,
                    }
                )
                shown = " ".join(f"{ratio:.4f}" for ratio in ratios)
                seconds = f"pass {pass_s:.2f} s, solve {solve_s:.2f} s"
                print(f"{name:8} K={n_clusters:<4} {order:9} {shown}  {seconds}", flush=True)
    every = [ratio for row in rows for ratio in row["ratios"]]
    print(f"mean {np.mean(every):.4f}, worst {max(every):.4f} of {len(every)} runs")
    with open(args.out, "w") as stream_:
        json.dump(
            {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, stream_, indent=1
        )


if __name__ == "__main__":
    main()
