"""Data that float32 cannot hold as they are, far from zero, tiny or huge, beside scikit-learn in float64."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as TheirKMeans
from sklearn.metrics import adjusted_rand_score

from spt_fast import KMeans, NonFiniteError, StreamingKMeans

K, D = 4, 6


def plain(rows: int = 400) -> np.ndarray:
    """Four blobs of unit width around points some ten apart."""
    rng = np.random.default_rng(0)
    return (10 * rng.normal(size=(K, D)))[rng.integers(K, size=rows)] + rng.normal(size=(rows, D))


def distances(tokens: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """By differences: scikit-learn's own lose their digits far from zero."""
    return np.linalg.norm(tokens[:, None] - centers, axis=-1)


CASES = {
    "offset-1e9": plain() + 1e9,
    "offset-by-feature": plain() + np.array([1e9, 0, -1e7, 3, 0, 1e5]),
    "size-1e-25": plain() * 1e-25,
    "size-1e+25": plain() * 1e25,
    "size-1e+150": plain() * 1e150,
    "offset-1e-16-size-1e-25": plain() * 1e-25 + 1e-16,
    "float32-size-1e-25": (plain() * 1e-25).astype(np.float32),
    "float32-subnormal": (plain() * 1e-40).astype(np.float32),
    "float32-size-1e+25": (plain() * 1e25).astype(np.float32),
    "integers": (plain() * 100).astype(np.int64) + 10**12,
}


@pytest.mark.parametrize("estimator", [KMeans, StreamingKMeans])
@pytest.mark.parametrize("data", CASES.values(), ids=CASES)
def test_results_are_scikit_learns(data: np.ndarray, estimator: Any) -> None:
    ours = estimator(K, seed=0).fit(data)
    theirs = TheirKMeans(K, n_init=5, random_state=0).fit(data.astype(np.float64))
    assert adjusted_rand_score(ours.labels_, theirs.labels_) == 1
    assert np.array_equal(ours.predict(data), ours.labels_)
    assert ours.counts_.sum() == len(data)
    assert ours.inertia_ == pytest.approx(theirs.inertia_, rel=1e-4)
    assert ours.score(data) == pytest.approx(-theirs.inertia_, rel=1e-4)
    exact = data.astype(np.float64)
    order = distances(ours.cluster_centers_.astype(np.float64), theirs.cluster_centers_).argmin(1)
    width = np.ptp(exact, axis=0).max()
    off = abs(ours.cluster_centers_ - theirs.cluster_centers_[order]).max()
    assert off <= 1e-5 * width + np.spacing(abs(exact).max())
    expected = distances(exact, theirs.cluster_centers_[order])
    np.testing.assert_allclose(ours.transform(data), expected, rtol=0, atol=1e-4 * width)
    wide = data.dtype != np.float32
    assert ours.cluster_centers_.dtype == ours.transform(data).dtype == (np.float64 if wide else np.float32)
    again = pickle.loads(pickle.dumps(ours))
    assert np.array_equal(again.predict(data), ours.labels_)


def test_a_stream_keeps_the_frame_of_its_first_batch() -> None:
    data = plain() + 1e9
    streamed = StreamingKMeans(K, seed=0)
    for batch in np.array_split(data, 5):
        streamed.partial_fit(batch)
    assert streamed.inertia_ == pytest.approx(StreamingKMeans(K, seed=0).fit(data).inertia_, rel=1e-4)
    assert abs(streamed.cluster_centers_ - 1e9).max() < 100
    with pytest.raises(ValueError, match=r"X must be torch\.float64 like before, got torch\.float32"):
        streamed.partial_fit(data.astype(np.float32))


@pytest.mark.parametrize(("factor", "row"), [(10, 7), (1e60, 0)])  # of several infinite rows the first
@pytest.mark.parametrize("method", ["partial_fit", "predict", "transform", "score"])
def test_data_beyond_the_scale_of_the_first_are_refused_in_words_that_are_true(
    method: str, factor: float, row: int
) -> None:
    data = plain()
    data[7] *= 100
    streamed = StreamingKMeans(K, seed=0).partial_fit(data * 1e-20)
    words = f"squared in float32, but row {row} is not: the first data, .* have fixed how X is .* scaled"
    with pytest.raises(NonFiniteError, match=words) as error:
        getattr(streamed, method)(data * factor)
    assert error.value.row == row
    assert streamed.n_seen_.tolist() == [len(data)]


def test_a_wide_batch_of_one_group_has_a_frame_too() -> None:
    streamed = StreamingKMeans(K, n_groups=2, seed=0)
    for group, offset in enumerate((1e9, 0.0)):
        streamed.partial_fit(torch.from_numpy(plain() + offset), group=group)
    near, far = streamed.cluster_centers_[1], streamed.cluster_centers_[0] - 1e9
    assert streamed.inertia_[0] == pytest.approx(float(streamed.inertia_[1]), rel=1e-3)
    assert abs(near).max() < 100
    assert abs(far).max() < 100


@pytest.mark.parametrize("init", ["random", "uniform", "array", "callable"])
def test_every_start_is_in_the_measure_of_the_data(init: str) -> None:
    data = plain() + 1e9
    seen: list[np.ndarray] = []

    def call(X: np.ndarray, n_clusters: int, random_state: Any) -> np.ndarray:
        seen.append(X)
        return X[:n_clusters]

    start: Any = {"array": data[:K], "callable": call}.get(init, init)
    ours = KMeans(K, init=start, seed=0, tol=0).fit(data)
    shifted = {"array": plain()[:K]}.get(init, start)
    near = KMeans(K, init=shifted, seed=0, tol=0).fit(plain())
    assert ours.inertia_ == pytest.approx(near.inertia_, rel=1e-4)
    assert all(np.array_equal(X, data) for X in seen[:1])


def test_groups_have_frames_of_their_own() -> None:
    data = np.stack([plain() + 1e9, plain() * 1e-25, plain()])
    for estimator in (KMeans, StreamingKMeans):
        ours = estimator(K, n_groups=3, seed=0).fit(data)
        alone = [estimator(K, seed=0).fit(group).inertia_ for group in data]
        np.testing.assert_allclose(ours.inertia_, alone, rtol=0.5)
        assert ours.predict(data).shape == (3, len(data[0]))


def test_ordinary_float64_is_cast_as_it_is() -> None:
    data = plain() + 30
    ours, cast = KMeans(K).fit(data), KMeans(K).fit(data.astype(np.float32))
    assert ours.cluster_centers_.dtype == np.float32
    assert np.array_equal(ours.cluster_centers_, cast.cluster_centers_)


def test_duplicates_are_still_called_so() -> None:
    for value in (0.0, 7.0, 1e9, 1e-30, 1e50):
        with pytest.warns(UserWarning, match="only 1 of n_clusters=2 clusters hold tokens"):
            fitted = KMeans(2).fit(np.full((9, 2), value))
        assert fitted.inertia_ == 0
        assert np.all(fitted.cluster_centers_[fitted.counts_ > 0] == value)


def test_what_is_not_finite_is_named_whatever_the_dtype() -> None:
    for bad in (np.nan, np.inf):
        data = plain() + 1e9
        data[7, 2] = bad
        for estimator in (KMeans, StreamingKMeans):
            with pytest.raises(NonFiniteError, match="row 7"):
                estimator(2).fit(data)
