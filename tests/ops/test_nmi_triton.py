"""The Triton kernels of `sigmoid_nmi` against float64, in Triton's interpreter; and what they compile to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import spt_fast
from spt_fast.ops import nmi_tiles
from spt_fast.ops.accuracy import NMI_SHARE, nmi_gradient_bound, nmi_inputs
from spt_fast.ops.nmi import explain_backend, sigmoid_nmi
from spt_fast.ops.nmi_cpu import nmi_backward, nmi_coefficients, nmi_forward
from spt_fast.ops.nmi_triton import launch_nmi_backward, launch_nmi_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # NumPy on overflow, as meant
if DEVICE == "cuda":
    # The same tests run the compiled kernels there.
    pytestmark.append(pytest.mark.gpu)
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "nmi_compiled.py"
# N_p, B, N_e, D: small and large in one tile; several tiles of prompts and of tokens
SHAPES = [(3, 2, 5, 7), (20, 2, 196, 40), (20, 1, 300, 33)]


def make_inputs(
    shape: tuple[int, int, int, int], largest_score: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return nmi_inputs(shape, largest_score, dtype, DEVICE)


def inputs_with_scores(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and one image of tokens whose scores are exactly `scores` [N_p, N_e] in float32."""
    return torch.eye(scores.shape[0]).to(DEVICE), scores.T[None].float().to(DEVICE)


def in_pairs(
    scores: list[float], dtypes: list[torch.dtype]
) -> list[tuple[tuple[int, int, int, int], float, torch.dtype]]:
    """Cases in which every two of a shape, a largest score and a dtype meet; the interpreter is slow."""
    return [
        (SHAPES[(row + column) % len(SHAPES)], score, dtypes[column % len(dtypes)])
        for row, score in enumerate(scores)
        for column in range(max(len(dtypes), len(SHAPES)))
    ]


@pytest.mark.parametrize(
    ("shape", "largest_score", "dtype"),
    in_pairs([1e-3, 1.0, 30.0, 1e3], [torch.float32, torch.bfloat16, torch.float16]),
    ids=str,
)
def test_forward_matches_float64(
    shape: tuple[int, int, int, int], largest_score: float, dtype: torch.dtype
) -> None:
    prompts, tokens = make_inputs(shape, largest_score, dtype)
    got = launch_nmi_forward(prompts, tokens)
    expected = nmi_forward(prompts.double(), tokens.double())
    for mine, theirs in zip(got[:4], expected[:4], strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs, rtol=NMI_SHARE, atol=0)
    for mine, theirs in zip(got[4:], expected[4:], strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("shape", "largest_score", "dtype"),
    in_pairs([1e-3, 1.0, 1e3], [torch.float32, torch.bfloat16]),
    ids=str,
)
def test_backward_matches_float64(
    shape: tuple[int, int, int, int], largest_score: float, dtype: torch.dtype
) -> None:
    prompts, tokens = make_inputs(shape, largest_score, dtype)
    parts = nmi_forward(prompts.double(), tokens.double())
    coefficients = nmi_coefficients(parts[0], parts[2], parts[3])
    expected = nmi_backward(prompts.double(), tokens.double(), coefficients)
    got = launch_nmi_backward(prompts, tokens, coefficients, *(part.float() for part in parts[1:4]))
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs).abs().max() <= nmi_gradient_bound(theirs, dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_may_have_prompts_of_their_own(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nmi_tiles, "images_per_chunk", lambda *_: 2)
    prompts, tokens = make_inputs((shape[0], 3, *shape[2:]), 3.0, torch.float32)
    prompts = torch.stack([prompts, prompts.flip(0), prompts.roll(1, dims=1)]).mT.contiguous().mT
    expected = nmi_forward(prompts.double(), tokens.double())
    got = launch_nmi_forward(prompts, tokens)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-9)
    coefficients = nmi_coefficients(expected[0], expected[2], expected[3])
    gradients = launch_nmi_backward(prompts, tokens, coefficients, *(part.float() for part in expected[1:4]))
    in_float64 = nmi_backward(prompts.double(), tokens.double(), coefficients)
    for mine, theirs in zip(gradients, in_float64, strict=True):
        assert (mine.double() - theirs).abs().max() <= nmi_gradient_bound(theirs, torch.float32)


