"""What a command prints reaches any terminal, and a reader that has gone is no error."""

from __future__ import annotations

import io
import os
import sys

import pytest

from spt_fast.commands import main as cli
from spt_fast.support.console import CLOSED_PIPE, ClosedPipeError, accept_any_text, flushed_output


def test_text_that_a_terminal_lacks_is_spelled(monkeypatch):
    for encoding, expected in (
        ("ascii", b"1 +- 2, \\xe9, \\udce9\n"),
        ("latin-1", b"1 \xb1 2, \xe9, \\udce9\n"),
        ("utf-8", "1 ± 2, é, ".encode() + b"\\udce9\n"),
    ):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        accept_any_text()
        print("1 ± 2, é, \udce9")
        sys.stdout.flush()
        assert written.getvalue() == expected


@pytest.mark.parametrize("buffering", [-1, 1])
def test_a_closed_pipe_is_quiet(buffering, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=buffering) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert cli.main(["doctor"]) == CLOSED_PIPE
    assert capsys.readouterr().err == ""


def test_another_broken_pipe_is_an_error(tmp_path):
    with pytest.raises(BrokenPipeError), flushed_output():
        raise BrokenPipeError("of a worker")


def test_a_closed_standard_error_counts_too(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with pytest.raises(ClosedPipeError), flushed_output():
            print("x" * 10, file=stream, flush=True)


def test_a_full_disk_behind_standard_output_is_an_error(monkeypatch, capsys):
    with open("/dev/full", "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert cli.main(["doctor"]) == cli.BAD_INPUT
    assert "doctor: error: standard output cannot be written: No space left" in capsys.readouterr().err


def test_no_standard_output_is_fine(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert cli.main(["doctor"]) == 0
