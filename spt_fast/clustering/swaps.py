"""Local search by swaps (Lattanzi and Sohler, 2019): leave a bad optimum that Lloyd cannot leave.

Runs where the tokens are, without a round trip to the host; holds a matrix of n x K distances.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.ordered import sum_by_label, weighted_sum
from spt_fast.clustering.seeding import draw
from spt_fast.clustering.weighted import WeightedTokens

CANDIDATES = 32  # tokens tried at once, in one read of all tokens


def improve_by_swaps(
    problem: WeightedTokens, centers: Tensor, tries: int, rng: np.random.Generator
) -> Tensor:
    """Centres [K, D] after up to `tries` swaps, each of which lowered the inertia.

    A try draws tokens with probability proportional to weight times squared distance, and finds the
    best pair of one of them to add and one centre to remove.
    """
    weights = problem.unit_weights()
    distances = problem.distances_to(centers)
    centers = centers.clone()
    for numbers in problem.uniform([CANDIDATES] * tries, rng):
        first, second, labels = _two_nearest(distances)
        candidates = problem.rows(draw(weights * first, numbers))
        to_candidates = problem.distances_to(candidates)
        costs = _costs_of_swaps(weights, first, second, labels, to_candidates, len(centers))
        best = costs.flatten().argmin(keepdim=True)
        added, removed = best // len(centers), best % len(centers)
        better = costs.flatten().index_select(0, best) < weighted_sum(weights, first)
        _replace(centers, 0, removed, candidates, added, better)
        _replace(distances, 1, removed, to_candidates, added, better)
    return centers


def _replace(old: Tensor, dim: int, removed: Tensor, new: Tensor, added: Tensor, better: Tensor) -> None:
    """Put slice `added` of `new` in the place of slice `removed` of `old` where `better` [1] says so."""
    kept = old.index_select(dim, removed)
    old.index_copy_(dim, removed, torch.where(better, new.index_select(dim, added), kept))


def _two_nearest(distances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distance to the nearest and to the second nearest centre, and the nearest one's index."""
    first, labels = distances.min(dim=1)
    second = distances.scatter(1, labels[:, None], torch.inf).amin(dim=1)
    return first, second, labels


def _costs_of_swaps(
    weights: Tensor,  # [n]
    first: Tensor,  # [n]
    second: Tensor,  # [n]
    labels: Tensor,  # [n]
    to_candidates: Tensor,  # [n, C]
    n_clusters: int,
) -> Tensor:
    """Inertia [C, K] after adding candidate c and removing centre k."""
    kept = to_candidates.minimum(first[:, None]).double()
    orphaned = to_candidates.minimum(second[:, None]).double()
    base = weighted_sum(weights, kept)
    return base[:, None] + sum_by_label(labels, (orphaned - kept) * weights[:, None], n_clusters)
