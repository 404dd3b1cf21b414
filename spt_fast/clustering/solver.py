"""The solve on a summary: a few starts on a part of it, swaps, then Lloyd on all of it."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from spt_fast.clustering.lloyd import LloydResult, lloyd
from spt_fast.clustering.seeding import kmeans_plus_plus
from spt_fast.clustering.swaps import improve_by_swaps
from spt_fast.clustering.weighted import WeightedTokens

# How the work is spent; measured in docs/kmeans.md. The search runs on a sample of the summary
# because it needs many passes, and only has to find the right region: the last Lloyd finds the rest.
STARTS = 4
MOST_STARTS = 16  # on a summary so small that they cost nothing
SWAP_ROUNDS = 5
SWAPS_PER_ROUND = 4
SEARCH_TOKENS = 5_000
SEARCH_TOKENS_PER_CLUSTER = 100
ROUGH_GAIN = 1e-3
SEARCH_GAIN = 1e-4
FINAL_GAIN = 5e-5
RELAXATION = 1.8
MAX_ITER = 300


def solve(problem: WeightedTokens, n_clusters: int, rng: np.random.Generator) -> LloydResult:
    """K centres of the weighted tokens: several starts, local search, Lloyd to convergence."""
    size = max(SEARCH_TOKENS, SEARCH_TOKENS_PER_CLUSTER * n_clusters)
    part = problem.sample(size, rng)
    starts = max(STARTS, min(MOST_STARTS, STARTS * size // len(problem)))
    best = min((_start(part, n_clusters, rng) for _ in range(starts)), key=_inertia)
    best = _search(part, best, rng)
    return _settle(problem, best.centers, FINAL_GAIN)


def _start(part: WeightedTokens, n_clusters: int, rng: np.random.Generator) -> LloydResult:
    centers = kmeans_plus_plus(part, n_clusters, rng)
    return _settle(part, centers, ROUGH_GAIN)


def _search(part: WeightedTokens, best: LloydResult, rng: np.random.Generator) -> LloydResult:
    """Rounds of swaps, each followed by Lloyd; stops at the first round that does not pay."""
    for _ in range(SWAP_ROUNDS):
        swapped = improve_by_swaps(part, best.centers, SWAPS_PER_ROUND, rng)
        settled = _settle(part, swapped, SEARCH_GAIN)
        if settled.inertia > best.inertia * (1 - SEARCH_GAIN):
            return min(best, settled, key=_inertia)
        best = settled
    return best


def _settle(problem: WeightedTokens, centers: Tensor, gain: float) -> LloydResult:
    return lloyd(problem, centers, max_iter=MAX_ITER, gain_tolerance=gain, relaxation=RELAXATION)


def _inertia(result: LloydResult) -> float:
    return result.inertia
