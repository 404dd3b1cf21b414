"""The command line as a user calls it: help, one-line errors with exit code 2, Ctrl-C with 130."""

from __future__ import annotations

import re
import runpy
import signal
import sys

import pytest

import spt_fast
from spt_fast.commands import main as cli
from spt_fast.commands import options
from spt_fast.commands.demo import compare

COMMANDS = ("demo", "prototypes", "train", "eval", "predict", "sweep", "table", "report", "nmi", "doctor")


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


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"spt-fast {spt_fast.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["doctor", "--chek"],
            "spt-fast doctor: error: unrecognized arguments: --chek; did you mean --check?",
        ),
        (["doctor", "--qqq=1"], "spt-fast doctor: error: unrecognized arguments: --qqq=1"),
        (["doctor", "now"], "spt-fast: error: unrecognized arguments: now"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert capsys.readouterr().err.splitlines()[-1] == message


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


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("prototypes", "train")])
def test_commands_of_one_process_are_refused_under_torchrun(command, tmp_path, monkeypatch, only_error):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.chdir(tmp_path)
    options = {
        "eval": ("--model", "shipped", "--data", "digits", "--tuned", "t.safetensors"),
        "predict": ("--model", "shipped", "--tuned", "t.safetensors", "photo.png"),
        "table": ("study",),
        "nmi": ("--model", "shipped", "--data", "digits", "--random", "2"),
        "report": ("study",),
        "sweep": ("--model", "shipped", "--data", "digits", "--methods", "linear", "--out", "out"),
    }
    error = only_error(cli.main([command, *options.get(command, ())]), command)
    assert f"{command} runs in one process, got WORLD_SIZE=2" in error
    assert list(tmp_path.iterdir()) == []


# Nothing can be written into /proc, whoever asks; `{long}` is a name that is too long.
@pytest.mark.parametrize("out", ["/proc/spt_fast", "{tmp}/{long}", "{tmp}/taken.txt/x", "/dev/null"])
@pytest.mark.parametrize(
    "command",
    [
        ("demo",),
        ("prototypes", "--model", "shipped", "--data", "digits"),
        ("train", "--model", "shipped", "--data", "digits"),
        ("nmi", "--model", "shipped", "--data", "digits", "--random", "2"),
    ],
    ids=lambda command: command[0],
)
def test_an_output_that_cannot_be_written_is_found_before_any_work(
    command, out, tmp_path, only_error, capsys, monkeypatch
):
    monkeypatch.setattr(options, "open_model", lambda _: pytest.fail("work was begun"))
    monkeypatch.setattr(compare, "run_method", lambda *_, **__: pytest.fail("work was begun"))
    (tmp_path / "taken.txt").write_text("mine")
    place = out.format(tmp=tmp_path, long="n" * 300)
    code = cli.main([*command, "--out", place, "--overwrite"])
    assert place.rpartition("/")[0] in only_error(code, command[0])
    assert [path.name for path in tmp_path.iterdir()] == ["taken.txt"]


def test_an_error_of_an_unexpected_class_is_one_line(tmp_path, monkeypatch, only_error):
    def fail(*_: object, **__: object) -> None:
        raise AttributeError("no such\nthing")

    monkeypatch.setattr(compare, "run_method", fail)
    error = only_error(cli.main(["demo", "--out", str(tmp_path)]), "demo")
    assert "error: AttributeError: no such thing (spt-fast --traceback ... shows where)" in error
