"""benchmarks/gpu_check.sh with stubs for nvidia-smi and Python: what it calls a success, and what not."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

NVIDIA_SMI = """#!/bin/sh
case "$*" in
  *name,*) echo "NVIDIA H100 80GB HBM3, 9.0, 580.65.06" ;;
  *) printf '%s' "$CAPABILITIES" ;;
esac
"""
# Prints what the part that it is asked for finds on a GPU, or what the test put into its variable.
PYTHON = """#!/bin/sh
echo "$SPT_FAST_CUDA_ARCHS: $*" >>"$CALLS"
case "$*" in
  *"import sys, torch"*) exit "${TORCH:-0}" ;;
  *"import _kmeans"*) exit "${MODULE:-0}" ;;
  "setup.py"*) exit "${BUILD:-0}" ;;
  *"doctor --check") printf '%b\\n' "${CHECK:-all 90 ok}" ;;
  *"-m gpu"*) printf '%b\\n' "${GPU_TESTS:-3 passed}"; exit "${GPU_STATUS:-0}" ;;
  *pytest*) echo "3 passed" ;;
esac
"""


def run_script(folder: Path, **variables: str) -> tuple[int, str, str]:
    """Exit status, summary, and the calls of Python, each after the architectures to build for."""
    for name, text in (("nvidia-smi", NVIDIA_SMI), ("python", PYTHON)):
        stub = folder / "stubs" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(text)
        stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    script = folder / "checkout" / "benchmarks" / "gpu_check.sh"
    script.parent.mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "gpu_check.sh", script)
    calls = folder / "calls"
    calls.touch()
    environment = {
        **os.environ,
        "PATH": f"{folder / 'stubs'}:/usr/bin:/bin",
        "PYTHON": str(folder / "stubs" / "python"),
        "CALLS": str(calls),
        "CAPABILITIES": "9.0\n",
        **variables,
    }
    done = subprocess.run(
        ["bash", str(script), str(folder / "report")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done.returncode, (folder / "report" / "summary.txt").read_text(), calls.read_text()


def test_every_part_runs_and_the_kernels_are_built_for_this_gpu(tmp_path: Path) -> None:
    status, summary, calls = run_script(tmp_path)
    assert status == 0, summary
    assert "FAILED" not in summary
    assert "NVIDIA H100" in summary
    assert "90a: setup.py build_ext --inplace" in calls
    order = (
        *("setup.py", "doctor --check", "bench_prompt_attention", "bench_prompted_step", "bench_nmi"),
        *("bench_kmeans_cuda", "pytest", "bench_table1", "benchmarks.report"),
    )
    places = [calls.index(part) for part in order]
    assert places == sorted(places)


def test_several_kinds_of_gpu_are_built_for_the_newest_last(tmp_path: Path) -> None:
    _, _, calls = run_script(tmp_path, CAPABILITIES="12.0\n9.0\n8.6\n9.0\n")
    assert "86;90a;120: setup.py build_ext --inplace" in calls


@pytest.mark.parametrize(
    ("variables", "failed"),
    [
        ({"GPU_TESTS": "SKIPPED [40] tests/conftest.py:38: needs a CUDA device\\n40 skipped"}, "tests"),
        ({"GPU_TESTS": "SKIPPED [1] a.py:1: spt_fast was built without CUDA\\n39 passed"}, "tests"),
        ({"GPU_TESTS": "5 deselected", "GPU_STATUS": "5"}, "tests"),
        ({"CHECK": "reference ok, but it is a fallback: no nvcc\\nall 90 ok"}, "check"),
        ({"CHECK": "all 36 ok\\nno CUDA device is available: nothing is said"}, "check"),
        ({"BUILD": "1"}, "build"),
        ({"MODULE": "1"}, "module"),
    ],
    ids=["all-skipped", "some-skipped", "nothing-collected", "fallback", "cpu-only", "build", "module"],
)
def test_what_says_nothing_of_a_gpu_is_a_failure(
    variables: dict[str, str], failed: str, tmp_path: Path
) -> None:
    status, summary, calls = run_script(tmp_path, **variables)
    assert status == 1
    lines = [line.split() for line in summary.splitlines() if line.startswith("FAILED")]
    assert [line[1].rstrip(",") for line in lines if line[1] != "memcheck,"] == [failed]
    assert "bench_table1" in calls, "the others were not run"


def test_a_second_gpu_is_not_demanded(tmp_path: Path) -> None:
    reason = "SKIPPED [1] tests/clustering/test_clustering.py:669: needs two CUDA devices\\n39 passed"
    assert run_script(tmp_path, GPU_TESTS=reason)[0] == 0


@pytest.mark.parametrize("variables", [{"TORCH": "1"}, {"CAPABILITIES": ""}, {"CAPABILITIES": "[N/A]\n"}])
def test_without_a_usable_gpu_nothing_is_built(variables: dict[str, str], tmp_path: Path) -> None:
    status, _, calls = run_script(tmp_path, **variables)
    assert status == 1
    assert "setup.py" not in calls
