"""Exact k-means over chunks: what Lloyd on the whole gives, wherever the tokens are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spt_fast.clustering import KMeans
from spt_fast.clustering.lloyd import LloydResult, lloyd
from spt_fast.clustering.out_of_core import OutOfCoreKMeans
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.prototypes.token_store import StoredLayer, TokenStore


def make_tokens(
    rows: int = 1_003, width: int = 13, dtype: torch.dtype = torch.float32, spread: float = 2.0
) -> Tensor:
    """An overlapping mixture: the smaller the spread of its means, the more iterations Lloyd needs."""
    means = spread * torch.randn(9, width)
    return (means[torch.randint(9, (rows,))] + torch.randn(rows, width) + 5).to(dtype)


@contextmanager
def stored(tokens: Tensor, budget: int = 2**30, chunk_bytes: int = 4_000) -> Iterator[StoredLayer]:
    with TokenStore(1, budget, chunk_bytes=chunk_bytes) as store:
        store.append(0, tokens)
        yield store.layer(0)


def fit(layer: StoredLayer, n_clusters: int = 6, **options: Any) -> OutOfCoreKMeans:
    return OutOfCoreKMeans(layer, n_clusters, np.random.default_rng(3), **options)


def assert_same_bits(ours: LloydResult, theirs: LloydResult) -> None:
    assert torch.equal(ours.centers, theirs.centers)
    assert torch.equal(ours.counts, theirs.counts)
    assert (ours.inertia, ours.n_iter) == (theirs.inertia, theirs.n_iter)


class Counted:
    """A layer that counts the sweeps over it, and notes which chunks each has read."""

    def __init__(self, layer: StoredLayer) -> None:
        self.layer = layer
        self.read: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)

    def __len__(self) -> int:
        return len(self.layer)

    def chunks(self, wanted: Sequence[int] | None = None) -> Iterator[Tensor]:
        self.read.append(list(range(len(self.layer.chunk_rows)) if wanted is None else wanted))
        return self.layer.chunks(wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [100, 4_000, 2**20])
def test_is_lloyd_from_the_same_starts(dtype: torch.dtype, chunk_bytes: int) -> None:
    tokens = make_tokens(dtype=dtype)
    starts = tokens[:6].float()
    mean, variance = tokens.double().mean(0), float(tokens.double().var(0, correction=0).mean())
    theirs = lloyd(
        WeightedTokens(tokens, None, mean.float()), starts, max_iter=300, shift_tolerance=1e-4 * variance
    )
    with stored(tokens, chunk_bytes=chunk_bytes) as layer:
        ours = fit(layer, starts=starts[None]).run()
    assert ours.n_iter == theirs.n_iter > 5
    # Sums of a tile are float32, and tiles are cut elsewhere: a few roundings of the largest token.
    atol = 8 * torch.finfo(torch.float32).eps * float(tokens.abs().max())
    torch.testing.assert_close(ours.centers, theirs.centers, rtol=0, atol=atol)
    assert torch.equal(ours.counts, theirs.counts)
    assert ours.inertia == pytest.approx(theirs.inertia, rel=1e-6)


def test_counts_and_inertia_are_those_of_its_centres() -> None:
    tokens = make_tokens()
    with stored(tokens, budget=0) as layer:
        ours = fit(layer).run()
    squared, nearest = torch.cdist(tokens.double(), ours.centers.double()).square().min(1)
    assert torch.equal(ours.counts, nearest.bincount(minlength=6).double())
    assert ours.inertia == pytest.approx(float(squared.sum()), rel=1e-6)


def test_is_as_good_as_kmeans_in_memory() -> None:
    tokens = make_tokens()
    with stored(tokens) as layer:
        ours = fit(layer, n_init=10).run()
    assert ours.inertia <= 1.005 * float(KMeans(6, n_init=10, seed=5).fit(tokens).inertia_)


@pytest.mark.parametrize("chunk_bytes", [100, 4_000])
def test_starts_by_name_are_those_of_kmeans(chunk_bytes: int) -> None:
    tokens = make_tokens()
    bounds = [len(tokens) * k // 6 for k in range(7)]
    parts = torch.stack([tokens[a:b].double().mean(0) for a, b in itertools.pairwise(bounds)]).float()
    with stored(tokens, chunk_bytes=chunk_bytes) as layer:
        expected = fit(layer, starts=parts[None]).run()
        ours = fit(layer, init="uniform").run()
        assert ours.n_iter == expected.n_iter
        torch.testing.assert_close(ours.centers, expected.centers, rtol=1e-5, atol=1e-5)
        drawn = fit(layer, init="random", n_init=2)._runs.centers
    for start in drawn:
        gaps = torch.cdist(start, tokens, compute_mode="donot_use_mm_for_euclid_dist")
        assert float(gaps.amin(1).max()) == 0
        assert len(set(gaps.argmin(1).tolist())) == 6


def test_memory_five_times_too_small_gives_the_same_bits() -> None:
    tokens = make_tokens()
    with stored(tokens) as layer:
        expected = fit(layer, n_init=3).run()
    for budget in (tokens.nbytes // 5, 0):
        with stored(tokens, budget) as layer:
            assert layer.store.bytes_in_memory <= budget
            assert_same_bits(fit(layer, n_init=3).run(), expected)


def test_goes_on_from_a_coarse_tolerance_to_where_a_fine_one_ends() -> None:
    with stored(make_tokens()) as layer:
        stepwise = fit(layer, n_init=3)
        coarse = stepwise.run(tol=1.0)
        direct = fit(layer, n_init=3).run(tol=1e-6)
        assert coarse.n_iter < direct.n_iter
        assert_same_bits(stepwise.run(tol=1e-6), direct)
        assert_same_bits(stepwise.run(tol=1e-6), direct)


def test_stops_after_max_iter_and_goes_on() -> None:
    with stored(make_tokens()) as layer:
        stepwise = fit(layer)
        assert stepwise.run(max_iter=2).n_iter == 2
        assert_same_bits(stepwise.run(), fit(layer).run())


def test_restarts_share_the_reads() -> None:
    tokens = make_tokens()
    with stored(tokens) as layer:
        starts = torch.stack([tokens[6 * i : 6 * i + 6] for i in range(5)])
        alone = [fit(layer, starts=start[None]).run() for start in starts]
        counted = Counted(layer)
        together = OutOfCoreKMeans(counted, 6, np.random.default_rng(0), starts=starts)
        best = together.run()
    assert_same_bits(best, min(alone, key=lambda run: run.inertia))
    # The moments, the first assignment, and an iteration each, but a last one that moves nothing.
    longest = max(run.n_iter for run in alone)
    assert longest + 1 <= len(counted.read) <= longest + 2 < sum(run.n_iter for run in alone)


@pytest.mark.parametrize(
    ("chunk_bytes", "dtype"),
    [
        (100, torch.float32),
        *itertools.product([4_000, 60_000, 2**20], [torch.float32, torch.bfloat16, torch.float16]),
    ],
)
def test_pruned_passes_end_where_plain_ones_end(chunk_bytes: int, dtype: torch.dtype) -> None:
    """Chunks of one row, of less than the 1,024 rows that a thread takes, of more, and a single one."""
    tokens = make_tokens(503 if chunk_bytes == 100 else 1_203, dtype=dtype, spread=0.5)
    starts = torch.stack([tokens[6 * i : 6 * i + 6].float() for i in range(3)])
    starts[1, 2] = 1e3  # an empty cluster in one of the restarts
    with stored(tokens, chunk_bytes=chunk_bytes) as layer:
        pruned, plain = (fit(layer, starts=starts, prune=prune) for prune in (True, False))
        for tol in (1.0, 1e-7):  # the second goes on from the first
            ours, theirs = pruned.run(tol), plain.run(tol)
            assert ours.n_iter == theirs.n_iter
            # The same labels, so the same sums but for the rounding of float64: one rounding of the means.
            torch.testing.assert_close(ours.centers, theirs.centers, rtol=2**-23, atol=2**-23)
            assert torch.equal(ours.counts, theirs.counts)
            assert ours.inertia == pytest.approx(theirs.inertia, rel=1e-6)
    assert ours.n_iter > 20


def test_chunks_without_a_token_to_be_read_are_not_read() -> None:
    """Three chunks out of four hold a cluster each, far from the others, whose centres soon stay."""
    tokens = make_tokens(8 * 200, spread=0.5)
    for chunk in (0, 1, 2, 4, 5, 6):
        tokens[200 * chunk : 200 * chunk + 200] = 100 * (chunk % 4 + 1) + torch.randn(200, 13)
    starts = torch.cat([tokens[:600:200], tokens[600:603]])
    results = []
    for budget in (2**30, 5 * 200 * 52, 0):
        with stored(tokens, budget, chunk_bytes=200 * 52) as layer:
            counted = Counted(layer)
            results.append(
                OutOfCoreKMeans(counted, 6, np.random.default_rng(0), starts=starts[None]).run(1e-7)
            )
            plain = fit(layer, starts=starts[None], prune=False).run(1e-7)
        everything = list(range(8))
        assert counted.read[:2] == [everything, everything]  # the moments, and the first pass
        assert counted.read[-1] == [3, 7]
        assert_same_bits(results[-1], results[0])
        assert results[-1].n_iter == plain.n_iter > 8
        torch.testing.assert_close(results[-1].centers, plain.centers, rtol=2**-23, atol=2**-23)


def test_reference_backend_makes_plain_passes() -> None:
    with stored(make_tokens()) as layer:
        plain, same = (fit(layer, backend="reference", prune=prune).run() for prune in (True, False))
    assert_same_bits(plain, same)


@pytest.mark.parametrize("chunk_bytes", [100, 2**20])
def test_empty_clusters_go_to_the_farthest_tokens(chunk_bytes: int) -> None:
    tokens = make_tokens()
    tokens[::100] *= 30
    starts = tokens[:6].clone()
    starts[[2, 3, 5]] = 1e4 + torch.arange(3.0)[:, None]  # far from every token
    problem = WeightedTokens(tokens, None, tokens.mean(0))
    theirs = lloyd(problem, starts, max_iter=1)
    with stored(tokens, chunk_bytes=chunk_bytes) as layer:
        ours = fit(layer, starts=starts[None]).run(max_iter=1)
        settled = fit(layer, starts=starts[None]).run()
    atol = 8 * torch.finfo(torch.float32).eps * float(tokens.abs().max())
    torch.testing.assert_close(ours.centers, theirs.centers, rtol=0, atol=atol)
    assert float(settled.counts.min()) > 0


def test_duplicates_fewer_than_clusters_end() -> None:
    with stored(torch.eye(3, 5).repeat(20, 1)) as layer:
        ours = fit(layer, 6).run()
    assert ours.inertia < 60 * 4 * torch.finfo(torch.float32).eps  # |x|^2 - 2 x.c + |c|^2 of unit vectors
    assert sorted(ours.counts.tolist()) == [0, 0, 0, 20, 20, 20]


def test_fewer_tokens_than_clusters_are_refused() -> None:
    with (
        stored(torch.eye(3)) as layer,
        pytest.raises(ValueError, match="number of tokens, n_samples=3, got 4"),
    ):
        fit(layer, 4)


def test_same_bits_for_any_number_of_threads() -> None:
    tokens, before = make_tokens(20_011, 33), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            with stored(tokens, tokens.nbytes // 3, chunk_bytes=300_000) as layer:
                results.append(fit(layer, n_init=2).run())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.gpu
def test_device_gives_what_the_host_gives() -> None:
    tokens = make_tokens(20_011, 33)
    starts = tokens[None, :6].clone()
    with stored(tokens) as layer:
        expected = fit(layer, starts=starts).run()
    for budget in (0, tokens.nbytes // 5, 2**30):
        with TokenStore(1, budget, torch.device("cuda"), chunk_bytes=300_000) as store:
            store.append(0, tokens.cuda())
            ours = OutOfCoreKMeans(store.layer(0), 6, np.random.default_rng(0), starts=starts).run()
        torch.testing.assert_close(ours.centers.cpu(), expected.centers, rtol=1e-3, atol=1e-3)
