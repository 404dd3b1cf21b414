"""Exact k-means: Lloyd's algorithm over tokens that are all at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering import faiss_backend
from spt_fast.clustering.chunks import OneChunk
from spt_fast.clustering.estimator import (
    Clustering,
    ClusteringEstimator,
    check_enough,
    not_fitted,
    warn_of_empty_clusters,
)
from spt_fast.clustering.inputs import ArrayLike, as_groups, as_weights, raise_non_finite
from spt_fast.clustering.lloyd import MAX_ITER, N_INIT, TOL, LloydResult, lloyd
from spt_fast.clustering.moments import moments
from spt_fast.clustering.seeding import equal_parts, kmeans_plus_plus, random_tokens
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import BACKENDS
from spt_fast.support.arguments import check_int, check_number

SEEDING_TOKENS = 65_536
SEEDING_TOKENS_PER_CLUSTER = 256
INITS = ("k-means++", "random", "uniform")


class KMeans(ClusteringEstimator):
    """Lloyd's algorithm; scikit-learn's conventions.

    Arguments are checked by `fit`. Results are torch tensors where X was one, else NumPy arrays.

    Args:
        n_clusters: K.
        n_groups: G independent problems that share K.
        init: where Lloyd starts. "k-means++": greedy, on a sample of at least 65,536 tokens; "random": K of
            the tokens; "uniform": the means of K equal consecutive parts of the data; an array of centres
            [K, D] or [G, K, D]; or a callable that returns [K, D] for (X [M, D], n_clusters,
            random_state=numpy.random.RandomState), called for each group.
        n_init: starts; the run with the lowest inertia is kept. One where `init` leaves nothing to chance.
        max_iter: Lloyd iterations at most.
        tol: stop when the squared movement of all centres falls below `tol` times the mean variance of
            the features; 0 stops only when nothing moves.
        seed: the same seed gives the same result, on any number of threads; None: 0.
        random_state: scikit-learn's name for `seed`.
        backend: "auto", "native" (compiled), "reference" (plain PyTorch) or "faiss", which iterates by
            faiss where that is installed: on its GPUs if it sees any, else on the CPU.

    Attributes:
        cluster_centers_, counts_, inertia_, n_iter_, labels_, n_features_in_: see the base class.
    """

    _backends = (*BACKENDS, "faiss")
    _fitted: Clustering | None = None

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        n_groups: int = 1,
        init: str | ArrayLike = "k-means++",
        n_init: int = N_INIT,
        max_iter: int = MAX_ITER,
        tol: float = TOL,
        seed: int | None = None,
        random_state: int | None = None,
        backend: str = "auto",
    ) -> None:
        self.n_clusters = n_clusters
        self.n_groups = n_groups
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.seed = seed
        self.random_state = random_state
        self.backend = backend

    def fit(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> KMeans:
        """Cluster X.

        Args:
            X: [M, D] (one group) or [G, M, D]; float32, float16 or bfloat16 are read in place, memory
                maps too; other real dtypes are converted to float32.
            y: ignored; pipelines pass it.
            sample_weight: a weight >= 0 for each token, [M] or [G, M]; None: one.

        Raises:
            NonFiniteError: X holds NaN or infinity.
            ValueError, TypeError: an argument, also of the constructor, is not what it must be.
            ImportError: `backend` is "faiss", which is not installed.
        """
        settings = self._settings()
        n_init, max_iter = check_int("n_init", self.n_init, 1), check_int("max_iter", self.max_iter, 1)
        tol = check_number("tol", self.tol, 0)
        iterate = faiss_backend.lloyd if self.backend == "faiss" else lloyd
        tokens = as_groups(X, settings.n_groups)
        check_enough(tokens.shape[1], settings.n_clusters)
        weights = as_weights(sample_weight, tuple(tokens.shape[:2]), tokens.device)
        start = self._start_maker(tokens, settings.n_clusters, isinstance(X, Tensor))
        results = []
        for g in range(settings.n_groups):
            rng = np.random.default_rng([settings.seed, g])
            problem, variance = _measure(tokens[g], None if weights is None else weights[g], self._kernel())
            runs = (
                iterate(problem, centers, max_iter=max_iter, shift_tolerance=variance * tol)
                for centers in start(problem, g, n_init, rng)
            )
            results.append(min(runs, key=lambda run: run.inertia))
        self._fitted = _collect(results)
        self._remember(X, tokens, self._fitted)
        warn_of_empty_clusters(self._fitted)
        return self

    def _result(self) -> Clustering:
        if self._fitted is None:
            raise not_fitted(self, "fit")
        return self._fitted

    def _start_maker(self, tokens: Tensor, n_clusters: int, from_tensor: bool) -> StartMaker:
        """The function (problem, group, n_init, rng) -> starting centres that `init` stands for."""
        init = self.init
        if callable(init):
            return lambda problem, g, n_init, rng: (
                _ask_for_centers(init, problem, n_clusters, rng, from_tensor) for _ in range(n_init)
            )
        if not isinstance(init, str):
            given = _check_centers(init, (len(tokens), n_clusters, tokens.shape[-1]), tokens.device)
            return lambda problem, g, n_init, rng: iter([given[g]])
        if init not in INITS:
            raise ValueError(
                f"init must be {', '.join(map(repr, INITS))}, an array of centres or a callable, got {init!r}"
            )
        if init == "uniform":
            return lambda problem, g, n_init, rng: iter([equal_parts(problem, n_clusters)])
        if init == "random":
            return lambda problem, g, n_init, rng: (
                random_tokens(problem, n_clusters, rng) for _ in range(n_init)
            )
        return lambda problem, g, n_init, rng: _greedy_starts(problem, n_clusters, n_init, rng)


StartMaker = Callable[[WeightedTokens, int, int, np.random.Generator], Iterator[Tensor]]


def _greedy_starts(
    problem: WeightedTokens, n_clusters: int, n_init: int, rng: np.random.Generator
) -> Iterator[Tensor]:
    sample = problem.sample(seeding_size(n_clusters), rng)
    return (kmeans_plus_plus(sample, n_clusters, rng) for _ in range(n_init))


def seeding_size(n_clusters: int) -> int:
    """Tokens of the sample on which k-means++ draws its starts."""
    return max(SEEDING_TOKENS, SEEDING_TOKENS_PER_CLUSTER * n_clusters)


def _ask_for_centers(
    init: Callable[..., ArrayLike],
    problem: WeightedTokens,
    n_clusters: int,
    rng: np.random.Generator,
    from_tensor: bool,
) -> Tensor:
    """Centres [K, D] from the user's function, which sees the kind of array that `fit` was given."""
    tokens = problem.tokens
    random_state = np.random.RandomState(int(rng.integers(2**32)))
    centers = init(tokens if from_tensor else tokens.numpy(), n_clusters, random_state=random_state)
    return _check_centers(centers, (1, n_clusters, tokens.shape[-1]), tokens.device)[0]


def _check_centers(init: ArrayLike, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """A float32 copy [G, K, D] of starting centres."""
    centers = as_groups(init, shape[0], device, "init").float()
    if tuple(centers.shape) != shape:
        raise ValueError(f"init must be {list(shape)}, got {list(centers.shape)}")
    if not bool(torch.isfinite(centers).all()):
        raise ValueError("init must be finite, but it holds NaN or infinity")
    return centers.clone()


def _measure(tokens: Tensor, weights: Tensor | None, backend: str) -> tuple[WeightedTokens, float]:
    """The problem of one group's tokens [M, D], and the mean variance of its features."""
    found = moments(OneChunk(tokens), weights, backend=backend)
    if not math.isfinite(found.variance):
        raise_non_finite(tokens)
    return WeightedTokens(tokens, weights, found.mean, backend), found.variance


def _collect(results: list[LloydResult]) -> Clustering:
    return Clustering(
        centers=torch.stack([result.centers.cpu() for result in results]),
        counts=torch.stack([result.counts.cpu() for result in results]),
        inertia=torch.tensor([result.inertia for result in results], dtype=torch.float64),
        n_iter=tuple(result.n_iter for result in results),
    )
