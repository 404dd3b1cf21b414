"""The C++ core under AddressSanitizer with UBSan and under ThreadSanitizer, every instruction set.

OpenMP's runtime is not built for ThreadSanitizer, which then reports its barriers as races; there the same
loops run on std::thread (csrc/parallel.h).
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
X86 = platform.machine() in ("x86_64", "AMD64")
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fopenmp"]
THREAD = ["-fsanitize=thread", "-DSPT_FAST_STD_THREADS", "-pthread"]
RACE = """
#include "parallel.h"
int main() {
  long total = 0;
  spt_fast::parallel_for(2, 200000, [&](int64_t, int) { ++total; });
  return total == 0;
}
"""


@pytest.mark.parametrize("flags", [ADDRESS, THREAD], ids=["address-undefined", "thread"])
def test_kernels_are_clean_under_sanitizers(tmp_path: Path, flags: list[str]) -> None:
    common = compiler_with(flags, tmp_path)
    isas = list(ISA_FLAGS) if X86 else ["baseline"]
    defines = ["-DSPT_HAVE_X86_ISAS=1"] if X86 else []
    kernels = ROOT / "csrc" / "kmeans_cpu_isa.cpp"
    commands = [[*common, *ISA_FLAGS[isa], f"-DSPT_ISA={isa}", "-c", str(kernels)] for isa in isas]
    for source in (
        "csrc/kmeans_cpu.cpp",
        "csrc/kmeans_cpu_pruned.cpp",
        "tests/ops/native/check_kmeans.cpp",
    ):
        commands.append([*common, *defines, "-c", str(ROOT / source)])
    objects = [str(tmp_path / f"{index}.o") for index in range(len(commands))]
    with ThreadPoolExecutor(2) as compilers:
        targets = zip(commands, objects, strict=True)
        list(compilers.map(run, [[*command, "-o", target] for command, target in targets]))
    run([*common, *objects, "-o", str(tmp_path / "check")])
    assert "baseline checked" in run([str(tmp_path / "check")])


def test_thread_sanitizer_sees_a_race_in_the_body_of_a_parallel_loop(tmp_path: Path) -> None:
    common = compiler_with(THREAD, tmp_path)
    (tmp_path / "race.cpp").write_text(RACE)
    run([*common, str(tmp_path / "race.cpp"), "-o", str(tmp_path / "race")])
    done = subprocess.run([str(tmp_path / "race")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "data race" in done.stderr


def compiler_with(flags: list[str], tmp_path: Path) -> list[str]:
    """The compiler's command line so far; skips where it cannot build or run a program with `flags`."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    common = [compiler, "-std=c++17", "-O1", "-g", *flags, f"-I{ROOT / 'csrc'}"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    built = subprocess.run([*common, str(probe), "-o", str(tmp_path / "probe")], capture_output=True)
    if built.returncode or subprocess.run([str(tmp_path / "probe")], capture_output=True).returncode:
        pytest.skip(f"programs built with {' '.join(flags)} do not build or run here")
    return common


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
