"""One pass of assign-and-accumulate on the CPU, beside scikit-learn, PyTorch and the sgemm of the same size.

    pytest benchmarks/bench_kmeans.py --benchmark-only
    python -m benchmarks.bench_kmeans            full size, interleaved, medians and ratios

Every side starts from the same centres and returns the centres of one Lloyd iteration; the results are
compared before anything is timed. The sgemm computes the inner products and nothing else. scikit-learn has no
public single pass: its side is a fit of one iteration, with its checks, centring and final labelling.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Tensor

from spt_fast.ops.kmeans import assign_accumulate

Side = Callable[[], Tensor]


def ours(tokens: Tensor, centers: Tensor, mean: Tensor) -> Tensor:
    result = assign_accumulate(tokens[None], centers[None], shift=mean[None])
    return (result.sums[0] / result.counts[0][:, None]).float()


def pytorch(tokens: Tensor, centers: Tensor) -> Tensor:
    """The textbook pass with PyTorch's best kernels: addmm, argmin, index_add."""
    half_norms = centers.square().sum(1) / 2
    labels = torch.addmm(half_norms, tokens, centers.T, alpha=-1).argmin(1)
    sums = torch.zeros_like(centers).index_add_(0, labels, tokens)
    counts = torch.bincount(labels, minlength=len(centers))
    return sums / counts[:, None]


def scikit_learn(tokens: np.ndarray, centers: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one iteration does not converge, as asked
        model = SklearnKMeans(len(centers), init=centers, n_init=1, max_iter=1, algorithm="lloyd").fit(tokens)
    return torch.from_numpy(model.cluster_centers_)


def make_sides(rows: int, width: int, clusters: int) -> dict[str, Side]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(rows, width, generator=generator)
    centers = tokens[:clusters].clone()
    mean = tokens.mean(0)
    array, starts = tokens.numpy(), centers.numpy()
    sides: dict[str, Side] = {
        "spt_fast": lambda: ours(tokens, centers, mean),
        "pytorch": lambda: pytorch(tokens, centers),
        "scikit-learn fit": lambda: scikit_learn(array, starts),
        "sgemm only": lambda: tokens @ centers.T,
    }
    expected = sides["pytorch"]()
    # A token halfway between two centres may go to either, and moves a centre by its share of it.
    for name in ("spt_fast", "scikit-learn fit"):
        torch.testing.assert_close(sides[name](), expected, rtol=1e-3, atol=1e-2)
    return sides


@pytest.mark.parametrize("side", ["spt_fast", "pytorch", "scikit-learn fit", "sgemm only"])
@pytest.mark.parametrize("clusters", [20, 100])
def test_one_pass(benchmark: object, clusters: int, side: str) -> None:
    rows, width = 20_000, 384
    run = make_sides(rows, width, clusters)[side]
    benchmark.group = f"k-means pass, M={rows}, D={width}, K={clusters}, float32"
    benchmark.extra_info.update(threads=torch.get_num_threads(), torch=torch.__version__)
    benchmark(run)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, nargs="+", default=[768])
    parser.add_argument("--clusters", type=int, nargs="+", default=[5, 20, 24, 96, 100])
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, M={args.rows}, float32")
    for width in args.width:
        for clusters in args.clusters:
            sides = make_sides(args.rows, width, clusters)
            times: dict[str, list[float]] = {name: [] for name in sides}
            for _ in range(args.rounds):
                for name, run in sides.items():
                    started = time.perf_counter()
                    run()
                    times[name].append(time.perf_counter() - started)
            medians = {name: statistics.median(values) for name, values in times.items()}
            base = medians["spt_fast"]
            cells = [f"{name} {value * 1e3:.0f} ms ({value / base:.2f}x)" for name, value in medians.items()]
            print(f"D={width} K={clusters}: " + ", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
