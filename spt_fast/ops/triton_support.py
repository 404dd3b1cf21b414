"""What all Triton kernels of the package need: whether they can serve a device, and what they compile to.

Limits: nothing here imports Triton before it is used; `compile_ahead` needs Triton's own `ptxas`, no GPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

INSTALLED = find_spec("triton") is not None
MINIMUM_CAPABILITY = 8


class Compiled(NamedTuple):
    """What one kernel takes of a multiprocessor."""

    registers: int  # of a thread
    spills: int  # bytes of a thread that did not fit into registers
    shared: int  # bytes of a program


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


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
) -> Compiled:
    """Compile a kernel for compute capability `arch` (80, 90, 100), on any machine.

    `signature` gives the type of each argument ("*bf16", "i32", "fp32"; see Triton's documentation), with
    ":16" behind those that are divisible by 16; `constexprs` the rest.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: signature[name].split(":")[0] if name in signature else "constexpr" for name in names}
    divisible = {
        (names.index(name),): [["tt.divisibility", 16]] for name, kind in signature.items() if ":16" in kind
    }
    values = {(names.index(name),): value for name, value in constexprs.items()}
    compiled = triton.compile(
        ASTSource(kernel, types, constexprs=values, attrs=divisible),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg},
    )
    registers, stack = _resources(compiled.asm["cubin"])
    return Compiled(registers, stack, int(compiled.metadata.shared))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as cuobjdump reads them from a compiled kernel.

    The kernels keep no arrays and call no functions, so that what is on the stack has been spilled.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {text}")
    return int(match[1]), int(match[2])
