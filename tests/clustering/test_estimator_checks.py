"""scikit-learn's common estimator checks on KMeans and StreamingKMeans, and their use by its tools.

The checks are those of the scikit-learn installed, 1.6 or later; some skip themselves without pandas.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.datasets import load_digits, load_iris, load_wine, make_blobs
from sklearn.exceptions import NotFittedError as SklearnNotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

from spt_fast import KMeans, NotFittedError, StreamingKMeans

Estimator = KMeans | StreamingKMeans


# Does not apply where the start is drawn: a token of weight 2 is one candidate, two equal tokens are two.
# scikit-learn expects its own KMeans to fail it, too; test_weights_count_as_repetitions gives the start.
EXPECTED = {"check_sample_weight_equivalence_on_dense_data": "the start is drawn from other tokens"}
# scikit-learn gives these to subclasses of its ClusterMixin only.
CLUSTERING_CHECKS = (
    "check_clusterer_compute_labels_predict",
    "check_clustering",
    "check_estimators_partial_fit_n_features",
)


def common_checks() -> Iterator[Any]:
    for estimator in (KMeans(n_clusters=2), StreamingKMeans(n_clusters=2)):
        name = type(estimator).__name__
        with warnings.catch_warnings():
            # Not a BaseEstimator: scikit-learn is no runtime dependency of this package.
            warnings.filterwarnings("ignore", message="Estimator .* does not inherit from")
            checks = [check for _, check in estimator_checks.estimator_checks_generator(estimator)]
        checks += [partial(getattr(estimator_checks, check), name) for check in CLUSTERING_CHECKS]
        for check in checks:
            reason = EXPECTED.get(check.func.__name__)
            marks = [pytest.mark.xfail(reason=reason)] if reason else []
            yield pytest.param(estimator, check, marks=marks, id=f"{name}-{check.func.__name__}")


@pytest.mark.filterwarnings("ignore:only . of n_clusters", "ignore:Estimator .* does not inherit from")
@pytest.mark.parametrize(("estimator", "check"), list(common_checks()))
def test_common_check(estimator: Estimator, check: Callable[[Estimator], None]) -> None:
    check(estimator)


# ---- Use by scikit-learn --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [KMeans, StreamingKMeans])
def test_works_in_a_pipeline_and_a_grid_search(make: type[Estimator]) -> None:
    X, y = make_blobs(300, centers=4, cluster_std=0.5, random_state=0)
    pipeline = make_pipeline(StandardScaler(), make(random_state=0))
    step = make.__name__.lower()
    search = GridSearchCV(pipeline, {f"{step}__n_clusters": [2, 4]}, cv=3).fit(X, y)
    assert search.best_params_ == {f"{step}__n_clusters": 4}
    assert search.predict(X).shape == (300,)
    assert search.transform(X).shape == (300, 4)
    assert isinstance(search.score(X), float)


def test_a_clone_has_the_arguments_and_not_the_data() -> None:
    start = np.eye(3, 2)
    model = KMeans(3, init=start, tol=0.5, seed=7).fit(np.random.default_rng(0).normal(size=(50, 2)))
    copied = clone(model)
    np.testing.assert_array_equal(copied.init, start)
    assert (copied.tol, copied.seed, copied.n_clusters) == (0.5, 7, 3)
    assert not hasattr(copied, "cluster_centers_")


def test_repr_shows_what_was_changed() -> None:
    assert repr(KMeans()) == "KMeans()"
    assert (
        repr(KMeans(3, tol=0.0, init=torch.zeros(3, 2)))
        == "KMeans(n_clusters=3, init=<array [3, 2]>, tol=0.0)"
    )
    assert repr(StreamingKMeans(20, capacity=50)) == "StreamingKMeans(n_clusters=20, capacity=50)"


def test_unknown_parameters_are_named() -> None:
    with pytest.raises(ValueError, match=r"parameters of KMeans must be among n_clusters, .*, got 'k'"):
        KMeans().set_params(k=3)


@pytest.mark.parametrize("estimator", [KMeans(2), StreamingKMeans(2)])
def test_errors_before_fit_are_scikit_learns_and_ours(estimator: Estimator) -> None:
    with pytest.raises(SklearnNotFittedError) as error:
        estimator.predict(np.zeros((3, 2)))
    assert isinstance(error.value, NotFittedError)
    assert type(pickle.loads(pickle.dumps(error.value))) is NotFittedError


# ---- Agreement with scikit-learn ------------------------------------------------------------------


def two_moving_centers() -> np.ndarray:
    """Data on which a starting centre far away loses all tokens at once."""
    X = make_blobs(200, centers=3, cluster_std=1.0, random_state=3)[0]
    return np.concatenate([X, [[40.0, 40.0]]])


DATA = {
    "iris": lambda: load_iris().data,
    "wine": lambda: StandardScaler().fit_transform(load_wine().data),
    "digits": lambda: load_digits().data,
    "blobs": lambda: make_blobs(3000, n_features=17, centers=12, cluster_std=4.0, random_state=1)[0],
    "outlier": two_moving_centers,
}


@pytest.mark.parametrize("tol", [0, 1e-4])
@pytest.mark.parametrize("name", list(DATA))
def test_the_same_start_gives_scikit_learns_centres_and_iterations(name: str, tol: float) -> None:
    X = DATA[name]().astype(np.float32)
    start = X[:: len(X) // 7][:7].copy()
    theirs = SklearnKMeans(7, init=start, n_init=1, tol=tol, max_iter=500).fit(X.astype(np.float64))
    ours = KMeans(7, init=start, tol=tol, max_iter=500).fit(X)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-4, atol=1e-4)
    assert ours.n_iter_ == theirs.n_iter_
    np.testing.assert_array_equal(ours.labels_, theirs.labels_)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)


def test_an_empty_cluster_moves_where_scikit_learn_moves_it() -> None:
    X = two_moving_centers()
    start = np.array([[0.0, 0.0], [1.0, 1.0], [1000.0, -1000.0]])
    theirs = SklearnKMeans(3, init=start, n_init=1, tol=0).fit(X)
    ours = KMeans(3, init=start, tol=0).fit(X)
    assert (theirs.cluster_centers_[2] == [40, 40]).all()
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-4, atol=1e-4)
    assert ours.n_iter_ == theirs.n_iter_


def test_weights_move_the_centres_as_scikit_learns_do() -> None:
    X, _ = make_blobs(500, n_features=5, centers=6, cluster_std=2.0, random_state=2)
    weights = np.random.default_rng(0).exponential(size=500)
    theirs = SklearnKMeans(6, init=X[:6], n_init=1, tol=0).fit(X, sample_weight=weights)
    ours = KMeans(6, init=X[:6], tol=0).fit(X, sample_weight=weights)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-4, atol=1e-4)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-5)
    assert ours.score(X, sample_weight=weights) == pytest.approx(
        theirs.score(X, sample_weight=weights), rel=1e-5
    )


# ---- Kinds of results -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [KMeans, StreamingKMeans])
def test_results_are_of_the_kind_of_the_data(make: type[Estimator]) -> None:
    X = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    from_array, from_tensor = make(3).fit(X), make(3).fit(torch.from_numpy(X))
    for name in ("cluster_centers_", "counts_", "labels_"):
        ours, theirs = getattr(from_array, name), getattr(from_tensor, name)
        assert isinstance(ours, np.ndarray)
        assert isinstance(theirs, torch.Tensor)
        np.testing.assert_array_equal(ours, theirs)
    for method in ("predict", "transform"):
        assert isinstance(getattr(from_tensor, method)(X), np.ndarray)
        assert isinstance(getattr(from_array, method)(torch.from_numpy(X)), torch.Tensor)
    assert isinstance(from_array.inertia_, float)
    assert isinstance(from_array.score(X), float)


@pytest.mark.parametrize("make", [KMeans, StreamingKMeans])
def test_labels_are_those_of_the_fitted_data_and_found_once(make: type[Estimator]) -> None:
    X = torch.randn(80, 4)
    model = make(3).fit(X)
    expected = model.predict(X)
    assert torch.equal(model.labels_, expected)
    X.zero_()
    assert torch.equal(model.labels_, expected)
    assert torch.equal(make(3).fit_predict(torch.ones(3, 2).cumsum(0)).sort().values, torch.arange(3))


@pytest.mark.parametrize("make", [KMeans, StreamingKMeans])
def test_pickles_and_copies_hold_labels_and_not_the_data(make: type[Estimator]) -> None:
    X = torch.randn(5000, 64)
    model = make(3, **({"capacity": 50} if make is StreamingKMeans else {})).fit(X)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin.labels_, model.labels_)
        assert torch.equal(twin.predict(X), model.predict(X))
    assert len(pickle.dumps(model)) < X.nbytes / 4


def test_a_stream_has_no_labels() -> None:
    model = StreamingKMeans(2).fit(torch.randn(30, 3))
    assert model.labels_.shape == (30,)
    model.partial_fit(torch.randn(30, 3))
    assert not hasattr(model, "labels_")


# ---- Where k-means starts -------------------------------------------------------------------------


def test_uniform_starts_from_the_means_of_equal_parts() -> None:
    X = torch.arange(14.0)[:, None] ** 2
    weights = torch.rand(14) + 0.1
    weights[:3] = 0  # a part without weight counts as if it had none
    model = KMeans(4, init="uniform", max_iter=1, tol=0)
    seen = [part.mean().item() for part in X.split([3, 4, 3, 4])]
    start = torch.tensor(seen)[:, None]
    expected = KMeans(4, init=start, max_iter=1, tol=0).fit(X)
    torch.testing.assert_close(model.fit(X).cluster_centers_, expected.cluster_centers_)
    start[1:, 0] = torch.tensor(
        [
            float((x[:, 0] * w).sum() / w.sum())
            for x, w in zip(X[3:].split([4, 3, 4]), weights[3:].split([4, 3, 4]), strict=True)
        ]
    )
    expected = KMeans(4, init=start, max_iter=1, tol=0).fit(X, sample_weight=weights)
    torch.testing.assert_close(
        model.fit(X, sample_weight=weights).cluster_centers_, expected.cluster_centers_
    )


def test_random_starts_are_distinct_tokens_drawn_by_weight() -> None:
    X = torch.arange(6.0)[:, None] * 100
    weights = torch.tensor([1.0, 1, 1, 1, 1, 0])
    for seed in range(20):
        found = KMeans(5, init="random", seed=seed).fit(X, sample_weight=weights).cluster_centers_
        assert found[:, 0].tolist() == [0, 100, 200, 300, 400]
    first = {float(KMeans(1, init="random", seed=s, max_iter=1).fit(X).inertia_) for s in range(5)}
    assert len(first) == 1  # one iteration from any token leads to the mean
    runs = [KMeans(3, init="random", seed=s, n_init=n).fit(X).inertia_ for s in range(5) for n in (1, 8)]
    assert all(many <= one for one, many in zip(runs[::2], runs[1::2], strict=True))


def test_a_callable_gives_the_centres_of_each_run() -> None:
    seen: list[tuple[Any, int, float]] = []

    def init(X: Any, n_clusters: int, random_state: np.random.RandomState) -> Any:
        seen.append((X, n_clusters, random_state.uniform()))
        return X[:n_clusters]

    X = torch.randn(2, 40, 3)
    model = KMeans(4, n_groups=2, init=init, n_init=3).fit(X)
    assert [len(x) for x, _, _ in seen] == [40] * 6
    assert len({number for _, _, number in seen}) == 6
    assert all(isinstance(x, torch.Tensor) for x, _, _ in seen)
    expected = KMeans(4, n_groups=2, init=X[:, :4]).fit(X)
    assert torch.equal(model.cluster_centers_, expected.cluster_centers_)
    KMeans(4, init=init).fit(X[0].numpy())
    assert isinstance(seen[-1][0], np.ndarray)


def test_random_state_is_another_name_of_seed() -> None:
    X = torch.randn(200, 5)
    for make in (KMeans, StreamingKMeans):
        named, seeded = make(6, random_state=3).fit(X), make(6, seed=3, random_state=3).fit(X)
        assert torch.equal(named.cluster_centers_, make(6, seed=3).fit(X).cluster_centers_)
        assert torch.equal(named.cluster_centers_, seeded.cluster_centers_)
        assert torch.equal(make(6).fit(X).cluster_centers_, make(6, seed=0).fit(X).cluster_centers_)
        assert not torch.equal(named.cluster_centers_, make(6).fit(X).cluster_centers_)
