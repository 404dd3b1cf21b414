"""Promised accuracy holds where the user lets PyTorch round float32 products.

CPUs round at most the largest products, so that the products of PyTorch are replaced here by some that round
as TensorFloat-32 does: to 10 bits of mantissa.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spt_fast import KMeans, cka
from spt_fast.ops.accuracy import (
    assigned_deviations,
    kmeans_problem,
    nmi_gradient_bound,
    nmi_inputs,
    rounding_band,
)
from spt_fast.ops.cka_reference import cka_reference
from spt_fast.ops.float32_products import full_product, rounds_float32
from spt_fast.ops.kmeans import assign_accumulate, squared_distances
from spt_fast.ops.kmeans_reference import distances_reference
from spt_fast.ops.nmi import sigmoid_nmi

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROMISED = 1e-4  # relative, of docs/nmi.md


def rounded(factor: Tensor) -> Any:
    """A factor as a product takes it, in NumPy's float64: float32 to the nearest of 10 bits of mantissa."""
    if factor.dtype != torch.float32:
        return factor.double().numpy()
    bits = factor.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & -(1 << 13)).view(torch.float32).double().numpy()


def rounding_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.from_numpy(rounded(a) @ rounded(b)).to(a.dtype)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Products round float32 to TensorFloat-32, as the user has allowed."""
    torch.set_float32_matmul_precision("high")
    library = torch.library.Library("aten", "IMPL")
    for name in ("mm", "bmm"):
        library.impl(name, rounding_product, "CPU", allow_override=True)
    yield
    library._destroy()
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("tf32")
def test_the_products_of_these_tests_round() -> None:
    a, b = torch.randn(2, 8, 64), torch.randn(2, 64, 8)
    exact = torch.from_numpy(a.double().numpy() @ b.double().numpy())
    assert ((a @ b) - exact).abs().max() > 1e-4 * exact.abs().max()
    assert ((a[0] @ b[0]) - exact[0]).abs().max() > 1e-4 * exact.abs().max()
    assert (full_product(a, b) - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (20, 3, 50, 40)], ids=str)
@pytest.mark.parametrize("largest_score", [5.0, 50.0, 1e3])
def test_nmi_and_its_gradient(largest_score: float, shape: tuple[int, int, int, int]) -> None:
    inputs = [tensor.requires_grad_() for tensor in nmi_inputs(shape, largest_score, torch.float32)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    found, expected = sigmoid_nmi(*inputs), sigmoid_nmi(*exact)
    torch.testing.assert_close(found.double(), expected, rtol=PROMISED, atol=0)
    gradients = torch.autograd.grad(found.sum(), inputs)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected.sum(), exact), strict=True):
        assert (mine.double() - theirs).abs().max() <= nmi_gradient_bound(theirs, torch.float32)


@pytest.mark.usefixtures("tf32")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy on overflow, as meant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (20, 1, 70, 40)], ids=str)
def test_the_gradient_of_nmi_beside_the_triton_kernels(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    from spt_fast.ops.nmi_cpu import nmi_backward, nmi_coefficients, nmi_forward
    from spt_fast.ops.nmi_triton import launch_nmi_backward

    prompts, tokens = nmi_inputs(shape, 5.0, dtype)
    parts = nmi_forward(prompts.double(), tokens.double())
    coefficients = nmi_coefficients(parts[0], parts[2], parts[3])
    expected = nmi_backward(prompts.double(), tokens.double(), coefficients)
    found = launch_nmi_backward(prompts, tokens, coefficients, *(part.float() for part in parts[1:4]))
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine.double() - theirs).abs().max() <= nmi_gradient_bound(theirs, dtype)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kmeans_without_compiled_kernels(dtype: torch.dtype) -> None:
    tokens, centers, shift, weights = kmeans_problem(2, 3, 17, 1, 48, 5, dtype, weighted=True)
    options: dict[str, Any] = {"shift": shift, "backend": "reference"}
    found = assign_accumulate(
        tokens, centers, weights=weights, with_labels=True, with_distances=True, **options
    )
    for name, deviation in assigned_deviations(found, tokens, centers, shift, weights).items():
        assert deviation.ok, (name, deviation)
    flat = tokens.flatten(1, 2)
    error = squared_distances(tokens, centers, **options) - distances_reference(
        flat.double(), centers.double()
    )
    assert (error.abs() <= rounding_band(flat, centers, shift)).all()


@pytest.mark.usefixtures("tf32")
def test_cka() -> None:
    x, y = torch.randn(40, 12), torch.randn(40, 9)
    torch.testing.assert_close(cka(x, y).double(), cka_reference(x, y).double(), rtol=1e-6, atol=0)


def test_autocast_does_not_reach_kmeans_without_compiled_kernels() -> None:
    tokens = torch.randn(300, 24)
    estimator = KMeans(6, backend="reference", random_state=0, n_init=1)
    expected = estimator.fit(tokens).cluster_centers_.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(estimator.fit(tokens).cluster_centers_, expected)


@pytest.mark.parametrize("value", ["high", "medium"])
def test_the_precision_of_the_process_is_seen(value: str) -> None:
    assert not rounds_float32(CPU)
    assert not rounds_float32(CUDA)
    try:
        torch.set_float32_matmul_precision(value)
        assert rounds_float32(CPU)
        assert rounds_float32(CUDA)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_precision_of_cuda_is_seen() -> None:
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert rounds_float32(CUDA)
        assert not rounds_float32(CPU)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"


def test_the_old_switch_of_cuda_is_seen() -> None:
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert rounds_float32(CUDA)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.usefixtures("tf32")
def test_no_other_thread_sees_another_setting() -> None:
    """Products are made while another thread looks at the setting."""
    seen, done = set(), threading.Event()

    def look() -> None:
        while not done.is_set():
            seen.add(torch.get_float32_matmul_precision())

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(50):
        full_product(torch.randn(4, 16, 16), torch.randn(4, 16, 16))
    done.set()
    thread.join()
    assert seen == {"high"}
