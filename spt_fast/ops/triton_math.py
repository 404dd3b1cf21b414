"""Functions of Triton kernels that keep float32's precision where the textbook forms cancel."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

# Up to this size of their argument the series of `log1p` and `divergence_series` have float32's precision.
SERIES_LIMIT = tl.constexpr(0.25)
# The least that logarithms are taken of. Triton makes float64 of a constant below float32's 2 ** -126, and of
# whatever meets it.
LEAST = tl.constexpr(2.0**-126)


@triton.jit
def expm1(x):
    """exp(x) - 1 for x <= 0."""
    series = 1.0 + x * 0.125
    series = 1.0 + x * series * 0.14285715
    series = 1.0 + x * series * 0.16666667
    series = 1.0 + x * series * 0.2
    series = 1.0 + x * series * 0.25
    series = 1.0 + x * series * 0.33333334
    series = 1.0 + x * series * 0.5
    # Up to -0.5, exp(x) - 1 loses one bit at most.
    return tl.where(x > -0.5, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), but -87 where it is below -87."""
    series = 0.11111111 - 0.1 * x
    series = 0.125 - x * series
    series = 0.14285715 - x * series
    series = 0.16666667 - x * series
    series = 0.2 - x * series
    series = 0.25 - x * series
    series = 0.33333334 - x * series
    series = 0.5 - x * series
    return tl.where(tl.abs(x) < SERIES_LIMIT, x * (1.0 - x * series), tl.log(tl.maximum(1.0 + x, LEAST)))


@triton.jit
def divergence_series(x):
    """((1 + x) log(1 + x) - x) / x^2 for |x| < SERIES_LIMIT."""
    series = 0.013888889 - 0.011111111 * x
    series = 0.017857144 - x * series
    series = 0.023809524 - x * series
    series = 0.033333335 - x * series
    series = 0.05 - x * series
    series = 0.083333336 - x * series
    series = 0.16666667 - x * series
    return 0.5 - x * series
