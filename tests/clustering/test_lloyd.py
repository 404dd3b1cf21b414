"""Pruned Lloyd against plain passes: labels bit for bit, sums to float64, any number of threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spt_fast.clustering.lloyd import LloydResult, lloyd
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops import kmeans_native
from spt_fast.ops.kmeans import PrunedAssign, PrunedParts, assign_accumulate

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
    """Passes of one instruction set over tokens [1, 1, M, D] that are cut into parts of `part_rows`."""

    def __init__(
        self,
        tokens: Tensor,
        clusters: int,
        shift: Tensor | None,
        weights: Tensor | None,
        isa: str = "",
        part_rows: int = 10**9,
    ) -> None:
        self.parts = tokens.split(part_rows, dim=2)
        self.weights = [None] * len(self.parts) if weights is None else weights.split(part_rows, dim=1)
        sizes = [part.shape[2] for part in self.parts]
        self.native = kmeans_native.PrunedPasses(sizes, clusters, tokens.shape[-1], shift, isa)
        self.labels = self.native.labels

    def assign(self, centers: Tensor) -> tuple[Tensor, Tensor, Tensor, Any]:
        for part in self.native.begin(centers):
            weights = self.weights[part]
            self.native.add(part, self.parts[part], None if weights is None else weights.contiguous())
        return self.native.end()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("part_rows", [10**9, 1, 37, 1025], ids=lambda rows: f"parts-of-{rows}")
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: f"M{p[0]}-D{p[1]}-K{p[2]}-{p[3]}")
def test_pruned_labels_are_those_of_the_plain_pass(problem: tuple, part_rows: int, isa: str) -> None:
    rows, width, clusters, dtype, weighted = problem
    tokens = make_tokens(rows, width, dtype)[None, None]
    weights = torch.rand(1, rows).round(decimals=1) if weighted else None  # some are zero
    shift = tokens.float().mean((1, 2))
    centers = tokens[0, :, :clusters].float()
    passes = Pruned(tokens, clusters, shift, weights, isa, part_rows)
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


def test_parts_without_a_token_to_be_read_are_not_asked_for() -> None:
    still, moving = torch.randn(2, 500, 8) + torch.tensor([10.0, 0.0])[:, None, None]
    parts = [still[:300], moving, still[300:]]
    shift = torch.cat(parts).mean(0, keepdim=True)
    passes = PrunedParts([300, 500, 200], 3, 8, shift=shift)
    centers = torch.stack([still.mean(0), moving[0], moving[1]])
    asked = []
    for _ in range(6):
        asked.append(passes.begin(centers[None]))
        for part in asked[-1]:
            passes.add(part, parts[part][None])
        sums, counts, inertia, *_ = passes.end()
        plain = assign_accumulate(torch.cat(parts)[None], centers[None], shift=shift)
        torch.testing.assert_close(sums, plain.sums, rtol=1e-12, atol=1e-9)
        assert torch.equal(counts, plain.counts)
        torch.testing.assert_close(inertia, plain.inertia, rtol=1e-5, atol=0)
        centers = means(sums[0], counts[0], centers)
    assert asked[0] == [0, 1, 2]
    assert asked[-1] == [1]


def test_a_pass_that_was_broken_off_leaves_no_trace() -> None:
    tokens = make_tokens(2000, 8)
    parts = [tokens[:900], tokens[900:]]
    passes, whole = PrunedParts([900, 1100], 5, 8), PrunedParts([900, 1100], 5, 8)
    centers = tokens[:5].clone()
    for step in range(12):
        if step % 3 == 2:  # a fresh pass, then pruned ones
            begun = passes.begin(centers[None] + 1)
            passes.add(begun[0], parts[begun[0]][None])
        for each in (passes, whole):
            for part in each.begin(centers[None]):
                each.add(part, parts[part][None])
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


def test_views_are_read_in_place() -> None:
    activations = torch.randn(20, 9, 16)
    view = activations[:, 2:]
    passes = PrunedAssign(view[None])
    flat = PrunedAssign(view.reshape(1, -1, 16))
    centers = activations[:1, 2:7].clone()
    for _ in range(5):
        seen, expected = passes.assign(centers), flat.assign(centers)
        assert torch.equal(seen.sums, expected.sums)
        centers = means(seen.sums, seen.counts, centers)


def test_reference_backend_makes_plain_passes() -> None:
    tokens = torch.randn(1, 50, 4)
    passes = PrunedAssign(tokens, backend="reference")
    expected = assign_accumulate(tokens, tokens[:, :3], backend="reference")
    assert torch.equal(passes.assign(tokens[:, :3]).sums, expected.sums)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"tokens must be one group, .* got \[2, 5, 3\]"):
        PrunedAssign(torch.zeros(2, 5, 3))
    passes = PrunedAssign(torch.randn(1, 5, 3))
    passes.assign(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="centers must be 2 as before, got 3"):
        passes.assign(torch.zeros(1, 3, 3))
    with pytest.raises(ValueError, match=r"centers must be \[1, K, 3\]"):
        PrunedAssign(torch.randn(1, 5, 3)).assign(torch.zeros(1, 2, 4))


def test_bad_parts_are_named() -> None:
    with pytest.raises(ValueError, match=r"shift must be \[1, 3\], got \[3\]"):
        PrunedParts([5], 2, 3, shift=torch.zeros(3))
    with pytest.raises(ValueError, match="chunks must not be empty"):
        PrunedParts([5, 0], 2, 3)
    passes, tokens = PrunedParts([5, 4], 2, 3), torch.randn(1, 5, 3)
    with pytest.raises(ValueError, match=r"centers must be \[1, K, 3\]"):
        passes.begin(torch.zeros(1, 2, 4))
    with pytest.raises(ValueError, match="centers must be 2 as before, got 1"):
        passes.begin(torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="in the order in which begin"):
        passes.add(0, tokens)
    assert passes.begin(tokens[:, :2]) == [0, 1]
    with pytest.raises(ValueError, match="all chunks that begin"):
        passes.end()
    with pytest.raises(ValueError, match=r"tokens of part 0 must be \[1, 5, 3\] on the CPU, got \[1, 4, 3\]"):
        passes.add(0, tokens[:, :4])
    with pytest.raises(ValueError, match=r"weights must be \[1, 5\], got \[1, 4\]"):
        passes.add(0, tokens, torch.ones(1, 4))
    with pytest.raises(ValueError, match="in the order in which begin"):
        passes.add(1, tokens[:, :4])
    passes.add(0, tokens)
    passes.add(1, tokens[:, :4])
    passes.end()
    with pytest.raises(ValueError, match="all chunks that begin"):
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
    assert torch.equal(PrunedAssign(tokens).assign(centers).sums, near.sums)


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
