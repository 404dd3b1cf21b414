"""sigmoid_nmi against the paper's formula in float64, over the whole range of scores, and its bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_fast.errors import NonFiniteError
from spt_fast.ops import nmi
from spt_fast.ops.nmi import sigmoid_nmi
from spt_fast.ops.nmi_reference import sigmoid_nmi_reference


def make_inputs(
    num_prompts: int, batch: int, num_tokens: int, width: int, *, largest_score: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 prompts and tokens whose largest absolute score is `largest_score`."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randn(num_prompts, width, generator=generator)
    tokens = torch.randn(batch, num_tokens, width, generator=generator)
    factor = math.sqrt(largest_score / float((tokens @ prompts.T).abs().max()))
    return prompts * factor, tokens * factor


def inputs_with_scores(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and one image of tokens whose score matrix is exactly `scores` [N_p, N_e]."""
    return torch.eye(scores.shape[0], dtype=scores.dtype), scores.T[None]


def softmax_nmi(scores: torch.Tensor) -> torch.Tensor:
    """What eq. 7-8 tend to when every score is far below zero: pi = softmax of all scores."""
    pi = scores.double().flatten().softmax(0).reshape(scores.shape)
    r, c = pi.sum(1), pi.sum(0)
    information = torch.special.xlogy(pi, pi / (r[:, None] * c)).sum()
    return 2 * information / (torch.special.entr(r).sum() + torch.special.entr(c).sum())


@pytest.mark.parametrize("largest_score", [1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3])
@pytest.mark.parametrize(
    "shape", [(2, 5, 3, 4), (20, 3, 196, 64), (7, 2, 33, 384), (100, 2, 50, 16)], ids=str
)
def test_matches_reference_over_the_range_of_scores(
    shape: tuple[int, int, int, int], largest_score: float
) -> None:
    prompts, tokens = make_inputs(*shape, largest_score=largest_score)
    expected = sigmoid_nmi_reference(prompts, tokens)
    got = sigmoid_nmi(prompts, tokens)
    assert got.shape == (shape[1],)
    assert got.dtype == torch.float32
    assert ((got.double() - expected) / expected).abs().max() <= 1e-6


@settings(max_examples=60, deadline=None)
@given(
    num_prompts=st.integers(2, 12),
    batch=st.integers(1, 4),
    num_tokens=st.integers(2, 40),
    width=st.integers(1, 24),
    exponent=st.floats(-3, 3),
    seed=st.integers(0, 2**16),
)
def test_any_shape_matches_reference(
    num_prompts: int, batch: int, num_tokens: int, width: int, exponent: float, seed: int
) -> None:
    prompts, tokens = make_inputs(
        num_prompts, batch, num_tokens, width, largest_score=10**exponent, seed=seed
    )
    expected = sigmoid_nmi_reference(prompts, tokens)
    got = sigmoid_nmi(prompts.double(), tokens.double())
    # The textbook sum is itself exact only to about 1e-15 of entropies near 1.
    assert ((got - expected).abs() <= 1e-4 * expected + 1e-14).all()
    assert (got >= 0).all()
    assert (got <= 1 + 1e-12).all()


def test_tiny_scores_follow_the_second_order_expansion() -> None:
    """At scores x -> 0, I tends to half the mean square of the doubly centred x / 2."""
    x = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-9
    interaction = x - x.mean(0) - x.mean(1, keepdim=True) + x.mean()
    information = (interaction / 2).square().mean() / 2
    expected = 2 * information / (math.log(6) + math.log(9))
    assert sigmoid_nmi(*inputs_with_scores(x))[0] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("offset", [-60.0, -800.0, -1e5])
def test_scores_far_below_zero_do_not_underflow(offset: float) -> None:
    scores = 3 * torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = sigmoid_nmi(*inputs_with_scores(scores + offset))
    torch.testing.assert_close(got[0], softmax_nmi(scores), rtol=1e-9, atol=0)


@pytest.mark.parametrize("score", [-1e4, -20.0, 0.0, 1e-3, 20.0, 1e4])
def test_equal_scores_share_nothing(score: float) -> None:
    got = sigmoid_nmi(*inputs_with_scores(torch.full((4, 9), score)))
    assert 0 <= float(got[0]) <= 1e-12


def test_one_pair_with_all_the_mass_is_zero_not_nan() -> None:
    scores = torch.full((3, 4), -4000.0)
    scores[1, 2] = 0
    assert sigmoid_nmi(*inputs_with_scores(scores)).tolist() == [0.0]


def test_one_to_one_pairs_share_everything() -> None:
    got = sigmoid_nmi(*inputs_with_scores(2000 * torch.eye(5) - 1000))
    torch.testing.assert_close(got, torch.ones(1))


