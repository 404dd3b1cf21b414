"""Inertia of streamed, mini-batch and exact clustering over the best of several exact runs.

    python -m benchmarks.bench_stream_quality IMAGE_FOLDER --out results.json  # real tokens
    python -m benchmarks.bench_stream_quality --heavy-tails                    # made-up tokens, the hard case

IMAGE_FOLDER holds one sub-folder per class (the results committed are for CIFAR-10's test images). Tokens
are what enters a late block of the shipped backbone, and a middle block of an untrained ViT. For each set, K,
order (shuffled, sorted by class) and seed it prints the inertia over *all* tokens divided by the lowest
inertia of ten exact runs: of the stream, and of scikit-learn's MiniBatchKMeans fed the same batches by
`partial_fit`. The side "exact" is the ten exact runs themselves, whatever the order.

With --heavy-tails the tokens are those of `heavy_tailed_tokens`, made anew for each seed, and K is 100. The
lowest inertia is that of five exact runs.
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
    side = facts["architecture"]["img_size"]
    taken: dict[int, int] = {}
    images = []
    for path, label in samples.samples:
        taken[label] = taken.get(label, 0) + 1
        if taken[label] <= per_class:
            image = samples.loader(path).resize((side, side))
            images.append(pil_to_tensor(image).float() / 255)
    mean, std = (torch.tensor(facts[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (torch.stack(images) - mean) / std


def untrained_vit() -> nn.Module:
    """Of the shipped backbone's shape."""
    torch.manual_seed(0)
    return VisionTransformer(**backbone_facts()["architecture"], class_token=False, global_pool="avg")


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


def heavy_tailed_tokens(seed: int) -> Tensor:
    """60,000 tokens [60_000, 256] of 137 clusters, sorted by cluster.

    The sizes of the clusters follow Gamma(0.3), their centres a normal distribution of standard deviation
    4.5. The noise is Student's t with 4 degrees of freedom, two dimensions are shifted by 30 and -30, and
    0.4 % of the tokens are multiplied by 6: these outliers hold about half of the inertia.
    """
    rng = np.random.default_rng(seed)
    sizes = rng.gamma(0.3, size=137)
    labels = np.sort(rng.choice(137, 60_000, p=sizes / sizes.sum()))
    tokens = rng.standard_t(4, size=(60_000, 256)) + rng.normal(scale=4.5, size=(137, 256))[labels]
    tokens[:, [3, 128]] += (30, -30)
    tokens[rng.random(60_000) < 0.004] *= 6
    return torch.from_numpy(tokens.astype(np.float32))


def exact_runs(tokens: Tensor, n_clusters: int, runs: int = 10) -> list[float]:
    return [float(KMeans(n_clusters, seed=seed).fit(tokens).inertia_) for seed in range(runs)]


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


def report_heavy_tails(seeds: int, n_clusters: int) -> None:
    """Print a table of inertia ratios, a line for each seed, and their mean and worst."""
    print(f"heavy tails, K={n_clusters}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("seed  exact: five runs                     sorted  shuffled  mini-batch  pass s  solve s")
    found = []
    for seed in range(seeds):
        tokens = heavy_tailed_tokens(seed)
        exact = exact_runs(tokens, n_clusters, 5)
        mixed = tokens[torch.from_numpy(np.random.default_rng(seed).permutation(len(tokens)))]
        images, mixed = (rows.view(-1, 60, tokens.shape[-1]) for rows in (tokens, mixed))
        solved = [stream(rows, n_clusters, "sorted", seed) for rows in (images, mixed)]
        mini = inertia_of(mini_batch(images, n_clusters, "sorted", seed), tokens) / min(exact)
        ratios = [inertia_of(centers, tokens) / min(exact) for centers, _, _ in solved]
        _, pass_s, solve_s = solved[0]
        found.append([*ratios, mini, pass_s, solve_s])
        runs = " ".join(f"{inertia / min(exact):.4f}" for inertia in exact)
        print(
            f"{seed:4d}  {runs}  {ratios[0]:.4f}    {ratios[1]:.4f}             {mini:.4f}"
            f"    {pass_s:.2f}     {solve_s:.2f}",
            flush=True,
        )
    mean, worst = np.mean(found, axis=0), np.max(found, axis=0)
    print(
        f"sorted: mean {mean[0]:.4f}, worst {worst[0]:.4f}; "
        f"shuffled: mean {mean[1]:.4f}, worst {worst[1]:.4f}"
    )
    print(f"mini-batch, sorted: mean {mean[2]:.2f}; medians {np.median(found, axis=0)[3:].round(2)} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="IMAGE_FOLDER", nargs="?")
    parser.add_argument("--heavy-tails", action="store_true", help="made-up tokens instead of images")
    parser.add_argument("--per-class", type=int, default=160)
    parser.add_argument("--clusters", type=int, nargs="+", default=[5, 20, 100])
    parser.add_argument("--seeds", type=int, help="default: 3, with --heavy-tails 10")
    parser.add_argument("--out", help="a JSON file; not with --heavy-tails")
    args = parser.parse_args()
    if args.heavy_tails:
        report_heavy_tails(args.seeds or 10, 100)
        return
    if args.folder is None or args.out is None:
        parser.error("give IMAGE_FOLDER and --out, or --heavy-tails")
    seeds = args.seeds or 3
    rows = []
    pictures = load_images(args.folder, args.per_class)
    sets = {
        "mae-b5": block_inputs(load_backbone(), pictures, 5),
        "rnd-b4": block_inputs(untrained_vit(), pictures, 4),
    }
    for name, images in sets.items():
        tokens = images.flatten(0, 1)
        for n_clusters in args.clusters:
            exact = exact_runs(tokens, n_clusters)
            best = min(exact)
            exact_ratios = [inertia / best for inertia in exact]
            print(f"{name:8} K={n_clusters:<4} exact     " + " ".join(f"{r:.4f}" for r in exact_ratios))
            for order in ("shuffled", "sorted"):
                ratios, times = [], []
                for seed in range(seeds):
                    centers, pass_s, solve_s = stream(images, n_clusters, order, seed)
                    ratios.append(inertia_of(centers, tokens) / best)
                    times.append((pass_s, solve_s))
                mini = [
                    inertia_of(mini_batch(images, n_clusters, order, seed), tokens) / best
                    for seed in range(seeds)
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
