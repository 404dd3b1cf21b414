"""A script written for scikit-learn's estimators runs with ours: arguments, generators, DataFrames."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import config_context
from sklearn.base import clone
from sklearn.cluster import KMeans as SklearnKMeans
from sklearn.cluster import MiniBatchKMeans
from sklearn.datasets import make_blobs

from spt_fast import KMeans, NotFittedError, StreamingKMeans

Estimator = KMeans | StreamingKMeans
BOTH = pytest.mark.parametrize("make", [KMeans, StreamingKMeans])
NAMES = ["length", "width", "height"]


class Frame:
    """What is asked of a DataFrame: names of columns, an index, and numbers."""

    def __init__(self, values: Any, columns: list[Any] | None = None, index: Any = None, **_: Any) -> None:
        self.values, self.columns, self.index = np.asarray(values), columns, index
        self.shape = self.values.shape

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.values, dtype)


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(60, 3)) * [1, 10, 100]


def test_every_argument_of_scikit_learns_kmeans_is_taken(rows: np.ndarray) -> None:
    theirs = SklearnKMeans(
        n_clusters=4, init="random", n_init="auto", max_iter=50, tol=1e-3, verbose=0,
        random_state=np.random.RandomState(0), copy_x=False, algorithm="elkan",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = KMeans(**theirs.get_params()).fit(rows)
        KMeans(**SklearnKMeans().get_params()).fit(rows)
    assert ours.inertia_ <= 1.5 * theirs.fit(rows).inertia_


def test_what_a_stream_ignores_of_mini_batch_kmeans_it_names(rows: np.ndarray) -> None:
    theirs = MiniBatchKMeans(4, batch_size=32, max_iter=20, n_init=3, verbose=0, random_state=0).get_params()
    shared = {name: value for name, value in theirs.items() if name in StreamingKMeans().get_params()}
    with pytest.warns(UserWarning, match="StreamingKMeans ignores batch_size, max_iter, n_init: ") as caught:
        ours = StreamingKMeans(**shared).fit(rows)
    assert len(caught) == 1
    assert np.array_equal(
        ours.cluster_centers_, StreamingKMeans(4, random_state=0).fit(rows).cluster_centers_
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n_init": "all"}, ValueError, "n_init must be an integer >= 1 or 'auto', got 'all'"),
        ({"n_init": 0}, ValueError, "n_init must be an integer >= 1 or 'auto', got 0"),
        ({"algorithm": "full"}, ValueError, "algorithm must be one of 'lloyd', 'elkan', got 'full'"),
        ({"copy_x": 1}, TypeError, "copy_x must be True or False"),
        ({"verbose": -1}, ValueError, "verbose must be an integer >= 0"),
        ({"max_iter": -1}, ValueError, "max_iter must be an integer >= 0"),
        ({"random_state": "0"}, TypeError, "random_state must be .* or a NumPy RandomState or Generator"),
        ({"random_state": np.random.RandomState(0), "seed": 1}, ValueError, "must equal it"),
    ],
)
def test_wrong_arguments_are_named(
    rows: np.ndarray, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        KMeans(2, **options).fit(rows)


def test_auto_takes_ten_starts_where_they_are_plain_draws(rows: np.ndarray) -> None:
    asked = []

    def init(X: np.ndarray, n_clusters: int, random_state: np.random.RandomState) -> np.ndarray:
        asked.append(random_state)
        return X[:n_clusters]

    KMeans(3, init=init).fit(rows)
    assert len(asked) == 10
    ten = KMeans(5, init="random", n_init=10).fit(rows)
    assert KMeans(5, init="random").fit(rows).inertia_ == ten.inertia_
    assert KMeans(5).fit(rows).inertia_ == KMeans(5, n_init=1).fit(rows).inertia_


def test_verbose_prints_every_start(rows: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    best = KMeans(3, n_init=2, verbose=True).fit(rows)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[2].partition(":")[0] for line in lines] == [
        " group 0, start 1", " group 0, start 2"
    ]  # fmt: skip
    assert min(float(line.rpartition(" ")[2]) for line in lines) == pytest.approx(best.inertia_, rel=1e-5)
    KMeans(3).fit(rows)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("shape", ["K", "GK"])
def test_no_iterations_assign_to_the_centres_given(shape: str) -> None:
    X = torch.randn(2, 50, 4)
    start = X[:, 3:6].clone()
    model = KMeans(3, n_groups=2, init=start, max_iter=0)
    X, start = (X, start) if shape == "GK" else (X[0], start[0])
    model = model.set_params(n_groups=2 if shape == "GK" else 1, init=start).fit(X)
    assert torch.equal(model.cluster_centers_, start)
    expected = torch.cdist(X.double(), start.double()).square()
    assert torch.equal(model.labels_, expected.argmin(-1))
    torch.testing.assert_close(
        torch.as_tensor(model.inertia_), expected.min(-1).values.sum(-1), rtol=1e-5, atol=0
    )
    assert set(np.ravel(model.n_iter_)) == {0}


@BOTH
@pytest.mark.parametrize("generator", [np.random.RandomState, np.random.default_rng])
def test_a_generator_gives_another_start_in_each_fit(make: type[Estimator], generator: Any) -> None:
    X, _ = make_blobs(400, n_features=8, centers=60, random_state=0)
    once = make(12, random_state=generator(7))
    found = [once.fit(X).cluster_centers_ for _ in range(2)]
    again = make(12, random_state=generator(7))
    assert not np.array_equal(*found)
    assert all(np.array_equal(centers, again.fit(X).cluster_centers_) for centers in found)


def test_a_generator_is_asked_once_for_a_stream() -> None:
    X = torch.randn(300, 6)
    model = StreamingKMeans(8, random_state=np.random.RandomState(3))
    for batch in X.split(100):
        model.partial_fit(batch)
    twin = StreamingKMeans(8, random_state=int(np.random.RandomState(3).randint(2**31, dtype=np.int64)))
    for batch in X.split(100):
        twin.partial_fit(batch)
    for count in (8, 5):
        assert torch.equal(model.solve(count).centers, twin.solve(count).centers)


# ---- DataFrames -----------------------------------------------------------------------------------


@BOTH
def test_names_of_columns_are_kept_and_compared(make: type[Estimator], rows: np.ndarray) -> None:
    model = make(3).fit(Frame(rows, NAMES))
    assert model.feature_names_in_.tolist() == NAMES
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        labels = model.predict(Frame(rows, NAMES))
    reordered = Frame(rows[:, ::-1], NAMES[::-1])
    for method in (model.predict, model.transform, model.score):
        with pytest.raises(ValueError, match="must be in the same order as they were in fit"):
            method(reordered)
    with pytest.raises(ValueError, match=r"unseen at fit time:\n- depth\n.*now missing:\n- height"):
        model.predict(Frame(rows, ["length", "width", "depth"]))
    with pytest.warns(UserWarning, match=f"{make.__name__} was fitted with feature names"):
        assert np.array_equal(model.predict(rows), labels)
    model.fit(rows)
    assert not hasattr(model, "feature_names_in_")
    with pytest.warns(UserWarning, match="was fitted without feature names"):
        model.predict(Frame(rows, NAMES))
    with pytest.raises(TypeError, match="string names"):
        model.fit(Frame(rows, ["length", 1, 2]))
    assert not hasattr(model.fit(Frame(rows, [0, 1, 2])), "feature_names_in_")


def test_every_batch_of_a_stream_has_the_names_of_the_first(rows: np.ndarray) -> None:
    model = StreamingKMeans(2).partial_fit(Frame(rows, NAMES))
    with pytest.raises(ValueError, match="same order"):
        model.partial_fit(Frame(rows, NAMES[::-1]))
    assert int(model.partial_fit(Frame(rows, NAMES)).n_seen_) == 2 * len(rows)
    assert model.feature_names_in_.tolist() == NAMES


@BOTH
def test_transform_returns_the_container_that_was_asked_for(
    make: type[Estimator], rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    if importlib.util.find_spec("pandas") is None:
        monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=Frame))
    pandas = sys.modules.get("pandas") or importlib.import_module("pandas")
    X = pandas.DataFrame(rows, columns=NAMES, index=np.arange(60) + 7)
    model = make(2).fit(X)
    plain = model.transform(X)
    table = clone(model).set_output(transform="pandas").fit_transform(X)
    assert isinstance(plain, np.ndarray)
    assert isinstance(table, pandas.DataFrame)
    assert list(table.columns) == model.get_feature_names_out().tolist()
    assert list(table.columns) == [f"{make.__name__.lower()}{number}" for number in range(2)]
    assert list(table.index) == list(X.index)
    np.testing.assert_array_equal(np.asarray(table), plain)
    with config_context(transform_output="pandas"):
        assert isinstance(model.transform(X), pandas.DataFrame)
    assert isinstance(model.set_output(transform="default").transform(X), np.ndarray)
    assert isinstance(make(2).fit(rows).set_output(transform="pandas").transform(rows), pandas.DataFrame)


def test_an_output_that_cannot_be_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="output config must be in"):
        KMeans().set_output(transform="arrow")
    with pytest.raises(NotFittedError):
        KMeans().get_feature_names_out()
    groups = KMeans(2, n_groups=2).fit(np.stack([rows, rows])).set_output(transform="pandas")
    with pytest.raises(ValueError, match="n_groups must be 1 for a DataFrame, got 2"):
        groups.transform(np.stack([rows, rows]))
