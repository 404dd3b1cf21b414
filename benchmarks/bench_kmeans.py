"""K-means on the CPU beside its peers: one pass, ten Lloyd iterations, Lloyd to convergence.

    pytest benchmarks/bench_kmeans.py --benchmark-only
    python -m benchmarks.bench_kmeans            full size, interleaved, medians and ratios

Limits: CPU only. Every side starts from the same centres and uses as many threads; those that do Lloyd's
algorithm must reach the inertia of ours within 0.1 % before anything is timed. "sgemm" computes the inner
products of one pass and nothing else, "read" sums the tokens up; our pass is given the mean of the tokens.
scikit-learn has no public pass: a fit includes its checks, centring and final labels. superkmeans takes no
starting centres and works on its own: it is not held to the same inertia.
"""

from __future__ import annotations

import argparse
import importlib
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Tensor

from benchmarks.timing import alternate, medians
from spt_fast.clustering.lloyd import lloyd
from spt_fast.clustering.moments import mean_of
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import assign_accumulate

Outcome = tuple[float, int]  # inertia over all tokens, iterations (0: not told)
Side = Callable[[], tuple[Tensor, int]]  # centres, iterations
WORKLOADS = {"pass": 1, "ten": 10, "converged": 300}
TOL = 1e-4  # of scikit-learn; times the mean variance of the features
FREE = ("superkmeans",)  # sides that choose their own start


def make_tokens(rows: int, width: int, kind: str) -> Tensor:
    """Gaussian noise, or 300 unequal clusters with a power-law spectrum."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, width, generator=generator)
    if kind == "noise":
        return noise
    spectrum = torch.arange(1, width + 1).pow(-0.5)
    middles = torch.randn(300, width, generator=generator) * spectrum
    shares = torch.rand(300, generator=generator).square()
    members = torch.multinomial(shares, rows, replacement=True, generator=generator)
    return middles[members] + 0.7 * noise * spectrum


def one_pass(tokens: Tensor, starts: Tensor, mean: Tensor) -> tuple[Tensor, int]:
    """Our pass alone, around a point near the data that is known, as it is from the second iteration on."""
    assigned = assign_accumulate(tokens[None], starts[None], shift=mean[None])
    return (assigned.sums[0] / assigned.counts[0][:, None]).float(), 1


def ours(tokens: Tensor, starts: Tensor, iterations: int) -> tuple[Tensor, int]:
    problem = WeightedTokens(tokens, None, mean_of(tokens, None))
    tolerance = TOL * float(tokens.var(0, correction=0).mean()) if iterations > 10 else 0.0
    result = lloyd(problem, starts, max_iter=iterations, shift_tolerance=tolerance)
    return result.centers, result.n_iter


def pytorch(tokens: Tensor, starts: Tensor, iterations: int) -> tuple[Tensor, int]:
    """The textbook iteration with PyTorch's best kernels: addmm, argmin, index_add."""
    centers = starts
    tolerance = TOL * float(tokens.var(0, correction=0).mean()) if iterations > 10 else 0.0
    done = 0
    while done < iterations:
        labels = torch.addmm(centers.square().sum(1) / 2, tokens, centers.T, alpha=-1).argmin(1)
        sums = torch.zeros_like(centers).index_add_(0, labels, tokens)
        moved = sums / torch.bincount(labels, minlength=len(centers)).clamp_min(1)[:, None]
        shift = float((moved - centers).square().sum())
        centers, done = moved, done + 1
        if shift <= tolerance:
            break
    return centers, done


