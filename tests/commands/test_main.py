"""The command line as a user calls it: help, one-line errors with exit code 2, Ctrl-C with 130."""

from __future__ import annotations

import re
import runpy
import signal
import sys

import pytest

from spt_fast.commands import main as cli
from spt_fast.commands.demo import compare

COMMANDS = ("demo", "prototypes", "train", "eval", "predict", "nmi", "doctor")


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if re.match(r" {4}\w", line)] == list(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: spt-fast {command} " in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["bake"], ["prototypes", "--depth", "medium"]])
def test_unusable_arguments_leave_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == cli.BAD_INPUT
    assert "usage: spt-fast" in capsys.readouterr().err


def test_module_runs_as_a_command(tmp_path, monkeypatch, capsys):
    """What `python -m spt_fast` does, with its exit code."""
    monkeypatch.setattr(sys, "argv", ["spt_fast", "demo", "--epochs", "0", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("spt_fast", run_name="__main__")
    assert stop.value.code == cli.BAD_INPUT
    assert capsys.readouterr().err == "spt-fast demo: error: epochs must be an integer >= 1, got 0\n"


def test_traceback_is_shown_on_request(tmp_path):
    (tmp_path / "taken.txt").write_text("mine")
    with pytest.raises(NotADirectoryError):
        cli.main(["--traceback", "demo", "--out", str(tmp_path / "taken.txt")])


def test_ctrl_c_leaves_with_130_and_no_file(tmp_path, monkeypatch, capsys, ctrl_c):
    monkeypatch.setattr(compare, "run_method", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert cli.main(["demo", "--out", str(tmp_path / "out")]) == cli.INTERRUPTED
    errors = capsys.readouterr().err
    assert "spt-fast: interrupted" in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
