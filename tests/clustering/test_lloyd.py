"""Pruned Lloyd against plain passes: labels bit for bit, sums to float64, any number of threads."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spt_fast.clustering.chunks import OneChunk
from spt_fast.clustering.lloyd import Lloyd, LloydResult, Until, lloyd
from spt_fast.clustering.passes import TokenPasses
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops import kmeans_native
from spt_fast.ops.kmeans import PassResult, PrunedPasses, assign_accumulate

ISAS = kmeans_native.build_info()["isas"]
# M, D, K, dtype, weighted: one group of bounds and many, sizes that divide no tile, more rows than a chunk.
PROBLEMS = [
    (100, 5, 1, torch.float32, False),
    (3000, 37, 5, torch.float32, False),
    (2500, 64, 20, torch.bfloat16, True),
    (2100, 19, 45, torch.float16, False),
    (2501, 33, 100, torch.float32, True),
]


def make_tokens(rows: int, width: int, dtype: torch.dtype = torch.float32, clumps: int = 40) -> Tensor:
    middles = torch.randn(clumps, width) + 1
    return (middles[torch.randint(clumps, (rows,))] + 0.5 * torch.randn(rows, width)).to(dtype)


def make_problem(tokens: Tensor, weights: Tensor | None = None, backend: str = "auto") -> WeightedTokens:
    return WeightedTokens(tokens, weights, tokens.float().mean(0), backend)


def means(sums: Tensor, counts: Tensor, centers: Tensor) -> Tensor:
    moved = (sums / counts.clamp_min(1e-300)[..., None]).float()
    return torch.where((counts > 0)[..., None], moved, centers)


class Pruned:
    """Passes of one instruction set over tokens [1, 1, M, D] that are cut into chunks of `chunk_rows`."""

    def __init__(
        self,
        tokens: Tensor,
        clusters: int,
        shift: Tensor | None,
        weights: Tensor | None,
        isa: str = "",
        chunk_rows: int = 10**9,
    ) -> None:
        self.chunks = tokens.split(chunk_rows, dim=2)
        self.weights = [None] * len(self.chunks) if weights is None else weights.split(chunk_rows, dim=1)
        sizes = [chunk.shape[2] for chunk in self.chunks]
        self.native = kmeans_native.PrunedPasses(sizes, clusters, tokens.shape[-1], shift, isa)
        self.labels = self.native.labels

    def assign(self, centers: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        for chunk in self.native.begin(centers):
            weights = self.weights[chunk]
            self.native.add(chunk, self.chunks[chunk], None if weights is None else weights.contiguous())
        return self.native.end()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("chunk_rows", [10**9, 1, 37, 1025], ids=lambda rows: f"chunks-of-{rows}")
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"M{p[0]}-D{p[1]}-K{p[2]}-{p[3]}")
def test_pruned_labels_are_those_of_the_plain_pass(problem: tuple, chunk_rows: int, isa: str) -> None:
    rows, width, clusters, dtype, weighted = problem
    if chunk_rows == 1:
        rows = min(rows, 400)
    tokens = make_tokens(rows, width, dtype)[None, None]
    weights = torch.rand(1, rows).round(decimals=1) if weighted else None  # some are zero
    shift = tokens.float().mean((1, 2))
    centers = tokens[0, :, :clusters].float()
    passes = Pruned(tokens, clusters, shift, weights, isa, chunk_rows)
    skipped = 0
    for _ in range(25):
        centers = centers.contiguous()
        sums, counts, inertia, done = passes.assign(centers)
        plain = kmeans_native.assign_accumulate(tokens, centers, shift, weights, True, False, isa)
        assert torch.equal(passes.labels(), plain[3])
        torch.testing.assert_close(sums, plain[0], rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(counts, plain[1], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(inertia, plain[2], rtol=1e-5, atol=1e-5)
        skipped += rows - done.tokens_read
        centers = means(sums, counts, centers)
    assert skipped > 10 * rows, "pruning never set in"


def test_pruned_labels_survive_ties_and_bounds_within_rounding() -> None:
    # Far from the shift, rounding is larger than the distances: nothing may be ruled out by bounds then.
    tokens = (torch.randn(1, 1, 2000, 16) * 1e-3 + 1e3).contiguous()
    shift = torch.zeros(1, 16)
    centers = tokens[0, :, :20].clone()
    centers[0, 10:] = centers[0, :10]  # every centre twice
    passes = Pruned(tokens, 20, shift, None)
    for _ in range(8):
        _, _, _, done = passes.assign(centers)
        labels = kmeans_native.assign_accumulate(tokens, centers, shift, None, True, False)[3]
        assert torch.equal(passes.labels(), labels)
        assert done.tokens_read == 2000
        assert labels.max() < 10
        centers = centers + torch.randn(1, 20, 16).mul(1e-4)
        centers[0, 10:] = centers[0, :10]


def test_a_centre_that_loses_its_tokens_keeps_no_rounding() -> None:
    tokens = make_tokens(3000, 8)[None, None]
    weights = torch.rand(1, 3000)
    passes = Pruned(tokens, 3, None, weights)
    centers = tokens[0, :, :3].clone()
    for step in range(6):
        if step == 4:
            centers[0, 1] = 1e4
        sums, counts, _, _ = passes.assign(centers)
    assert counts[0, 1] == 0
    assert not sums[0, 1].any()


def test_chunks_without_a_token_to_be_read_are_not_asked_for() -> None:
    still, moving = torch.randn(2, 500, 8) + torch.tensor([10.0, 0.0])[:, None, None]
    chunks = [still[:300], moving, still[300:]]
    shift = torch.cat(chunks).mean(0, keepdim=True)
    passes = PrunedPasses([300, 500, 200], 3, 8, shift=shift)
    centers = torch.stack([still.mean(0), moving[0], moving[1]])
    asked = []
    for _ in range(6):
        asked.append(passes.begin(centers[None]))
        for chunk in asked[-1]:
            passes.add(chunk, chunks[chunk][None])
        found = passes.end()
        plain = assign_accumulate(torch.cat(chunks)[None], centers[None], shift=shift)
        torch.testing.assert_close(found.sums, plain.sums, rtol=1e-12, atol=1e-9)
        assert torch.equal(found.counts, plain.counts)
        torch.testing.assert_close(found.inertia, plain.inertia, rtol=1e-5, atol=0)
        centers = means(found.sums[0], found.counts[0], centers)
    assert asked[0] == [0, 1, 2]
    assert asked[-1] == [1]


def test_a_pass_that_was_broken_off_leaves_no_trace() -> None:
    tokens = make_tokens(2000, 8)
    chunks = [tokens[:900], tokens[900:]]
    passes, whole = PrunedPasses([900, 1100], 5, 8), PrunedPasses([900, 1100], 5, 8)
    centers = tokens[:5].clone()
    for step in range(12):
        if step % 3 == 2:  # a pass over everything, then pruned ones
            begun = passes.begin(centers[None] + 1)
            passes.add(begun[0], chunks[begun[0]][None])
        for each in (passes, whole):
            for chunk in each.begin(centers[None]):
                each.add(chunk, chunks[chunk][None])
        got, expected = passes.end(), whole.end()
        torch.testing.assert_close(got.sums, expected.sums, rtol=1e-12, atol=1e-9)
        assert torch.equal(got.counts, expected.counts)
        centers = means(got.sums[0], got.counts[0], centers)


def test_pruned_lloyd_ends_where_plain_lloyd_ends() -> None:
    tokens = make_tokens(6000, 24)
    for weights in (None, torch.rand(6000)):
        for relaxation in (1.0, 1.8):
            results = [
                lloyd(
                    make_problem(tokens, weights),
                    tokens[:30].clone(),
                    max_iter=200,
                    shift_tolerance=1e-2,  # below, the plain pass stops by the rounding of its inertia
                    relaxation=relaxation,
                    prune=prune,
                )
                for prune in (True, False)
            ]
            assert results[0].n_iter == results[1].n_iter
            torch.testing.assert_close(results[0].centers, results[1].centers, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(results[0].counts, results[1].counts, rtol=1e-9, atol=0)
            assert abs(results[0].inertia / results[1].inertia - 1) < 1e-5


def assert_same(one: LloydResult, other: LloydResult) -> None:
    assert torch.equal(one.centers, other.centers)
    assert torch.equal(one.counts, other.counts)
    assert (one.inertia, one.n_iter) == (other.inertia, other.n_iter)


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    tokens = torch.randn(9000, 300).to(torch.bfloat16)
    weights = torch.rand(9000)
    before = torch.get_num_threads()
    results, passes = [], []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            problem = WeightedTokens(tokens, weights, tokens[0].float())
            results.append(lloyd(problem, tokens[:33].float(), max_iter=30))
            passes.append(problem.assign(tokens[:33].float(), with_labels=True, with_distances=True))
    finally:
        torch.set_num_threads(before)
    assert results[0].n_iter > 10
    for result, assigned in zip(results[1:], passes[1:], strict=True):
        assert_same(result, results[0])
        assert all(torch.equal(a, b) for a, b in zip(assigned, passes[0], strict=True))


@pytest.mark.parametrize("relaxation", [1.0, 1.8])
@pytest.mark.parametrize("max_iter", [1, 6, 300])
def test_looking_seldom_gives_the_result_of_looking_each_step(max_iter: int, relaxation: float) -> None:
    tokens = make_tokens(2000, 12, clumps=6)
    for tolerances in ({}, {"shift_tolerance": 1e-3}, {"gain_tolerance": 1e-3}):
        for centers in (tokens[:9].clone(), torch.cat([tokens[:5], torch.full((2, 12), 90.0)])):
            options = {"max_iter": max_iter, "relaxation": relaxation, **tolerances}
            each, seldom = (
                lloyd(make_problem(tokens), centers, look_every=every, **options) for every in (1, 4)
            )
            assert_same(each, seldom)


def test_centres_that_stay_empty_cost_no_passes_that_are_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal tokens one centre takes all, so that of those without tokens one finds some in each step."""
    tokens = make_tokens(30, 6).repeat_interleave(20, 0)
    centers = torch.cat([tokens[:1], torch.full((14, 6), 1e3)])
    passes: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> PassResult:
        passes[-1] += 1
        return assign_accumulate(*args, **kwargs)

    monkeypatch.setattr("spt_fast.clustering.passes.assign_accumulate", counted)
    results = []
    for look_every in (1, 4):
        passes.append(0)
        results.append(lloyd(make_problem(tokens), centers, max_iter=99, look_every=look_every, prune=False))
    assert_same(*results)
    assert results[0].n_iter > 14
    # Those made ahead before the first look at an empty centre, and after the last.
    assert passes[1] <= passes[0] + 8


