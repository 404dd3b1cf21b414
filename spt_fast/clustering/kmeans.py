"""Exact k-means: Lloyd's algorithm over tokens that are all at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering import faiss_backend
from spt_fast.clustering.chunks import OneChunk
from spt_fast.clustering.columns import feature_names
from spt_fast.clustering.estimator import (
    Clustering,
    ClusteringEstimator,
    check_enough,
    not_fitted,
    outside_inference_mode,
    warn_of_empty_clusters,
)
from spt_fast.clustering.frame import Frame, find_frame, in_frame, out_of_frames, scales
from spt_fast.clustering.inputs import ArrayLike, as_groups, as_weights, raise_non_finite
from spt_fast.clustering.lloyd import MAX_ITER, N_INIT, TOL, LloydResult, lloyd
from spt_fast.clustering.moments import moments
from spt_fast.clustering.seeding import equal_parts, kmeans_plus_plus, random_tokens
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import BACKENDS, TOKEN_DTYPES
from spt_fast.support.arguments import check_bool, check_choice, check_int, check_number

SEEDING_TOKENS = 65_536
SEEDING_TOKENS_PER_CLUSTER = 256
# Between them, float32 holds the squares of distances with all of their digits.
LEAST_VARIANCE, MOST_VARIANCE = 2.0**-60, 2.0**80
AUTO_STARTS = 10  # scikit-learn's, where starts are plain draws
ALGORITHMS = ("lloyd", "elkan")  # scikit-learn's
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
            "auto", as in scikit-learn: 10 for "random" and callables, else 1.
        max_iter: Lloyd iterations at most; 0 keeps the start, and assigns the tokens to it.
        tol: stop when the squared movement of all centres falls below `tol` times the mean variance of
            the features; 0 stops only when nothing moves.
        seed: the same seed gives the same result, on any number of threads; None: 0.
        random_state: scikit-learn's name for `seed`; also a NumPy RandomState or Generator, from which each
            `fit` draws a seed.
        verbose: print a line for each start.
        copy_x, algorithm: taken for scikit-learn's sake, without effect: X is never changed, and "lloyd" and
            "elkan" name two ways to the same result, ours being a third.
        backend: "auto", "native" (compiled), "reference" (plain PyTorch) or "faiss", which iterates by
            faiss where that is installed: on its GPUs if it sees any, else on the CPU.

    Attributes:
        cluster_centers_, counts_, inertia_, n_iter_, labels_, n_features_in_, feature_names_in_: see the base
            class. Centres and distances are float32 also where X is float64, unlike scikit-learn's, but for
            data that float32 cannot hold.
    """

    _backends = (*BACKENDS, "faiss")
    _fitted: Clustering | None = None
    _found_frames: tuple[Frame | None, ...] = ()

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        n_groups: int = 1,
        init: str | ArrayLike = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = MAX_ITER,
        tol: float = TOL,
        seed: int | None = None,
        random_state: int | np.random.RandomState | np.random.Generator | None = None,
        verbose: int | bool = 0,
        copy_x: bool = True,
        algorithm: str = "lloyd",
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
        self.verbose = verbose
        self.copy_x = copy_x
        self.algorithm = algorithm
        self.backend = backend

    @outside_inference_mode
    def fit(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> KMeans:
        """Cluster X.

        Args:
            X: [M, D] (one group) or [G, M, D]; float32, float16 or bfloat16 are read in place, memory
                maps too; other real dtypes are converted to float32. Where float32 cannot tell them apart,
                or cannot square their distances, a copy is moved and scaled first.
            y: ignored; pipelines pass it.
            sample_weight: a weight >= 0 for each token, [M] or [G, M]; None: one.

        Raises:
            NonFiniteError: X holds NaN or infinity.
            ValueError, TypeError: an argument, also of the constructor, is not what it must be.
            ImportError: `backend` is "faiss", which is not installed.
        """
        settings = self._settings()
        n_init, max_iter = self._number_of_starts(), check_int("max_iter", self.max_iter, 0)
        tol = check_number("tol", self.tol, 0)
        verbose = self._check_the_rest()
        names = feature_names(X)
        iterate = faiss_backend.lloyd if self.backend == "faiss" else partial(lloyd, exact_inertia=True)
        given = as_groups(X, settings.n_groups)
        check_enough(given.shape[1], settings.n_clusters)
        weights = as_weights(sample_weight, tuple(given.shape[:2]), given.device)
        start = self._start_maker(given, settings.n_clusters, isinstance(X, Tensor))
        self._drawn_seed = None
        seed = self._seed()
        problems, results = [], []
        for g in range(settings.n_groups):
            rng = np.random.default_rng([seed, g])
            own = None if weights is None else weights[g]
            problem = _measure(given[g], own, self._kernel(), first_row=g * given.shape[1])
            runs = (
                iterate(problem.tokens, centers, max_iter=max_iter, shift_tolerance=problem.variance * tol)
                for centers in start(problem, g, n_init, rng)
            )
            problems.append(problem)
            shown = _printed(runs, g, problem.frame) if verbose else runs
            results.append(min(shown, key=lambda run: run.inertia))
        self._found_frames = tuple(problem.frame for problem in problems)
        self._fitted = _collect(results, self._found_frames)
        self._remember(X, names, _together([problem.tokens.tokens for problem in problems], given))
        warn_of_empty_clusters(self._fitted)
        return self

    def _result(self) -> Clustering:
        if self._fitted is None:
            raise not_fitted(self, "fit")
        return self._fitted

    def _frames(self) -> tuple[Frame | None, ...]:
        return self._found_frames

    def _number_of_starts(self) -> int:
        if isinstance(self.n_init, str):
            if self.n_init != "auto":
                raise ValueError(f"n_init must be an integer >= 1 or 'auto', got {self.n_init!r}")
            is_random = isinstance(self.init, str) and self.init == "random"
            return AUTO_STARTS if is_random or callable(self.init) else N_INIT
        return check_int("n_init", self.n_init, 1, "or 'auto'")

    def _check_the_rest(self) -> bool:
        """Whether to print each start; checks what else scikit-learn has arguments for."""
        check_bool("copy_x", self.copy_x)
        check_choice("algorithm", self.algorithm, ALGORITHMS)
        if isinstance(self.verbose, bool):
            return self.verbose
        return check_int("verbose", self.verbose, 0, "or a bool") > 0

    def _start_maker(self, given: Tensor, n_clusters: int, from_tensor: bool) -> StartMaker:
        """The function (problem, group, n_init, rng) -> starting centres that `init` stands for.

        `given` [G, M, D] are the tokens as the user has them, outside of the frames.
        """
        init = self.init
        if callable(init):
            return lambda problem, g, n_init, rng: (
                _ask_for_centers(init, given[g], problem, n_clusters, rng, from_tensor) for _ in range(n_init)
            )
        if not isinstance(init, str):
            shape = (len(given), n_clusters, given.shape[-1])
            centers = _check_centers(init, shape, given.device)
            return lambda problem, g, n_init, rng: iter([_centers_in(problem.frame, centers[g])])
        if init not in INITS:
            raise ValueError(
                f"init must be {', '.join(map(repr, INITS))}, an array of centres or a callable, got {init!r}"
            )
        if init == "uniform":
            return lambda problem, g, n_init, rng: iter([equal_parts(problem.tokens, n_clusters)])
        if init == "random":
            return lambda problem, g, n_init, rng: (
                random_tokens(problem.tokens, n_clusters, rng) for _ in range(n_init)
            )
        return lambda problem, g, n_init, rng: _greedy_starts(problem.tokens, n_clusters, n_init, rng)


class _Problem(NamedTuple):
    """One group's tokens, in its frame, and the mean variance of their features."""

    tokens: WeightedTokens
    variance: float
    frame: Frame | None


StartMaker = Callable[[_Problem, int, int, np.random.Generator], Iterator[Tensor]]


def _printed(runs: Iterable[LloydResult], group: int, frame: Frame | None) -> Iterator[LloydResult]:
    """The runs, each printed when it ends."""
    scale = float(scales([frame])[0]) ** 2
    for number, run in enumerate(runs, start=1):
        inertia = run.inertia * scale
        print(f"KMeans: group {group}, start {number}: {run.n_iter} iterations, inertia {inertia:.6g}")
        yield run


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
    given: Tensor,
    problem: _Problem,
    n_clusters: int,
    rng: np.random.Generator,
    from_tensor: bool,
) -> Tensor:
    """Centres [K, D] from the user's function, which sees the kind of array that `fit` was given."""
    tokens = problem.tokens.tokens if problem.frame is None else given
    random_state = np.random.RandomState(int(rng.integers(2**32)))
    centers = init(tokens if from_tensor else tokens.numpy(), n_clusters, random_state=random_state)
    shape = (1, n_clusters, tokens.shape[-1])
    return _centers_in(problem.frame, _check_centers(centers, shape, tokens.device)[0])


