"""What KMeans and StreamingKMeans share: checked arguments, results, predict, transform, score.

Results are torch tensors where the data came as a tensor, and NumPy arrays where it came as anything else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.columns import (
    check_container,
    check_feature_names,
    chosen_container,
    in_container,
)
from spt_fast.clustering.frame import Frame, in_frames, scales
from spt_fast.clustering.inputs import (
    ArrayLike,
    as_groups,
    as_weights,
    check_width,
    raise_non_finite,
)
from spt_fast.clustering.ordered import weighted_sum
from spt_fast.clustering.parameters import Parameters, Self
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import BACKENDS, assign_accumulate, squared_distances
from spt_fast.support.arguments import check_choice, check_int
from spt_fast.support.errors import NotFittedError
from spt_fast.support.user_warnings import warn_user

_GENERATORS = (np.random.RandomState, np.random.Generator)
# For what stores results: inference tensors could not be changed afterwards, or take part in training.
outside_inference_mode = torch.inference_mode(mode=False)
Array = Any  # a tensor, or a NumPy array where the data came as something else than a tensor


@dataclass(frozen=True)
class Clustering:
    """Centres of G independent problems, on the CPU."""

    centers: Tensor  # [G, K, D] float32; float64 where float32 cannot hold them
    counts: Tensor  # [G, K] float64: tokens (or their weight) of each centre
    inertia: Tensor  # [G] float64: sum of squared distances of the tokens (times their weight)
    n_iter: tuple[int, ...]  # Lloyd iterations of each problem

    @property
    def mean_squared_distance(self) -> Tensor:
        """Of a token to its centre (per unit of weight), [G] float64."""
        return self.inertia / self.counts.sum(dim=1)


@dataclass(frozen=True)
class Settings:
    """Arguments that both estimators have, checked."""

    n_clusters: int
    n_groups: int


class ClusteringEstimator(Parameters):
    """Base of the estimators; scikit-learn's conventions, with a leading group dimension where G > 1."""

    n_clusters: Any
    n_groups: Any
    seed: Any
    random_state: Any
    backend: Any

    _backends: tuple[str, ...] = BACKENDS
    _from_tensor = True  # whether the data came as a tensor
    # What `_match` returns for the data of the last fit, until its labels are asked for.
    _unlabelled: tuple[Tensor, Tensor, Tensor] | None = None
    _labels: Tensor | None = None  # [G, M]
    _feature_names: np.ndarray | None = None  # [D], where the data came as a DataFrame
    _drawn_seed: int | None = None  # of this fit, where `random_state` is a generator

    def _settings(self) -> Settings:
        """Check the arguments, which the constructor only stores (scikit-learn's convention)."""
        check_choice("backend", self.backend, self._backends)
        _check_seeds(self.seed, self.random_state)
        return Settings(check_int("n_clusters", self.n_clusters, 1), check_int("n_groups", self.n_groups, 1))

    def _result(self) -> Clustering:
        """The clustering found; NotFittedError before any data."""
        raise NotImplementedError

    def _frames(self) -> Sequence[Frame | None]:
        """That of each group; NotFittedError before any data."""
        raise NotImplementedError

    def _seed(self) -> int:
        """The seed; a generator as `random_state` is asked once in each fit."""
        if not isinstance(self.random_state, _GENERATORS):
            return next((int(value) for value in (self.seed, self.random_state) if value is not None), 0)
        if self._drawn_seed is None:
            self._drawn_seed = _draw_seed(self.random_state)
        return self._drawn_seed

    def __sklearn_is_fitted__(self) -> bool:
        try:
            return self.n_features_in_ > 0
        except NotFittedError:
            return False

    def __getstate__(self) -> dict[str, Any]:
        """Without the data: its labels take their place in a pickle or a copy."""
        if self._unlabelled is not None:
            _ = self.labels_
        return dict(self.__dict__)

    @property
    def cluster_centers_(self) -> Array:
        """Centres [K, D], or [G, K, D] where n_groups > 1; float32.

        float64 where X was float64 or integers and float32 cannot hold them: where the data lie more than 16
        times as far from zero as they are wide, are narrower than 2**-40 or larger than 2**40.
        """
        return self._attribute(self._result().centers)

    @property
    def counts_(self) -> Array:
        """Tokens of each centre, [K] or [G, K]; float64."""
        return self._attribute(self._result().counts)

    @property
    def inertia_(self) -> Array:
        """Sum of squared distances of the tokens to their centres, scalar or [G]; float64."""
        return self._attribute(self._result().inertia)

    @property
    def n_iter_(self) -> int | tuple[int, ...]:
        """Lloyd iterations of the final run, one number per group."""
        n_iter = self._result().n_iter
        return n_iter[0] if len(n_iter) == 1 else n_iter

    @property
    def n_features_in_(self) -> int:
        """Width D of the tokens."""
        return self._result().centers.shape[-1]

    @property
    def feature_names_in_(self) -> np.ndarray:
        """Names of the columns of the DataFrame that was fitted, [D] objects; absent for other data."""
        if self._feature_names is None:
            raise AttributeError("feature_names_in_: X was no DataFrame whose columns are named by strings")
        return self._feature_names

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """Names of the columns of `transform`, such as "kmeans0": [K] objects; the argument is ignored.

        Raises:
            NotFittedError: before any data.
        """
        prefix, count = type(self).__name__.lower(), self._result().centers.shape[1]
        return np.array([f"{prefix}{number}" for number in range(count)], dtype=object)

    def set_output(self: Self, *, transform: str | None = None) -> Self:
        """What `transform` and `fit_transform` return: "pandas", "polars" or "default"; None changes nothing.

        Raises:
            ValueError: another word.
        """
        if transform is not None:
            # scikit-learn's name: its `clone` copies it.
            self._sklearn_output_config = {"transform": check_container(transform)}
        return self

    @property
    @outside_inference_mode
    def labels_(self) -> Array:
        """Index of the nearest centre of each token given to `fit`, int64: [M], or [G, M].

        Found when first asked for. Until then the estimator refers to that data, which must not change.
        """
        if self._labels is None:
            if self._unlabelled is None:
                raise _no_labels(self)
            self._labels = self._nearest(self._unlabelled[0], *self._unlabelled)
            self._unlabelled = None
        return self._attribute(self._labels)

    def predict(self, X: ArrayLike) -> Array:
        """Index of the nearest centre, int64: [M] for X [M, D], [G, M] for X [G, M, D].

        Raises:
            NotFittedError: before any data.
            NonFiniteError: X holds NaN or infinity.
            ValueError: X has another shape.
        """
        return _like(X, self._nearest(X, *self._match(X)))

    def transform(self, X: ArrayLike) -> Array:
        """Distances to every centre, [M, K], or [G, M, K] where n_groups > 1; in the dtype of the centres.

        A DataFrame where `set_output`, or scikit-learn's `set_config`, asks for one; one group only.
        """
        tokens, centers, middle = self._match(X)
        squared = squared_distances(tokens, centers, shift=middle, backend=self._kernel())
        self._refuse_non_finite(X, tokens, squared.sum())
        distances = squared.sqrt()
        if any(self._frames()):
            factors = scales(self._frames()).to(distances.device)[:, None, None]
            distances = (distances.double() * factors).to(self._result().centers.dtype)
        return self._contained(_like(X, distances), X)

    def score(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> Array:
        """Minus the sum of squared distances of X to the nearest centres, scalar or [G]; float64.

        `y` is ignored; pipelines pass it.
        """
        tokens, centers, middle = self._match(X)
        weights = as_weights(sample_weight, tuple(tokens.shape[:2]), tokens.device)
        labels = self._nearest(X, tokens, centers, middle)
        inertia = torch.tensor(
            [
                WeightedTokens(group, None if weights is None else weights[g], middle[g]).inertia(
                    centers[g], labels[g]
                )
                for g, group in enumerate(tokens)
            ],
            dtype=torch.float64,
            device="cpu",
        )
        return _like(X, (-inertia * scales(self._frames()).square()).to(tokens.device))

    def fit_predict(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> Array:
        """`fit(X)`, then `labels_`."""
        return self.fit(X, sample_weight=sample_weight).labels_

    def fit_transform(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> Array:
        """`fit(X)`, then `transform(X)`."""
        return self.fit(X, sample_weight=sample_weight).transform(X)

    def fit(
        self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None
    ) -> ClusteringEstimator:
        """Cluster X."""
        raise NotImplementedError

    def _remember(self, X: ArrayLike, names: np.ndarray | None, tokens: Tensor) -> None:
        """Note what was fitted, for the kind of the results and for `labels_`; `tokens` are in its frames."""
        self._feature_names = names
        self._from_tensor = isinstance(X, Tensor)
        self._unlabelled, self._labels = (tokens, *self._centers_for(tokens)), None

    def _contained(self, values: Array, X: ArrayLike) -> Array:
        """`values` [M, K] in the container that was asked for."""
        container = chosen_container(getattr(self, "_sklearn_output_config", {}))
        if container == "default":
            return values
        if values.ndim != 2:
            raise ValueError(f"n_groups must be 1 for a DataFrame, got {self.n_groups}")
        return in_container(values, X, container, self.get_feature_names_out())

    def _attribute(self, value: Tensor) -> Array:
        value = value[0] if len(value) == 1 else value
        return value if self._from_tensor else value.cpu().numpy()[()]

    def _kernel(self) -> str:
        """The backend for everything but the iterations of `fit`."""
        return self.backend if self.backend in BACKENDS else "auto"

    def _nearest(self, X: ArrayLike, tokens: Tensor, centers: Tensor, middle: Tensor) -> Tensor:
        assigned = assign_accumulate(tokens, centers, shift=middle, with_labels=True, backend=self._kernel())
        self._refuse_non_finite(X, tokens, assigned.inertia)
        assert assigned.labels is not None
        return assigned.labels.long()

    def _refuse_non_finite(self, X: ArrayLike, tokens: Tensor, total: Tensor) -> None:
        """NonFiniteError where `total`, which came of the tokens, X in the frames, is not finite."""
        if not bool(torch.isfinite(total).all()):
            if any(self._frames()):
                raise_non_finite(as_groups(X, len(tokens)), scaled=tokens)
            raise_non_finite(tokens)

    def _match(self, X: ArrayLike) -> tuple[Tensor, Tensor, Tensor]:
        """X [G, M, D] in the frames of the data that were fitted, and `_centers_for` it."""
        centers = self._result().centers
        check_feature_names(X, self._feature_names, type(self).__name__)
        tokens = as_groups(X, len(centers))
        check_width(tokens, centers.shape[-1], type(self).__name__)
        return in_frames(tokens, self._frames()), *self._centers_for(tokens)

    def _centers_for(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The centres [G, K, D] in the frames, and the point [G, D] that distances are computed around.

        As in the fit that is the mean of the tokens: that of the centres by their counts. The plain mean
        follows a centre that lies far off with a few tokens, and the others lose their digits.
        """
        found = self._result()
        centers = in_frames(found.centers, self._frames())
        middle = torch.stack([_mean_by_count(*group) for group in zip(centers, found.counts, strict=True)])
        return centers.to(tokens.device), middle.to(tokens.device)


def not_fitted(
    estimator: ClusteringEstimator, method: str, why: str = "has not seen any data yet"
) -> NotFittedError:
    """The error for asking `estimator` for a result before `method` was called."""
    message = f"this {type(estimator).__name__} {why}; call {method} first"
    sklearn = sys.modules.get("sklearn.exceptions")
    return NotFittedError(message) if sklearn is None else _shared_error(sklearn.NotFittedError)(message)


def _no_labels(estimator: ClusteringEstimator) -> NotFittedError:
    if not estimator.__sklearn_is_fitted__():
        return not_fitted(estimator, "fit")
    # A stream keeps a part of its tokens only.
    return not_fitted(estimator, "fit, or predict with the tokens,", "keeps no labels of partial_fit")


@cache
def _shared_error(theirs: type[Exception]) -> type[NotFittedError]:
    """Our NotFittedError that `except sklearn.exceptions.NotFittedError` catches, too; pickled as ours."""
    members = {"__reduce__": lambda error: (NotFittedError, error.args)}
    return type("NotFittedError", (NotFittedError, theirs), members)


def warn_of_empty_clusters(result: Clustering) -> None:
    """Warn where centres ended without tokens, as they do where there are fewer distinct tokens."""
    n_clusters = result.counts.shape[1]
    fewest = int((result.counts > 0).sum(dim=1).min())
    if fewest < n_clusters:
        warn_user(
            f"only {fewest} of n_clusters={n_clusters} clusters hold tokens: X has too few distinct ones "
            "in float32"
        )


def check_enough(n_tokens: int, n_clusters: int) -> None:
    """ValueError where there are fewer tokens than clusters."""
    if n_tokens < n_clusters:
        raise ValueError(
            f"n_clusters must be at most the number of tokens, n_samples={n_tokens}, got {n_clusters}"
        )


def _check_seeds(seed: Any, random_state: Any) -> None:
    """That `seed` is an integer or None, and `random_state`, its other name, too, or a generator."""
    is_generator = isinstance(random_state, _GENERATORS)
    if seed is not None:
        check_int("seed", seed, 0, "or None")
    if random_state is not None and not is_generator:
        check_int("random_state", random_state, 0, "or None, or a NumPy RandomState or Generator")
    if seed is not None and random_state is not None and (is_generator or seed != random_state):
        raise ValueError(
            f"random_state is another name of seed and must equal it, got {random_state} and seed={seed}"
        )


def _draw_seed(generator: np.random.RandomState | np.random.Generator) -> int:
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(2**31))
    return int(generator.randint(2**31, dtype=np.int64))


def _like(X: ArrayLike, value: Tensor) -> Array:
    """`value` [G, ...] without its group dimension where G is 1, as a tensor only where X is one."""
    value = value[0] if len(value) == 1 else value
    return value if isinstance(X, Tensor) else value.numpy()[()]


def _mean_by_count(centers: Tensor, counts: Tensor) -> Tensor:
    """Mean [D] of centres [K, D], each as often as it has tokens; float32."""
    return (weighted_sum(counts, centers) / weighted_sum(counts, torch.ones_like(counts))).float()
