"""Linear CKA: against its definition in float64, its invariances, and its streaming form."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch

import spt_fast
from spt_fast.ops.cka import StreamingCKA, cka
from spt_fast.ops.cka_reference import cka_reference, hsic_reference
from spt_fast.support.errors import NonFiniteError

# Every product is accumulated in float64, so what is left is rounding of the result to its own dtype.
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def related(n: int, width_x: int, width_y: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 features with means far from 0, the second partly made of the first."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width_x, generator=generator, dtype=torch.float64)
    mix = torch.randn(width_x, width_y, generator=generator, dtype=torch.float64) / width_x**0.5
    noise = torch.randn(n, width_y, generator=generator, dtype=torch.float64)
    return x + 3, x @ mix + noise - 2


def rotation(width: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q


@pytest.mark.parametrize(
    ("n", "width_x", "width_y"), [(4, 1, 1), (5, 3, 2), (7, 40, 60), (33, 5, 129), (130, 17, 23)]
)
def test_cka_matches_reference(n, width_x, width_y):
    x, y = related(n, width_x, width_y)
    torch.testing.assert_close(cka(x, y), cka_reference(x, y), **EXACT)
    torch.testing.assert_close(cka(x, y), cka(y, x), **EXACT)
    torch.testing.assert_close(cka(x, x), torch.ones((), dtype=torch.float64), **EXACT)


@pytest.mark.parametrize(("n", "width_x", "width_y"), [(4, 1, 1), (7, 40, 60), (33, 5, 129)])
def test_biased_cka_is_that_of_kornblith(n, width_x, width_y):
    x, y = related(n, width_x, width_y)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    k, l = (centring @ z @ z.T @ centring for z in (x, y))  # noqa: E741
    expected = (k * l).sum() / (k.norm() * l.norm())
    torch.testing.assert_close(cka(x, y, unbiased=False), expected, **EXACT)
    streaming = StreamingCKA(1, 1, unbiased=False)
    streaming.update([x[None]], y[None], 0)
    torch.testing.assert_close(streaming.result()[0, 0], expected, **EXACT)
    assert float(cka(x, x + 5, unbiased=False)) == pytest.approx(1)


def test_biased_cka_of_a_constant_is_zero():
    x, y = related(9, 3, 4)
    assert float(cka(x, torch.ones_like(y), unbiased=False)) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_narrow_inputs_match_reference_on_the_same_rounded_values(dtype):
    x, y = (tensor.to(dtype) for tensor in related(31, 6, 9))
    found = spt_fast.cka(x, y)
    assert found.dtype == torch.float32
    # Half an ulp of a float32 below 1.
    torch.testing.assert_close(found.double(), cka_reference(x, y), rtol=0, atol=2**-25)


def test_strides_change_nothing():
    x, y = related(20, 6, 8)
    found = cka(x.T.contiguous().T, y[:, ::2])
    torch.testing.assert_close(found, cka(x, y[:, ::2].contiguous()), **EXACT)


def test_rotation_scale_and_shift_change_nothing():
    x, y = related(25, 6, 11)
    expected = cka(x, y)
    for changed in (x @ rotation(6), 1e-3 * x, 1e3 * x, x + torch.randn(6, dtype=torch.float64), x.flip(1)):
        torch.testing.assert_close(cka(changed, y), expected, **EXACT)
    order = torch.randperm(25)
    torch.testing.assert_close(cka(x[order], y[order]), expected, **EXACT)
    stretched = x * torch.arange(1, 7)
    assert abs(cka(stretched, y) - expected) > 1e-3


def test_large_mean_does_not_cancel():
    x, y = related(25, 6, 11)
    torch.testing.assert_close(cka(x + 1e6, y), cka(x, y), rtol=1e-6, atol=1e-8)


def biased_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_unrelated_features_have_no_bias():
    trials, n, width = 400, 12, 30
    pairs = torch.randn(trials, 2, n, width, dtype=torch.float64)
    unbiased = torch.stack([cka(*pair) for pair in pairs])
    biased = np.mean([biased_cka(*pair) for pair in pairs])
    # The mean of 400 draws lies within four of its standard errors of 0.
    assert abs(unbiased.mean()) < 4 * unbiased.std() / trials**0.5
    assert unbiased.std() / trials**0.5 < 0.01
    assert biased > 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "empty",
    [
        torch.full((9, 3), 0.1),
        torch.zeros(9, 3),
        torch.tensor([1e4] + [0.1] * 8)[:, None].expand(9, 3),
    ],
    ids=["constant", "zero", "one-example"],
)
def test_features_that_say_nothing_give_zero(empty, dtype):
    other = torch.randn(9, 5).to(dtype)
    assert cka(empty.to(dtype), other) == 0
    assert cka(other, empty.to(dtype)) == 0


def test_no_gradient_flows():
    x = torch.randn(6, 3, requires_grad=True)
    assert not cka(x, torch.randn(6, 2)).requires_grad


# What PyTorch loads for forward mode is compiled by its own deprecated means.
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("index", [0, 1])
def test_tangents_are_refused(index):
    pair = list(related(6, 3, 2))
    with torch.autograd.forward_ad.dual_level():
        pair[index] = torch.autograd.forward_ad.make_dual(pair[index], pair[index])
        with pytest.raises(ValueError, match=f"{'xy'[index]} must carry no tangent, got one: cka has no"):
            cka(*pair)


def test_meta_tensors_give_shapes():
    value = cka(torch.empty(6, 3, device="meta"), torch.empty(6, 2, device="meta"))
    assert (value.shape, value.dtype, value.device.type) == ((), torch.float32, "meta")


def test_op_passes_opcheck_and_compiles_without_a_break():
    x, y = (tensor.float() for tensor in related(9, 3, 4))
    torch.library.opcheck(torch.ops.spt_fast.cka.default, (x, y))
    compiled = torch.compile(cka, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, y), cka(x, y))


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (np.zeros((5, 2)), torch.zeros(5, 2), TypeError, "x must be a tensor, got ndarray"),
        (torch.zeros(5, 2), [1.0], TypeError, "y must be a tensor, got list"),
        (torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 2), TypeError, "x must be a floating-point"),
        (torch.zeros(5, 2), torch.zeros(5, 2).half(), TypeError, r"y must be torch.float32, got torch.fl"),
        (torch.zeros(5), torch.zeros(5, 2), ValueError, r"x must be \[n, D1\], got \[5\]"),
        (torch.zeros(3, 2), torch.zeros(3, 2), ValueError, "x must hold at least 4 examples.*got 3"),
        (torch.zeros(5, 2), torch.zeros(5, 0), ValueError, r"y must be \[5, D2\], got \[5, 0\]"),
        (torch.zeros(5, 2), torch.zeros(6, 2), ValueError, r"y must be \[5, D2\], got \[6, 2\]"),
        (
            torch.zeros(5, 2),
            torch.zeros(5, 2, device="meta"),
            ValueError,
            "y must be on cpu, got meta",
        ),
    ],
)
def test_bad_input_is_named(x, y, error, message):
    with pytest.raises(error, match=message):
        cka(x, y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value):
    x = torch.zeros(6, 2)
    x[4, 1] = value
    with pytest.raises(NonFiniteError, match="y must be finite, but row 4") as raised:
        cka(torch.randn(6, 2), x)
    assert raised.value.row == 4


def stream(x_layers, y_layers, sizes) -> torch.Tensor:
    """Minibatches of `sizes` each; [minibatches, n, D] per layer in, [Lx, Ly] out."""
    streaming = StreamingCKA(len(x_layers), len(y_layers))
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        for column, y in enumerate(y_layers):
            streaming.update([x if len(x) == 1 else x[part] for x in x_layers], y[part], column)
        start += size
    return streaming.result()


def make_layers(shared: bool = False) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Two x, the first the same in all six minibatches if `shared`, and three y; n = 15."""
    pairs = [related(15, 4, 6, seed) for seed in range(6)]
    base, mixed = (torch.stack(side) for side in zip(*pairs, strict=True))
    noise = torch.randn(6, 15, 5, dtype=torch.float64)
    return [base[:1] if shared else base, noise], [base, mixed, noise + base[:, :, :1]]


