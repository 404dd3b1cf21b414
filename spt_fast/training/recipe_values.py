"""Values of a recipe that are neither plain numbers nor words of a list: how they are checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spt_fast.support.names import nearest


def check_options(name: str, value: Any) -> dict[str, Any]:
    """A mapping of names to numbers, words, switches or None; which there are is known to the method."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, such as {{'bottleneck': 8}}, got {value!r}")
    for option, given in value.items():
        if not (isinstance(option, str) and isinstance(given, bool | int | float | str | None)):
            raise TypeError(
                f"{name} must hold numbers, words, true, false or null, got {option!r}: {given!r}"
            )
    return dict(value)


def check_optimizer(value: Any) -> str:
    from timm.optim import list_optimizers  # type: ignore[attr-defined]

    if value == "adahessian":
        raise ValueError("optimizer must be one without second derivatives, got 'adahessian'")
    known = [str(name) for name in list_optimizers()]
    if not isinstance(value, str) or value not in known:
        raise ValueError(
            "optimizer must be a name of timm.optim.list_optimizers(), "
            f"got {value!r}{nearest(str(value), known)}"
        )
    return value
