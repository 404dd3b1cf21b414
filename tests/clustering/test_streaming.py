"""The reservoir, and StreamingKMeans: close to exact in any order, repeatable, every token counted."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spt_fast import KMeans, StreamingKMeans
from spt_fast.clustering.reservoir import PriorityReservoir, take_rows


def blobs(rows: int, width: int = 8, n_blobs: int = 6, seed: int = 0, spread: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(n_blobs, width, generator=generator) * 4
    labels = torch.randint(n_blobs, (rows,), generator=generator)
    return middles[labels] + spread * torch.randn(rows, width, generator=generator)


def test_take_rows_reads_strided_views() -> None:
    tokens = torch.arange(5 * 7 * 3).reshape(5, 7, 3)[:, 2:]
    rows = torch.tensor([0, 4, 5, 24, 13])
    assert torch.equal(take_rows(tokens, rows), tokens.reshape(-1, 3)[rows])


def test_reservoir_holds_everything_up_to_its_capacity() -> None:
    tokens = torch.randn(40, 3)
    reservoir = PriorityReservoir(40, 3, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
    for part in tokens.split(7):
        reservoir.offer(part, torch.rand(len(part)) + 0.1, None)
    summary = reservoir.summary()
    assert torch.equal(summary.tokens, tokens)
    assert summary.weights.eq(1).all()


@pytest.mark.parametrize("capacity", [150, 10**12])
def test_reservoir_makes_room_as_tokens_come(capacity: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, importance = torch.randn(200, 3), torch.rand(200) + 0.1
    samples = []
    for first_rows in (7, 1000):
        monkeypatch.setattr("spt_fast.clustering.reservoir.FIRST_ROWS", first_rows)
        generator = torch.Generator().manual_seed(0)
        found = PriorityReservoir(capacity, 3, torch.float32, torch.device("cpu"), generator)
        for part in torch.arange(200).split(30):
            found.offer(tokens[part], importance[part], None)
        samples.append(found.summary())
        assert len(found) == min(capacity, 200)
        held = sum(value.nbytes for value in vars(found).values() if isinstance(value, Tensor))
        # A token, its key, importance and weight; and the threshold.
        assert held <= max(first_rows, 400) * (3 * 4 + 3 * 8) + 8
    assert torch.equal(samples[0].tokens, samples[1].tokens)
    assert torch.equal(samples[0].weights, samples[1].weights)


def test_only_tokens_that_stay_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []

    def counting(tokens: Tensor, rows: Tensor) -> Tensor:
        copied.append(len(rows))
        return take_rows(tokens, rows)

    monkeypatch.setattr("spt_fast.clustering.reservoir.take_rows", counting)
    generator = torch.Generator().manual_seed(0)
    reservoir = PriorityReservoir(100, 3, torch.float32, torch.device("cpu"), generator)
    # All tokens are candidates for an empty reservoir.
    reservoir.offer(torch.randn(5000, 3), torch.rand(5000) + 0.1, None)
    assert copied == [100]


def test_reservoir_estimates_are_unbiased() -> None:
    values = torch.cat([torch.rand(900, 1), 30 * torch.rand(100, 1)])
    importance = 1 + values[:, 0]
    weights = torch.rand(1000) + 0.5
    estimates, totals = [], []
    for seed in range(400):
        generator = torch.Generator().manual_seed(seed)
        reservoir = PriorityReservoir(60, 1, torch.float32, torch.device("cpu"), generator)
        for part in torch.randperm(1000, generator=generator).split(130):
            reservoir.offer(values[part], importance[part], weights[part])
        summary = reservoir.summary()
        assert len(reservoir) == 60
        estimates.append(float((summary.weights * summary.tokens[:, 0]).sum()))
        totals.append(float(summary.weights.sum()))
    for sample, truth in ((estimates, (weights * values[:, 0]).sum()), (totals, weights.sum())):
        error = 4 * np.std(sample) / math.sqrt(len(sample))
        assert abs(np.mean(sample) - float(truth)) < error


def test_a_stream_that_fits_is_solved_on_all_its_tokens() -> None:
    tokens = blobs(3000, spread=1.5)
    streamed = StreamingKMeans(6, seed=1)
    for part in tokens.split(331):
        streamed.partial_fit(part)
    exact = min(float(KMeans(6, seed=s).fit(tokens).inertia_) for s in range(5))
    assert float(streamed.inertia_) == pytest.approx(-float(streamed.score(tokens)), rel=1e-5)
    assert float(streamed.inertia_) <= 1.005 * exact
    assert streamed.counts_.sum() == pytest.approx(3000)
    assert streamed.n_seen_.tolist() == [3000]


@pytest.mark.parametrize("order", ["shuffled", "sorted"])
def test_a_long_stream_is_close_to_exact(order: str) -> None:
    tokens = blobs(40_000, width=12, n_blobs=30, spread=1.2)
    tokens[::500] *= 6  # a few far outliers
    if order == "sorted":
        tokens = tokens[tokens[:, 0].argsort()]
    streamed = StreamingKMeans(10, capacity=5000, seed=2)
    for part in tokens.split(1500):
        streamed.partial_fit(part)
    exact = min(float(KMeans(10, seed=s).fit(tokens).inertia_) for s in range(5))
    reached = -float(streamed.score(tokens))
    assert reached <= 1.02 * exact
    assert float(streamed.inertia_) == pytest.approx(reached, rel=0.05)


def test_other_lengths_are_solved_from_the_same_pass() -> None:
    tokens = blobs(2000, n_blobs=12)
    streamed = StreamingKMeans(4).partial_fit(tokens)
    twelve = streamed.solve(12)
    assert twelve.centers.shape == (1, 12, 8)
    assert twelve.inertia[0] < 0.1 * streamed.solve(4).inertia[0]
    again = streamed.summary().solve(12)
    assert torch.equal(again.centers, twelve.centers)
    with pytest.raises(
        ValueError, match="n_clusters must be at most the number of tokens kept, 2000, got 2001"
    ):
        streamed.solve(2001)


def test_the_same_seed_gives_the_same_centres_on_any_number_of_threads() -> None:
    tokens = blobs(40_000, width=24, spread=1.0)  # enough for torch to share out single operations
    groups = torch.stack([tokens, tokens.flip(0), tokens + tokens.roll(1, 1)])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            streamed = StreamingKMeans(7, n_groups=3, capacity=6000, seed=5)
            for batch in groups.split(5000, 1):
                streamed.partial_fit(batch)
            results.append(streamed.cluster_centers_)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    alone = StreamingKMeans(7, capacity=6000, seed=5)
    for batch in tokens.split(5000):
        alone.partial_fit(batch)
    assert torch.equal(alone.cluster_centers_, results[0][0])
    other_seed = StreamingKMeans(7, capacity=6000, seed=6).fit(tokens)
    assert not torch.equal(other_seed.cluster_centers_, results[0][0])


def heavy_tailed_tokens(rows: int, width: int, n_blobs: int, seed: int) -> Tensor:
    """Sorted by blob, of very unequal ones; Student-t noise, two shifted dimensions, 0.4 % far outliers."""
    rng = np.random.default_rng(seed)
    sizes = rng.gamma(0.3, size=n_blobs)
    labels = np.sort(rng.choice(n_blobs, rows, p=sizes / sizes.sum()))
    tokens = 5 * rng.normal(size=(n_blobs, width))[labels] + rng.standard_t(4, size=(rows, width))
    tokens[:, :2] += (30, -30)
    tokens[rng.random(rows) < 0.004] *= 6
    return torch.from_numpy(tokens.astype(np.float32))


def test_rare_far_tokens_in_a_sorted_stream_get_their_centres() -> None:
    """They hold a large share of the inertia: a search that misses them ends above single runs of Lloyd."""
    ratios = []
    for seed in range(3):
        tokens = heavy_tailed_tokens(15_000, 32, 137, seed)
        streamed = StreamingKMeans(100, seed=seed)
        for batch in tokens.split(1000):
            streamed.partial_fit(batch)
        exact = min(float(KMeans(100, seed=s).fit(tokens).inertia_) for s in range(3))
        ratios.append(-float(streamed.score(tokens)) / exact)
    assert np.mean(ratios) <= 0.99
    assert max(ratios) <= 1.005


def test_one_group_at_a_time_equals_all_groups_at_once() -> None:
    tokens = torch.stack([blobs(1200, seed=s) for s in range(2)])
    together, apart = StreamingKMeans(5, n_groups=2), StreamingKMeans(5, n_groups=2)
    for part in tokens.split(400, dim=1):
        together.partial_fit(part)
        for g in (1, 0):
            apart.partial_fit(part[g].reshape(20, 20, 8), group=g)
    assert torch.equal(together.cluster_centers_, apart.cluster_centers_)
    assert apart.n_seen_.tolist() == [1200, 1200]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_streams_keep_their_dtype_and_quality(dtype: torch.dtype) -> None:
    tokens = blobs(4000, spread=1.0)
    full = StreamingKMeans(6).fit(tokens)
    half = StreamingKMeans(6).fit(tokens.to(dtype))
    assert half.summary().groups[0].tokens.dtype == dtype
    assert half.cluster_centers_.dtype == torch.float32
    assert half.score(tokens) > 1.02 * full.score(tokens)  # scores are negative


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 300), width=st.integers(1, 20), clusters=st.integers(1, 12), parts=st.integers(1, 90)
)
def test_any_split_of_a_stream_counts_every_token(rows: int, width: int, clusters: int, parts: int) -> None:
    tokens = blobs(rows, width=width)
    streamed = StreamingKMeans(clusters, capacity=max(clusters, 50))
    for part in tokens.split(parts):
        streamed.partial_fit(part)
    if min(rows, streamed.capacity) < clusters:
        with pytest.raises(ValueError, match="n_clusters must be at most"):
            streamed.solve()
        return
    assert float(streamed.counts_.sum()) == pytest.approx(rows)
    assert torch.isfinite(streamed.cluster_centers_).all()
    assert streamed.cluster_centers_.shape == (clusters, width)


def test_sample_weights_move_the_centres() -> None:
    tokens = torch.cat([torch.zeros(100, 1), torch.ones(100, 1)])
    weights = torch.cat([torch.full((100,), 3.0), torch.ones(100)])
    streamed = StreamingKMeans(1).partial_fit(tokens, sample_weight=weights)
    assert float(streamed.cluster_centers_) == pytest.approx(0.25)
    assert float(streamed.counts_) == pytest.approx(400)


@pytest.mark.parametrize("capacity", [100, 5000])
@pytest.mark.parametrize("scale", [2.0**127, 2.0**-149])
def test_the_scale_of_weights_does_not_matter(scale: float, capacity: int) -> None:
    tokens, ones = blobs(2000), torch.ones(2000)
    plain = StreamingKMeans(5, capacity=capacity).fit(tokens, sample_weight=ones)
    scaled = StreamingKMeans(5, capacity=capacity).fit(tokens, sample_weight=ones * scale)
    torch.testing.assert_close(scaled.cluster_centers_, plain.cluster_centers_)
    torch.testing.assert_close(scaled.counts_ / scale, plain.counts_)
    torch.testing.assert_close(scaled.inertia_ / scale, plain.inertia_)


def test_light_tokens_beside_heavy_ones_are_kept() -> None:
    tokens = torch.tensor([[0.0], [1.0], [2.0]]).repeat_interleave(50, 0)
    weights = torch.tensor([1e38, 1.0, 1e-36]).repeat_interleave(50)
    assert (StreamingKMeans(3).fit(tokens, sample_weight=weights).counts_ > 0).all()


def test_weights_of_a_group_may_come_in_the_shape_of_its_tokens() -> None:
    tokens, weights = blobs(60).reshape(5, 12, 8), torch.rand(5, 12)
    shaped, flat = (
        StreamingKMeans(3, n_groups=2)
        .partial_fit(tokens, sample_weight=given, group=0)
        .partial_fit(tokens, group=1)
        .summary()
        for given in (weights, weights.flatten())
    )
    assert torch.equal(shaped.groups[0].weights, weights.flatten())
    assert torch.equal(shaped.groups[0].weights, flat.groups[0].weights)


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_a_stream_is_solved_for_the_clusters_asked_for_and_those_set(method: str) -> None:
    tokens = blobs(200)
    model = getattr(StreamingKMeans(3), method)(tokens)
    assert model.cluster_centers_.shape == (3, 8)
    model.set_params(n_clusters=5)
    expected = StreamingKMeans(5).fit(tokens).cluster_centers_
    assert torch.equal(model.solve(5).centers[0], expected)
    assert torch.equal(model.cluster_centers_, expected)
    assert model.solve(3).centers.shape == (1, 3, 8)
    assert torch.equal(model.cluster_centers_, expected)


def test_every_solve_of_too_few_distinct_tokens_warns_once_at_the_users_line() -> None:
    tokens = np.repeat(np.eye(2, 4, dtype="f"), 25, axis=0)
    solves: list[Callable[[], object]] = [
        lambda: StreamingKMeans(3).fit(tokens).counts_,
        lambda: StreamingKMeans(3).partial_fit(tokens).counts_,
        lambda: StreamingKMeans(2).partial_fit(tokens).solve(3),
    ]
    for solve in solves:
        with pytest.warns(UserWarning, match="only 2 of n_clusters=3 clusters hold tokens") as caught:
            solve()
        assert [warning.filename for warning in caught] == [__file__]
    streamed = StreamingKMeans(3).partial_fit(tokens)
    with pytest.warns(UserWarning, match="only 2 of") as caught:
        _ = streamed.counts_, streamed.inertia_, streamed.predict(tokens)
    assert len(caught) == 1


def test_labels_stay_those_of_the_fit_when_other_clusters_are_set() -> None:
    tokens = blobs(200)
    expected = StreamingKMeans(3).fit_predict(tokens)
    for read_before in (False, True):
        model = StreamingKMeans(3).fit(tokens)
        if read_before:
            _ = model.labels_
        model.set_params(n_clusters=5)
        _ = model.cluster_centers_
        assert torch.equal(model.labels_, expected)
