"""sigmoid_nmi against the paper's formula in float64, over the whole range of scores, and its bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from spt_fast.ops.accuracy import nmi_gradient_bound
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


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [0.051, 1.0, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_and_normalize_are_those_of_the_scores(
    dtype: torch.dtype, scale: float, normalize: bool
) -> None:
    prompts, tokens = (x.to(dtype) for x in make_inputs(7, 2, 33, 48, largest_score=40.0))
    wide = [x.double().requires_grad_() for x in (prompts, tokens)]
    lengths = [x.norm(dim=-1, keepdim=True) if normalize else torch.ones(()) for x in wide]
    expected = sigmoid_nmi_reference(scale * wide[0] / lengths[0], wide[1] / lengths[1])
    leaves = [x.clone().requires_grad_() for x in (prompts, tokens)]
    got = sigmoid_nmi(*leaves, scale=scale, normalize=normalize)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), wide), strict=True
    ):
        assert ours.dtype == dtype
        bound = 1e-4 if dtype == torch.float32 else 1e-2
        assert float((ours.double() - theirs).abs().max()) <= bound * float(theirs.abs().max())


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_scale_must_be_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be a finite number > 0"):
        sigmoid_nmi(*make_inputs(2, 1, 3, 4, largest_score=1.0), scale=scale)


@settings(max_examples=60, deadline=None)
@given(
    num_prompts=st.integers(2, 12),
    batch=st.integers(1, 4),
    num_tokens=st.integers(2, 40),
    width=st.integers(1, 24),
    exponent=st.floats(-3, 3),
    seed=st.integers(0, 2**16),
)
@example(num_prompts=2, batch=2, num_tokens=2, width=23, exponent=2.5, seed=23)
def test_any_shape_matches_reference(
    num_prompts: int, batch: int, num_tokens: int, width: int, exponent: float, seed: int
) -> None:
    prompts, tokens = make_inputs(
        num_prompts, batch, num_tokens, width, largest_score=10**exponent, seed=seed
    )
    expected = sigmoid_nmi_reference(prompts, tokens)
    parts = sigmoid_nmi(prompts.double(), tokens.double(), with_parts=True)
    assert (parts.nmi >= 0).all()
    assert (parts.nmi <= 1 + 1e-12).all()
    # The reference has nothing to divide by where all mass rounds to one pair.
    assume(bool(expected.isfinite().all()))
    # Its sums of p log p are exact to about 1e-15; the division by the entropies makes more of that.
    slack = 1e-14 / (parts.prompt_entropy + parts.token_entropy).clamp(max=1)
    assert ((parts.nmi - expected).abs() <= 1e-4 * expected + slack).all()


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
    assert got.tolist() == [0.0]


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


def test_images_do_not_depend_on_their_batch() -> None:
    """Nine images of 40,000 scores are more than are held at a time."""
    prompts, tokens = make_inputs(100, 9, 400, 8, largest_score=5.0)
    alone = torch.cat([sigmoid_nmi(prompts, image[None]) for image in tokens])
    torch.testing.assert_close(sigmoid_nmi(prompts, tokens), alone, rtol=1e-6, atol=0)
    weights = torch.rand(9)
    of_prompts, of_tokens = gradients(sigmoid_nmi, prompts, tokens, weights)
    each = [gradients(sigmoid_nmi, prompts, tokens[b : b + 1], weights[b]) for b in range(9)]
    torch.testing.assert_close(of_tokens, torch.cat([pair[1] for pair in each]))
    torch.testing.assert_close(of_prompts, torch.stack([pair[0] for pair in each]).sum(0))


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


def test_compiles_without_graph_break_forward_and_backward() -> None:
    prompts, tokens = make_inputs(6, 3, 11, 8, largest_score=5.0)
    compiled = torch.compile(sigmoid_nmi, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(prompts, tokens), sigmoid_nmi(prompts, tokens))
    weights = torch.ones(3)
    torch.testing.assert_close(
        gradients(compiled, prompts, tokens, weights), gradients(sigmoid_nmi, prompts, tokens, weights)
    )


def test_second_derivative_is_refused() -> None:
    prompts, tokens = make_inputs(3, 2, 4, 5, largest_score=3.0)
    prompts.requires_grad_()
    (gradient,) = torch.autograd.grad(sigmoid_nmi(prompts, tokens).sum(), [prompts], create_graph=True)
    with pytest.raises(RuntimeError, match="sigmoid_nmi can be differentiated once only"):
        gradient.sum().backward()


# What PyTorch loads for forward mode is compiled by its own deprecated means.
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("name", ["prompts", "tokens"])
def test_tangents_are_refused(name: str) -> None:
    given = dict(zip(("prompts", "tokens"), make_inputs(3, 2, 4, 5, largest_score=3.0), strict=True))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(ValueError, match=f"{name} must carry no tangent, got one: sigmoid_nmi has no"),
    ):
        sigmoid_nmi(**{**given, name: torch.autograd.forward_ad.make_dual(given[name], given[name])})


def test_bad_types_are_refused() -> None:
    prompts, tokens = torch.ones(2, 4), torch.ones(3, 5, 4)
    with pytest.raises(TypeError, match="prompts must be a tensor, got list"):
        sigmoid_nmi([[1.0]], tokens)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tokens must be torch\.float32, got torch\.int32"):
        sigmoid_nmi(prompts, tokens.int())
    with pytest.raises(TypeError, match=r"prompts must be a floating-point tensor, got torch\.int32"):
        sigmoid_nmi(prompts.int(), tokens)
    with pytest.raises(TypeError, match=r"tokens must be torch\.float32, got torch\.float64"):
        sigmoid_nmi(prompts, tokens.double())


def test_bad_shapes_and_devices_are_refused() -> None:
    prompts, tokens = torch.ones(2, 4), torch.ones(3, 5, 4)
    with pytest.raises(ValueError, match=r"prompts must be \[3, N_p, D\], got \[1, 2, 4\]"):
        sigmoid_nmi(prompts[None], tokens)
    with pytest.raises(ValueError, match=r"prompts must be \[N_p, D\], got \[1, 1, 2, 4\]"):
        sigmoid_nmi(prompts[None, None], tokens)
    with pytest.raises(ValueError, match=r"tokens must be \[B, N_e, 4\], got \[5, 4\]"):
        sigmoid_nmi(prompts, tokens[0])
    with pytest.raises(ValueError, match=r"tokens must be \[B, N_e, 4\], got \[3, 5, 3\]"):
        sigmoid_nmi(prompts, tokens[..., :3])
    with pytest.raises(ValueError, match=r"prompts must be \[N_p, D\], got \[0, 4\]"):
        sigmoid_nmi(prompts[:0], tokens)
    with pytest.raises(ValueError, match=r"tokens must be \[B, N_e, 4\], got \[3, 0, 4\]"):
        sigmoid_nmi(prompts, tokens[:, :0])
    with pytest.raises(ValueError, match="tokens must be on cpu, got meta"):
        sigmoid_nmi(prompts, tokens.to("meta"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_make_the_nmi_of_their_image_nan(value: float) -> None:
    prompts, tokens = make_inputs(2, 3, 5, 4, largest_score=1.0)
    expected = sigmoid_nmi(prompts, tokens)
    tokens[1, 2, 3] = value
    got = sigmoid_nmi(prompts, tokens)
    assert got.isnan().tolist() == [False, True, False]
    assert torch.equal(got[::2], expected[::2])
    prompts[0, 0] = value
    assert sigmoid_nmi(prompts, tokens).isnan().all()


def test_parts_are_those_of_the_distribution() -> None:
    prompts, tokens = make_inputs(4, 3, 6, 5, largest_score=6.0)
    parts = sigmoid_nmi(prompts.double(), tokens.double(), with_parts=True)
    s = torch.sigmoid(prompts.double() @ tokens.double().mT)
    pi = s / s.sum(dim=(1, 2), keepdim=True)
    r, c = pi.sum(2), pi.sum(1)
    joint_entropy = torch.special.entr(pi).sum(dim=(1, 2))
    torch.testing.assert_close(parts.prompt_marginal, r)
    torch.testing.assert_close(parts.token_marginal, c)
    torch.testing.assert_close(parts.prompt_entropy, torch.special.entr(r).sum(1))
    torch.testing.assert_close(parts.token_entropy, torch.special.entr(c).sum(1))
    torch.testing.assert_close(
        parts.information, parts.prompt_entropy + parts.token_entropy - joint_entropy, rtol=1e-9, atol=1e-14
    )
    torch.testing.assert_close(parts.nmi, sigmoid_nmi(prompts.double(), tokens.double()))


@pytest.mark.parametrize("part", ["nmi", "information", "prompt_entropy", "token_entropy"])
def test_gradient_of_every_part_passes_gradcheck(part: str) -> None:
    prompts, tokens = (
        tensor.double().requires_grad_() for tensor in make_inputs(3, 2, 4, 5, largest_score=3.0)
    )
    assert torch.autograd.gradcheck(
        lambda p, e: getattr(sigmoid_nmi(p, e, with_parts=True), part), (prompts, tokens)
    )


def test_gradcheck_of_the_reference() -> None:
    prompts, tokens = (
        tensor.double().requires_grad_() for tensor in make_inputs(3, 2, 4, 5, largest_score=3.0)
    )
    assert torch.autograd.gradcheck(sigmoid_nmi_reference, (prompts, tokens))


@pytest.mark.parametrize("largest_score", [1e-3, 1.0, 30.0, 1e3])
def test_backward_matches_reference(largest_score: float) -> None:
    prompts, tokens = make_inputs(7, 3, 13, 10, largest_score=largest_score)
    weights = torch.rand(3, generator=torch.Generator().manual_seed(1))
    expected = gradients(sigmoid_nmi_reference, prompts.double(), tokens.double(), weights.double())
    got = gradients(sigmoid_nmi, prompts, tokens, weights)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == torch.float32
        # float64 inside; what is left is the rounding of inputs' gradients to float32.
        assert (mine.double() - theirs).abs().max() <= 4 * 2**-24 * theirs.abs().max()


def gradients(
    op: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    prompts: torch.Tensor,
    tokens: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Of the weighted sum of the values per image, for prompts and tokens."""
    prompts, tokens = prompts.clone().requires_grad_(), tokens.clone().requires_grad_()
    return torch.autograd.grad((op(prompts, tokens) * weights).sum(), (prompts, tokens))


