"""Checks of arguments: an error names the argument, what was given and what is allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spt_fast.support.errors import first_line

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
SEED_LIMIT = 2**63


def check_int(name: str, value: Any, minimum: int, otherwise: str = "") -> int:
    """`value` as an int of at least `minimum`; TypeError or ValueError naming the argument otherwise."""
    allowed = f"an integer >= {minimum} {otherwise}".rstrip()
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return int(value)


def check_number(
    name: str,
    value: Any,
    minimum: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    maximum: float | None = None,
    otherwise: str = "",
) -> float:
    """`value` as a finite float in `minimum`..`maximum`, greater than `above`, and less than `below`.

    Raises:
        TypeError: not a number.
        ValueError: NaN, infinite or out of range.
    """
    signs = ((">=", minimum), (">", above), ("<", below), ("<=", maximum))
    bounds = " and ".join(f"{sign} {bound:g}" for sign, bound in signs if bound is not None)
    allowed = " ".join(part for part in ("a finite number", bounds, otherwise) if part)
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} must be {allowed}, got {value!r}")
    too_small = (minimum is not None and value < minimum) or (above is not None and value <= above)
    too_large = (maximum is not None and value > maximum) or (below is not None and value >= below)
    if not math.isfinite(value) or too_small or too_large:
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return float(value)


def check_seed(value: Any, name: str = "seed") -> int:
    """`value` as a seed that the generators of torch and NumPy both take: an integer in [0, 2**63).

    Raises:
        TypeError: not an integer.
        ValueError: out of range.
    """
    seed = check_int(name, value, 0)
    if seed >= SEED_LIMIT:
        raise ValueError(f"{name} must be below 2**63, got {seed}")
    return seed


def check_bool(name: str, value: Any) -> bool:
    """`value` as a bool; TypeError naming the argument unless it is True or False, Python's or NumPy's."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_choice(name: str, value: Any, allowed: Collection[str]) -> str:
    """`value` if it is one of `allowed`; ValueError naming the argument otherwise."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def check_device(name: str, value: Any) -> torch.device:
    """`value` as a device on which this torch can make tensors; ValueError naming the argument otherwise."""
    reason = "not a device's name"
    with suppress(RuntimeError, TypeError):
        device = torch.device(value)
        reason = "it holds no data" if device.type == "meta" else _why_unusable(device)
        if not reason:
            return device
    allowed = "'cpu', or 'cuda' or 'cuda:N' where torch finds such a GPU"
    raise ValueError(f"{name} must be {allowed}, got {str(value)!r} ({reason})")


def _why_unusable(device: torch.device) -> str:
    """Why no tensor can be made on `device`, in one line; empty where one can."""
    try:
        torch.empty(1, device=device)
    except Exception as error:
        # Of another class for each kind of device.
        return first_line(error)
    return ""


def check_tensor(
    name: str,
    value: Any,
    shape: Sequence[int | str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """`value` if it is a tensor of that kind.

    Args:
        shape: a number where the size is known, a name such as "N_p" where any size of at least 1 will do.
        dtype: None allows any floating-point dtype.
        device: None allows any.

    Raises:
        TypeError: no tensor, or another dtype.
        ValueError: another shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if dtype is None and not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {value.dtype}")
    if shape is not None and not _has_shape(value, shape):
        raise ValueError(f"{name} must be [{', '.join(map(str, shape))}], got {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    return value


def _has_shape(tensor: Tensor, shape: Sequence[int | str]) -> bool:
    return tensor.ndim == len(shape) and all(
        size >= 1 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(tensor.shape, shape, strict=True)
    )


def parse_bytes(argument: str, value: object) -> int:
    """A number of bytes from an integer, or from text such as "4GiB", "1.5 GB" or "800 MB".

    Raises:
        TypeError: neither an integer nor a string.
        ValueError: negative, or no number with a unit of B, kB, MB, GB, TB, KiB, MiB, GiB or TiB.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", value)
        unit = match[2].replace("k", "K") if match else "?"
        if match is None or unit not in _UNITS:
            raise ValueError(
                f"{argument} must be a number with a unit (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB), "
                f"got {value!r}"
            )
        return int(float(match[1]) * _UNITS[unit])
    return check_int(argument, value, 0, '(bytes) or text such as "4GiB"')