def test_gradients_are_contiguous_whatever_the_inputs_are() -> None:
    prompts, tokens = make_inputs((3, 2, 5, 7), 1.0, torch.float32)
    prompts, tokens = prompts.T.contiguous().T, tokens.mT.contiguous().mT
    parts = launch_nmi_forward(prompts, tokens)
    gradients = launch_nmi_backward(
        prompts, tokens, nmi_coefficients(parts[0], parts[2], parts[3]), *parts[1:4]
    )
    assert all(gradient.is_contiguous() for gradient in gradients)


@pytest.mark.parametrize("offset", [-1000.0, 0.0, 1000.0])
@pytest.mark.parametrize("spread", [1e-3, 3.0, 20.0])
def test_hard_scores_match_float64(offset: float, spread: float) -> None:
    scores = spread * torch.randn(5, 9, generator=torch.Generator().manual_seed(0)) + offset
    prompts, tokens = inputs_with_scores(scores)
    got = launch_nmi_forward(prompts, tokens)[0]
    expected = nmi_forward(prompts.double(), tokens.double())[0]
    # At +1000 every sigmoid is 1 in float64 too, and nothing is shared.
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("score", [-1e3, -20.0, 0.0, 1e3])
@pytest.mark.parametrize("shape", [(4, 9), (20, 300)], ids=str)
def test_equal_scores_share_nothing(score: float, shape: tuple[int, int]) -> None:
    assert launch_nmi_forward(*inputs_with_scores(torch.full(shape, score)))[0].tolist() == [0.0]


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 300)], ids=str)
def test_one_prompt_or_one_token_is_zero(shape: tuple[int, int]) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert launch_nmi_forward(*inputs_with_scores(scores))[0].tolist() == [0.0]


@pytest.mark.parametrize("lead", [10.0, 30.0, 60.0])
def test_one_pair_with_nearly_all_the_mass(lead: float) -> None:
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) - 900 - lead
    scores[1, 2] = -900
    prompts, tokens = inputs_with_scores(scores)
    expected = nmi_forward(prompts.double(), tokens.double())[0]
    torch.testing.assert_close(launch_nmi_forward(prompts, tokens)[0].double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (20, 3, 300, 8)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_make_the_nmi_of_their_image_nan(
    shape: tuple[int, int, int, int], value: float
) -> None:
    prompts, tokens = make_inputs(shape, 1.0, torch.float32)
    tokens[1, 2, 3] = value
    assert launch_nmi_forward(prompts, tokens)[0].isnan().tolist() == [False, True, False]


def test_bounded_buffer_gives_the_same_as_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, tokens = make_inputs((20, 3, 300, 8), 5.0, torch.float32)
    whole = launch_nmi_forward(prompts, tokens)
    monkeypatch.setattr(nmi_tiles, "BUFFERED_SCORES", 2 * 20 * 300)
    for mine, theirs in zip(launch_nmi_forward(prompts, tokens), whole, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
def test_op_on_a_gpu_uses_the_kernels_and_matches_float64() -> None:
    prompts, tokens = make_inputs((20, 3, 196, 768), 5.0, torch.float32)
    assert explain_backend(tokens.device)[0] == "triton"
    mine = [tensor.clone().requires_grad_() for tensor in (prompts, tokens)]
    exact = [tensor.double().cpu().requires_grad_() for tensor in (prompts, tokens)]
    got, expected = sigmoid_nmi(*mine), sigmoid_nmi(*exact)
    torch.testing.assert_close(got.double().cpu(), expected, rtol=1e-4, atol=0)
    gradients = torch.autograd.grad(got.sum(), mine)
    for gradient, theirs in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert (gradient.double().cpu() - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_kernels_as_compiled_for_sm_80_90_100_and_120() -> None:
    """In a process of its own, because the interpreter's switch is read once.

    Of the fused kernel the largest tiles, 16 warps: smaller ones have as many scores a thread, and more
    registers. All of them: `python -m benchmarks.nmi_compiled`.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(spt_fast.__file__).parents[1])
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--json", "--least-scores", "8192"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for arch in (80, 90, 100, 120):
        assert len([case for case in found if case["arch"] == arch]) == 2 * (2 + 1) + 2
    for case in found:
        assert case["loop_spills"] == 0, case
        # One value of the fused kernel's largest tile in float32, outside of the loop.
        assert case["spills"] <= (8 if case["arch"] == 120 else 0), case
        # float32 is never rounded to TensorFloat-32.
        assert not case["tf32"], case
        if case["kernel"].startswith("sweep gradient"):
            # Scores become gradients in place, behind a barrier.
            assert not case["unordered"][-1], case