@pytest.mark.parametrize("offset", [0.0, -1000.0, 1000.0])
@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0])
def test_matches_exact_arithmetic_where_float64_textbook_formulas_fail(offset: float, spread: float) -> None:
    """With nearly all mass on one pair the textbook loses 1 - p; with +1000 and spread 1, 1 - sigmoid."""
    scores = spread * torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = float(sigmoid_nmi(*inputs_with_scores(scores + offset))[0])
    # sigmoid(x) is 1 in float64 above 37: information below the square of its rounding is not there.
    assert got == pytest.approx(exact_nmi(scores + offset), rel=1e-13, abs=1e-30)


def exact_nmi(scores: torch.Tensor) -> float:
    """Eq. 8 in 500 digits."""
    with mpmath.workdps(500):
        s = [[1 / (1 + mpmath.exp(-mpmath.mpf(x))) for x in row] for row in scores.tolist()]
        total = mpmath.fsum(map(mpmath.fsum, s))
        pi = [[value / total for value in row] for row in s]
        r, c = [mpmath.fsum(row) for row in pi], [mpmath.fsum(column) for column in zip(*pi, strict=True)]
        pairs = ((pi[k][j], r[k] * c[j]) for k in range(len(r)) for j in range(len(c)))
        information = mpmath.fsum(p * mpmath.log(p / rc) for p, rc in pairs)
        return float(2 * information / -mpmath.fsum(p * mpmath.log(p) for p in r + c))


