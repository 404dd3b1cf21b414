"""Local search by swaps (Lattanzi and Sohler, 2019): leave a bad optimum that Lloyd cannot leave."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from spt_fast.clustering.seeding import draw
from spt_fast.clustering.weighted import WeightedTokens, weighted_sum

CANDIDATES = 16  # tokens tried at once: their distances cost about one vector column of the kernel


def improve_by_swaps(
    problem: WeightedTokens, centers: Tensor, tries: int, rng: np.random.Generator
) -> Tensor:
    """Centres [K, D] after up to `tries` swaps, each of which lowered the inertia.

    A try draws tokens with probability proportional to weight times squared distance, and finds the
    best pair of one of them to add and one centre to remove. Holds a matrix of n x K distances.
    """
    weights = problem.weights_array()
    distances = problem.distances_to(centers)
    centers = centers.clone()
    for _ in range(tries):
        first, second, labels = _two_nearest(distances)
        candidates = problem.rows(draw(weights * first, CANDIDATES, rng))
        to_candidates = problem.distances_to(candidates)
        costs = _costs_of_swaps(weights, first, second, labels, to_candidates, len(centers))
        candidate, removed = np.unravel_index(int(np.argmin(costs)), costs.shape)
        if costs[candidate, removed] < weighted_sum(weights, first):
            centers[removed] = candidates[candidate]
            distances[:, removed] = to_candidates[:, candidate]
    return centers


def _two_nearest(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared distance to the nearest and to the second nearest centre, and the nearest one's index."""
    labels = distances.argmin(axis=1)
    if distances.shape[1] == 1:
        return distances[:, 0], np.full(len(distances), np.inf, np.float32), labels
    two = np.partition(distances, 1, axis=1)
    return two[:, 0], two[:, 1], labels


def _costs_of_swaps(
    weights: np.ndarray,  # [n]
    first: np.ndarray,  # [n]
    second: np.ndarray,  # [n]
    labels: np.ndarray,  # [n]
    to_candidates: np.ndarray,  # [n, C]
    n_clusters: int,
) -> np.ndarray:
    """Inertia [C, K] after adding candidate c and removing centre k."""
    kept = np.minimum(to_candidates, first[:, None]).astype(np.float64)
    orphaned = np.minimum(to_candidates, second[:, None]).astype(np.float64)
    base = weighted_sum(weights, kept)
    extra = (orphaned - kept) * weights[:, None]
    removal = [np.bincount(labels, weights=column, minlength=n_clusters) for column in extra.T]
    return np.asarray(base[:, None] + np.stack(removal))
