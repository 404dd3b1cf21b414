"""Linear centred kernel alignment (CKA) without bias, of two sets of features or of a stream of them.

Limits: computed in float64, no gradients; needs a float64 copy of what it is given at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spt_fast.ops.modes import refuse_tangents
from spt_fast.support.errors import NonFiniteError

MIN_EXAMPLES = 4
# Below this share of the sum that it is the small rest of, an HSIC in float64 is rounding.
_ROUNDING = 1e-12
# What subtracting its mean leaves of a constant, at most, in float64.
_REST_OF_A_CONSTANT = 1e-13


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Similarity of two feature sets of the same n examples: 1 if equal, 0 on average if unrelated.

    Linear CKA (Kornblith et al. 2019) with the unbiased HSIC_1 (Nguyen, Raghu and Kornblith 2021):
    rotating features, scaling all of them by one number or adding a constant to a feature changes nothing.
    Being unbiased, it may also fall below 0; it stays within [-1, 1]. Features that say nothing about the
    examples (constant, or telling a single example from the rest) give 0.

    Prompts and patch tokens of different number are compared with channels as examples (App. B.4):
    `cka(prompts.T, tokens.T)` for [N_p, D] and [N_e, D].

    Args:
        x: [n, D1], floating point, n >= 4; any strides.
        y: [n, D2], same n, dtype and device.

    Returns:
        Scalar without gradient; float64 for float64 inputs, else float32.

    Raises:
        TypeError: an argument is no floating-point tensor, or the dtypes differ.
        ValueError: wrong rank, no features, fewer than 4 examples, different n or devices, or a tangent of
            forward-mode differentiation.
        NonFiniteError: a row holds NaN or infinity (not checked while compiling).
    """
    _check_features("x", x, ("n", "D1"))
    _check_features("y", y, ("n", "D2"))
    _check_pair(x, y)
    refuse_tangents("cka", {"x": x, "y": y})
    value: Tensor = _cka(x.detach(), y.detach())
    return value


class StreamingCKA:
    """CKA of every x against every y from minibatches, in memory that does not grow with their number.

    Numerator and both factors of the denominator are averaged over minibatches before they are divided
    (Nguyen, Raghu and Kornblith 2021). HSIC_1 has no bias at any size of minibatch, so the averages
    estimate the same value at each.

    Args:
        num_x: number of feature sets on the one side, such as the prompts of L layers.
        num_y: number on the other side, such as the tokens of L layers.
    """

    def __init__(self, num_x: int, num_y: int) -> None:
        for name, number in (("num_x", num_x), ("num_y", num_y)):
            if number < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {number}")
        self._cross, self._own_x, self._own_y = torch.zeros(3, num_x, num_y, dtype=torch.float64)
        self._minibatches = torch.zeros(num_y, dtype=torch.int64)

    def update(self, xs: Sequence[Tensor], y: Tensor, column: int) -> None:
        """Add B minibatches of all x and of y number `column`.

        Args:
            xs: `num_x` tensors [B, n, D_i]; [1, n, D_i] where an x is the same in all minibatches.
            y: [B, n, D].
            column: 0 to num_y - 1.

        Raises:
            TypeError, ValueError, NonFiniteError: as `cka`; also for a wrong number of tensors, a wrong
                `column`, or an x of another number of minibatches than 1 and B.
        """
        rows, columns = self._cross.shape
        if len(xs) != rows:
            raise ValueError(f"xs must hold num_x = {rows} tensors, got {len(xs)}")
        if not 0 <= column < columns:
            raise ValueError(f"column must be 0 to {columns - 1}, got {column}")
        _check_features("y", y, ("B", "n", "D"))
        own, centred, count = *_own(y), len(y)
        for row, x in enumerate(xs):
            name = f"xs[{row}]"
            _check_features(name, x, ("B", "n", "D"))
            _check_pair(x, y, name)
            if len(x) not in (1, count):
                raise ValueError(f"{name} must hold 1 or {count} minibatches as y does, got {len(x)}")
            own_x, centred_x = _own(x)
            self._cross[row, column] += _hsic(centred_x, centred).expand(count).sum().cpu()
            self._own_x[row, column] += own_x.expand(count).sum().cpu()
            self._own_y[row, column] += own.sum().cpu()
        self._minibatches[column] += count

    def result(self) -> Tensor:
        """CKA [num_x, num_y], float64 on the CPU.

        Raises:
            ValueError: a y has had no minibatch, or fewer than another.
        """
        fewest, most = self._minibatches.aminmax()
        if fewest != most or not most:
            raise ValueError(
                "each y must have had the same number of minibatches, at least 1, "
                f"got {self._minibatches.tolist()}"
            )
        return _ratio(self._cross, self._own_x, self._own_y)


