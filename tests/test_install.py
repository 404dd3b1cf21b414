"""The package as installed: a light import, no torch and no libcudart in the binary, metadata that agree."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import spt_fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(spt_fast.__file__).resolve().parent


@pytest.fixture
def run_python(tmp_path: Path, child_environment: dict[str, str]) -> Callable[[str], str]:
    """Standard output of code in a fresh interpreter that sees the package under test, not the checkout."""

    def run(code: str) -> str:
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=child_environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def extension_path() -> Path:
    """The compiled module. A missing one is a failure, not a skip: every install builds it."""
    found = sorted(PACKAGE.glob("_kmeans*.so"))
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    found = [path for path in found if tag in path.name or "abi3" in path.name]
    assert found, (
        f"{PACKAGE} holds no compiled module: run `pip install .` and then `pytest` (not `python -m pytest`, "
        "which imports the checkout), or build in place with `python setup.py build_ext --inplace`"
    )
    return found[0]


def test_import_and_help_add_no_heavy_module_and_start_no_cuda(run_python):
    code = """
import json, sys
import torch, timm
before = set(sys.modules)
import spt_fast
from spt_fast.commands.main import main
public = set(sys.modules)
try:
    main(["--help"])
except SystemExit as stop:
    code = stop.code
new = {name.partition(".")[0] for name in set(sys.modules) - before}
work = sorted(name for name in set(sys.modules) - public if name.startswith("spt_fast."))
print(json.dumps({"new": sorted(new), "work": work, "code": code, "cuda": torch.cuda.is_initialized()}))
"""
    seen = json.loads(run_python(code).splitlines()[-1])
    heavy = {"faiss", "matplotlib", "pandas", "scipy", "sklearn", "tensorboard", "torchvision", "triton"}
    assert heavy.isdisjoint(seen["new"])
    assert seen["cuda"] is False
    assert seen["code"] == 0
    # The commands import what they do their work with when they run.
    assert seen["work"] == []


def test_extension_imports_without_torch(run_python):
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_kmeans", {str(extension_path())!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print("torch" in sys.modules, "baseline" in module.build_info()["isas"])
"""
    assert run_python(code).split() == ["False", "True"]


def test_extension_links_neither_torch_nor_libcudart():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf (binutils) is not installed")
    listing = subprocess.run(
        [readelf, "-d", str(extension_path())], capture_output=True, text=True, check=True
    ).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.+)\]", listing)
    assert libraries, listing
    assert not [name for name in libraries if re.match(r"lib(torch|c10|cuda|nv)", name)]
    assert "RPATH" not in listing
    assert "RUNPATH" not in listing


def test_versions_agree():
    project_version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    citation_version = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert project_version is not None
    assert citation_version is not None
    assert spt_fast.__version__ == project_version[1] == citation_version[1]
    if PACKAGE.parent != ROOT:
        assert spt_fast.__version__ == importlib.metadata.version("spt_fast")


@pytest.mark.parametrize("folder", ["assets", "training/recipes", "study/tables/published"])
def test_package_is_typed_and_ships_its_files(folder):
    assert (PACKAGE / "py.typed").is_file()
    source = {path.name for path in (ROOT / "spt_fast" / folder).iterdir()}
    assert source
    assert source == {path.name for path in (PACKAGE / folder).iterdir()}


def test_setup_script_imports_no_torch():
    tree = ast.parse((ROOT / "setup.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in modules}
    assert roots.isdisjoint({"torch", "numpy", "spt_fast"})


def test_lint_versions_agree():
    pinned = r'"((?:ruff|mypy|clang-format)==[^"]+)"'
    project = set(re.findall(pinned, (ROOT / "pyproject.toml").read_text()))
    hooks = set(re.findall(pinned, (ROOT / ".pre-commit-config.yaml").read_text()))
    assert len(project) == 3
    assert hooks
    assert hooks <= project
