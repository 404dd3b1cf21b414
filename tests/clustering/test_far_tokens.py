"""Data with a token far from all others, whose squared distances float32 rounds by more than theirs are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spt_fast import KMeans, StreamingKMeans

TRUTH = np.repeat([0, 1, 2], [500, 500, 1])


def two_clusters_and_a_far_token(far: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    near = [rng.normal(middle, 0.05, (500, 8)) for middle in (0, 1)]
    return np.concatenate([*near, np.full((1, 8), far)]).astype("f")


@pytest.mark.parametrize("far", [1e4, 1e5])
@pytest.mark.parametrize("make", [KMeans, StreamingKMeans])
def test_every_method_measures_around_the_tokens(make: type[KMeans | StreamingKMeans], far: float) -> None:
    tokens = two_clusters_and_a_far_token(far)
    model = KMeans(3, init=tokens[[0, 500, 1000]]) if make is KMeans else make(3, seed=1)
    model.fit(tokens)
    order = np.argsort(model.cluster_centers_[:, 0])
    np.testing.assert_array_equal(model.counts_[order], [500, 500, 1])
    for labels in (model.labels_, model.predict(tokens), model.transform(tokens).argmin(1)):
        np.testing.assert_array_equal(labels, order[TRUTH])
    # Squares are rounded around the mean: the far token's by this much, those of the others by less.
    rounding = 16 * np.finfo("f").eps * np.square(tokens - tokens.mean(0)).sum(1).max()
    assert -model.score(tokens) <= 21 + rounding


@pytest.mark.parametrize("far", [1e4, 1e5, 1e6])
@pytest.mark.parametrize("make", [KMeans, StreamingKMeans])
def test_starts_draw_a_far_token_once(make: type[KMeans | StreamingKMeans], far: float) -> None:
    tokens = two_clusters_and_a_far_token(far)
    for seed in range(5):
        assert sorted(make(3, seed=seed).fit(tokens).counts_) == [1, 500, 500]


@pytest.mark.parametrize("copies", [1, 5])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_empty_centre_does_not_go_where_a_far_token_has_one(backend: str, copies: int) -> None:
    tokens = np.concatenate([two_clusters_and_a_far_token(1e5), np.full((copies - 1, 8), 1e5, "f")])
    init = tokens[[0, 1000, 1000]]
    model = KMeans(3, init=init, backend=backend).fit(tokens)
    assert sorted(model.counts_) == [copies, 500, 500]


def test_centres_without_a_token_to_go_to_end_the_iterations() -> None:
    rng = np.random.default_rng(0)
    far = rng.normal(size=(1, 8)) * 1e5
    near = np.repeat(rng.normal(size=(4, 8)), [249, 251, 247, 253], axis=0)
    tokens = np.concatenate([far, near]).astype("f")
    with pytest.warns(UserWarning, match="only 5 of n_clusters=7"):
        model = KMeans(7, init=tokens[[0, 1, 260, 510, 760, 0, 1]], tol=0).fit(tokens)
    # The first iteration rounds the centres, which is no distance to send another one to.
    assert model.n_iter_ == 2


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", [KMeans, StreamingKMeans])
def test_inertia_and_score_have_the_digits_of_small_distances(
    make: type[KMeans | StreamingKMeans], backend: str, dtype: str, weighted: bool
) -> None:
    tokens = torch.from_numpy(two_clusters_and_a_far_token(1e5)).to(getattr(torch, dtype))
    weights = torch.rand(len(tokens)) + 0.5 if weighted else torch.ones(len(tokens))
    model = make(3, backend=backend).fit(tokens, sample_weight=weights if weighted else None)
    steps = tokens.double() - model.cluster_centers_.double()[model.labels_]
    exact = float((weights.double() * steps.square().sum(1)).sum())
    # Differences are rounded once each, and centres where they are returned.
    assert float(model.inertia_) == pytest.approx(exact, rel=1e-6)
    score = model.score(tokens, sample_weight=weights if weighted else None)
    assert float(score) == pytest.approx(-exact, rel=1e-6)


def test_inertia_and_score_are_the_same_on_any_number_of_threads() -> None:
    tokens = torch.randn(3000, 20, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    found = set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model = KMeans(7).fit(tokens)
            found.add((float(model.inertia_), float(model.score(tokens))))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