@torch.library.custom_op("spt_fast::cka", mutates_args=())
def _cka(x: Tensor, y: Tensor) -> Tensor:
    (own_x, centred_x), (own_y, centred_y) = _own(x), _own(y)
    value = _ratio(_hsic(centred_x, centred_y), own_x, own_y)
    return value.to(torch.promote_types(x.dtype, torch.float32))


@_cka.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))


def _own(x: Tensor) -> tuple[Tensor, Tensor]:
    """HSIC_1 [...] of features [..., n, D] with themselves, 0 where it is rounding, and the features centred.

    HSIC_1 does not depend on the mean of a feature; without it nothing large cancels.
    """
    wide = x.double()
    centred = wide - wide.mean(dim=-2, keepdim=True)
    largest = _cross_products(centred, centred)
    own = _hsic(centred, centred)
    n = x.shape[-2]
    constant = centred.norm(dim=(-2, -1)) <= _REST_OF_A_CONSTANT * wide.norm(dim=(-2, -1))
    return own.masked_fill(constant | (own * (n * (n - 3)) <= _ROUNDING * largest), 0), centred


def _hsic(x: Tensor, y: Tensor) -> Tensor:
    """HSIC_1 [...] of centred features [..., n, D1] and [..., n, D2] with the kernels x x^T and y y^T.

    The rows of both kernels sum to 0, so the sums over kernels without their diagonals, k and l, in
    Song et al. (2012) are sums over the diagonals alone: K~ 1 = -k, 1^T K~ 1 = -sum k.
    """
    n = x.shape[-2]
    k, l = x.square().sum(dim=-1), y.square().sum(dim=-1)  # noqa: E741
    total = _cross_products(x, y)
    total = total - n / (n - 2) * (k * l).sum(dim=-1) + k.sum(-1) * l.sum(-1) / ((n - 1) * (n - 2))
    return total / (n * (n - 3))


def _cross_products(x: Tensor, y: Tensor) -> Tensor:
    """tr(x x^T y y^T) = |x^T y|^2, by whichever of the two needs fewer operations."""
    n, width_x, width_y = x.shape[-2], x.shape[-1], y.shape[-1]
    if n * (width_x + width_y) < width_x * width_y:
        return ((x @ x.mT) * (y @ y.mT)).sum(dim=(-2, -1))
    return (x.mT @ y).square().sum(dim=(-2, -1))


def _ratio(cross: Tensor, own_x: Tensor, own_y: Tensor) -> Tensor:
    scale = own_x.sqrt() * own_y.sqrt()
    positive = scale > 0
    return torch.where(positive, cross / torch.where(positive, scale, 1), 0)


def _check_features(name: str, tensor: Tensor, layout: tuple[str, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.ndim != len(layout):
        raise ValueError(f"{name} must have shape [{', '.join(layout)}], got {tuple(tensor.shape)}")
    if tensor.shape[-2] < MIN_EXAMPLES:
        raise ValueError(
            f"{name} must hold at least {MIN_EXAMPLES} examples, which unbiased CKA needs, "
            f"got {tensor.shape[-2]}"
        )
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")


def _check_pair(x: Tensor, y: Tensor, name: str = "x") -> None:
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(f"y must hold as many examples as {name}, {x.shape[-2]}, got {y.shape[-2]}")
    if x.device != y.device:
        raise ValueError(f"y must be on the device of {name}, {x.device}, got {y.device}")
    if x.dtype != y.dtype:
        raise TypeError(f"y must have the dtype of {name}, {x.dtype}, got {y.dtype}")
    if not (torch.compiler.is_compiling() or x.is_meta):
        _check_finite(name, x)
        _check_finite("y", y)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        row = int((~torch.isfinite(tensor)).any(dim=-1).flatten().nonzero()[0])
        raise NonFiniteError(f"{name} must be finite, but row {row} holds NaN or infinity", row=row)
