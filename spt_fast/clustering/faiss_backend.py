"""Lloyd's iterations by faiss, for `KMeans(backend="faiss")`.

faiss reads a copy of the tokens: float32, in host memory, moved to their mean. What it lacks (groups, starts,
a tolerance) is ours. The same seed gives the same bits only on the same number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.lloyd import Lloyd, LloydResult, Until
from spt_fast.clustering.passes import Step, squared_movement
from spt_fast.clustering.weighted import WeightedTokens


def lloyd(
    problem: WeightedTokens, centers: Tensor, *, max_iter: int, shift_tolerance: float = 0.0
) -> LloydResult:
    """As `spt_fast.clustering.lloyd.lloyd`; a centre without tokens takes half of a large cluster's instead.

    Raises:
        ImportError: faiss is not installed.
    """
    # Around the mean, because faiss forms |x|^2 - 2 x.c + |c|^2 in float32.
    run = Lloyd(_FaissSteps(problem, len(centers)), (centers - problem.mean)[None])
    run.run(Until(max_iter, shift_tolerance))
    found = run.centers[0] + problem.mean
    assigned = problem.assign(found, with_labels=True)
    assert assigned.labels is not None
    inertia = problem.inertia(found, assigned.labels[0])
    return LloydResult(found, assigned.counts[0], inertia, run.n_iter[0])


class _FaissSteps:
    """Steps of a single run, each one call of faiss: only then can it be asked how far the centres moved."""

    def __init__(self, problem: WeightedTokens, n_clusters: int) -> None:
        faiss = _load()
        self._tokens = np.ascontiguousarray((problem.tokens.float() - problem.mean).cpu().numpy())
        self._weights = _scaled_weights(problem.weights)
        self._faiss = faiss.Kmeans(
            self._tokens.shape[1],
            n_clusters,
            niter=1,
            gpu=faiss.get_num_gpus(),
            **_every_token(len(self._tokens), n_clusters),
        )
        if hasattr(self._faiss.cp, "check_input_data_for_NaNs"):
            # The caller has looked; faiss would look in every iteration.
            self._faiss.cp.check_input_data_for_NaNs = False

    def assign(self, runs: Sequence[int], centers: Tensor) -> None:
        """Nothing to do: faiss assigns when it steps."""

    def step(self, runs: Sequence[int], centers: Tensor) -> Step:
        """Assign and move centres [1, K, D], which are around the mean."""
        self._faiss.train(self._tokens, weights=self._weights, init_centroids=centers[0].cpu().numpy())
        moved = torch.from_numpy(self._faiss.centroids.copy()).to(centers.device)
        movement = squared_movement(centers, moved[None]).tolist()
        return Step(moved[None], [float(self._faiss.obj[-1])], [False], movement)


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
