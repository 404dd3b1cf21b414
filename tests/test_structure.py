"""The import graph of the package: wings import downwards only, nothing imports in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import spt_fast

PACKAGE = Path(spt_fast.__file__).resolve().parent
# Bottom first: a wing may import the wings before it, and itself.
WINGS = (
    "support",
    "ops",
    "data",
    "backbones",
    "clustering",
    "prototypes",
    "prompting",
    "methods",
    "plots",
    "analysis",
    "training",
    "study",
    "commands",
)
# Files of the package itself; `__init__` gathers the public names, `__main__` starts the command line.
TOP = {"__init__", "__main__"}
MAX_LINES = 450


def modules() -> dict[str, Path]:
    """Every module of the package by its name after "spt_fast."; a package by its folder's name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports anywhere in it, but for annotations only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "spt_fast":
                yield from (name.name for name in node.names)
            elif node.module and node.module.startswith("spt_fast."):
                module = node.module.removeprefix("spt_fast.")
                # `from package import module` needs the module, not what the package gathers.
                names = (f"{module}.{name.name}" for name in node.names)
                yield from (name if name in MODULES else module for name in names)
        elif isinstance(node, ast.Import):
            for name in node.names:
                if name.name.startswith("spt_fast."):
                    yield name.name.removeprefix("spt_fast.")


GRAPH = {
    name: {found for found in imports(path) if found in MODULES and found != name}
    for name, path in MODULES.items()
}
INSIDE = sorted(name for name in GRAPH if name not in TOP)


def test_every_module_is_in_a_wing() -> None:
    assert {name.partition(".")[0] for name in INSIDE} == set(WINGS)


@pytest.mark.parametrize("name", INSIDE)
def test_imports_go_down(name: str) -> None:
    height = WINGS.index(name.partition(".")[0])
    upwards = {found for found in GRAPH[name] if WINGS.index(found.partition(".")[0]) > height}
    assert not upwards, f"{name} imports from above: {sorted(upwards)}"


def test_no_cycle() -> None:
    # A package's own `__init__` imports its modules, which do not import it.
    order = tuple(TopologicalSorter(GRAPH).static_order())
    assert set(order) == set(GRAPH)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_is_too_long(name: str) -> None:
    lines = len(MODULES[name].read_text().splitlines())
    assert lines <= MAX_LINES, f"{name} has {lines} lines"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_says_what_it_is_for_in_its_first_line(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[name].read_text()))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ":")) or len(docstring.splitlines()) > 1
