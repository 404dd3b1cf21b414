"""Errors for the derivatives that an operator does not have, instead of wrong numbers.

Limits: a tangent is seen where the operator is called, not inside code that `torch.compile` made before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor
from torch.autograd import forward_ad


def refuse_tangents(operator: str, tensors: Mapping[str, Tensor]) -> None:
    """ValueError where one of `tensors` carries a tangent, which the operator would drop without a word."""
    # Outside forward mode, which is nearly always, this is all that the check costs.
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise ValueError(
                f"{name} must carry no tangent, got one: {operator} has no forward-mode derivative "
                "(torch.func.jvp, jacfwd); use reverse mode, torch.autograd.grad"
            )


def refuse_second_derivative(operator: str) -> Callable[..., NoReturn]:
    """The backward function of the operator that computes the gradient of `operator`: a RuntimeError."""

    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(f"{operator} can be differentiated once only: its gradient has no derivative")

    return backward
