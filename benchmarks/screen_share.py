"""How many tokens the screen of the CUDA k-means cannot decide on: python -m benchmarks.screen_share.

Needs no GPU: the rule of csrc/kmeans_cuda_screened.cuh in PyTorch, on bfloat16 tokens of `bench_kmeans` and
centres after ten iterations. Left out is what the exchange between blocks adds, a 2^-15th of the products.
"""

from __future__ import annotations

from torch import Tensor

from benchmarks.bench_kmeans import make_tokens
from spt_fast import KMeans

TOKENS, WIDTH, CLUSTERS = 50_000, 768, (40, 100, 128)


def undecided_share(tokens: Tensor, centers: Tensor) -> float:
    """Share of the tokens for which several centres may be nearest, tokens in bfloat16."""
    shift = tokens.float().mean(0)
    near, moved = tokens.float() - shift, centers - shift
    high = moved.to(tokens.dtype).float()
    scores = moved.square().sum(1) - 2 * near @ high.T
    doubts = 2 * near.norm(dim=1)[:, None] * (moved - high).norm(dim=1)
    candidates = scores - doubts <= (scores + doubts).amin(1, keepdim=True)
    return float((candidates.sum(1) != 1).double().mean())


def main() -> None:
    print(f"bfloat16, M = {TOKENS:,}, D = {WIDTH}: tokens without a decision")
    for kind in ("clusters", "noise"):
        tokens = make_tokens(TOKENS, WIDTH, kind).bfloat16()
        for clusters in CLUSTERS:
            centers = KMeans(clusters, max_iter=10).fit(tokens).cluster_centers_
            print(f"{kind:10}K={clusters:<5}{undecided_share(tokens, centers):7.1%}", flush=True)


if __name__ == "__main__":
    main()
