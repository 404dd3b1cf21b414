"""One process at a time has a folder; what is left of a killed one does not matter."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from spt_fast.support.files import remove_leftovers
from spt_fast.support.locks import LOCK_NAME, folder_lock


def test_a_folder_is_had_once_at_a_time(tmp_path: Path) -> None:
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text() == f"{os.getpid()}\n"
        with (
            pytest.raises(ValueError, match=rf"{tmp_path} is in use: another run \(process {os.getpid()}\)"),
            folder_lock(tmp_path),
        ):
            pass
        # The refusal has taken nothing away.
        assert (tmp_path / LOCK_NAME).exists()
    assert list(tmp_path.iterdir()) == []
    with folder_lock(tmp_path):
        pass


def test_the_file_of_a_killed_process_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text("123456789012345\n")
    with folder_lock(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"cannot write {tmp_path}/missing/{LOCK_NAME}"):
        folder_lock(tmp_path / "missing").__enter__()


def test_a_file_system_without_locks_is_said_to_be_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.warns(UserWarning, match="cannot be locked"), folder_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_writers_go_and_nothing_else(tmp_path: Path) -> None:
    for name in (".spt_fast.abc123.part", ".spt_fast.lock", "x.part", "tuned.safetensors"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".spt_fast.lock", "x.part", "tuned.safetensors"}
