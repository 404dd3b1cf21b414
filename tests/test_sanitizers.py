"""The C++ core under AddressSanitizer and UndefinedBehaviorSanitizer, every instruction set."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
X86 = platform.machine() in ("x86_64", "AMD64")
ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def test_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    common = [compiler, "-std=c++17", "-O1", "-g", "-fopenmp", *SANITIZE, f"-I{ROOT / 'csrc'}"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    if subprocess.run([*common, str(probe), "-o", str(tmp_path / "probe")], capture_output=True).returncode:
        pytest.skip("the C++ compiler has no sanitizer runtime or no OpenMP")
    isas = list(ISA_FLAGS) if X86 else ["baseline"]
    defines = ["-DSPT_HAVE_X86_ISAS=1"] if X86 else []
    objects = []
    for isa in isas:
        objects.append(str(tmp_path / f"{isa}.o"))
        source = str(ROOT / "csrc" / "kmeans_cpu_isa.cpp")
        run([*common, *ISA_FLAGS[isa], f"-DSPT_ISA={isa}", "-c", source, "-o", objects[-1]])
    sources = [str(ROOT / "csrc" / "kmeans_cpu.cpp"), str(ROOT / "tests" / "native" / "check_kmeans.cpp")]
    run([*common, *defines, *sources, *objects, "-o", str(tmp_path / "check")])
    assert "baseline checked" in run([str(tmp_path / "check")])


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout
