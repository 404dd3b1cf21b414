"""Where k-means starts: greedy k-means++ (Arthur and Vassilvitskii, 2007), random tokens, equal parts.

All are weighted. k-means++ runs where the tokens are, without a round trip to the host.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.moments import mean_of
from spt_fast.clustering.ordered import running_sum, weighted_sum
from spt_fast.clustering.weighted import WeightedTokens


def kmeans_plus_plus(problem: WeightedTokens, n_clusters: int, rng: np.random.Generator) -> Tensor:
    """Starting centres [K, D], each one of the tokens.

    After a first token drawn by weight, every further one is the best of 2 + ln K candidates drawn
    with probability proportional to weight times squared distance to the nearest centre so far.
    """
    return several_starts(problem, n_clusters, 1, rng)[0]


def several_starts(
    problem: WeightedTokens, n_clusters: int, n_starts: int, rng: np.random.Generator
) -> Tensor:
    """Centres [S, K, D] of S independent runs of greedy k-means++, in one run's reads of the tokens."""
    weights = problem.unit_weights()
    trials = 2 + int(math.log(n_clusters))
    first, *uniform = problem.uniform([n_starts] + [n_starts * trials] * (n_clusters - 1), rng)
    chosen = [draw(weights, first)]
    nearest = _distances_to_tokens(problem, chosen[0])  # [n, S]
    for numbers in uniform:
        pairs = zip(nearest.unbind(1), numbers.view(n_starts, trials), strict=True)
        candidates = torch.cat([draw(weights * distances, given) for distances, given in pairs])
        distances = _distances_to_tokens(problem, candidates).view(-1, n_starts, trials)
        distances = distances.minimum(nearest[:, :, None]).flatten(1)  # [n, S * trials]
        costs = weighted_sum(weights, distances).view(n_starts, trials)
        best = costs.argmin(1) + trials * torch.arange(n_starts, device=costs.device)
        chosen.append(candidates.index_select(0, best))
        nearest = distances.index_select(1, best)
    return problem.rows(torch.stack(chosen, 1).flatten()).view(n_starts, n_clusters, -1)


def _distances_to_tokens(problem: WeightedTokens, index: Tensor) -> Tensor:
    """Squared distances [n, C] to the tokens at `index` [C]; 0 to a token itself, and to those equal to it.

    A token's distance to itself is the rounding of its squared norm. Where it lies far from all others that
    may exceed all of theirs, and the token would be drawn again and again.
    """
    distances = problem.distances_to(problem.rows(index))
    to_itself = distances.gather(0, index[None])  # [1, C]
    return distances.masked_fill(distances <= to_itself, 0)


def random_tokens(problem: WeightedTokens, n_clusters: int, rng: np.random.Generator) -> Tensor:
    """Starting centres [K, D]: tokens drawn by weight, none of them twice."""
    weights = problem.unit_weights().cpu().numpy()
    with np.errstate(divide="ignore"):
        # A race of exponential clocks is won in the order of weighted draws without replacement.
        arrival = rng.exponential(size=len(problem)) / weights
    first = np.sort(np.argpartition(arrival, n_clusters - 1)[:n_clusters])
    return problem.rows(torch.from_numpy(first).to(problem.tokens.device))


def equal_parts(problem: WeightedTokens, n_clusters: int) -> Tensor:
    """Starting centres [K, D]: means of K parts of the data, equal in size and in its order."""
    means = []
    for start, stop in itertools.pairwise(equal_bounds(len(problem), n_clusters)):
        weights = None if problem.weights is None else problem.weights[start:stop]
        if weights is not None and not bool(weights.any()):
            weights = None
        means.append(mean_of(problem.tokens[start:stop], weights, problem.backend))
    return torch.stack(means)


def equal_bounds(count: int, n_clusters: int) -> list[int]:
    """Where the K parts of `count` tokens begin, and where the last one ends."""
    return [count * k // n_clusters for k in range(n_clusters + 1)]


def draw(mass: Tensor, uniform: Tensor) -> Tensor:
    """Indices with probability proportional to `mass` [n]; uniform where all mass is zero.

    `uniform` [size] holds the random numbers, in [0, 1).
    """
    cumulative = running_sum(mass)
    total = cumulative[-1:]
    by_mass = torch.searchsorted(cumulative, uniform * total, right=True)
    by_count = (uniform * len(mass)).long()
    return torch.where(total > 0, by_mass, by_count).clamp_max(len(mass) - 1)
