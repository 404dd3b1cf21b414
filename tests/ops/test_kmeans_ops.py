"""assign_accumulate and squared_distances: every instruction set against the float64 reference."""

from __future__ import annotations

import importlib.util
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import spt_fast
from spt_fast.ops import kmeans_native
from spt_fast.ops.kmeans import (
    assign_accumulate,
    choose_backend,
    explain_backend,
    squared_distances,
)
from spt_fast.ops.kmeans_reference import assign_accumulate_reference, distances_reference

ISAS = kmeans_native.build_info()["isas"]
# G, B, N, D, K: one of everything, sizes that divide no tile, more rows than a chunk, one panel and many.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 7, 5, 3),
    (3, 5, 63, 33, 20),
    (1, 4, 300, 64, 100),
    (2, 7, 197, 130, 17),
    (1, 1, 2500, 48, 49),
    (1, 2, 9, 770, 129),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT32_EPS = torch.finfo(torch.float32).eps


def make_problem(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens with a skipped prefix token (so a strided view), centres, a shift and weights."""
    groups, batch, rows, width, clusters = shape
    tokens = (torch.randn(groups, batch, rows + 1, width) + 2).to(dtype)[:, :, 1:]
    centers = torch.randn(groups, clusters, width) + 2
    return tokens, centers, tokens.float().mean((1, 2)), torch.rand(groups, batch * rows)


def assert_labels_match(labels: Tensor, tokens: Tensor, centers: Tensor) -> None:
    """The distance to the chosen centre is the smallest one, up to the rounding of float32."""
    distances = distances_reference(tokens.flatten(1, -2), centers.double())
    chosen = distances.gather(2, labels.long()[:, :, None])[:, :, 0]
    scale = tokens.double().square().sum(-1).flatten(1).amax() + centers.double().square().sum(-1).amax()
    assert (chosen - distances.amin(-1)).max() <= 8 * FLOAT32_EPS * scale


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "G{}-B{}-N{}-D{}-K{}".format(*s))
def test_assign_matches_float64_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, isa: str
) -> None:
    tokens, centers, shift, weights = make_problem(shape, dtype)
    got = kmeans_native.assign_accumulate(tokens, centers, shift, weights, True, True, isa)
    sums, counts, inertia, labels, distances = got
    assert_labels_match(labels, tokens, centers)
    # Sums and counts are compared for the labels chosen, since a tie may fall either way.
    flat = tokens.flatten(1, 2).double()
    expected_sums, expected_counts = sums_of_labels(flat, weights, labels, centers.shape[1])
    torch.testing.assert_close(sums, expected_sums, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(counts, expected_counts, rtol=1e-12, atol=0)
    *_, expected_inertia, _, expected_distances = assign_accumulate_reference(
        flat, centers.double(), shift.double(), weights.double()
    )
    torch.testing.assert_close(inertia, expected_inertia, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(distances.double(), expected_distances, rtol=1e-4, atol=1e-3)


def sums_of_labels(tokens: Tensor, weights: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    one_hot = torch.nn.functional.one_hot(labels.long(), clusters).double() * weights.double()[:, :, None]
    return one_hot.mT @ tokens, one_hot.sum(1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "G{}-B{}-N{}-D{}-K{}".format(*s))
def test_distances_match_float64_reference(shape: tuple[int, int, int, int, int], isa: str) -> None:
    tokens, centers, shift, _ = make_problem(shape, torch.float32)
    got = kmeans_native.distances(tokens, centers, shift, isa)
    expected = distances_reference(tokens.flatten(1, 2), centers.double())
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 70), st.integers(1, 60)
    ),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_native_matches_reference_on_any_shape(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    tokens, centers, shift, weights = make_problem(shape, dtype)
    native = assign_accumulate(
        tokens, centers, shift=shift, weights=weights, with_labels=True, with_distances=True, backend="native"
    )
    reference = assign_accumulate(
        tokens, centers, shift=shift, weights=weights, with_distances=True, backend="reference"
    )
    assert_labels_match(native.labels, tokens, centers)
    torch.testing.assert_close(native.counts.sum(1), reference.counts.sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(native.sums.sum(1), reference.sums.sum(1), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(native.distances, reference.distances, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
def test_sums_of_small_integers_are_exact(isa: str) -> None:
    tokens = torch.randint(-8, 9, (2, 3, 1001, 19)).float()
    centers = tokens[:, 0, :7].clone()
    sums, counts, inertia, labels, _ = kmeans_native.assign_accumulate(
        tokens, centers, None, None, True, False, isa
    )
    ones = torch.ones(labels.shape)
    expected_sums, expected_counts = sums_of_labels(tokens.flatten(1, 2).double(), ones, labels, 7)
    assert torch.equal(sums, expected_sums)
    assert torch.equal(counts, expected_counts)
    assert torch.equal(inertia, inertia.round())


@pytest.mark.parametrize("isa", ISAS)
def test_ties_go_to_the_lowest_index(isa: str) -> None:
    tokens = torch.zeros(1, 1, 5, 3)
    centers = torch.ones(1, 90, 3)
    *_, labels, _ = kmeans_native.assign_accumulate(tokens, centers, None, None, True, False, isa)
    assert labels.eq(0).all()


def test_every_half_value_is_widened_exactly() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        values = values[torch.isfinite(values)]
        if dtype is torch.bfloat16:  # whose squares would overflow
            values = values[values.abs() < 1e18]
        for isa in ISAS:
            sums, *_ = kmeans_native.assign_accumulate(
                values.reshape(1, -1, 1, 1), torch.zeros(1, 1, 1), None, None, False, False, isa
            )
            squared = kmeans_native.distances(values.reshape(1, -1, 1, 1), torch.zeros(1, 1, 1), None, isa)
            torch.testing.assert_close(squared[0, :, 0], values.float().square(), rtol=1e-6, atol=0)
            assert math.isclose(
                sums.item(), values.double().sum().item(), abs_tol=1e-6 * values.double().abs().sum()
            )


def test_shift_saves_float32_from_cancellation() -> None:
    tokens = torch.randn(1, 500, 64) + 3000
    centers = tokens[:, :10].clone()
    exact = assign_accumulate_reference(tokens, centers.double())[2]
    shifted = assign_accumulate(tokens, centers, shift=tokens.mean(1))
    torch.testing.assert_close(shifted.inertia, exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(shifted.sums.sum(1), tokens.double().sum(1), rtol=1e-9, atol=0)
    unshifted = assign_accumulate(tokens, centers)
    assert (unshifted.inertia - exact).abs() > 1e-3 * exact, "the shift is no longer needed?"


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    tokens, centers, shift, weights = make_problem((3, 9, 511, 40, 30), torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(assign_accumulate(tokens, centers, shift=shift, weights=weights, with_labels=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert torch.equal(other.sums, results[0].sums)
        assert torch.equal(other.counts, results[0].counts)
        assert torch.equal(other.inertia, results[0].inertia)
        assert torch.equal(other.labels, results[0].labels)


@pytest.mark.parametrize(("dtype", "small"), [(torch.float16, 3e-5), (torch.float32, 1e-39)])
def test_subnormal_tokens_count_where_the_caller_has_them_flushed(dtype: torch.dtype, small: float) -> None:
    """That is a setting of some threads, and a result must not depend on which of them work."""
    tokens = torch.full((1, 20_480, 16), small, dtype=dtype)
    exact = tokens.double().sum(1)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found = assign_accumulate(tokens, torch.zeros(1, 1, 16), backend="native").sums[:, 0]
            torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
        assert torch.tensor([1e-39]) * 1 == 0, "the caller's setting is gone"
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_a_bad_token_makes_its_group_inertia_not_finite(bad: float, isa: str) -> None:
    tokens = torch.randn(2, 1, 100, 20)
    tokens[1, 0, 57, 13] = bad
    _, _, inertia, _, _ = kmeans_native.assign_accumulate(
        tokens, torch.randn(2, 5, 20), None, None, False, False, isa
    )
    assert torch.isfinite(inertia).tolist() == [True, False]


def test_tokens_that_are_not_contiguous_give_the_same_result() -> None:
    tokens = torch.randn(2, 33, 50)
    centers = torch.randn(2, 4, 50)
    transposed = tokens.mT.contiguous().mT
    assert transposed.stride(-1) != 1
    assert torch.equal(assign_accumulate(transposed, centers).sums, assign_accumulate(tokens, centers).sums)
    expanded = tokens[:, :1].expand(-1, 33, -1)  # stride 0 between tokens
    assert assign_accumulate(expanded, centers).counts.amax(1).tolist() == [33, 33]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokens": [[1.0]]}, TypeError, "tokens must be a tensor, got list"),
        (
            {"tokens": torch.zeros(2, 5, 4, dtype=torch.float64)},
            TypeError,
            "tokens must be float32, float16 or bfloat16, got torch.float64",
        ),
        ({"tokens": torch.zeros(5, 4)}, ValueError, "tokens must be a non-empty"),
        ({"tokens": torch.zeros(2, 0, 4)}, ValueError, "tokens must be a non-empty"),
        ({"centers": torch.zeros(2, 3, 5)}, ValueError, r"centers must be \[2, K, 4\], got \[2, 3, 5\]"),
        ({"centers": torch.zeros(1, 3, 4)}, ValueError, r"centers must be \[2, K, 4\]"),
        ({"centers": torch.zeros(2, 0, 4)}, ValueError, r"centers must be \[2, K, 4\], got \[2, 0, 4\]"),
        (
            {"centers": torch.zeros(2, 3, 4).half()},
            TypeError,
            "centers must be torch.float32, got torch.float16",
        ),
        ({"shift": torch.zeros(4)}, ValueError, r"shift must be \[2, 4\]"),
        ({"weights": torch.zeros(2, 6)}, ValueError, r"weights must be \[2, 5\]"),
        ({"backend": "fast"}, ValueError, "backend must be one of 'auto', 'native', 'reference', got 'fast'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"tokens": torch.zeros(2, 5, 4), "centers": torch.zeros(2, 3, 4)} | change
    with pytest.raises(error, match=message):
        assign_accumulate(**arguments)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_result_to_be_corrected_changes_nothing_and_is_not_changed(backend: str) -> None:
    tokens, centers = torch.randn(2, 50, 6), torch.randn(2, 4, 6)
    last = assign_accumulate(tokens, centers + 1, with_labels=True)
    kept = [value.clone() for value in last[:4]]
    given = assign_accumulate(tokens, centers, last=last, with_labels=True, backend=backend)
    expected = assign_accumulate(tokens, centers, with_labels=True, backend=backend)
    torch.testing.assert_close(given[:4], expected[:4])
    assert all(torch.equal(a, b) for a, b in zip(last[:4], kept, strict=True))


def test_what_cannot_be_corrected_is_named() -> None:
    tokens, centers = torch.randn(2, 50, 6), torch.randn(2, 4, 6)
    last = assign_accumulate(tokens, centers, with_labels=True)
    with pytest.raises(ValueError, match="last must have labels, and takes no weights"):
        assign_accumulate(tokens, centers, last=last._replace(labels=None))
    with pytest.raises(ValueError, match="last must have labels, and takes no weights"):
        assign_accumulate(tokens, centers, last=last, weights=torch.ones(2, 50))
    with pytest.raises(ValueError, match=r"last\.labels must be \[2, 49\], got \[2, 50\]"):
        assign_accumulate(tokens[:, 1:], centers, last=last)
    for wrong in (-1, 4):
        labels = last.labels.clone()
        labels[1, 7] = wrong
        with pytest.raises(ValueError, match=f"last.labels must be from 0 to 3, got {wrong}"):
            assign_accumulate(tokens, centers, last=last._replace(labels=labels))
    with pytest.raises(ValueError, match=r"last\.sums must be \[2, 3, 6\], got \[2, 4, 6\]"):
        assign_accumulate(tokens, centers[:, 1:], last=last)


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="isa must be one of"):
        kmeans_native.distances(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1), None, "mmx")


def test_missing_module_falls_back_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans_native, "why_not", lambda device: "it was not built")
    cpu = torch.device("cpu")
    assert explain_backend(cpu) == ("reference", "it was not built")
    with pytest.raises(ValueError, match="backend='native' cannot serve cpu tensors: it was not built"):
        choose_backend(cpu, "native")
    tokens, centers = torch.randn(1, 6, 4), torch.randn(1, 2, 4)
    with pytest.warns(UserWarning, match="plain PyTorch, which is slower: it was not built"):
        result = assign_accumulate(tokens, centers)
    assert result.counts.sum() == 6


def test_what_a_missing_module_was_built_with_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spt_fast._kmeans", None)
    monkeypatch.delattr(spt_fast, "_kmeans")
    spec = importlib.util.find_spec("spt_fast.ops.kmeans_native")
    loaded_anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded_anew)
    with pytest.raises(RuntimeError, match=r"the compiled module spt_fast\._kmeans cannot be imported"):
        loaded_anew.build_info()


def test_squared_distances_backends_agree() -> None:
    tokens, centers = torch.randn(2, 31, 9), torch.randn(2, 5, 9)
    torch.testing.assert_close(
        squared_distances(tokens, centers, backend="native"),
        squared_distances(tokens, centers, backend="reference"),
        rtol=1e-4,
        atol=1e-4,
    )
