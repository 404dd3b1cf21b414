"""Warnings that name the line of the user's code, however deep in the package they are given."""

from __future__ import annotations

import sys
import warnings

_OURS = ("spt_fast", "torch")  # torch: its decorators lie between a method and who calls it


def warn_user(message: str) -> None:
    """A UserWarning at the innermost line that is outside of the package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