@pytest.mark.parametrize("shared", [False, True])
def test_streaming_divides_averages_of_hsic(shared):
    xs, ys = make_layers(shared)
    found = stream(xs, ys, [6])
    for row, column in np.ndindex(2, 3):
        kernels = [
            [features.expand(6, -1, -1)[b] @ features.expand(6, -1, -1)[b].T for b in range(6)]
            for features in (xs[row], ys[column])
        ]
        cross = sum(hsic_reference(*pair) for pair in zip(*kernels, strict=True))
        own = [sum(hsic_reference(k, k) for k in side) for side in kernels]
        torch.testing.assert_close(found[row, column], cross / (own[0] * own[1]).sqrt(), **EXACT)


def test_streaming_does_not_depend_on_how_minibatches_arrive():
    xs, ys = make_layers(shared=True)
    torch.testing.assert_close(stream(xs, ys, [1, 3, 2]), stream(xs, ys, [6]), **EXACT)


def test_streaming_of_one_minibatch_is_cka():
    xs, ys = make_layers()
    found = stream([x[:1] for x in xs], [y[:1] for y in ys], [1])
    expected = [[cka(x[0], y[0]) for y in ys] for x in xs]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_minibatches_estimate_what_the_whole_gives():
    x, y = related(6000, 4, 6)
    parts = [tensor.reshape(400, 15, -1) for tensor in (x, y)]
    # 400 minibatches: the spread between halves is about 0.02.
    assert abs(stream([parts[0]], [parts[1]], [400])[0, 0] - cka(x, y)) < 0.05
    assert np.mean([biased_cka(*pair) for pair in zip(*parts, strict=True)]) - cka(x, y) > 0.1


def test_streaming_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="num_y must be an integer >= 1, got 0"):
        StreamingCKA(1, 0)
    streaming = StreamingCKA(1, 2)
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match="xs must hold num_x = 1 tensors, got 2"):
        streaming.update([x, x], y, 0)
    with pytest.raises(ValueError, match="column must be 0 to 1, got 2"):
        streaming.update([x], y, 2)
    with pytest.raises(ValueError, match=r"xs\[0\] must hold 1 or 2 minibatches as y does, got 3"):
        streaming.update([torch.randn(3, 5, 3)], y, 0)
    with pytest.raises(ValueError, match=r"xs\[0\] must be \[B, 5, D\], got \[2, 6, 3\]"):
        streaming.update([torch.randn(2, 6, 3)], y, 0)
    with pytest.raises(ValueError, match=r"same number of minibatches, at least 1, got \[0, 0\]"):
        streaming.result()
    streaming.update([x], y, 0)
    with pytest.raises(ValueError, match=r"got \[2, 0\]"):
        streaming.result()


def test_a_stream_looks_at_the_device_once_for_each_update(
    like_on_a_device: Callable[[], AbstractContextManager[None]],
) -> None:
    tokens = torch.randn(2, 3, 16, 7)
    streams = [StreamingCKA(2, 2), StreamingCKA(2, 2)]
    for stream, context in zip(streams, (nullcontext, like_on_a_device), strict=True):
        with context():
            for column in range(2):
                stream.update(list(tokens), tokens[column], column)
    assert torch.equal(streams[0].result(), streams[1].result())