READBACKS = ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "nonzero")


class Launches(TorchDispatchMode):
    """Counts the operators that launch a kernel: all but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.in_pass = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        allocates = func.overloadpacket.__name__.startswith(("empty", "new_empty"))
        self.number += not (func.is_view or allocates or self.in_pass)
        return func(*args, **(kwargs or {}))


class Readbacks(TorchFunctionMode):
    """Answers what is read back from a device that holds no values with ones, and counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        if name not in READBACKS or not isinstance(args[0], Tensor) or args[0].device.type == "cpu":
            return func(*args, **(kwargs or {}))
        self.number += 1
        ones = torch.from_numpy(np.ones(args[0].shape))
        return ones if name == "cpu" else getattr(ones, name)()


@pytest.mark.parametrize("relaxation", [1.0, 1.8])
def test_an_iteration_on_a_device_launches_little_and_is_read_back_seldom(
    relaxation: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = torch.empty(500, 12, device="meta")
    launches, readbacks, seen = Launches(), Readbacks(), []

    def pass_apart(*args: Any, **kwargs: Any) -> PassResult:
        launches.in_pass = True
        seen.append((launches.number, readbacks.number))
        try:
            return assign_accumulate(*args, **kwargs)
        finally:
            launches.in_pass = False

    monkeypatch.setattr("spt_fast.clustering.passes.assign_accumulate", pass_apart)
    problem = WeightedTokens(tokens, torch.empty(500, device="meta"), tokens[0], "reference")
    with launches, readbacks:
        result = lloyd(problem, tokens[:9], max_iter=12, relaxation=relaxation)
    assert result.n_iter == 12
    iterations = list(itertools.pairwise(seen[:13]))
    assert max(after[0] - before[0] for before, after in iterations) <= 8
    assert max(after[1] - before[1] for before, after in iterations) <= 1
    assert seen[12][1] - seen[0][1] <= 3  # every fourth iteration


def test_several_runs_are_read_back_once_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.empty(500, 12, device="meta")
    readbacks, seen = Readbacks(), []

    def pass_apart(*args: Any, **kwargs: Any) -> PassResult:
        seen.append(readbacks.number)
        return assign_accumulate(*args, **kwargs)

    monkeypatch.setattr("spt_fast.clustering.passes.assign_accumulate", pass_apart)
    passes = TokenPasses(OneChunk(tokens), tokens[0], backend="reference")
    with readbacks:
        runs = Lloyd(passes, tokens[:18].view(2, 9, 12))
        runs.run(Until(max_iter=6))
    assert runs.n_iter == [6, 6]
    assert [after - before for before, after in itertools.pairwise(seen)] == [1] * 6


@pytest.fixture
def correcting(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The reference corrects the sums of the last pass, as CUDA does; for each pass whether it did."""
    corrected = []

    def correct(
        tokens: Tensor, centers: Tensor, *, last: PassResult | None = None, **options: Any
    ) -> PassResult:
        anew = assign_accumulate(tokens, centers, **options)
        corrected.append(last is not None)
        if last is None:
            return anew
        assert anew.labels is not None
        assert last.labels is not None
        sums, counts = last.sums.clone(), last.counts.clone()
        for run, labels in enumerate(anew.labels):
            changed = labels != last.labels[run]
            rows = tokens[run, changed].double()
            for sign, owners in ((1, labels[changed]), (-1, last.labels[run, changed])):
                sums[run].index_add_(0, owners, rows, alpha=sign)
                counts[run].index_add_(0, owners, torch.ones(len(rows)).double(), alpha=sign)
        return PassResult(sums, counts, anew.inertia, anew.labels)

    monkeypatch.setattr("spt_fast.clustering.passes.assign_accumulate", correct)
    monkeypatch.setattr("spt_fast.clustering.passes.can_correct", lambda *_: True)
    return corrected


def test_corrected_passes_end_where_plain_ones_end(correcting: list[bool]) -> None:
    tokens = make_tokens(900, 12, clumps=6)
    # The runs end at different times; the last one begins with centres that have no tokens.
    starts = torch.stack([tokens[:9], tokens[40:49], torch.cat([tokens[:7], torch.full((2, 12), 90.0)])])
    results = []
    for prune in (True, False):
        passes = TokenPasses(OneChunk(tokens), tokens.mean(0), backend="reference", prune=prune)
        runs = Lloyd(passes, starts.clone())
        runs.run(Until(max_iter=60))
        results.append((runs.centers, passes.totals, runs.n_iter))
        if prune:
            assert sum(correcting) > len(correcting) / 2
            correcting.clear()
    assert not any(correcting)
    (ours, totals, n_iter), (plain, plain_totals, plain_n_iter) = results
    assert n_iter == plain_n_iter
    assert len(set(n_iter)) > 1
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(totals[:3], plain_totals[:3], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("max_iter", [6, 19, 300])
def test_passes_that_are_undone_leave_no_trace_in_those_that_correct(
    correcting: list[bool], max_iter: int
) -> None:
    tokens = make_tokens(900, 12, clumps=6)
    for centers in (tokens[:9].clone(), torch.cat([tokens[:7], torch.full((2, 12), 90.0)])):
        each, seldom = (
            lloyd(make_problem(tokens, backend="reference"), centers, max_iter=max_iter, look_every=every)
            for every in (1, 4)
        )
        assert_same(each, seldom)
    assert any(correcting)


def test_every_sixteenth_pass_adds_up_all_tokens(correcting: list[bool]) -> None:
    tokens = make_tokens(300, 5)
    passes = TokenPasses(OneChunk(tokens), tokens.mean(0), backend="reference")
    for step in range(40):
        passes.assign([0], tokens[None, step : step + 5])
    assert [index for index, one in enumerate(correcting) if not one] == [0, 16, 32]


class TwoChunks(OneChunk):
    """Tokens [n, D] in two chunks."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__(tokens)
        self.chunk_rows = [1, len(tokens) - 1]

    def chunks(self, wanted: Sequence[int] | None = None) -> Iterator[Tensor]:
        chunks = self._tokens.split(self.chunk_rows)
        return iter(chunks if wanted is None else [chunks[index] for index in wanted])


def test_sums_of_weighted_tokens_and_of_several_chunks_are_made_anew(correcting: list[bool]) -> None:
    tokens = make_tokens(300, 5)
    for chunks, weights in ((OneChunk(tokens), torch.rand(300)), (TwoChunks(tokens), None)):
        passes = TokenPasses(chunks, tokens.mean(0), weights, backend="reference")
        for step in range(3):
            passes.assign([0], tokens[None, step : step + 5])
    assert len(correcting) == 3 + 2 * 3
    assert not any(correcting)


def assign_once(passes: PrunedPasses, tokens: Tensor, centers: Tensor) -> PassResult:
    """A pass over tokens that are a single chunk."""
    for chunk in passes.begin(centers):
        passes.add(chunk, tokens)
    return passes.end()


def test_views_are_read_in_place() -> None:
    activations = torch.randn(20, 9, 16)
    view = activations[:, 2:]
    passes, flat = PrunedPasses([140], 5, 16), PrunedPasses([140], 5, 16)
    centers = activations[:1, 2:7].clone()
    for _ in range(5):
        seen = assign_once(passes, view[None], centers)
        expected = assign_once(flat, view.reshape(1, -1, 16), centers)
        assert torch.equal(seen.sums, expected.sums)
        centers = means(seen.sums, seen.counts, centers)


def test_tokens_in_columns_are_clustered_like_those_in_rows() -> None:
    tokens = make_tokens(500, 12)
    columns = tokens.T.contiguous().T
    assert columns.stride(-1) != 1
    problems = [WeightedTokens(given, None, tokens.mean(0)) for given in (columns, tokens)]
    assert_same(*(lloyd(problem, tokens[:7].clone(), max_iter=20) for problem in problems))


def test_reference_backend_makes_plain_passes() -> None:
    tokens = make_tokens(400, 6)
    plain, same = (
        lloyd(make_problem(tokens, backend="reference"), tokens[:5].clone(), max_iter=20, prune=prune)
        for prune in (False, True)
    )
    assert_same(plain, same)


def test_bad_arguments_of_pruned_passes_are_named() -> None:
    with pytest.raises(ValueError, match=r"shift must be \[1, 3\], got \[3\]"):
        PrunedPasses([5], 2, 3, shift=torch.zeros(3))
    with pytest.raises(ValueError, match="chunk_rows must be an integer >= 1, got 0"):
        PrunedPasses([5, 0], 2, 3)
    passes, tokens = PrunedPasses([5, 4], 2, 3), torch.randn(1, 5, 3)
    for centers in (torch.zeros(1, 2, 4), torch.zeros(1, 1, 3), torch.zeros(2, 2, 3)):
        with pytest.raises(ValueError, match=r"centers must be \[1, 2, 3\], got"):
            passes.begin(centers)
    with pytest.raises(TypeError, match=r"centers must be torch.float32, got torch.float64"):
        passes.begin(torch.zeros(1, 2, 3).double())
    with pytest.raises(ValueError, match="chunk must be one that begin asked for, got 0"):
        passes.add(0, tokens)
    with pytest.raises(ValueError, match="no pass is under way"):
        passes.end()
    assert passes.begin(tokens[:, :2]) == [0, 1]
    with pytest.raises(ValueError, match=r"every chunk that begin asked for .* \[0, 1\] are missing"):
        passes.end()
    with pytest.raises(
        ValueError, match=r"tokens of chunk 0 must be \[1, 5, 3\] on the CPU, got \[1, 4, 3\]"
    ):
        passes.add(0, tokens[:, :4])
    with pytest.raises(ValueError, match=r"weights must be \[1, 5\], got \[1, 4\]"):
        passes.add(0, tokens, torch.ones(1, 4))
    with pytest.raises(ValueError, match="chunk must be 0, which is next, got 1"):
        passes.add(1, tokens[:, :4])
    passes.add(0, tokens)
    passes.add(1, tokens[:, :4])
    passes.end()
    with pytest.raises(ValueError, match="no pass is under way"):
        passes.end()


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    # A sparse file: only the pages of these three tokens exist. The last begins behind 2^31 elements.
    size = 2**31 + 4096
    flat = torch.from_file(str(tmp_path / "tokens"), shared=True, size=size, dtype=torch.bfloat16)
    tokens = flat.as_strided((1, 3, 64), (size, 2**30 + 8, 1))
    tokens.copy_(torch.randn(1, 3, 64))
    packed = tokens.contiguous()
    centers = packed[:, 1:].float()
    far = assign_accumulate(tokens, centers, with_labels=True)
    near = assign_accumulate(packed, centers, with_labels=True)
    assert near.labels[0, 1:].tolist() == [0, 1]
    assert torch.equal(far.sums, near.sums)
    assert torch.equal(far.labels, near.labels)
    assert torch.equal(assign_once(PrunedPasses([3], 2, 64), tokens, centers).sums, near.sums)


def test_large_tokens_in_one_dimension_against_float64() -> None:
    tokens = torch.randn(1, 3000, 96)
    tokens[..., 17] = 1e4 + tokens[..., 17]
    centers = tokens[:, :12].clone()
    exact = (tokens.double()[:, :, None] - centers.double()[:, None]).square().sum(-1)
    got = assign_accumulate(tokens, centers, shift=tokens.double().mean(1).float(), with_labels=True)
    chosen = exact.gather(2, got.labels.long()[..., None])[..., 0]
    # Subtracting the shift rounds that dimension to 2^-24 * 1e4 = 6e-4 of a distance around 14.
    assert (chosen - exact.amin(-1)).max() < 4 * 6e-4 * 14
    torch.testing.assert_close(got.inertia, exact.amin(-1).sum(-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(got.sums.sum(1), tokens.double().sum(1), rtol=1e-7, atol=1e-2)
