"""KMeans, StreamingKMeans and their parts: worked examples, properties, agreement with scikit-learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Tensor

from spt_fast import KMeans, NonFiniteError, NotFittedError, StreamingKMeans
from spt_fast.clustering.lloyd import lloyd
from spt_fast.clustering.moments import mean_of
from spt_fast.clustering.seeding import draw, kmeans_plus_plus
from spt_fast.clustering.swaps import improve_by_swaps
from spt_fast.clustering.weighted import WeightedTokens

LikeOnADevice = Callable[[], AbstractContextManager[None]]


def blobs(rows: int, width: int = 8, n_blobs: int = 6, seed: int = 0, spread: float = 0.3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(n_blobs, width, generator=generator) * 4
    labels = torch.randint(n_blobs, (rows,), generator=generator)
    return middles[labels] + spread * torch.randn(rows, width, generator=generator)


def problem_of(tokens: Tensor, weights: Tensor | None = None) -> WeightedTokens:
    return WeightedTokens(tokens, weights, mean_of(tokens, weights))


# ---- Seeding, Lloyd, swaps ------------------------------------------------------------------------


def test_draw_follows_the_mass() -> None:
    uniform = torch.rand(20_000, dtype=torch.float64)
    index = draw(torch.tensor([0.0, 1.0, 0.0, 3.0]), uniform)
    share = index.bincount(minlength=4) / len(index)
    np.testing.assert_allclose(share, [0, 0.25, 0, 0.75], atol=0.02)
    assert set(draw(torch.zeros(3), uniform).tolist()) == {0, 1, 2}


def test_kmeans_plus_plus_finds_every_blob() -> None:
    tokens = blobs(3000, n_blobs=10)
    centers = kmeans_plus_plus(problem_of(tokens), 10, np.random.default_rng(0))
    assert (torch.cdist(tokens, centers).amin(1) < 4).all()


def test_lloyd_on_four_points_worked_by_hand() -> None:
    tokens = torch.tensor([[0.0], [1.0], [10.0], [14.0]])
    result = lloyd(problem_of(tokens), torch.tensor([[0.0], [1.0]]), max_iter=10)
    # {0} {1,10,14} -> 0, 25/3; {0,1} {10,14} -> 0.5, 12; then nothing moves.
    assert result.centers[:, 0].tolist() == [0.5, 12.0]
    assert result.counts.tolist() == [2, 2]
    assert result.inertia == pytest.approx(0.5 + 8.0)
    assert result.n_iter == 3


def test_lloyd_never_raises_the_inertia() -> None:
    problem = problem_of(blobs(2000, spread=2.0))
    centers = problem.tokens[:12].clone()
    inertias = [lloyd(problem, centers, max_iter=n).inertia for n in range(1, 12)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(inertias))


def test_relaxed_lloyd_ends_as_low_in_fewer_iterations() -> None:
    problem = problem_of(blobs(4000, width=16, n_blobs=40, spread=2.0))
    start = kmeans_plus_plus(problem, 12, np.random.default_rng(0))
    plain = lloyd(problem, start, max_iter=500, gain_tolerance=1e-6)
    relaxed = lloyd(problem, start, max_iter=500, gain_tolerance=1e-6, relaxation=1.8)
    assert relaxed.n_iter < plain.n_iter
    assert relaxed.inertia <= 1.01 * plain.inertia
    # The last step is plain: the centres are the means of their tokens, up to what one step still moves.
    assert lloyd(problem, relaxed.centers, max_iter=1).inertia >= relaxed.inertia * (1 - 1e-5)


def test_an_empty_centre_moves_to_the_farthest_token() -> None:
    tokens = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [0.0, 0.2]])
    start = torch.tensor([[0.0, 0.0], [100.0, 100.0]])
    result = lloyd(problem_of(tokens), start, max_iter=20)
    assert sorted(result.counts.tolist()) == [1, 3]
    assert result.centers.tolist()[1] == [5.0, 5.0]


def test_more_clusters_than_distinct_tokens_is_no_accident() -> None:
    tokens = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).repeat(10, 1)
    for estimator in (KMeans(5), StreamingKMeans(5)):
        with pytest.warns(UserWarning, match="only 2 of n_clusters=5 clusters hold tokens"):
            result = estimator.fit(tokens)
        assert result.inertia_ == 0
        assert torch.isfinite(result.cluster_centers_).all()
        assert result.counts_.sum() == 20
        assert result.labels_.unique().numel() == 2


def test_swaps_leave_an_optimum_that_lloyd_cannot_leave() -> None:
    tokens = blobs(2000, n_blobs=4, spread=0.2)
    labels = KMeans(4, n_init=5).fit(tokens).predict(tokens)
    bad = torch.stack(
        [
            tokens[labels == 0][0],
            tokens[labels == 0][1],
            tokens[(labels == 1) | (labels == 2)].mean(0),
            tokens[labels == 3][0],
        ]
    )
    problem = problem_of(tokens)
    stuck = lloyd(problem, bad, max_iter=100)
    swapped = improve_by_swaps(problem, stuck.centers, 8, np.random.default_rng(0))
    assert lloyd(problem, swapped, max_iter=100).inertia < 0.5 * stuck.inertia
    assert problem.assign(swapped).inertia <= stuck.inertia


def test_swaps_never_raise_the_inertia() -> None:
    problem = problem_of(blobs(800, spread=3.0), torch.rand(800))
    centers = kmeans_plus_plus(problem, 9, np.random.default_rng(1))
    before = float(problem.assign(centers).inertia[0])
    after = float(problem.assign(improve_by_swaps(problem, centers, 10, np.random.default_rng(2))).inertia[0])
    assert after <= before * (1 + 1e-6)


def test_round_trips_are_noticed(like_on_a_device: LikeOnADevice) -> None:
    values = torch.rand(3)
    for wait in (
        lambda: float(values[0]),
        lambda: values[values > 0.5],
        lambda: (values > 0.5).nonzero(),
        lambda: values.numpy(),
    ):
        with like_on_a_device(), pytest.raises(AssertionError, match=r"waits for the device|to the host"):
            wait()


@pytest.mark.parametrize("weighted", [False, True])
def test_seeding_and_swaps_need_no_round_trip_per_step(
    weighted: bool, like_on_a_device: LikeOnADevice
) -> None:
    tokens, weights = blobs(900, n_blobs=12, spread=1.0), torch.rand(900) if weighted else None
    problem = WeightedTokens(tokens, weights, mean_of(tokens, weights), "reference")

    def search() -> tuple[Tensor, Tensor]:
        start = kmeans_plus_plus(problem, 12, np.random.default_rng(0))
        return start, improve_by_swaps(problem, tokens[:12], 6, np.random.default_rng(1))

    with like_on_a_device():
        there = search()
    here = search()
    assert torch.equal(there[0], here[0])
    assert torch.equal(there[1], here[1])
    assert not torch.equal(here[1], tokens[:12])


# ---- KMeans ---------------------------------------------------------------------------------------


def test_exact_lloyd_equals_scikit_learn_from_the_same_start() -> None:
    tokens = blobs(3000, width=17, spread=2.0)
    start = tokens[:11].clone()
    theirs = SklearnKMeans(11, init=start.numpy(), n_init=1, tol=0, max_iter=500).fit(tokens.numpy())
    ours = KMeans(11, init=start, tol=0, max_iter=500).fit(tokens)
    np.testing.assert_allclose(ours.cluster_centers_, theirs.cluster_centers_, rtol=1e-4, atol=1e-4)
    assert float(ours.inertia_) == pytest.approx(theirs.inertia_, rel=1e-5)
    np.testing.assert_array_equal(ours.predict(tokens), theirs.labels_)
    np.testing.assert_allclose(ours.transform(tokens), theirs.transform(tokens.numpy()), rtol=1e-3, atol=1e-3)
    assert float(ours.score(tokens)) == pytest.approx(theirs.score(tokens.numpy()), rel=1e-5)


def test_weights_count_as_repetitions() -> None:
    tokens = blobs(400, spread=1.5)
    repeats = torch.randint(0, 4, (400,))
    start = tokens[:5].clone()
    weighted = KMeans(5, init=start, tol=0).fit(tokens, sample_weight=repeats.float())
    repeated = KMeans(5, init=start, tol=0).fit(tokens.repeat_interleave(repeats, dim=0))
    torch.testing.assert_close(weighted.cluster_centers_, repeated.cluster_centers_, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(weighted.counts_, repeated.counts_)
    torch.testing.assert_close(weighted.inertia_, repeated.inertia_, rtol=1e-4, atol=0)


def test_groups_are_independent_problems() -> None:
    tokens = torch.stack([blobs(500, seed=s, spread=1.0) for s in range(3)])
    starts = tokens[:, :4].clone()
    together = KMeans(4, n_groups=3, init=starts).fit(tokens)
    for g in range(3):
        alone = KMeans(4, init=starts[g]).fit(tokens[g])
        assert torch.equal(together.cluster_centers_[g], alone.cluster_centers_)
        assert torch.equal(together.predict(tokens)[g], alone.predict(tokens[g]))
        assert together.n_iter_[g] == alone.n_iter_


def test_n_init_keeps_the_best_run() -> None:
    tokens = blobs(600, n_blobs=15, spread=0.8)
    one, ten = KMeans(15, seed=3).fit(tokens), KMeans(15, n_init=10, seed=3).fit(tokens)
    assert ten.inertia_ <= one.inertia_


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64])
def test_numpy_arrays_are_accepted(dtype: type) -> None:
    tokens = blobs(300).numpy().astype(dtype)
    model = KMeans(6).fit(tokens)
    assert model.predict(tokens).shape == (300,)
    assert model.n_features_in_ == 8


def test_a_memory_map_is_read_in_place(tmp_path: object) -> None:
    path = f"{tmp_path}/tokens.bin"
    tokens = blobs(500)
    tokens.numpy().tofile(path)
    mapped = np.memmap(path, dtype=np.float32, mode="r+", shape=(500, 8))
    fitted = KMeans(6).fit(mapped)
    np.testing.assert_array_equal(fitted.cluster_centers_, KMeans(6).fit(tokens).cluster_centers_)


def test_the_given_centres_and_data_are_not_changed() -> None:
    tokens, start = blobs(200), blobs(4, seed=9)
    tokens_before, start_before = tokens.clone(), start.clone()
    KMeans(4, init=start).fit(tokens)
    StreamingKMeans(4).partial_fit(tokens).solve()
    assert torch.equal(tokens, tokens_before)
    assert torch.equal(start, start_before)


def test_exact_centres_and_swaps_are_the_same_on_any_number_of_threads() -> None:
    tokens = blobs(40_000, width=24, spread=1.0)  # enough for torch to share out single operations
    problem = problem_of(tokens, tokens[:, 0].abs())
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            exact = KMeans(7, seed=5).fit(tokens)
            swapped = improve_by_swaps(problem, tokens[:7], 3, np.random.default_rng(0))
            results.append((exact.cluster_centers_, exact.labels_, swapped))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [KMeans(2), StreamingKMeans(2)])
def test_results_before_any_data_are_refused(estimator: KMeans | StreamingKMeans) -> None:
    for method in (
        lambda: estimator.predict(torch.zeros(3, 2)),
        lambda: estimator.cluster_centers_,
        lambda: estimator.inertia_,
    ):
        with pytest.raises(NotFittedError, match="has not seen any data yet; call"):
            method()


def test_labels_of_a_stream_are_refused_in_words_that_are_true() -> None:
    with pytest.raises(NotFittedError, match="has not seen any data yet; call fit first"):
        _ = StreamingKMeans(2).labels_
    with pytest.raises(NotFittedError, match="keeps no labels of partial_fit; call fit, or predict"):
        _ = StreamingKMeans(2).partial_fit(blobs(9)).labels_


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_tokens_are_named_and_nothing_is_taken_in(bad: float) -> None:
    good = blobs(200)
    spoiled = good.reshape(10, 20, 8).clone()
    spoiled[7, 3, 2] = bad
    streamed = StreamingKMeans(3, n_groups=2)
    with pytest.raises(NonFiniteError, match="row 143 holds NaN, infinity or numbers that") as error:
        streamed.partial_fit(spoiled, group=1)
    assert error.value.row == 143
    assert streamed.n_seen_.tolist() == [0, 0]
    streamed.partial_fit(good, group=1)
    with pytest.raises(NonFiniteError, match="row 343"):
        streamed.partial_fit(torch.stack([good, spoiled.reshape(-1, 8)]))
    assert streamed.n_seen_.tolist() == [0, 200]
    with pytest.raises(NonFiniteError, match="row 143"):
        KMeans(3).fit(spoiled.reshape(-1, 8))
    fitted = KMeans(3).fit(good)
    for method in (fitted.predict, fitted.transform, fitted.score):
        with pytest.raises(NonFiniteError, match="row 143"):
            method(spoiled.reshape(-1, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, 1e30])
@pytest.mark.parametrize("make", [KMeans, StreamingKMeans])
def test_a_bad_token_of_a_later_group_has_the_same_row_everywhere(
    make: type[KMeans | StreamingKMeans], bad: float, dtype: torch.dtype
) -> None:
    good = torch.stack([blobs(500), blobs(500, seed=1)]).to(dtype)
    spoiled = good.clone()
    spoiled[1, 7, 2] = bad
    fitted = make(3, n_groups=2).fit(good)
    methods = [fitted.predict, fitted.transform, fitted.score]
    if isinstance(fitted, StreamingKMeans):
        methods.append(fitted.partial_fit)
    if math.isnan(bad):
        methods.append(fitted.fit)
        if isinstance(fitted, StreamingKMeans):
            methods.append(make(3, n_groups=2).partial_fit)
    for method in methods:
        with pytest.raises(NonFiniteError, match="row 507") as error:
            method(spoiled)
        assert error.value.row == 507


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_fitted_in_inference_mode_serves_outside_of_it(dtype: torch.dtype) -> None:
    with torch.inference_mode():
        tokens = blobs(300).to(dtype)
        fitted = [KMeans(3).fit(tokens), StreamingKMeans(3).fit(tokens), StreamingKMeans(3)]
        stream = fitted[-1].partial_fit(tokens)
        stream.partial_fit_unchecked(tokens, 0)
        _ = fitted[0].labels_, stream.counts_
    for model in fitted:
        found = (model.cluster_centers_, model.counts_, model.inertia_)
        assert not any(value.is_inference() for value in found)
        factor = torch.ones(8, dtype=model.cluster_centers_.dtype, requires_grad=True)
        (factor * model.cluster_centers_).sum().backward()
        assert model.predict(tokens).shape == (300,)
    assert not fitted[0].labels_.is_inference()
    stream.partial_fit(tokens.clone())
    assert stream.n_seen_.tolist() == [900]
    assert float(stream.counts_.sum()) == 900
    with torch.inference_mode():
        assert float(stream.partial_fit(tokens).counts_.sum()) == 1200


def test_tokens_too_large_to_square_are_refused() -> None:
    tokens = blobs(50)
    fitted = KMeans(2).fit(tokens)
    tokens[9, 0] = 1e30
    for method in (fitted.predict, fitted.transform, fitted.score):
        with pytest.raises(NonFiniteError, match="small enough to be squared in float32, but row 9"):
            method(tokens)
    with pytest.raises(NonFiniteError, match="small enough to be squared in float32, but row 9"):
        StreamingKMeans(2).partial_fit(tokens, group=0)


@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_tensors_of_every_layout_are_refused(layout: torch.layout) -> None:
    tokens = torch.eye(9).to_sparse(layout=layout)
    with pytest.raises(TypeError, match=f"X must be dense, got a tensor of layout {layout}"):
        KMeans(3).fit(tokens)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: KMeans(0).fit(blobs(9)), ValueError, "n_clusters must be an integer >= 1, got 0"),
        (lambda: KMeans(2.5).fit(blobs(9)), TypeError, "n_clusters must be an integer >= 1, got 2.5"),
        (lambda: KMeans(True).fit(blobs(9)), TypeError, "n_clusters must be an integer >= 1, got True"),
        (lambda: KMeans(2, n_groups=0).fit(blobs(9)), ValueError, "n_groups must be an integer >= 1"),
        (
            lambda: KMeans(2, init="random partition").fit(blobs(9)),
            ValueError,
            "init must be 'k-means\\+\\+', 'random', 'uniform', an array of centres or a callable",
        ),
        (lambda: KMeans(2, tol=-1.0).fit(blobs(9)), ValueError, "tol must be a finite number >= 0, got -1.0"),
        (lambda: KMeans(2, seed=-1).fit(blobs(9)), ValueError, "seed must be an integer >= 0"),
        (lambda: KMeans(2, backend="gpu").fit(blobs(9)), ValueError, "backend must be one of"),
        (
            lambda: StreamingKMeans(30, capacity=20).partial_fit(blobs(9)),
            ValueError,
            "capacity must be at least n_clusters = 30",
        ),
        (
            lambda: KMeans(9).fit(torch.zeros(8, 2)),
            ValueError,
            "n_clusters must be at most the number of tokens, n_samples=8, got 9",
        ),
        (
            lambda: KMeans(2, seed=1, random_state=2).fit(blobs(9)),
            ValueError,
            "must equal it, got 2 and seed=1",
        ),
        (
            lambda: KMeans(2, random_state=torch.Generator()).fit(blobs(9)),
            TypeError,
            r"random_state must be an integer >= 0 or None, or a NumPy RandomState or Generator, got <torch",
        ),
        (
            lambda: KMeans(2, tol="small").fit(blobs(9)),
            TypeError,
            "tol must be a finite number >= 0, got 'small'",
        ),
        (
            lambda: KMeans(2, n_init=2.5).fit(blobs(9)),
            TypeError,
            "n_init must be an integer >= 1 or 'auto', got 2.5",
        ),
        (
            lambda: KMeans(2, init=torch.full((2, 8), torch.nan)).fit(blobs(9)),
            ValueError,
            "init must be finite",
        ),
        (
            lambda: KMeans(2, init=torch.zeros(2)).fit(blobs(9)),
            ValueError,
            r"init must be \[M, D\], got \[2\]",
        ),
        (
            lambda: KMeans(2, init=lambda X, k, random_state: X[:1]).fit(blobs(9)),
            ValueError,
            r"init must be \[1, 2, 8\], got \[1, 1, 8\]",
        ),
        (
            lambda: KMeans(2).fit(torch.ones(9, 2).bool()),
            TypeError,
            "X must hold real numbers, got torch.bool",
        ),
        (lambda: KMeans(2).fit([["a", "b"]] * 9), TypeError, "X must hold real numbers, got dtype <U1"),
        (lambda: KMeans(2).fit(scipy.sparse.eye(9)), TypeError, "X must be dense, got a sparse dia_matrix"),
        (lambda: KMeans(2).fit(np.zeros((9, 0))), ValueError, r"X has 0 feature\(s\) \(shape=\(9, 0\)\)"),
        (
            lambda: KMeans(2).fit(blobs(9), sample_weight=[1.0] * 8 + [math.nan]),
            ValueError,
            "sample_weight must be finite in float32 and >= 0, got nan",
        ),
        (
            lambda: KMeans(2).fit(blobs(9), sample_weight=np.zeros(9)),
            ValueError,
            "sample_weight must hold at least one weight above 0 per group, got only zeros",
        ),
        (
            lambda: KMeans(2, n_groups=2).fit(
                torch.randn(2, 9, 3), sample_weight=torch.stack([torch.ones(9), torch.zeros(9)])
            ),
            ValueError,
            "at least one weight above 0 per group",
        ),
        (
            lambda: (
                StreamingKMeans(2, n_groups=2)
                .partial_fit(blobs(9), group=0)
                .partial_fit(blobs(9, width=7), group=1)
            ),
            ValueError,
            "X has 7 features, but StreamingKMeans is expecting 8",
        ),
        (
            lambda: StreamingKMeans(2).partial_fit(blobs(9)).set_params(n_groups=2).partial_fit(blobs(9)),
            ValueError,
            "n_groups must be 1 like before, got 2",
        ),
        (
            lambda: StreamingKMeans(2).partial_fit(blobs(9)).partial_fit(blobs(9).to("meta")),
            ValueError,
            "X must be on cpu like before, got meta",
        ),
        (lambda: KMeans(2).fit(torch.zeros(0, 2)), ValueError, "X must hold at least one token"),
        (lambda: KMeans(2).fit(torch.zeros(3)), ValueError, r"X must be \[M, D\], got \[3\]"),
        (lambda: KMeans(2, n_groups=2).fit(torch.zeros(3, 4)), ValueError, r"X must be \[2, M, D\]"),
        (
            lambda: KMeans(2).fit(torch.zeros(4, 2, dtype=torch.complex64)),
            ValueError,
            "X must hold real numbers, got torch.complex64",
        ),
        (
            lambda: KMeans(2).fit(torch.zeros(4, 2), sample_weight=torch.ones(3)),
            ValueError,
            r"sample_weight must be \[4\] or \[1, 4\], a weight for each token, got \[3\]",
        ),
        (
            lambda: KMeans(2).fit(torch.zeros(200, 6), sample_weight=torch.ones(20, 10)),
            ValueError,
            r"sample_weight must be \[200\] or \[1, 200\], a weight for each token, got \[20, 10\]",
        ),
        (
            lambda: KMeans(2).fit(torch.zeros(200, 6), sample_weight=torch.ones(200, 1)),
            ValueError,
            r"got \[200, 1\]",
        ),
        (
            lambda: KMeans(2, n_groups=2).fit(torch.zeros(2, 50, 3), sample_weight=torch.ones(50, 2)),
            ValueError,
            r"sample_weight must be \[2, 50\], a weight for each token, got \[50, 2\]",
        ),
        (
            lambda: KMeans(2, n_groups=2).fit(torch.zeros(2, 50, 3), sample_weight=torch.ones(100)),
            ValueError,
            r"sample_weight must be \[2, 50\], a weight for each token, got \[100\]",
        ),
        (
            lambda: StreamingKMeans(2, n_groups=2).partial_fit(
                torch.zeros(5, 4, 3), sample_weight=torch.ones(4, 5), group=1
            ),
            ValueError,
            r"sample_weight must be \[20\] or \[1, 20\] or \[5, 4\], a weight for each token, got \[4, 5\]",
        ),
        (
            lambda: KMeans(2).fit(blobs(9), sample_weight=np.full(9, 1e-60)),
            ValueError,
            "above 0 per group, got only zeros in float32",
        ),
        (
            lambda: KMeans(2).fit(blobs(9)).predict(np.full((9, 8), 1e50)),
            NonFiniteError,
            "X must be finite, but row 0 holds NaN, infinity or numbers that float32 cannot hold",
        ),
        (
            lambda: KMeans(2).fit(torch.zeros(4, 2), sample_weight=-torch.ones(4)),
            ValueError,
            "sample_weight must be finite in float32 and >= 0, got -1.0",
        ),
        (lambda: KMeans(2, init=torch.zeros(3, 2)).fit(blobs(9, 2)), ValueError, r"init must be \[1, 2, 2\]"),
        (
            lambda: KMeans(2).fit(blobs(9)).predict(torch.zeros(3, 5)),
            ValueError,
            "X has 5 features, but KMeans is expecting 8",
        ),
        (
            lambda: StreamingKMeans(2).partial_fit(blobs(9), group=1),
            ValueError,
            "group must be below n_groups = 1",
        ),
        (
            lambda: StreamingKMeans(2).partial_fit(blobs(9)[0], group=0),
            ValueError,
            r"X must be \[..., M, D\], got \[8\]",
        ),
        (
            lambda: StreamingKMeans(2).partial_fit(blobs(9)).partial_fit(blobs(9, width=7)),
            ValueError,
            "X has 7 features, but StreamingKMeans is expecting 8",
        ),
        (
            lambda: StreamingKMeans(2).partial_fit(blobs(9)).partial_fit(blobs(9).half()),
            ValueError,
            "X must be torch.float32 like before, got torch.float16",
        ),
    ],
)
def test_bad_arguments_are_named(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("make", [KMeans, StreamingKMeans])
def test_equal_tokens_give_that_token(make: type[KMeans | StreamingKMeans]) -> None:
    tokens = torch.full((40, 3), 7.25)
    with pytest.warns(
        UserWarning, match="only 1 of n_clusters=4 clusters hold tokens: X has too few distinct"
    ):
        model = make(4).fit(tokens)
    assert model.cluster_centers_.eq(7.25).all()
    assert model.inertia_ == 0
    assert model.labels_.eq(0).all()


@pytest.mark.parametrize("spoil", ["offset", "scale"])
def test_a_huge_dimension_costs_no_digits(spoil: str) -> None:
    tokens = blobs(4000, width=24, n_blobs=10, spread=0.5)
    labels = KMeans(10, n_init=3).fit(tokens).labels_
    tokens[:, 5] = tokens[:, 5] + 1e4 if spoil == "offset" else tokens[:, 5] * 1e4
    wide = tokens.double()
    start = torch.stack([tokens[labels == k][0] for k in range(10)])
    model = KMeans(10, init=start, tol=0).fit(tokens)
    exact = SklearnKMeans(10, init=start.double().numpy(), n_init=1, tol=0).fit(wide.numpy())
    np.testing.assert_array_equal(model.labels_, exact.labels_)
    # Means of sums that are float32 over up to 1,024 tokens: a few units in the last place of the largest.
    rounding = 8 * wide.abs().amax(0).numpy() * torch.finfo(torch.float32).eps
    assert (np.abs(model.cluster_centers_.numpy() - exact.cluster_centers_) <= rounding).all()
    # Squared distances in float32 around the mean: a few eps of the largest squared distance to it.
    farthest = float((wide - wide.mean(0)).square().sum(1).max())
    squared = torch.cdist(
        wide, model.cluster_centers_.double(), compute_mode="donot_use_mm_for_euclid_dist"
    ).square()
    error = (model.transform(tokens).double().square() - squared).abs().max()
    assert error <= 16 * torch.finfo(torch.float32).eps * farthest
    streamed = StreamingKMeans(10).fit(tokens)
    centers = streamed.cluster_centers_.double()
    direct = torch.cdist(wide, centers, compute_mode="donot_use_mm_for_euclid_dist").square().amin(1).sum()
    assert abs(float(streamed.inertia_ - direct)) <= 16 * torch.finfo(torch.float32).eps * farthest * len(
        tokens
    )


@pytest.mark.gpu
def test_devices_do_not_mix_within_a_stream_and_results_follow_the_tokens() -> None:
    tokens = blobs(500)
    stream = StreamingKMeans(3).partial_fit(tokens)
    with pytest.raises(ValueError, match="X must be on cpu like before, got cuda:0"):
        stream.partial_fit(tokens.cuda())
    assert stream.n_seen_.tolist() == [500]
    model = KMeans(3, init=tokens[:3]).fit(tokens.cuda(), sample_weight=torch.ones(500))
    assert model.cluster_centers_.device.type == "cpu"
    assert model.labels_.device.type == "cuda"
    assert torch.equal(model.predict(tokens), model.labels_.cpu())
    assert model.transform(tokens.cuda()).device.type == "cuda"


@pytest.mark.gpu
def test_a_second_gpu_is_named_within_a_stream() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    tokens = blobs(500)
    stream = StreamingKMeans(3).partial_fit(tokens.to("cuda:0"))
    with pytest.raises(ValueError, match="X must be on cuda:0 like before, got cuda:1"):
        stream.partial_fit(tokens.to("cuda:1"))
    centers = KMeans(3, init=tokens[:3]).fit(tokens.to("cuda:1")).cluster_centers_
    torch.testing.assert_close(centers, KMeans(3, init=tokens[:3]).fit(tokens).cluster_centers_)


@pytest.mark.gpu
def test_seeding_and_swaps_on_a_gpu_do_not_wait_and_choose_as_on_the_cpu(
    waiting_refused: Callable[[], AbstractContextManager[None]],
) -> None:
    tokens = blobs(5000, n_blobs=12)
    here = problem_of(tokens)
    there = WeightedTokens(tokens.cuda(), None, here.mean.cuda())
    numbers = np.random.default_rng
    kmeans_plus_plus(there, 12, numbers(0))  # what is compiled or loaded once is not the question
    with waiting_refused():
        start = kmeans_plus_plus(there, 12, numbers(0))
        swapped = improve_by_swaps(there, there.tokens[:12], 6, numbers(1))
    torch.testing.assert_close(start.cpu(), kmeans_plus_plus(here, 12, numbers(0)))
    torch.testing.assert_close(swapped.cpu(), improve_by_swaps(here, tokens[:12], 6, numbers(1)))
