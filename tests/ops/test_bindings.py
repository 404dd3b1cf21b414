"""The stub spt_fast/_kmeans.pyi says what the compiled module offers: names, arguments, defaults, properties.

pybind11 writes a signature into every docstring, which is read like the stub. Types are left to mypy.
"""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

import spt_fast

_kmeans = pytest.importorskip("spt_fast._kmeans", reason="the compiled module was not built")

# Of every argument: its name, whether it is given by name only, whether it may be left out.
Arguments = list[tuple[str, bool, bool]]


def arguments_of(function: ast.FunctionDef) -> Arguments:
    """The arguments of a `def`, without self."""
    spec = function.args
    optional = [False] * (len(spec.args) - len(spec.defaults)) + [True] * len(spec.defaults)
    found = [(arg.arg, False, default) for arg, default in zip(spec.args, optional, strict=True)]
    named = zip(spec.kwonlyargs, spec.kw_defaults, strict=True)
    found += [(arg.arg, True, default is not None) for arg, default in named]
    return [argument for argument in found if argument[0] != "self"]


def stub_interface(text: str) -> dict[str, Arguments | None]:
    """Functions, methods and properties (None) of a stub by name; constructors by the name of their class."""
    found: dict[str, Arguments | None] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = arguments_of(node)
        elif isinstance(node, ast.ClassDef) and not any(
            ast.unparse(base) == "TypedDict" for base in node.bases
        ):
            found[node.name] = None  # cannot be made from Python, unless it has a constructor
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    name = node.name if member.name == "__init__" else f"{node.name}.{member.name}"
                    is_property = any(ast.unparse(mark) == "property" for mark in member.decorator_list)
                    found[name] = None if is_property else arguments_of(member)
    return found


def compiled_interface(module: ModuleType) -> dict[str, Arguments | None]:
    """The same of the compiled module, from the docstrings of its functions."""
    found: dict[str, Arguments | None] = {}
    for name, value in vars(module).items():
        if name.startswith("_"):
            continue
        if not isinstance(value, type):
            found[name] = documented_arguments(value.__doc__)
            continue
        constructor = vars(value)["__init__"].__doc__ or ""
        found[name] = documented_arguments(constructor) if constructor.startswith("__init__(self: ") else None
        for member, attribute in vars(value).items():
            if not member.startswith("_"):
                is_property = isinstance(attribute, property)
                found[f"{name}.{member}"] = None if is_property else documented_arguments(attribute.__doc__)
    return found


def documented_arguments(doc: str) -> Arguments:
    """Arguments in the first line of a docstring, such as `end(self: PrunedPasses, sums: int) -> None`."""
    definition = ast.parse(f"def {doc.strip().splitlines()[0]}: ...").body[0]
    assert isinstance(definition, ast.FunctionDef)
    return arguments_of(definition)


def test_stub_says_what_the_compiled_module_offers() -> None:
    stub = Path(spt_fast.__file__).with_name("_kmeans.pyi").read_text()
    assert stub_interface(stub) == compiled_interface(_kmeans)


def test_comparison_sees_every_kind_of_difference() -> None:
    stub = """
class View:
    def __init__(self, *, data: int, shift: int = ...) -> None: ...
    def rows(self, first: int) -> int: ...
    @property
    def width(self) -> int: ...
class Report: ...
def run(view: View, device: int) -> None: ...
"""
    assert stub_interface(stub) == {
        "View": [("data", True, False), ("shift", True, True)],
        "View.rows": [("first", False, False)],
        "View.width": None,
        "Report": None,
        "run": [("view", False, False), ("device", False, False)],
    }


@pytest.mark.skipif(_kmeans.build_info()["cuda"], reason="this build has CUDA")
def test_cuda_functions_of_a_build_without_cuda_say_so() -> None:
    view = _kmeans.TokenView(data=1, dtype="float32", sizes=[1, 1, 1, 1], strides=[1, 1, 1])
    assign = _kmeans.AssignArgs(tokens=view, centers=1, num_centers=1, sums=1, counts=1, inertia=1)
    distances = _kmeans.DistanceArgs(tokens=view, centers=1, num_centers=1, distances=1)
    for call in (
        lambda: _kmeans.assign_accumulate_cuda_workspace(assign),
        lambda: _kmeans.assign_accumulate_cuda(assign, 1, 0, 0),
        lambda: _kmeans.distances_cuda_workspace(distances),
        lambda: _kmeans.distances_cuda(distances, 1, 0, 0),
    ):
        with pytest.raises(RuntimeError, match="spt_fast was built without CUDA"):
            call()


def test_arguments_that_cannot_be_right_are_refused() -> None:
    good = {"data": 1, "dtype": "float32", "sizes": [1, 2, 3, 4], "strides": [24, 12, 4]}
    for wrong, message in (
        ({"data": 0}, "tokens must have an address"),
        ({"dtype": "int8"}, "dtype must be float32, float16 or bfloat16, got int8"),
        ({"sizes": [1, 2, 0, 4]}, "tokens must not be empty"),
    ):
        with pytest.raises(ValueError, match=message):
            _kmeans.TokenView(**good | wrong)
    view = _kmeans.TokenView(**good)
    with pytest.raises(ValueError, match="num_centers must be at least 1"):
        _kmeans.DistanceArgs(tokens=view, centers=1, num_centers=0, distances=1)
    with pytest.raises(ValueError, match="centers, sums, counts and inertia must have an address"):
        _kmeans.AssignArgs(tokens=view, centers=1, num_centers=1, sums=0, counts=1, inertia=1)
