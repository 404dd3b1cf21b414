"""What `python -m benchmarks.NAME` measures: never a `spt_fast` without its compiled module."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import spt_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(spt_fast.__file__).resolve().parent
MODULE = f"_kmeans{EXTENSION_SUFFIXES[0]}"
# Prints which `spt_fast` it would measure, by itself and in a process of its own.
PROBE = """
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
import spt_fast

def where():
    return spt_fast.__file__

if __name__ == "__main__":
    print(where())
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        print(pool.submit(where).result())
"""
SAY_WHERE = "import benchmarks, importlib.util; print(importlib.util.find_spec('spt_fast').origin)"


def run_python(folder: Path, *arguments: str, installed: Path) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in `folder`, which sees the packages in `installed` behind the folder's own."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def make_package(folder: Path, *, compiled: bool) -> Path:
    """A package of the same name, with an empty file where the compiled module would be."""
    package = folder / "spt_fast"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    if compiled:
        (package / MODULE).touch()
    return package


def make_checkout(folder: Path, *, compiled: bool) -> Path:
    """A checkout with the package and `benchmarks.probe`."""
    shutil.copytree(
        ROOT / "benchmarks", folder / "benchmarks", ignore=lambda _, names: {*names} - {"__init__.py"}
    )
    (folder / "benchmarks" / "probe.py").write_text(PROBE)
    return make_package(folder, compiled=compiled)


@pytest.mark.parametrize("built_in_place", [False, True])
def test_the_package_with_the_compiled_module_is_measured(built_in_place: bool, tmp_path: Path) -> None:
    own = make_checkout(tmp_path / "checkout", compiled=built_in_place)
    installed = make_package(tmp_path / "installed", compiled=True)
    done = run_python(tmp_path / "checkout", "-m", "benchmarks.probe", installed=tmp_path / "installed")
    assert done.returncode == 0, done.stderr
    measured = {Path(line).parent for line in done.stdout.splitlines()}
    assert measured == {own if built_in_place else installed}


@pytest.mark.parametrize("how", [("-m", "benchmarks.probe"), ("-m", "pytest", "benchmarks/probe.py")])
def test_without_a_compiled_module_nothing_is_measured(how: tuple[str, ...], tmp_path: Path) -> None:
    make_checkout(tmp_path / "checkout", compiled=False)
    make_package(tmp_path / "installed", compiled=False)
    done = run_python(tmp_path / "checkout", *how, installed=tmp_path / "installed")
    assert done.returncode != 0
    assert "spt_fast/__init__.py" not in done.stdout
    said = [line for line in (done.stdout + done.stderr).splitlines() if "pip install ." in line]
    assert len(said) == 1


def test_benchmarks_of_this_checkout_find_the_package_under_test() -> None:
    done = run_python(ROOT, "-c", SAY_WHERE, installed=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    found = Path(done.stdout.strip()).parent
    assert (found / MODULE).is_file()
    assert found in (PACKAGE, ROOT / "spt_fast")
