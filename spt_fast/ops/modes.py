"""PyTorch's modes around a call, as the operators meet them: autocast, and derivatives that they do not have.

Limits: a tangent is seen where the operator is called, not inside code that `torch.compile` made before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast casts to on such devices; None where it is off, or unknown there (meta)."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def refuse_tangents(operator: str, tensors: Mapping[str, Tensor]) -> None:
    """ValueError where one of `tensors` carries a tangent, which the operator would drop without a word."""
    # Outside forward mode, which is nearly always, that is all it costs.
    if forward_ad._current_level < 0:
        return
    for name, tensor in tensors.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise ValueError(
                f"{name} must carry no tangent, got one: {operator} has no forward-mode derivative "
                "(torch.func.jvp, jacfwd); use reverse mode, torch.autograd.grad"
            )


def refuse_second_derivative(operator: str) -> Callable[..., NoReturn]:
    """The backward function of an operator that computes the gradient of `operator`."""

    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(f"{operator} can be differentiated once only: its gradient has no derivative")

    return backward
