"""Greedy k-means++ (Arthur and Vassilvitskii, 2007), weighted."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from spt_fast.clustering.weighted import WeightedTokens, weighted_sum


def kmeans_plus_plus(problem: WeightedTokens, n_clusters: int, rng: np.random.Generator) -> Tensor:
    """Starting centres [K, D], each one of the tokens.

    After a first token drawn by weight, every further one is the best of 2 + ln K candidates drawn
    with probability proportional to weight times squared distance to the nearest centre so far.
    """
    weights = problem.weights_array()
    trials = 2 + int(math.log(n_clusters))
    chosen = draw(weights, 1, rng)
    nearest = problem.distances_to(problem.rows(chosen))[:, 0]
    for _ in range(1, n_clusters):
        candidates = draw(weights * nearest, trials, rng)
        distances = np.minimum(problem.distances_to(problem.rows(candidates)), nearest[:, None])
        best = int(np.argmin(weighted_sum(weights, distances)))
        chosen = np.append(chosen, candidates[best])
        nearest = distances[:, best]
    return problem.rows(chosen)


def draw(mass: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` indices with probability proportional to `mass`; uniform where all mass is zero."""
    cumulative = np.cumsum(mass, dtype=np.float64)
    if not cumulative[-1] > 0:
        return rng.integers(len(mass), size=size)
    index = np.searchsorted(cumulative, rng.random(size) * cumulative[-1], side="right")
    return np.asarray(np.minimum(index, len(mass) - 1))
