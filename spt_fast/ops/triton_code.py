"""Triton kernels compiled ahead of time, and what their machine code says of them; for tests and benchmarks.

Limits: needs Triton's own `ptxas`, `cuobjdump` and `nvdisasm`, but no GPU; a kernel that runs in Triton's
interpreter cannot be compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

_TENSOR_PRODUCT = r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"
_MACHINE_PRODUCT = r"\b(?:HMMA|HGMMA|UTCHMMA|FFMA)\b"


class Compiled(NamedTuple):
    """What one kernel takes of a multiprocessor, and what its code does."""

    registers: int  # of a thread
    spills: int  # bytes of a thread that did not fit into registers
    loop_spills: int  # reads and writes of them in the innermost loop that multiplies
    shared: int  # bytes of a program
    in_flight: int  # groups of copies to shared memory that are under way while a step computes
    tensor_products: int  # instructions of the tensor cores
    tf32: bool  # whether one of them rounds float32 to TensorFloat-32
    unordered: tuple[
        bool, ...
    ]  # of each write to global memory: whether no barrier parts it from the last read


def compile_ahead(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    num_warps: int,
    num_stages: int,
    maxnreg: int | None = None,
) -> Compiled:
    """Compile a kernel for compute capability `arch` (80, 90, 100, 120), on any machine.

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
    ptx = compiled.asm["ptx"]
    registers, stack, loop_spills = _resources(compiled.asm["cubin"])
    return Compiled(
        registers=registers,
        spills=stack,
        loop_spills=loop_spills,
        shared=int(compiled.metadata.shared),
        in_flight=copies_in_flight(ptx),
        tensor_products=len(re.findall(_TENSOR_PRODUCT, ptx)),
        tf32=".tf32" in ptx,
        unordered=tuple(unordered_writes(ptx)),
    )


def copies_in_flight(ptx: str) -> int:
    """The most groups of copies that a wait leaves under way; 0 if every wait is for all of them."""
    return max((int(number) for number in re.findall(r"cp\.async\.wait_group\s+(\d+);", ptx)), default=0)


def unordered_writes(ptx: str) -> list[bool]:
    """For each write to global memory, whether no barrier stands between it and the last read before it.

    Reads and writes are taken in the order of the text.
    """
    found, read = [], False
    for line in ptx.splitlines():
        if re.search(r"\bld\.global\b", line):
            read = True
        elif re.search(r"\b(?:bar|barrier)\.sync\b", line):
            read = False
        elif re.search(r"\bst\.global\b", line):
            found.append(read)
    return found


def spills_in_loop(assembly: str) -> int:
    """Reads and writes of the stack in the shortest loop that multiplies, from `nvdisasm -c`."""
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(instruction[1])
            jump = re.search(r"\bBRA\b.*\((\.L_x_\d+)\)", instruction[1])
            if jump and jump[1] in labels:
                loops.append(code[labels[jump[1]] :])
    hot = min((loop for loop in loops if re.search(_MACHINE_PRODUCT, " ".join(loop))), key=len, default=[])
    return sum(bool(re.search(r"\b(?:LDL|STL)\b", instruction)) for instruction in hot)


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers and stack bytes of a thread, and `spills_in_loop`, of a compiled kernel.

    The kernels keep no arrays and call no functions, so that what is on the stack has been spilled.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output([knobs.nvidia.cuobjdump.path, "-res-usage", str(path)])
        match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if match is None:
            raise RuntimeError(f"cuobjdump gave no resource usage: {usage}")
        registers, stack = int(match[1]), int(match[2])
        # nvdisasm takes half a second, and without a stack there is nothing to look for.
        in_loop = spills_in_loop(_output([knobs.nvidia.nvdisasm.path, "-c", str(path)])) if stack else 0
    return registers, stack, in_loop


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
