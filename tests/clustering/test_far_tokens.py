"""Data with a token far from all others, whose squared distances float32 rounds by more than theirs are."""

from __future__ import annotations

import numpy as np
import pytest

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