@pytest.mark.parametrize(("num_prompts", "num_tokens"), [(1, 7), (7, 1), (1, 1)])
def test_one_prompt_or_one_token_is_zero(num_prompts: int, num_tokens: int) -> None:
    got = sigmoid_nmi(torch.randn(num_prompts, 8), torch.randn(3, num_tokens, 8))
    assert got.tolist() == [0.0, 0.0, 0.0]


def test_order_of_prompts_and_tokens_does_not_matter() -> None:
    prompts, tokens = make_inputs(6, 2, 11, 8, largest_score=5.0)
    torch.testing.assert_close(sigmoid_nmi(prompts.flip(0), tokens.flip(1)), sigmoid_nmi(prompts, tokens))


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, tokens = make_inputs(6, 7, 11, 8, largest_score=5.0)
    whole = sigmoid_nmi(prompts, tokens)
    monkeypatch.setattr(nmi, "_SCORES_PER_CHUNK", 2 * 6 * 11)
    torch.testing.assert_close(sigmoid_nmi(prompts, tokens), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_float32_on_the_same_values(dtype: torch.dtype) -> None:
    prompts, tokens = (tensor.to(dtype) for tensor in make_inputs(6, 2, 11, 8, largest_score=5.0))
    got = sigmoid_nmi(prompts, tokens)
    assert got.dtype == torch.float32
    assert torch.equal(got, sigmoid_nmi(prompts.float(), tokens.float()))


def test_strided_tokens_need_no_copy_and_give_the_same() -> None:
    prompts, tokens = make_inputs(6, 3, 12, 8, largest_score=5.0)
    assert torch.equal(sigmoid_nmi(prompts, tokens[:, 1:]), sigmoid_nmi(prompts, tokens[:, 1:].contiguous()))


def test_gradient_passes_gradcheck() -> None:
    prompts, tokens = (
        tensor.double().requires_grad_() for tensor in make_inputs(3, 2, 4, 5, largest_score=3.0)
    )
    assert torch.autograd.gradcheck(sigmoid_nmi, (prompts, tokens))


def test_gradient_is_finite_at_the_extremes() -> None:
    for largest_score in (1e-3, 1e3, 1e5):
        prompts, tokens = make_inputs(3, 2, 4, 5, largest_score=largest_score)
        prompts.requires_grad_()
        sigmoid_nmi(prompts, tokens).sum().backward()
        assert torch.isfinite(prompts.grad).all()  # type: ignore[arg-type]


def test_compiles_without_graph_break() -> None:
    prompts, tokens = make_inputs(6, 3, 11, 8, largest_score=5.0)
    compiled = torch.compile(sigmoid_nmi, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(prompts, tokens), sigmoid_nmi(prompts, tokens))


def test_bad_types_are_refused() -> None:
    prompts, tokens = torch.ones(2, 4), torch.ones(3, 5, 4)
    with pytest.raises(TypeError, match="prompts must be a tensor, got list"):
        sigmoid_nmi([[1.0]], tokens)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tokens must be a floating-point tensor, got torch\.int32"):
        sigmoid_nmi(prompts, tokens.int())
    with pytest.raises(
        TypeError, match=r"tokens must have the dtype of prompts, torch\.float32, got torch\.float64"
    ):
        sigmoid_nmi(prompts, tokens.double())


def test_bad_shapes_and_devices_are_refused() -> None:
    prompts, tokens = torch.ones(2, 4), torch.ones(3, 5, 4)
    with pytest.raises(ValueError, match=r"prompts must have shape \[N_p, D\], got \(1, 2, 4\)"):
        sigmoid_nmi(prompts[None], tokens)
    with pytest.raises(ValueError, match=r"tokens must have shape \[B, N_e, D\], got \(5, 4\)"):
        sigmoid_nmi(prompts, tokens[0])
    with pytest.raises(ValueError, match="tokens must have the width of prompts, 4, got 3"):
        sigmoid_nmi(prompts, tokens[..., :3])
    with pytest.raises(ValueError, match="prompts must not be empty"):
        sigmoid_nmi(prompts[:0], tokens)
    with pytest.raises(ValueError, match="tokens must not be empty"):
        sigmoid_nmi(prompts, tokens[:, :0])
    with pytest.raises(ValueError, match="tokens must be on the device of prompts, cpu, got meta"):
        sigmoid_nmi(prompts, tokens.to("meta"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_input_is_refused_with_its_row(value: float) -> None:
    prompts, tokens = torch.ones(2, 4), torch.ones(3, 5, 4)
    tokens[1, 2, 3] = value
    with pytest.raises(NonFiniteError, match="tokens must be finite, but row 7 holds NaN") as caught:
        sigmoid_nmi(prompts, tokens)
    assert caught.value.row == 7
