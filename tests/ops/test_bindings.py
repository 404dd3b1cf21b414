"""The stub spt_fast/_kmeans.pyi says what the compiled module offers: names, arguments, defaults, properties.

pybind11 writes a signature into every docstring, which is read like the stub. Types are left to mypy.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import spt_fast
from spt_fast.ops import kmeans, kmeans_native

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
    assert _kmeans.cuda_why_not() == "spt_fast was built without CUDA"
    view = _kmeans.TokenView(data=1, dtype="float32", sizes=[1, 1, 1, 1], strides=[1, 1, 1])
    assign = _kmeans.AssignArgs(tokens=view, centers=1, num_centers=1, sums=1, counts=1, inertia=1)
    distances = _kmeans.DistanceArgs(tokens=view, centers=1, num_centers=1, distances=1)
    for call in (
        lambda: _kmeans.assign_accumulate_cuda_workspace(assign),
        lambda: _kmeans.assign_accumulate_cuda(assign, 1, 0),
        lambda: _kmeans.distances_cuda_workspace(distances),
        lambda: _kmeans.distances_cuda(distances, 1, 0),
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


class Machine:
    """Two GPUs, with code for the first only, and a compiled module that notes what is asked of it."""

    def __init__(self) -> None:
        self.current = 0
        self.asked: list[int] = []  # devices whose code was looked for
        self.launched: list[int] = []  # devices that were current when kernels were enqueued
        self.cuda = SimpleNamespace(
            device=self.device,
            is_available=lambda: True,
            current_stream=lambda device: SimpleNamespace(cuda_stream=7),
        )
        self.TokenView = self.AssignArgs = SimpleNamespace

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        yield
        self.current = before

    def build_info(self) -> dict[str, Any]:
        return {"cuda": True, "isas": ["baseline"]}

    def cuda_why_not(self) -> str:
        self.asked.append(self.current)
        return "no code for it" if self.current else ""

    def assign_accumulate_cuda_workspace(self, args: SimpleNamespace) -> int:
        return 256

    def assign_accumulate_cuda(self, args: SimpleNamespace, workspace: int, stream: int) -> None:
        assert stream == 7
        self.launched.append(self.current)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """What a fresh copy of `kmeans_native` finds in place of torch.cuda and the compiled module."""
    machine = Machine()
    monkeypatch.setattr(spt_fast, "_kmeans", machine)
    spec = importlib.util.spec_from_file_location("kmeans_native_copy", kmeans_native.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    stand_in = SimpleNamespace(**vars(torch) | {"cuda": machine.cuda, "empty": empty_on_the_cpu})
    monkeypatch.setattr(copy, "torch", stand_in)
    monkeypatch.setattr(kmeans, "kmeans_native", copy)
    return machine


def empty_on_the_cpu(*sizes: int, dtype: torch.dtype = torch.float32, device: torch.device) -> torch.Tensor:
    return torch.empty(*sizes, dtype=dtype)


def test_a_gpu_without_code_falls_back_with_the_reason_and_is_asked_once(machine: Machine) -> None:
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    for _ in range(3):
        assert kmeans.explain_backend(first) == ("native", "compiled CUDA kernels")
        assert kmeans.explain_backend(second) == ("reference", "no code for it")
    assert machine.asked == [0, 1]
    assert machine.current == 0
    with pytest.raises(ValueError, match="backend='native' cannot serve cuda tensors: no code for it"):
        kmeans.choose_backend(second, "native")
    with pytest.warns(UserWarning, match="plain PyTorch, which is slower: no code for it"):
        assert kmeans.choose_backend(second, "auto") == "reference"


def test_kernels_are_enqueued_under_the_device_guard_of_torch(machine: Machine) -> None:
    """It creates no context on a GPU that the process does not use; the compiled module switches nothing."""
    tensor = SimpleNamespace(
        device=torch.device("cuda", 1),
        dtype=torch.float32,
        shape=(1, 1, 4, 8),
        stride=lambda: (32, 32, 8, 1),
        data_ptr=lambda: 4096,
    )
    centers = SimpleNamespace(shape=(1, 2, 8), data_ptr=lambda: 8192)
    kmeans.kmeans_native.assign_accumulate(tensor, centers, None, None, False, False)
    assert machine.launched == [1]
    assert machine.current == 0
