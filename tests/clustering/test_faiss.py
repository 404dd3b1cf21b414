"""KMeans(backend="faiss"): the same attributes and starts as our own iterations, and only when asked for.

Most of it needs faiss; what happens without it is tested everywhere.
"""

from __future__ import annotations

import importlib.abc
import sys

import numpy as np
import pytest
import torch

from spt_fast import KMeans, NonFiniteError, StreamingKMeans
from spt_fast.commands import doctor


def blobs(rows: int = 1500, width: int = 13, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(9, width, generator=generator) * 3
    labels = torch.randint(9, (rows,), generator=generator)
    return middles[labels] + torch.randn(rows, width, generator=generator)


@pytest.fixture
def faiss() -> object:
    """faiss; the warnings of its generated wrapper are none of ours."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("faiss")


@pytest.mark.usefixtures("faiss")
@pytest.mark.parametrize("tol", [0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ends_where_our_iterations_end(dtype: torch.dtype, tol: float) -> None:
    tokens = blobs().to(dtype)
    theirs = KMeans(9, init=tokens[:9], tol=tol, backend="faiss").fit(tokens)
    ours = KMeans(9, init=tokens[:9], tol=tol).fit(tokens)
    torch.testing.assert_close(theirs.cluster_centers_, ours.cluster_centers_, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs.inertia_, ours.inertia_, rtol=1e-5, atol=0)
    assert torch.equal(theirs.labels_, ours.labels_)
    assert torch.equal(theirs.counts_, ours.counts_)
    assert theirs.n_iter_ == ours.n_iter_


@pytest.mark.usefixtures("faiss")
def test_counts_every_token_of_a_large_set() -> None:
    # faiss by itself looks at no more than 256 tokens per centre.
    tokens = torch.cat([torch.zeros(2000, 2), torch.ones(2000, 2)])
    model = KMeans(2, init=torch.tensor([[0.0, 0.0], [1.0, 0.9]]), backend="faiss").fit(tokens)
    assert model.cluster_centers_.tolist() == [[0, 0], [1, 1]]
    rare = torch.zeros(4000, 1)
    rare[1234] = 1.0
    assert float(KMeans(1, backend="faiss").fit(rare).cluster_centers_) == pytest.approx(1 / 4000, rel=1e-3)


@pytest.mark.usefixtures("faiss")
def test_tokens_far_from_zero_keep_their_centres() -> None:
    tokens = blobs() + 1e4  # float32 is 1e-3 apart there
    theirs, ours = (KMeans(9, init=tokens[:9], backend=name).fit(tokens) for name in ("faiss", "auto"))
    torch.testing.assert_close(theirs.cluster_centers_ - 1e4, ours.cluster_centers_ - 1e4, rtol=0, atol=5e-3)


@pytest.mark.usefixtures("faiss")
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_weights_are_passed_on_whatever_their_scale(scale: float) -> None:
    tokens, weights = blobs(), torch.rand(1500) + 0.1
    # The far start loses its tokens: faiss then splits a cluster, which never ends with weights below 1.
    start = torch.cat([tokens[:4], torch.full((1, 13), 1e3)])
    far = KMeans(5, init=start, backend="faiss").fit(tokens, sample_weight=weights * scale)
    assert (far.counts_ > 0).all()
    theirs = KMeans(4, init=tokens[:4], tol=0, backend="faiss").fit(tokens, sample_weight=weights * scale)
    ours = KMeans(4, init=tokens[:4], tol=0).fit(tokens, sample_weight=weights * scale)
    torch.testing.assert_close(theirs.cluster_centers_, ours.cluster_centers_, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("faiss")
@pytest.mark.parametrize("init", ["k-means++", "random", "uniform"])
def test_the_same_seed_gives_the_same_groups(init: str) -> None:
    tokens = torch.stack([blobs(seed=s) for s in range(2)])
    runs = [KMeans(6, n_groups=2, init=init, n_init=2, seed=4, backend="faiss").fit(tokens) for _ in range(2)]
    assert torch.equal(runs[0].cluster_centers_, runs[1].cluster_centers_)
    assert runs[0].cluster_centers_.shape == (2, 6, 13)
    assert runs[0].predict(tokens).shape == (2, 1500)
    assert runs[0].transform(tokens).shape == (2, 1500, 6)
    torch.testing.assert_close(runs[0].score(tokens), -runs[0].inertia_, rtol=1e-5, atol=0)


@pytest.mark.usefixtures("faiss")
def test_small_and_equal_data_end() -> None:
    tokens = blobs(5)
    found = KMeans(5, backend="faiss").fit(tokens).cluster_centers_
    torch.testing.assert_close(found[found[:, 0].argsort()], tokens[tokens[:, 0].argsort()])
    with pytest.warns(UserWarning, match="only 1 of n_clusters=3"):
        same = KMeans(3, max_iter=5, backend="faiss").fit(torch.ones(50, 4))
    assert same.counts_.sum() == 50


@pytest.mark.usefixtures("faiss")
def test_bad_tokens_are_refused_before_faiss_sees_them() -> None:
    tokens = blobs()
    tokens[77, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="row 77"):
        KMeans(3, backend="faiss").fit(tokens)


class RefusesFaiss(importlib.abc.MetaPathFinder):
    """Raises when faiss is imported."""

    def find_spec(self, name: str, *args: object) -> None:
        assert name != "faiss", "faiss was asked for"


def test_faiss_is_not_loaded_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.setattr(sys, "meta_path", [RefusesFaiss(), *sys.meta_path])
    assert KMeans(3).fit(blobs()).n_iter_ > 0
    with pytest.raises(AssertionError, match="faiss was asked for"):
        KMeans(3, backend="faiss").fit(blobs())


def test_a_missing_faiss_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r'backend="faiss" needs faiss; pip install "spt_fast\[faiss\]"'):
        KMeans(3, backend="faiss").fit(np.zeros((9, 2)))
    assert "k-means by faiss" in doctor.report()
    assert 'not available: backend="faiss" needs faiss' in doctor.report()


@pytest.mark.usefixtures("faiss")
def test_doctor_says_what_faiss_runs_on() -> None:
    assert "only when asked for" in doctor.report()


def test_a_stream_refuses_faiss() -> None:
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'native', 'reference', got 'faiss'"):
        StreamingKMeans(2, backend="faiss").fit(blobs())