def test_scores_that_float32_cannot_hold_are_computed_in_float64() -> None:
    """Scores near -1000 that differ by little: rounding to float32 alone moves the NMI by more than 1e-4."""
    prompts, tokens = make_inputs(3, 4, 5, 64, largest_score=5.0)
    prompts = torch.cat((prompts, torch.full((3, 100), 10.0)), dim=1)
    tokens = torch.cat((tokens, torch.full((4, 5, 100), -1.0) - 1e-3), dim=2)
    expected = sigmoid_nmi(prompts.double(), tokens.double())
    torch.testing.assert_close(sigmoid_nmi(prompts, tokens).double(), expected, rtol=1e-6, atol=0)
    rounded = [sigmoid_nmi(*inputs_with_scores((prompts @ image.T).double())) for image in tokens]
    assert ((torch.cat(rounded) - expected) / expected).abs().max() > 1e-6


def test_scaling_the_sigmoid_does_not_change_it() -> None:
    """Far below zero, adding a constant to all scores multiplies every sigmoid by one factor."""
    scores = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 60
    torch.testing.assert_close(
        sigmoid_nmi(*inputs_with_scores(scores - 30)),
        sigmoid_nmi(*inputs_with_scores(scores)),
        rtol=1e-9,
        atol=0,
    )