def scikit_learn(tokens: Tensor, starts: Tensor, iterations: int, algorithm: str) -> tuple[Tensor, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few iterations do not converge, as asked
        model = SklearnKMeans(
            len(starts),
            init=starts.numpy(),
            n_init=1,
            max_iter=iterations,
            tol=TOL if iterations > 10 else 0,
            algorithm=algorithm,
        ).fit(tokens.numpy())
    return torch.from_numpy(model.cluster_centers_), model.n_iter_


def faiss_kmeans(tokens: Tensor, starts: Tensor, iterations: int, gpus: int = 0) -> tuple[Tensor, int]:
    """Tokens and starts are float32 in host memory, also for GPUs: faiss copies them there itself."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    model = faiss.Kmeans(
        tokens.shape[1], len(starts), niter=iterations, max_points_per_centroid=len(tokens), gpu=gpus
    )
    model.train(tokens.numpy(), init_centroids=starts.numpy())
    return torch.from_numpy(model.centroids), iterations


def superkmeans(tokens: Tensor, starts: Tensor, iterations: int) -> tuple[Tensor, int]:
    from superkmeans import SuperKMeans

    model = SuperKMeans(
        len(starts),
        tokens.shape[1],
        hierarchical=False,
        iters=iterations,
        sampling_fraction=1.0,
        max_points_per_cluster=len(tokens),
        n_threads=torch.get_num_threads(),
        early_termination=iterations > 10,
        tol=TOL,
    )
    return torch.from_numpy(np.array(model.train(tokens.numpy()))), len(model.iteration_stats)


def fast_pytorch_kmeans(tokens: Tensor, starts: Tensor, iterations: int) -> tuple[Tensor, int]:
    from fast_pytorch_kmeans import KMeans

    model = KMeans(len(starts), max_iter=iterations, tol=TOL if iterations > 10 else 0.0)
    model.fit_predict(tokens, centroids=starts.clone())
    return model.centroids, 0


def available(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception as error:  # a peer may fail to import for any reason
        print(f"{module} is left out: {error!r}")
        return False
    return True


def make_sides(tokens: Tensor, starts: Tensor, workload: str) -> dict[str, Side]:
    iterations = WORKLOADS[workload]
    sides: dict[str, Side] = {
        "spt_fast": lambda: ours(tokens, starts, iterations),
        "pytorch": lambda: pytorch(tokens, starts, iterations),
        "sklearn lloyd": lambda: scikit_learn(tokens, starts, iterations, "lloyd"),
        "sklearn elkan": lambda: scikit_learn(tokens, starts, iterations, "elkan"),
    }
    if workload == "pass":
        mean = mean_of(tokens, None)
        sides["spt_fast"] = lambda: one_pass(tokens, starts, mean)
    peers = {"faiss": faiss_kmeans, "superkmeans": superkmeans, "fast_pytorch_kmeans": fast_pytorch_kmeans}
    for module, peer in peers.items():
        if available(module):
            sides[module] = lambda peer=peer: peer(tokens, starts, iterations)
    return sides


def outcomes(sides: dict[str, Side], tokens: Tensor) -> dict[str, Outcome]:
    """Inertia and iterations of each side; raises where one that started alike ended elsewhere."""
    found: dict[str, Outcome] = {}
    for name, run in sides.items():
        centers, iterations = run()
        assigned = assign_accumulate(tokens[None], centers[None].contiguous(), shift=tokens.mean(0)[None])
        found[name] = float(assigned.inertia[0]), iterations
        ratio = found[name][0] / found["spt_fast"][0]
        if name not in FREE and abs(ratio - 1) > 1e-3:
            raise AssertionError(f"{name} ends at {ratio:.5f} of the inertia of spt_fast")
    return found


def bounds(tokens: Tensor, starts: Tensor) -> dict[str, Side]:
    """What no pass can beat: the products by two libraries, and reading the tokens."""
    array, columns = tokens.numpy(), starts.numpy().T
    return {
        "sgemm torch": lambda: (tokens @ starts.T, 0),
        "sgemm numpy": lambda: (torch.from_numpy(array @ columns), 0),
        "read": lambda: (tokens.sum(), 0),
    }


@pytest.mark.parametrize("side", ["spt_fast", "pytorch", "sklearn lloyd", "sklearn elkan", "faiss"])
@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_kmeans(benchmark: object, workload: str, side: str) -> None:
    rows, width, clusters = 10_000, 192, 20
    tokens = make_tokens(rows, width, "clusters")
    sides = make_sides(tokens, tokens[:clusters].clone(), workload)
    if side not in sides:
        pytest.skip(f"{side} is not installed")
    outcomes({"spt_fast": sides["spt_fast"], side: sides[side]}, tokens)
    benchmark.group = f"k-means, {workload}, M={rows}, D={width}, K={clusters}, float32"
    benchmark.extra_info.update(threads=torch.get_num_threads(), torch=torch.__version__)
    benchmark.pedantic(sides[side], rounds=3)


def report(
    tokens: Tensor, starts: Tensor, workload: str, rounds: int, title: str, wanted: list[str] | None
) -> None:
    sides = make_sides(tokens, starts, workload)
    if wanted is not None:
        sides = {name: run for name, run in sides.items() if name in ["spt_fast", *wanted]}
    found = outcomes(sides, tokens)
    timed = alternate(sides | (bounds(tokens, starts) if workload == "pass" else {}), rounds, warmup=0)
    base = timed["spt_fast"].median
    print(f"{title} {workload}")
    for name, seconds in medians(timed).items():
        line = f"  {name:20} {seconds * 1e3:9.1f} ms {seconds / base:6.2f}x"
        if name in found:
            line += f"  inertia {found[name][0] / found['spt_fast'][0]:.5f}, {found[name][1]} iterations"
        if name == "read":
            line += f"  {tokens.numel() * 4 / seconds / 1e9:.1f} GB/s"
        if name.startswith("sgemm"):
            line += f"  {2 * tokens.numel() * len(starts) / seconds / 1e9:.0f} GFLOP/s"
        print(line, flush=True)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--width", type=int, nargs="+", default=[192, 768, 1280])
    parser.add_argument("--clusters", type=int, nargs="+", default=[5, 20, 24, 96, 100, 200])
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=WORKLOADS)
    parser.add_argument("--kinds", nargs="+", default=["clusters", "noise"], choices=["clusters", "noise"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", help="peers to run; default: all that are installed")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, M={args.rows}, float32")
    for kind in args.kinds:
        for width in args.width:
            tokens = make_tokens(args.rows, width, kind)
            for clusters in args.clusters:
                for workload in args.workloads:
                    title = f"{kind} D={width} K={clusters}"
                    report(tokens, tokens[:clusters].clone(), workload, args.rounds, title, args.sides)


if __name__ == "__main__":
    main()
