"""Exact k-means: Lloyd's algorithm over tokens that are all at hand."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.estimator import Clustering, ClusteringEstimator, not_fitted
from spt_fast.clustering.inputs import ArrayLike, as_groups, as_weights, check_int, raise_non_finite
from spt_fast.clustering.lloyd import LloydResult, lloyd
from spt_fast.clustering.seeding import kmeans_plus_plus
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import assign_accumulate

SEEDING_TOKENS = 65_536
SEEDING_TOKENS_PER_CLUSTER = 256


class KMeans(ClusteringEstimator):
    """Lloyd's algorithm from greedy k-means++ starts; scikit-learn's conventions.

    Args:
        n_clusters: K.
        n_groups: G independent problems that share K.
        init: "k-means++" (on a sample of at least 65,536 tokens), or starting centres [K, D] or [G, K, D].
        n_init: starts; the run with the lowest inertia is kept. One where `init` gives the centres.
        max_iter: Lloyd iterations at most.
        tol: stop when the squared movement of all centres falls below `tol` times the mean variance of
            the features; 0 stops only when nothing moves.
        seed: the same seed gives the same result, on any number of threads.
        backend: "auto", "native" (compiled) or "reference" (plain PyTorch).

    Attributes:
        cluster_centers_, counts_, inertia_, n_iter_: see the base class.
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        n_groups: int = 1,
        init: str | ArrayLike = "k-means++",
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(n_clusters, n_groups, seed, backend)
        self.init = init
        if isinstance(init, str) and init != "k-means++":
            raise ValueError(f"init must be 'k-means++' or an array of centres, got {init!r}")
        self.n_init = check_int("n_init", n_init, 1)
        self.max_iter = check_int("max_iter", max_iter, 1)
        if not tol >= 0:
            raise ValueError(f"tol must be >= 0, got {tol}")
        self.tol = float(tol)
        self._fitted: Clustering | None = None

    def fit(self, X: ArrayLike, sample_weight: ArrayLike | None = None) -> KMeans:
        """Cluster X.

        Args:
            X: [M, D] (one group) or [G, M, D]; float32, float16 or bfloat16 are read in place, memory
                maps too; other real dtypes are converted to float32.
            sample_weight: a weight >= 0 for each token, or None: one.

        Raises:
            NonFiniteError: X holds NaN or infinity.
            ValueError, TypeError: fewer tokens than clusters, or a shape or dtype does not fit.
        """
        tokens = as_groups(X, self.n_groups)
        if tokens.shape[1] < self.n_clusters:
            raise ValueError(
                f"n_clusters must be at most the number of tokens, {tokens.shape[1]}, got {self.n_clusters}"
            )
        weights = as_weights(sample_weight, tuple(tokens.shape[:2]), tokens.device)
        starts = self._given_centers(tokens)
        results, totals = [], []
        for g in range(self.n_groups):
            problem, variance, total = _measure(
                tokens[g], None if weights is None else weights[g], self.backend
            )
            start = None if starts is None else starts[g]
            results.append(
                self._best_run(problem, start, variance * self.tol, np.random.default_rng([self.seed, g]))
            )
            totals.append(total)
        self._fitted = _collect(results, torch.tensor(totals, dtype=torch.float64))
        return self

    def fit_predict(self, X: ArrayLike, sample_weight: ArrayLike | None = None) -> Tensor:
        """`fit(X)`, then `predict(X)`."""
        return self.fit(X, sample_weight).predict(X)

    def _result(self) -> Clustering:
        if self._fitted is None:
            raise not_fitted(self, "fit")
        return self._fitted

    def _given_centers(self, tokens: Tensor) -> Tensor | None:
        if isinstance(self.init, str):
            return None
        centers = as_groups(self.init, self.n_groups, tokens.device).float()
        expected = (self.n_groups, self.n_clusters, tokens.shape[-1])
        if tuple(centers.shape) != expected:
            raise ValueError(f"init must be {list(expected)}, got {list(centers.shape)}")
        if not bool(torch.isfinite(centers).all()):
            raise ValueError("init must be finite, but it holds NaN or infinity")
        return centers.clone()

    def _best_run(
        self, problem: WeightedTokens, start: Tensor | None, tolerance: float, rng: np.random.Generator
    ) -> LloydResult:
        if start is not None:
            return lloyd(problem, start, max_iter=self.max_iter, shift_tolerance=tolerance)
        part = problem.sample(max(SEEDING_TOKENS, SEEDING_TOKENS_PER_CLUSTER * self.n_clusters), rng)
        runs = (
            lloyd(
                problem,
                kmeans_plus_plus(part, self.n_clusters, rng),
                max_iter=self.max_iter,
                shift_tolerance=tolerance,
            )
            for _ in range(self.n_init)
        )
        return min(runs, key=lambda run: run.inertia)


def _measure(tokens: Tensor, weights: Tensor | None, backend: str) -> tuple[WeightedTokens, float, float]:
    """The problem of one group [M, D], the mean variance of its features, and its total weight."""
    anchor = tokens[:1].float()
    pass_over = assign_accumulate(
        tokens[None],
        anchor[None],
        shift=anchor,
        weights=None if weights is None else weights[None],
        backend=backend,
    )
    if not bool(torch.isfinite(pass_over.inertia).all()):
        raise_non_finite(tokens)
    total = float(pass_over.counts[0, 0])
    mean = pass_over.sums[0, 0] / total
    spread = float(pass_over.inertia[0]) / total - float((mean - anchor[0].double()).square().sum())
    problem = WeightedTokens(tokens, weights, mean.float(), backend)
    return problem, max(spread, 0.0) / tokens.shape[-1], total


def _collect(results: list[LloydResult], totals: Tensor) -> Clustering:
    return Clustering(
        centers=torch.stack([result.centers.cpu() for result in results]),
        counts=torch.stack([result.counts.cpu() for result in results]),
        inertia=torch.tensor([result.inertia for result in results], dtype=torch.float64) / totals,
        n_iter=tuple(result.n_iter for result in results),
    )