def test_the_bits_do_not_depend_on_whether_prompts_are_learned() -> None:
    prompts, tokens = make_inputs(5, 16, 196, 192, largest_score=3.0)
    learned = torch.nn.Parameter(prompts[None].clone())
    with torch.no_grad():
        assert torch.equal(sigmoid_nmi(learned[0], tokens[:, 1:]), sigmoid_nmi(prompts, tokens[:, 1:]))


def test_the_bits_do_not_depend_on_threads() -> None:
    prompts, tokens = make_inputs(20, 2, 196, 768, largest_score=3.0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = sigmoid_nmi(prompts, tokens), sigmoid_nmi(prompts, tokens[:1])
        torch.set_num_threads(2)
        assert torch.equal(sigmoid_nmi(prompts, tokens), alone[0])
        assert torch.equal(sigmoid_nmi(prompts, tokens[:1]), alone[1])
    finally:
        torch.set_num_threads(before)


def own_prompts(prompts: torch.Tensor, images: int) -> torch.Tensor:
    """Others for each image, [B, N_p, D]."""
    return torch.stack([prompts.roll(image, dims=1) for image in range(images)])


@pytest.mark.parametrize("largest_score", [1e-3, 3.0, 1e3])
@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (20, 3, 196, 64), (100, 20, 196, 16)], ids=str)
def test_images_may_have_prompts_of_their_own(shape: tuple[int, int, int, int], largest_score: float) -> None:
    """The last shape is more than one chunk."""
    prompts, tokens = make_inputs(*shape, largest_score=largest_score)
    leaves = [own_prompts(prompts, len(tokens)).requires_grad_(), tokens.clone().requires_grad_()]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = sigmoid_nmi_reference(*wide)
    got = sigmoid_nmi(*leaves)
    assert ((got.double() - expected) / expected).abs().max() <= 1e-6
    for ours, theirs in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(expected.sum(), wide), strict=True
    ):
        assert (ours.double() - theirs).abs().max() <= nmi_gradient_bound(theirs, torch.float32)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_op_is_registered_as_torch_wants_it(dtype: torch.dtype, own: bool) -> None:
    prompts, tokens = (tensor.to(dtype) for tensor in make_inputs(3, 2, 4, 5, largest_score=3.0))
    prompts = own_prompts(prompts, len(tokens)) if own else prompts
    arguments = (prompts.requires_grad_(), tokens[:, 1:].detach().requires_grad_())
    torch.library.opcheck(torch.ops.spt_fast.sigmoid_nmi.default, arguments)


def test_gradients_lie_in_memory_as_the_compiler_is_told() -> None:
    """Also of a transposed weight: compiled code relies on strides."""
    prompts, tokens = make_inputs(3, 2, 4, 5, largest_score=3.0)
    for each in (prompts, own_prompts(prompts, len(tokens))):
        prompts, tokens = each.mT.contiguous().mT, tokens.mT.contiguous().mT
        parts = torch.ops.spt_fast.sigmoid_nmi(prompts, tokens)
        arguments = (prompts, tokens, torch.randn(2, 3, dtype=torch.float64), *parts[1:4])
        torch.library.opcheck(torch.ops.spt_fast.sigmoid_nmi_backward.default, arguments)


def test_autocast_does_not_lower_the_precision() -> None:
    prompts, tokens = make_inputs(6, 3, 12, 8, largest_score=5.0)
    expected = sigmoid_nmi(prompts, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sigmoid_nmi(prompts, tokens), expected)
