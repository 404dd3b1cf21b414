"""Lloyd's algorithm on one clustering problem."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import Assigned


@dataclass(frozen=True)
class LloydResult:
    """Where Lloyd's algorithm ended."""

    centers: Tensor  # [K, D] float32
    counts: Tensor  # [K] float64: weight of each centre's tokens
    inertia: float  # weighted sum of squared distances to these centres
    n_iter: int  # counted as scikit-learn does, with the one that finds that nothing moves


def lloyd(
    problem: WeightedTokens,
    centers: Tensor,
    *,
    max_iter: int,
    shift_tolerance: float = 0.0,
    gain_tolerance: float = 0.0,
    relaxation: float = 1.0,
) -> LloydResult:
    """Assign (eq. 9) and move to the mean (eq. 10) until nothing moves.

    Stops early when the centres move by at most `shift_tolerance` (squared distance, summed over
    centres; scikit-learn's rule) or when an iteration lowers the inertia by less than
    `gain_tolerance` times the inertia. Counts and inertia belong to the centres returned.

    With a `relaxation` in (1, 2) each step goes that much further than to the mean, which never raises
    the inertia either and needs fewer iterations in the long tail; the last step is plain.
    """
    n_iter, previous = 0, math.inf
    assigned = problem.assign(centers)
    while n_iter < max_iter:
        inertia = float(assigned.inertia[0])
        if previous - inertia < gain_tolerance * inertia:
            break
        previous = inertia
        moved = move_centers(problem, centers, assigned)
        shift = _squared_movement(centers, moved)
        if shift == 0.0:
            n_iter += 1  # it moved nothing, which took an iteration to see
            break
        # A centre that was empty has jumped to a token, and must not jump past it.
        step = 1.0 if bool((assigned.counts[0] <= 0).any()) else relaxation
        centers, n_iter = torch.lerp(centers, moved, step), n_iter + 1
        assigned = problem.assign(centers)
        if shift <= shift_tolerance:
            break
    if relaxation != 1.0:
        centers = move_centers(problem, centers, assigned)
        assigned = problem.assign(centers)
    return LloydResult(centers, assigned.counts[0], float(assigned.inertia[0]), n_iter)


def move_centers(problem: WeightedTokens, centers: Tensor, assigned: Assigned) -> Tensor:
    """New centres [K, D]: means of their tokens; centres without tokens move to the farthest ones."""
    sums, counts = assigned.sums[0], assigned.counts[0]
    empty = counts <= 0
    if bool(empty.any()):
        sums, counts = _relocate_empty(problem, centers, sums, counts, empty)
    means = (sums / counts.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).float()
    return torch.where((counts > 0)[:, None], means, centers)


def _squared_movement(before: Tensor, after: Tensor) -> float:
    # Summed by NumPy, in one thread: when to stop must not depend on the number of threads.
    return float(np.square((after - before).double().cpu().numpy()).sum())


def _relocate_empty(
    problem: WeightedTokens, centers: Tensor, sums: Tensor, counts: Tensor, empty: Tensor
) -> tuple[Tensor, Tensor]:
    """Give each empty centre the token farthest from its own centre, as scikit-learn does.

    Tokens that lie on their centre are left there: moving them would gain nothing and never end.
    """
    assigned = problem.assign(centers, with_labels=True, with_distances=True)
    assert assigned.labels is not None
    assert assigned.distances is not None
    weights = torch.ones(len(problem), device=sums.device) if problem.weights is None else problem.weights
    gains = torch.where(weights > 0, assigned.distances[0], 0)
    slots = empty.nonzero()[:, 0]
    gain, farthest = gains.topk(min(len(slots), len(problem)))
    farthest = farthest[gain > 0]
    slots = slots[: len(farthest)]
    owners = assigned.labels[0][farthest].long()
    taken = weights[farthest].double()
    rows = problem.tokens[farthest].double() * taken[:, None]
    sums = sums.index_add(0, owners, rows, alpha=-1).index_copy(0, slots, rows)
    counts = counts.index_add(0, owners, taken, alpha=-1).index_copy(0, slots, taken)
    return sums, counts
