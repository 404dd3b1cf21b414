"""What all Triton kernels of the package need: whether they can serve a device, and how they are launched.

Limits: nothing here imports Triton.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import torch
from torch import Tensor

INSTALLED = find_spec("triton") is not None
MINIMUM_CAPABILITY = 8


def why_not(device: torch.device) -> str:
    """Why Triton's kernels cannot serve tensors on `device`; "" where they can."""
    if device.type != "cuda":
        return f"Triton's kernels are for CUDA tensors, not {device.type}"
    if not INSTALLED:
        return "Triton is not installed"
    major = torch.cuda.get_device_properties(device).major
    if major < MINIMUM_CAPABILITY:
        return f"compute capability {major}.x is below {MINIMUM_CAPABILITY}.0"
    return ""


def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA device as ten times major plus minor; 80 for the interpreter's CPU."""
    if device.type != "cuda":
        return 80
    facts = torch.cuda.get_device_properties(device)
    return 10 * int(facts.major) + int(facts.minor)


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, which takes CPU tensors; a switch for tests.

    Triton looks at the variable when it is imported, so it must be set before.
    """
    return os.environ.get("TRITON_INTERPRET") == "1"


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
