"""K-means on a GPU beside its peers: one pass, and ten Lloyd iterations, against the copy bandwidth.

    python -m benchmarks.bench_kmeans_cuda                       M = 1,060,000, D = 768, bfloat16 and float32
    python -m benchmarks.bench_kmeans_cuda --device cpu --rows 2000 --rounds 1        tries the script alone

Sides: ours, PyTorch, flash-kmeans where it is installed, and faiss where it sees a GPU (on the CPU, where
it is installed). faiss takes float32 tokens from host memory, whose way to the GPU is in its time. All
start from the same centres and must reach the same inertia within 1 % (bfloat16 sums of peers are coarse)
before anything is timed. Times are the device's, by events, for one pass without the wait for its launches;
"host" is how long the call took to return. The tokens are larger than any cache. "copy" copies the tokens,
and its rate counts reading and writing; "of copy" is the rate at which a side goes through the tokens once
per iteration, over that rate. Limits: never run on a GPU yet.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.bench_kmeans import available, faiss_kmeans, make_tokens, one_pass
from benchmarks.timing import alternate
from spt_fast.clustering.lloyd import lloyd
from spt_fast.clustering.moments import mean_of
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import assign_accumulate

Side = Callable[[], Tensor]
ITERATIONS = 10


def ours(tokens: Tensor, starts: Tensor, iterations: int, mean: Tensor) -> Tensor:
    if iterations == 1:
        return one_pass(tokens, starts, mean)[0]
    return lloyd(WeightedTokens(tokens, None, mean), starts, max_iter=iterations).centers


def pytorch(tokens: Tensor, starts: Tensor, iterations: int) -> Tensor:
    """The textbook iteration in the dtype of the tokens, with float32 sums."""
    centers = starts
    for _ in range(iterations):
        half_norms = (centers.square().sum(1) / 2).to(tokens.dtype)
        labels = torch.addmm(half_norms, tokens, centers.T.to(tokens.dtype), alpha=-1).argmin(1)
        sums = torch.zeros_like(centers).index_add_(0, labels, tokens.float())
        centers = sums / torch.bincount(labels, minlength=len(centers)).clamp_min(1)[:, None]
    return centers


def flash_kmeans(tokens: Tensor, starts: Tensor, iterations: int) -> Tensor:
    import flash_kmeans as peer

    found = peer.batch_kmeans_Euclid(
        tokens[None], len(starts), max_iters=iterations, init_centroids=starts.to(tokens.dtype)[None]
    )
    return found[1][0].float()


def make_sides(tokens: Tensor, starts: Tensor, iterations: int) -> dict[str, Side]:
    mean = mean_of(tokens, None)
    sides: dict[str, Side] = {
        "spt_fast": lambda: ours(tokens, starts, iterations, mean),
        "pytorch": lambda: pytorch(tokens, starts, iterations),
    }
    if tokens.is_cuda and available("flash_kmeans"):
        sides["flash_kmeans"] = lambda: flash_kmeans(tokens, starts, iterations)
    if available("faiss") and (gpus := faiss_gpus(tokens)) is not None:
        on_host = tokens.float().cpu(), starts.cpu()
        sides["faiss"] = lambda: faiss_kmeans(*on_host, iterations, gpus)[0].to(tokens.device)
    return sides


def faiss_gpus(tokens: Tensor) -> int | None:
    """How many GPUs faiss is to use beside ours on `tokens`; None where it lacks the one it would need."""
    import faiss

    if not tokens.is_cuda:
        return 0
    if faiss.get_num_gpus():
        return 1
    print("faiss is left out: it sees no GPU")
    return None


def check(sides: dict[str, Side], tokens: Tensor) -> None:
    """Raise where a side that started alike ends at another inertia than ours."""
    mean = mean_of(tokens, None)

    def inertia(run: Side) -> float:
        return float(assign_accumulate(tokens[None], run()[None].contiguous(), shift=mean[None]).inertia[0])

    ours = inertia(sides["spt_fast"])
    for name, run in sides.items():
        if abs(inertia(run) / ours - 1) > 1e-2:
            raise AssertionError(f"{name} ends at {inertia(run) / ours:.4f} of the inertia of spt_fast")


def report(tokens: Tensor, clusters: int, iterations: int, rounds: int) -> None:
    starts = tokens[:clusters].float()
    sides = make_sides(tokens, starts, iterations)
    check(sides, tokens)
    target = torch.empty_like(tokens)
    timed: dict[str, Callable[[], object]] = {**sides, "copy": lambda: target.copy_(tokens)}
    # Launching one pass takes as long as a good part of it; Lloyd launches one while another runs.
    seconds = alternate(timed, rounds, device=tokens.device, launched_ahead=iterations == 1)
    size = tokens.numel() * tokens.element_size()
    copy_rate = 2 * size / seconds["copy"].median
    title = str(tokens.dtype).removeprefix("torch.")
    print(f"{title} M={len(tokens)} D={tokens.shape[1]} K={clusters}, {iterations} iteration(s)")
    for name, taken in seconds.items():
        value = taken.median
        line = f"  {name:14}{value * 1e3:10.3f} ms {value / seconds['spt_fast'].median:7.2f}x"
        rate = copy_rate if name == "copy" else iterations * size / value
        host = f"host {taken.host_median * 1e3:.3f} ms"
        print(f"{line}  {rate / 1e9:8.1f} GB/s  {rate / copy_rate:5.2f} of copy  {host}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_060_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--clusters", type=int, nargs="+", default=[20, 100])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    device = torch.device(args.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}")
    tokens = make_tokens(args.rows, args.width, "clusters").to(device)
    for dtype in (torch.bfloat16, torch.float32):
        for clusters in args.clusters:
            for iterations in (1, ITERATIONS):
                report(tokens.to(dtype), clusters, iterations, args.rounds)


if __name__ == "__main__":
    main()
