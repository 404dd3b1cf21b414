"""Linear centred kernel alignment (CKA), of two sets of features or of a stream of them.

Limits: computed in float64, no gradients; needs a float64 copy of what it is given at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spt_fast.ops.autograd_guards import refuse_tangents
from spt_fast.ops.cka_cpu import cka_forward, cka_of_hsic, hsic, own_hsic
from spt_fast.support.arguments import check_bool, check_int, check_tensor
from spt_fast.support.errors import NonFiniteError

MIN_EXAMPLES = 4


def cka(x: Tensor, y: Tensor, *, unbiased: bool = True) -> Tensor:
    """Similarity of two feature sets of the same n examples: 1 if equal, 0 on average if unrelated.

    Linear CKA (Kornblith et al. 2019) with the unbiased HSIC_1 (Nguyen, Raghu and Kornblith 2021):
    rotating features, scaling all of them by one number or adding a constant to a feature changes nothing.
    Being unbiased, it may also fall below 0; it stays within [-1, 1]. Features that say nothing about the
    examples (constant, or telling a single example from the rest) give 0. With `unbiased=False` it is the
    form of Kornblith et al., |Yc^T Xc|^2 / (|Xc^T Xc| |Yc^T Yc|) of centred features and Frobenius norms,
    which lies in [0, 1] and far above 0 for unrelated features where n is small.

    Prompts and patch tokens of different number are compared with channels as examples (App. B.4):
    `cka(prompts.T, tokens.T)` for [N_p, D] and [N_e, D].

    Args:
        x: [n, D1], floating point, n >= 4; any strides.
        y: [n, D2], same n, dtype and device.
        unbiased: False for the biased form.

    Returns:
        Scalar without gradient; float64 for float64 inputs, else float32.

    Raises:
        TypeError: an argument is no floating-point tensor, or the dtypes differ.
        ValueError: wrong rank, no features, fewer than 4 examples, different n or devices, or a tangent of
            forward-mode differentiation.
        NonFiniteError: a row holds NaN or infinity (not checked while compiling).
    """
    check_tensor("x", x, ("n", "D1"))
    _check_examples("x", x)
    check_tensor("y", y, (len(x), "D2"), dtype=x.dtype, device=x.device)
    refuse_tangents("cka", {"x": x, "y": y})
    _check_finite({"x": x, "y": y})
    unbiased = check_bool("unbiased", unbiased)
    return torch.ops.spt_fast.cka(x.detach(), y.detach(), unbiased)  # type: ignore[no-any-return]


@torch.library.custom_op("spt_fast::cka", mutates_args=())
def _cka(x: Tensor, y: Tensor, unbiased: bool = True) -> Tensor:
    return cka_forward(x, y, unbiased)


@_cka.register_fake
def _(x: Tensor, y: Tensor, unbiased: bool = True) -> Tensor:
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))


class StreamingCKA:
    """CKA of every x against every y from minibatches, in memory that does not grow with their number.

    Numerator and both factors of the denominator are averaged over minibatches before they are divided
    (Nguyen, Raghu and Kornblith 2021). HSIC_1 has no bias at any size of minibatch, so the averages
    estimate the same value at each.

    Args:
        num_x: number of feature sets on the one side, such as the prompts of L layers.
        num_y: number on the other side, such as the tokens of L layers.
        unbiased: False averages the biased HSIC, whose bias depends on the size of a minibatch.
    """

    def __init__(self, num_x: int, num_y: int, *, unbiased: bool = True) -> None:
        self._unbiased = check_bool("unbiased", unbiased)
        num_x, num_y = check_int("num_x", num_x, 1), check_int("num_y", num_y, 1)
        self._device: torch.device | None = None  # of the first y: sums that stay there wait for nothing
        self._cross, self._own_x, self._own_y = torch.zeros(
            3, num_x, num_y, dtype=torch.float64, device="cpu"
        )
        self._minibatches = torch.zeros(num_y, dtype=torch.int64, device="cpu")

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
        check_tensor("y", y, ("B", "n", "D"))
        _check_examples("y", y)
        count = len(y)
        named = {f"xs[{row}]": x for row, x in enumerate(xs)}
        for name, x in named.items():
            check_tensor(name, x, ("B", y.shape[1], "D"), dtype=y.dtype, device=y.device)
            if len(x) not in (1, count):
                raise ValueError(f"{name} must hold 1 or {count} minibatches as y does, got {len(x)}")
        _check_finite({"y": y, **named})
        if self._device is None:
            self._device = y.device
            self._cross, self._own_x, self._own_y = (
                sums.to(y.device) for sums in (self._cross, self._own_x, self._own_y)
            )
        own, centred = own_hsic(y, self._unbiased)
        for row, x in enumerate(xs):
            own_x, centred_x = own_hsic(x, self._unbiased)
            cross = hsic(centred_x, centred, self._unbiased)
            self._cross[row, column] += cross.expand(count).sum().to(self._device)
            self._own_x[row, column] += own_x.expand(count).sum().to(self._device)
            self._own_y[row, column] += own.sum().to(self._device)
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
        return cka_of_hsic(self._cross, self._own_x, self._own_y).cpu()


def _check_examples(name: str, features: Tensor) -> None:
    if features.shape[-2] < MIN_EXAMPLES:
        raise ValueError(
            f"{name} must hold at least {MIN_EXAMPLES} examples, which unbiased CKA needs, "
            f"got {features.shape[-2]}"
        )


def _check_finite(tensors: dict[str, Tensor]) -> None:
    """NonFiniteError naming a row of NaN or infinity; nothing where there are no values to look at."""
    values = list(tensors.values())
    if torch.compiler.is_compiling() or any(tensor.is_meta for tensor in values):
        return
    # One look at the device for all of them.
    if bool(torch.stack([torch.isfinite(tensor).all() for tensor in values]).all()):
        return
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            row = int((~torch.isfinite(tensor)).any(dim=-1).flatten().nonzero()[0])
            raise NonFiniteError(f"{name} must be finite, but row {row} holds NaN or infinity", row=row)
