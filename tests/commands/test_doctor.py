"""`spt-fast doctor`: what is here, and what is missing."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from spt_fast.commands import doctor
from spt_fast.commands import main as cli
from spt_fast.data.shipped import backbone_facts
from spt_fast.ops import kmeans_native


def test_doctor_says_what_is_here(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for expected in (
        version("torch"),
        version("timm"),
        "triton",
        "numpy",
        "faiss",
        "matplotlib",
        "k-means on cpu",
    ):
        assert expected in printed
    assert str(backbone_facts()["epochs"]) in printed


def test_doctor_lists_what_is_required_and_what_users_may_add():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    with (Path(__file__).parents[2] / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    of_users = {"plots", "train", "peft", "faiss", "faiss-gpu"}
    assert of_users | {"bench", "test", "lint"} == {*project["optional-dependencies"]}
    wanted = {
        *project["dependencies"],
        *(name for extra in of_users for name in project["optional-dependencies"][extra]),
    }
    listed = {*doctor._REQUIRED, *doctor._OPTIONAL}
    assert {re.match(r"[\w-]+", each)[0].lower() for each in wanted} <= listed


def test_doctor_names_the_instruction_set(capsys):
    pytest.importorskip("spt_fast._kmeans")
    cli.main(["doctor"])
    assert kmeans_native.build_info()["isa"] in capsys.readouterr().out


def test_doctor_works_without_the_extension(capsys, monkeypatch):
    def missing() -> None:
        raise RuntimeError("it was never built")

    monkeypatch.setattr(kmeans_native, "build_info", missing)
    monkeypatch.setattr(kmeans_native, "why_not", lambda _: "it was never built")
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "no: it was never built" in printed
    assert "reference: it was never built" in printed
