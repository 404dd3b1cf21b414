"""What KMeans and StreamingKMeans share: results, predict, transform, score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spt_fast.clustering.inputs import ArrayLike, as_groups, as_weights, check_int, raise_non_finite
from spt_fast.errors import NotFittedError
from spt_fast.ops.kmeans import BACKENDS, assign_accumulate, squared_distances


@dataclass(frozen=True)
class Clustering:
    """Centres of G independent problems, on the CPU."""

    centers: Tensor  # [G, K, D] float32
    counts: Tensor  # [G, K] float64: tokens (or their weight) of each centre
    inertia: Tensor  # [G] float64: mean squared distance per token (or per unit of weight)
    n_iter: tuple[int, ...]  # Lloyd iterations of each problem


class ClusteringEstimator:
    """Base of the estimators; scikit-learn's conventions, with a leading group dimension where G > 1."""

    def __init__(self, n_clusters: int, n_groups: int, seed: int, backend: str) -> None:
        self.n_clusters = check_int("n_clusters", n_clusters, 1)
        self.n_groups = check_int("n_groups", n_groups, 1)
        self.seed = check_int("seed", seed, 0)
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        self.backend = backend

    def _result(self) -> Clustering:
        """The clustering found; NotFittedError before any data."""
        raise NotImplementedError

    @property
    def cluster_centers_(self) -> Tensor:
        """Centres [K, D], or [G, K, D] where n_groups > 1; float32."""
        return self._per_group(self._result().centers)

    @property
    def counts_(self) -> Tensor:
        """Tokens of each centre, [K] or [G, K]; float64."""
        return self._per_group(self._result().counts)

    @property
    def inertia_(self) -> Tensor:
        """Sum of squared distances of the tokens to their centres, scalar or [G]; float64."""
        result = self._result()
        return self._per_group(result.inertia * result.counts.sum(dim=1))

    @property
    def n_iter_(self) -> int | tuple[int, ...]:
        """Lloyd iterations of the final run, one number per group."""
        n_iter = self._result().n_iter
        return n_iter[0] if self.n_groups == 1 else n_iter

    @property
    def n_features_in_(self) -> int:
        """Width D of the tokens."""
        return self._result().centers.shape[-1]

    def predict(self, X: ArrayLike) -> Tensor:
        """Index of the nearest centre, int64: [M] for X [M, D], [G, M] for X [G, M, D].

        Raises:
            NotFittedError: before any data.
            NonFiniteError: X holds NaN or infinity.
            ValueError: X has another shape.
        """
        tokens, centers = self._match(X)
        assigned = assign_accumulate(
            tokens, centers, shift=centers.mean(1), with_labels=True, backend=self.backend
        )
        _refuse_non_finite(tokens, assigned.inertia)
        assert assigned.labels is not None
        return self._per_group(assigned.labels.long())

    def transform(self, X: ArrayLike) -> Tensor:
        """Distances to every centre, float32: [M, K], or [G, M, K] where n_groups > 1."""
        tokens, centers = self._match(X)
        squared = squared_distances(tokens, centers, shift=centers.mean(1), backend=self.backend)
        _refuse_non_finite(tokens, squared.sum())
        return self._per_group(squared.sqrt())

    def score(self, X: ArrayLike, sample_weight: ArrayLike | None = None) -> Tensor:
        """Minus the sum of squared distances of X to the nearest centres, scalar or [G]; float64."""
        tokens, centers = self._match(X)
        weights = as_weights(sample_weight, tuple(tokens.shape[:2]), tokens.device)
        assigned = assign_accumulate(
            tokens, centers, shift=centers.mean(1), weights=weights, backend=self.backend
        )
        _refuse_non_finite(tokens, assigned.inertia)
        return self._per_group(-assigned.inertia)

    def _match(self, X: ArrayLike) -> tuple[Tensor, Tensor]:
        centers = self._result().centers
        tokens = as_groups(X, self.n_groups)
        if tokens.shape[-1] != centers.shape[-1]:
            raise ValueError(
                f"X must have {centers.shape[-1]} features like the data seen, got {tokens.shape[-1]}"
            )
        return tokens, centers.to(tokens.device)

    def _per_group(self, value: Tensor) -> Tensor:
        return value[0] if self.n_groups == 1 else value


def not_fitted(estimator: ClusteringEstimator, method: str) -> NotFittedError:
    """The error for asking `estimator` for a result before `method` was called."""
    return NotFittedError(f"this {type(estimator).__name__} has not seen any data yet; call {method} first")


def _refuse_non_finite(tokens: Tensor, total: Tensor) -> None:
    if not bool(torch.isfinite(total).all()):
        raise_non_finite(tokens)
