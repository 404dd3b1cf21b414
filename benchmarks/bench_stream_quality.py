"""Inertia of streamed, mini-batch and exact clustering over the best of ten exact runs, on real tokens.

    python -m benchmarks.bench_stream_quality IMAGE_FOLDER --out results.json

IMAGE_FOLDER holds one sub-folder per class (the results committed are for CIFAR-10's test images). Tokens
are what enters a late block of the shipped backbone, and a middle block of an untrained ViT. For each set, K,
order (shuffled, sorted by class) and seed it prints the inertia over *all* tokens divided by the lowest
inertia of ten exact runs: of the stream, and of scikit-learn's MiniBatchKMeans fed the same batches by
`partial_fit`. The side "exact" is the ten exact runs themselves, whatever the order.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from sklearn.cluster import MiniBatchKMeans
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from spt_fast import KMeans, StreamingKMeans
from spt_fast.backbones.token_extractor import TokenExtractor
from spt_fast.data.shipped import backbone_facts, load_backbone
from spt_fast.ops.kmeans import assign_accumulate

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
    extractor = TokenExtractor(
        model, lambda layer, tokens: kept.append(tokens.clone()) if layer == block - 1 else None
    )
    with extractor:
        for batch in images.split(200):
            extractor.run(batch)
    return torch.cat(kept)


def ten_exact(tokens: Tensor, n_clusters: int) -> list[float]:
    return [float(KMeans(n_clusters, seed=seed).fit(tokens).inertia_) for seed in range(10)]


def in_order(images: Tensor, order: str, seed: int) -> Tensor:
    if order == "sorted":
        return images
    return images[torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))]


def mini_batch(images: Tensor, n_clusters: int, order: str, seed: int) -> Tensor:
    """Centres of scikit-learn's mini-batch k-means after one pass over the same batches."""
    model = MiniBatchKMeans(n_clusters, random_state=seed, n_init=3)
    for batch in in_order(images, order, seed).split(IMAGES_PER_BATCH):
        model.partial_fit(batch.flatten(0, 1).numpy())
    return torch.from_numpy(model.cluster_centers_).float()


def stream(images: Tensor, n_clusters: int, order: str, seed: int) -> tuple[Tensor, float, float]:
    """Centres, seconds of the pass and seconds of the solve."""
    images = in_order(images, order, seed)
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
            exact = ten_exact(tokens, n_clusters)
            best = min(exact)
            exact_ratios = [inertia / best for inertia in exact]
            print(f"{name:8} K={n_clusters:<4} exact     " + " ".join(f"{r:.4f}" for r in exact_ratios))
            for order in ("shuffled", "sorted"):
                ratios, times = [], []
                for seed in range(args.seeds):
                    centers, pass_s, solve_s = stream(images, n_clusters, order, seed)
                    ratios.append(inertia_of(centers, tokens) / best)
                    times.append((pass_s, solve_s))
                mini = [
                    inertia_of(mini_batch(images, n_clusters, order, seed), tokens) / best
                    for seed in range(args.seeds)
                ]
                pass_s, solve_s = np.median(np.array(times), axis=0)
                rows.append(
                    {
                        "set": name,
                        "M": len(tokens),
                        "D": tokens.shape[-1],
                        "K": n_clusters,
                        "order": order,
                        "ratios": ratios,
                        "mini_batch_ratios": mini,
                        "exact_ratios": exact_ratios,
                        "pass_s": pass_s,
                        "solve_s": solve_s,
                    }
                )
                shown = " ".join(f"{ratio:.4f}" for ratio in ratios)
                seconds = f"pass {pass_s:.2f} s, solve {solve_s:.2f} s"
                other = " ".join(f"{ratio:.4f}" for ratio in mini)
                line = f"{name:8} K={n_clusters:<4} {order:9} {shown}  mini-batch {other}  {seconds}"
                print(line, flush=True)
    every = [ratio for row in rows for ratio in row["ratios"]]
    print(f"stream: mean {np.mean(every):.4f}, worst {max(every):.4f} of {len(every)} runs")
    every = [ratio for row in rows for ratio in row["mini_batch_ratios"]]
    print(f"mini-batch: mean {np.mean(every):.4f}, worst {max(every):.4f}")
    with open(args.out, "w") as stream_:
        json.dump(
            {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}, stream_, indent=1
        )


if __name__ == "__main__":
    main()
