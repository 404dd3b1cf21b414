"""What nvcc makes of csrc/kmeans_cuda.cu: registers, spills and the instructions of each kernel, and ranges.

    python -m benchmarks.cuda_sources [ARCH ...]      default: 80 90a 100 120

Needs no GPU. Instructions are counted where nvdisasm is found: in PATH,
or the one that comes with Triton. They are counts of the machine code, not of what is executed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cuda_hot_path import Function, parse

CSRC = Path(__file__).resolve().parents[1] / "csrc"
ARCHITECTURES = ("80", "90a", "100", "120")
# The kernels that touch every token.
HOT = ("one_read_kernel", "assign_kernel", "accumulate_kernel")


@dataclass
class Kernel:
    """One entry point of the machine code."""

    registers: int
    spill_bytes: int
    static_shared: int
    function: Function | None  # None: no disassembler

    def count(self, opcode: str, modifier: str = "") -> int:
        """How many instructions begin with `opcode` and contain `modifier`."""
        names = [each.name for each in self.function.code] if self.function else []
        return sum(name.startswith(opcode) and modifier in name for name in names)


def compile_source(nvcc: str, arch: str, folder: Path, source: Path) -> tuple[Path, str]:
    """The cubin of `source` for sm_`arch`, and what ptxas said."""
    cubin = folder / f"kmeans_cuda_{arch}.cubin"
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-DSPT_HAVE_CUDA=1", "-Xptxas", "-v"]
    command += [
        f'-DSPT_CUDA_ARCHS="{arch}"',
        "-Xcompiler",
        "-Wall,-Wextra",
        "--Werror",
        "all-warnings",
        f"-I{CSRC}",
        "-cubin",
    ]
    command += [str(source), "-o", str(cubin)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"nvcc failed for sm_{arch}:\n{result.stderr}")
    return cubin, result.stderr


def inspect(nvcc: str, arch: str, folder: Path, source: Path = CSRC / "kmeans_cuda.cu") -> dict[str, Kernel]:
    """The kernels of `source` for sm_`arch`, by name and template arguments."""
    cubin, report = compile_source(nvcc, arch, folder, source)
    functions = disassemble(cubin)
    kernels = {}
    for part in report.split("Compiling entry function '")[1:]:
        symbol = part.partition("'")[0]
        if "8spt_fast" not in symbol:  # CUB's
            continue
        registers, spilled = re.search(r"Used (\d+) registers", part), re.findall(r"(\d+) bytes spill", part)
        shared = re.search(r"(\d+) bytes smem", part)
        assert registers is not None
        assert spilled
        kernels[readable(symbol)] = Kernel(
            registers=int(registers[1]),
            spill_bytes=sum(map(int, spilled)),
            static_shared=int(shared[1]) if shared else 0,
            function=None if functions is None else functions[symbol],
        )
    return kernels


def readable(symbol: str) -> str:
    """`one_read_kernel<bf16, 2, 6>` from a mangled name."""
    match = re.search(r"\d+([a-z_]+_kernel)(?:I(.*?)EE?v)?", symbol)
    assert match is not None, symbol
    name, arguments = match[1], match[2]
    if arguments is None:
        return name
    types = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
    kind = next(key for key in types if arguments.startswith(key))
    return f"{name}<{', '.join([types[kind], *re.findall('uint4|(?<=Li)[0-9]+', arguments)])}>"


def find_tool(name: str) -> str | None:
    """Path of a CUDA binary tool, or None."""
    path = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if path is None and spec is not None and spec.origin is not None:
        path = shutil.which(name, path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return path


def disassemble(cubin: Path) -> dict[str, Function] | None:
    """The functions, by symbol; None where nvdisasm is missing or too old for the architecture."""
    tool = find_tool("nvdisasm")
    if tool is None:
        return None
    result = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=False)
    if result.returncode:
        return None
    return parse(result.stdout)


def main(architectures: list[str]) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        sys.exit("benchmarks.cuda_sources: nvcc is not installed")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    print(version.strip().splitlines()[-1])
    registers: dict[str, list[int]] = {kind: [] for kind in HOT}
    columns = ("registers", "spilled", "HMMA", "LDSM", "LDGSTS.128", "LDG.128", "local")
    for arch in architectures:
        with tempfile.TemporaryDirectory() as folder:
            kernels = inspect(nvcc, arch, Path(folder))
        print(f"\n{'sm_' + arch:34}" + "".join(f"{column:>12}" for column in columns))
        for name, kernel in sorted(kernels.items()):
            if name.startswith(HOT):
                registers[name.partition("<")[0]].append(kernel.registers)
            counts: list[object] = ["-"] * 5
            if kernel.function is not None:
                local = kernel.count("LDL") + kernel.count("STL")
                counts = [
                    kernel.count("HMMA"),
                    kernel.count("LDSM"),
                    kernel.count("LDGSTS", ".128"),
                    kernel.count("LDG.", ".128"),
                    local,
                ]
            cells = [kernel.registers, kernel.spill_bytes, *counts]
            print(f"{name:34}" + "".join(f"{cell!s:>12}" for cell in cells))
    print("\nregisters of a thread")
    for kind, found in registers.items():
        print(f"{kind:34}{min(found)} to {max(found)}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(ARCHITECTURES))
