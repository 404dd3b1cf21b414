"""`spt-fast doctor`: what is here, and what is missing."""

from __future__ import annotations

from importlib.metadata import version

import pytest

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
