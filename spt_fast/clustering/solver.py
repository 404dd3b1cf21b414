"""The solve on a summary: a few starts on a sample of it, swaps, then Lloyd on all of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.lloyd import LloydResult, lloyd
from spt_fast.clustering.reservoir import ROUGH_CENTERS, PriorityReservoir, importance
from spt_fast.clustering.seeding import kmeans_plus_plus, several_starts
from spt_fast.clustering.swaps import improve_by_swaps
from spt_fast.clustering.weighted import WeightedTokens

# How the work is spent; measured in docs/kmeans.md. The search runs on a sample of the summary
# because it needs many passes, and only has to find the right region: the last Lloyd finds the rest.
SEARCH_TOKENS = 4_000
SEARCH_TOKENS_PER_CLUSTER = 80
ROUGH_TOKENS = 1_024
SWAP_ROUNDS = 20
SWAPS_PER_ROUND = 2
ROUGH_GAIN = 1e-3
SEARCH_GAIN = 1e-4
FINAL_GAIN = 5e-5
RELAXATION = 1.8
MAX_ITER = 300


def solve(problem: WeightedTokens, n_clusters: int, rng: np.random.Generator) -> LloydResult:
    """K centres of the weighted tokens: several starts, local search, Lloyd to convergence."""
    size = max(SEARCH_TOKENS, SEARCH_TOKENS_PER_CLUSTER * n_clusters)
    sample = draw_by_importance(problem, size, rng)
    n_starts = count_starts(n_clusters, size // len(problem))
    starts = several_starts(sample, n_clusters, n_starts, rng)
    runs = sorted((_settle(sample, centers, ROUGH_GAIN) for centers in starts), key=_inertia)
    for i, run in enumerate(runs):
        runs[i] = _search(sample, run, rng)
        # Where no swap pays for the best start, as among tokens without clusters, none will for the others.
        if runs[i] is run:
            break
    best = min(runs, key=lambda run: float(problem.assign(run.centers).inertia[0]))
    return _settle(problem, best.centers, FINAL_GAIN, exact_inertia=True)


def count_starts(n_clusters: int, affordable: int) -> int:
    """Starts to try: 2 to 6, the fewer the more centres; up to 16 where the summary is so small.

    A few centres can start badly as a whole. Of many only some do, and swaps move those.
    """
    return max(2, min(6, 60 // n_clusters), min(16, affordable))


def draw_by_importance(problem: WeightedTokens, size: int, rng: np.random.Generator) -> WeightedTokens:
    """A priority sample of `size` tokens that prefers those far from a few rough centres; all if no more.

    A uniform sample would lose most of the rare, far tokens that the reservoir took care to keep, and
    the centres found on it would not be placed for them.
    """
    if size >= len(problem):
        return problem
    few = problem.sample(ROUGH_TOKENS, rng)
    centers = kmeans_plus_plus(few, min(ROUGH_CENTERS, len(few)), rng)
    measured = problem.assign(centers, with_distances=True)
    assert measured.distances is not None
    preference = importance(measured.distances[0], measured.inertia[0], measured.counts[0].sum())
    tokens = problem.tokens
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    reservoir = PriorityReservoir(size, tokens.shape[1], tokens.dtype, tokens.device, generator)
    reservoir.offer(tokens, preference, problem.weights)
    return reservoir.summary(problem.backend)


def _search(sample: WeightedTokens, start: LloydResult, rng: np.random.Generator) -> LloydResult:
    """Rounds of swaps, each followed by Lloyd, until one does not pay; `start` itself if none does."""
    best = start
    for _ in range(SWAP_ROUNDS):
        swapped = improve_by_swaps(sample, best.centers, SWAPS_PER_ROUND, rng)
        if torch.equal(swapped, best.centers):
            break
        settled = _settle(sample, swapped, SEARCH_GAIN)
        if settled.inertia > best.inertia * (1 - SEARCH_GAIN):
            return min(best, settled, key=_inertia)
        best = settled
    return best


def _settle(
    problem: WeightedTokens, centers: Tensor, gain: float, *, exact_inertia: bool = False
) -> LloydResult:
    return lloyd(
        problem,
        centers,
        max_iter=MAX_ITER,
        gain_tolerance=gain,
        relaxation=RELAXATION,
        exact_inertia=exact_inertia,
    )


def _inertia(result: LloydResult) -> float:
    return result.inertia
