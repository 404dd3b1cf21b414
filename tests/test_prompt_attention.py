"""prompt_attention against its written-out reference in float64: values, gradients, bad input, tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spt_fast.ops.prompt_attention import prompt_attention
from spt_fast.ops.prompt_attention_reference import prompt_attention_reference

SHAPES = [(2, 3, 17, 5, 8), (1, 1, 1, 1, 1), (3, 2, 65, 20, 16), (2, 12, 197, 100, 64), (2, 4, 10, 0, 8)]


def make_inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, seed: int = 0
) -> list[torch.Tensor]:
    batch, heads, tokens, prompts, width = shape
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(3)]
    shared = [torch.randn(heads, prompts, width, generator=generator) for _ in range(2)]
    return [tensor.to(dtype).requires_grad_() for tensor in images + shared]


def in_float64(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in inputs]


def worst_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest difference relative to the largest reference value; 0 for empty tensors."""
    ours, reference = ours.detach().double(), reference.detach()
    if reference.numel() == 0:
        return 0.0
    scale = reference.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((ours - reference).abs().max() / scale)


def value_and_gradients(
    attention: Callable[..., torch.Tensor], inputs: list[torch.Tensor], scale: float | None
) -> list[torch.Tensor]:
    """The output and the gradient of each input for one fixed cotangent; zero where there is no path."""
    out = attention(*inputs, scale=scale)
    generator = torch.Generator().manual_seed(1)
    # Rounded to bfloat16, so that every precision is given the same one.
    cotangent = torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype)
    return [out, *torch.autograd.grad(out, inputs, cotangent, allow_unused=True, materialize_grads=True)]


def shape_id(shape: tuple[int, ...]) -> str:
    return "B{}-H{}-N{}-P{}-d{}".format(*shape)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_forward_and_backward_match_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, scale: float | None
) -> None:
    inputs = make_inputs(shape, dtype)
    ours = value_and_gradients(prompt_attention, inputs, scale)
    same_precision = value_and_gradients(prompt_attention_reference, inputs, scale)
    oracle = value_and_gradients(prompt_attention_reference, in_float64(inputs), scale)
    # Fused kernels rebuild the weights as exp(score - log sum): a score of 20 costs 20 roundings, and its sum
    # over tokens some more. float64 against itself is left to gradcheck.
    floor = 64 * torch.finfo(dtype).eps
    for got, plain, exact in zip(ours, same_precision, oracle, strict=True):
        assert got.dtype == dtype
        assert got.shape == exact.shape
        assert worst_error(got, exact) <= 2 * worst_error(plain, exact) + floor


@settings(max_examples=30, deadline=None)
@given(
    shape=st.tuples(
        st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.integers(0, 40), st.integers(1, 24)
    ),
    seed=st.integers(0, 2**16),
)
def test_any_shape_matches_reference(shape: tuple[int, int, int, int, int], seed: int) -> None:
    inputs = make_inputs(shape, torch.float32, seed)
    assert worst_error(prompt_attention(*inputs), prompt_attention_reference(*in_float64(inputs))) <= 1e-5


def test_reference_passes_gradcheck() -> None:
    inputs = make_inputs((2, 2, 5, 3, 4), torch.float64)
    assert torch.autograd.gradcheck(prompt_attention_reference, inputs)
    assert torch.autograd.gradcheck(prompt_attention, inputs)


def test_strided_views_give_the_same_result() -> None:
    qkv = torch.randn(2, 11, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    prompt_k, prompt_v = torch.randn(5, 2, 4, 8).permute(1, 2, 0, 3).unbind(0)
    packed = [tensor.contiguous() for tensor in (q, k, v, prompt_k, prompt_v)]
    torch.testing.assert_close(prompt_attention(q, k, v, prompt_k, prompt_v), prompt_attention(*packed))


def test_batch_order_does_not_matter() -> None:
    q, k, v, prompt_k, prompt_v = (tensor.detach() for tensor in make_inputs((4, 2, 9, 3, 8), torch.float32))
    straight = prompt_attention(q, k, v, prompt_k, prompt_v)
    reversed_ = prompt_attention(q.flip(0), k.flip(0), v.flip(0), prompt_k, prompt_v)
    torch.testing.assert_close(reversed_.flip(0), straight)


def test_prompt_order_does_not_matter() -> None:
    q, k, v, prompt_k, prompt_v = (tensor.detach() for tensor in make_inputs((2, 2, 9, 6, 8), torch.float32))
    straight = prompt_attention(q, k, v, prompt_k, prompt_v)
    torch.testing.assert_close(prompt_attention(q, k, v, prompt_k.flip(1), prompt_v.flip(1)), straight)


@pytest.mark.parametrize("num_prompts", [0, 3])
def test_compiles_without_graph_break(num_prompts: int) -> None:
    inputs = make_inputs((2, 2, 9, num_prompts, 8), torch.float32)
    compiled = torch.compile(prompt_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), prompt_attention(*inputs))


def test_autocast_takes_mixed_dtypes() -> None:
    q, k, v, prompt_k, prompt_v = (tensor.detach() for tensor in make_inputs((2, 2, 9, 3, 8), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = prompt_attention(q, k, v.bfloat16(), prompt_k, prompt_v.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(
        out.float(), prompt_attention(q, k, v, prompt_k, prompt_v), atol=0.05, rtol=0.05
    )


BAD_INPUTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    ({"prompt_v": None}, TypeError, "prompt_v must be a tensor, got NoneType"),
    (
        {"q": torch.ones(2, 3, 5, 4, dtype=torch.int64)},
        TypeError,
        "q must be a floating-point tensor, got torch.int64",
    ),
    (
        {"q": torch.ones(3, 5, 4)},
        ValueError,
        r"q must have 4 dimensions \[B, H, N, d\], got shape \(3, 5, 4\)",
    ),
    ({"prompt_k": torch.ones(1, 3, 6, 4)}, ValueError, r"prompt_k must have 3 dimensions \[H, N_p, d\]"),
    (
        {"k": torch.ones(2, 3, 6, 4)},
        ValueError,
        r"k must have the shape of q, \(2, 3, 5, 4\), got \(2, 3, 6, 4\)",
    ),
    ({"v": torch.ones(1, 3, 5, 4)}, ValueError, "v must have the shape of q"),
    ({"prompt_k": torch.ones(2, 6, 4)}, ValueError, "prompt_k must have the 3 heads of q, got 2"),
    ({"prompt_v": torch.ones(3, 6, 8)}, ValueError, "prompt_v must have the head width of q, 4, got 8"),
    ({"prompt_v": torch.ones(3, 7, 4)}, ValueError, "equally many prompts, got 6 and 7"),
    (
        {"v": torch.ones(2, 3, 5, 4).double()},
        TypeError,
        "v must have the dtype of q, torch.float32, got torch.float64",
    ),
    ({"prompt_k": torch.ones(3, 6, 4).half()}, TypeError, "prompt_k must have the dtype of q"),
    (
        {"prompt_v": torch.ones(3, 6, 4, device="meta")},
        ValueError,
        "prompt_v must be on the device of q, cpu, got meta",
    ),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD_INPUTS, ids=[case[2][:40] for case in BAD_INPUTS]
)
def test_bad_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = dict(zip(("q", "k", "v"), torch.ones(3, 2, 3, 5, 4), strict=True))
    good |= dict(zip(("prompt_k", "prompt_v"), torch.ones(2, 3, 6, 4), strict=True))
    with pytest.raises(error, match=message):
        prompt_attention(**{**good, **change})
