"""Lloyd's iterations by faiss, for `KMeans(backend="faiss")`.

faiss reads a copy of the tokens: float32, in host memory, moved to their mean. What it lacks (groups, starts,
a tolerance) is ours. The same seed gives the same bits only on the same number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.lloyd import LloydResult
from spt_fast.clustering.weighted import WeightedTokens


def lloyd(
    problem: WeightedTokens, centers: Tensor, *, max_iter: int, shift_tolerance: float = 0.0
) -> LloydResult:
    """As `spt_fast.clustering.lloyd.lloyd`; a centre without tokens takes half of a large cluster's instead.

    Each iteration is one call of faiss, which only then can be asked how far the centres moved.

    Raises:
        ImportError: faiss is not installed.
    """
    faiss = _load()
    # Around the mean, because faiss forms |x|^2 - 2 x.c + |c|^2 in float32.
    tokens = np.ascontiguousarray((problem.tokens.float() - problem.mean).cpu().numpy())
    weights = _scaled_weights(problem.weights)
    step = faiss.Kmeans(
        tokens.shape[1],
        len(centers),
        niter=1,
        gpu=faiss.get_num_gpus(),
        **_every_token(len(tokens), len(centers)),
    )
    if hasattr(step.cp, "check_input_data_for_NaNs"):
        step.cp.check_input_data_for_NaNs = False  # the caller has looked; faiss would in every iteration
    before = (centers - problem.mean).cpu().numpy()
    n_iter, shift = 0, np.inf
    while n_iter < max_iter and shift > shift_tolerance:
        step.train(tokens, weights=weights, init_centroids=before)
        shift = float(np.square((step.centroids - before).astype(np.float64)).sum())
        before, n_iter = step.centroids.copy(), n_iter + 1
    found = torch.from_numpy(before).to(centers.device) + problem.mean
    assigned = problem.assign(found)
    return LloydResult(found, assigned.counts[0], float(assigned.inertia[0]), n_iter)


def explain() -> str:
    """What `backend="faiss"` would run on, or why it cannot."""
    try:
        faiss = _load()
    except ImportError as error:
        return f"not available: {error}"
    gpus = faiss.get_num_gpus()
    return f"faiss {faiss.__version__}, {f'{gpus} GPU(s)' if gpus else 'CPU'}; only when asked for"


def _load() -> Any:
    try:
        import faiss
    except ImportError:
        raise ImportError(
            'backend="faiss" needs faiss; pip install "spt_fast[faiss]" adds it for the CPU, '
            '"spt_fast[faiss-gpu]" for GPUs'
        ) from None
    return faiss


def _every_token(n_tokens: int, n_clusters: int) -> dict[str, Any]:
    """Settings under which faiss leaves no token out, and does not complain about few."""
    return {"min_points_per_centroid": 1, "max_points_per_centroid": -(-n_tokens // n_clusters)}


def _scaled_weights(weights: Tensor | None) -> np.ndarray | None:
    """Weights of mean 1: faiss never ends where an empty cluster can take from none that weighs over 1."""
    if weights is None:
        return None
    return (weights.double() / weights.double().mean()).float().cpu().numpy()