def _check_centers(init: ArrayLike, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Starting centres [G, K, D]."""
    centers = as_groups(init, shape[0], device, "init")
    if tuple(centers.shape) != shape:
        raise ValueError(f"init must be {list(shape)}, got {list(centers.shape)}")
    _check_finite_centers(centers)
    return centers


def _centers_in(frame: Frame | None, centers: Tensor) -> Tensor:
    """A float32 copy of starting centres [K, D], in the frame of the data."""
    inside = in_frame(centers, frame).float()
    _check_finite_centers(inside)
    return inside.clone()


def _check_finite_centers(centers: Tensor) -> None:
    if not bool(torch.isfinite(centers).all()):
        raise ValueError("init must be finite, but it holds NaN or infinity")


def _measure(given: Tensor, weights: Tensor | None, backend: str, first_row: int) -> _Problem:
    """The problem of one group's tokens [M, D], of which errors number the first `first_row`.

    Those that kernels read in place are looked at for a frame only if they seem to need one.
    """
    frame = None if given.dtype in TOKEN_DTYPES else find_frame(given, first_row)
    tokens = in_frame(given, frame)
    found = moments(OneChunk(tokens), weights, backend=backend)
    if frame is None and not LEAST_VARIANCE <= found.variance <= MOST_VARIANCE:
        frame = find_frame(given, first_row)
        if frame is not None:
            tokens = frame.inside(given)
            found = moments(OneChunk(tokens), weights, backend=backend)
    if not math.isfinite(found.variance):
        raise_non_finite(tokens, first_row)
    return _Problem(WeightedTokens(tokens, weights, found.mean, backend), found.variance, frame)


def _together(groups: list[Tensor], given: Tensor) -> Tensor:
    """Tokens [G, M, D] of all groups; without a copy where each is as it was given, or is alone."""
    if all(group.data_ptr() == one.data_ptr() for group, one in zip(groups, given, strict=True)):
        return given
    return groups[0][None] if len(groups) == 1 else torch.stack([group.float() for group in groups])


def _collect(results: list[LloydResult], frames: Sequence[Frame | None]) -> Clustering:
    inertia = torch.tensor([result.inertia for result in results], dtype=torch.float64, device="cpu")
    return Clustering(
        centers=out_of_frames(torch.stack([result.centers.cpu() for result in results]), frames),
        counts=torch.stack([result.counts.cpu() for result in results]),
        inertia=inertia * scales(frames).square(),
        n_iter=tuple(result.n_iter for result in results),
    )
