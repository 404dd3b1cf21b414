"""Safetensors files are written whole or not at all, and refused when they are not what they should be."""

from __future__ import annotations

import json
import os
import resource
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from spt_fast.support import files
from spt_fast.support.files import check_output_path, read_safetensors, write_safetensors

TENSORS = {"a": torch.arange(12.0).reshape(3, 4), "b": torch.tensor(7)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "thing.safetensors"


@pytest.fixture
def written(path: Path) -> Path:
    write_safetensors(path, TENSORS, {"colour": "red"}, kind="thing")
    return path


def test_round_trip_gives_tensors_and_metadata_back(written: Path) -> None:
    tensors, metadata = read_safetensors(written, kind="thing")
    assert metadata == {"colour": "red"}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_strided_views_of_any_dtype_are_stored(path: Path, dtype: torch.dtype) -> None:
    view = torch.arange(24).reshape(4, 6).to(dtype)[::2, 1:].T
    write_safetensors(path, {"x": view}, {}, kind="thing")
    assert torch.equal(read_safetensors(path, kind="thing")[0]["x"], view)


def test_tensors_that_share_memory_are_stored_apart(path: Path) -> None:
    whole = torch.arange(6.0)
    write_safetensors(path, {"whole": whole, "part": whole[2:], "same": whole}, {}, kind="thing")
    tensors, _ = read_safetensors(path, kind="thing")
    assert torch.equal(tensors["part"], whole[2:])
    assert torch.equal(tensors["same"], whole)


def test_tensors_read_do_not_change_with_the_file(written: Path) -> None:
    tensors, _ = read_safetensors(written, kind="thing")
    with open(written, "r+b") as file:
        file.seek(-48, os.SEEK_END)
        file.write(b"\xff" * 48)
    assert torch.equal(tensors["a"], TENSORS["a"])


def test_plain_safetensors_reads_what_was_written(written: Path) -> None:
    header_size = struct.unpack("<Q", written.read_bytes()[:8])[0]
    header = json.loads(written.read_bytes()[8 : 8 + header_size])
    assert header["__metadata__"] == {"colour": "red", "kind": "thing", "format_version": "1"}


def test_same_content_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    metadata = {f"key {i}": f"wert ü {i}" for i in range(10)}
    write_safetensors(path, TENSORS, metadata, kind="thing")
    tensors, back = read_safetensors(path, kind="thing")
    assert back == metadata
    write_safetensors(tmp_path / "again", tensors, dict(reversed(back.items())), kind="thing")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_new_file_has_the_usual_permissions(written: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(written.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


class TestRefusals:
    @pytest.mark.parametrize("kept", [0, 5, 8, 60, -1])
    def test_truncated_file(self, written: Path, kept: int) -> None:
        written.write_bytes(written.read_bytes()[:kept])
        with pytest.raises(ValueError, match=r"thing\.safetensors is truncated or not a safetensors file"):
            read_safetensors(written, kind="thing")

    @pytest.mark.parametrize("content", [b"hello, world, this is text", b"PK\x03\x04" * 50, b"\xff" * 200])
    def test_file_that_is_no_safetensors(self, path: Path, content: bytes) -> None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or not a safetensors file"):
            read_safetensors(path, kind="thing")

    def test_file_of_another_program(self, path: Path) -> None:
        save_file({"x": torch.zeros(2)}, path)
        with pytest.raises(ValueError, match="not one that spt_fast wrote; expected 'thing'"):
            read_safetensors(path, kind="thing")

    def test_file_of_another_kind(self, written: Path) -> None:
        with pytest.raises(ValueError, match="holds 'thing', expected 'stuff'"):
            read_safetensors(written, kind="stuff")

    def test_file_of_a_newer_version(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(files, "FORMAT_VERSION", 2)
            write_safetensors(path, TENSORS, {}, kind="thing")
        with pytest.raises(ValueError, match="has format version 2, this spt_fast reads up to 1"):
            read_safetensors(path, kind="thing")

    def test_missing_file_and_folder_in_its_place(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"thing\.safetensors"):
            read_safetensors(path, kind="thing")
        with pytest.raises(IsADirectoryError, match="a file name is needed"):
            read_safetensors(tmp_path, kind="thing")

    def test_metadata_that_is_not_text(self, path: Path) -> None:
        with pytest.raises(TypeError, match="metadata must map strings to strings, got 'n': 3"):
            write_safetensors(path, TENSORS, {"n": 3}, kind="thing")  # type: ignore[dict-item]
        assert not path.exists()


class TestOutputPath:
    def test_free_name_in_a_folder_is_accepted(self, path: Path) -> None:
        assert check_output_path(str(path)) == path

    def test_existing_file_needs_overwrite(self, written: Path) -> None:
        with pytest.raises(FileExistsError, match="overwrite=True"):
            check_output_path(written)
        assert check_output_path(written, overwrite=True) == written

    def test_dangling_link_counts_as_existing(self, path: Path, tmp_path: Path) -> None:
        path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileExistsError):
            check_output_path(path)

    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"the folder .*missing does not exist"):
            check_output_path(tmp_path / "missing" / "x")

    def test_folder_that_is_a_file(self, written: Path) -> None:
        with pytest.raises(NotADirectoryError, match="is a file, not a folder"):
            check_output_path(written / "x")

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_folder_in_place_of_a_file(self, tmp_path: Path, overwrite: bool) -> None:
        with pytest.raises(IsADirectoryError):
            check_output_path(tmp_path, overwrite=overwrite)

    @pytest.mark.parametrize("name", ["/proc/x", "/proc/self/x", "{tmp}/" + "n" * 300])
    def test_what_cannot_be_written_is_found_by_trying(self, name: str, tmp_path: Path) -> None:
        target = name.replace("{tmp}", str(tmp_path))
        with pytest.raises(OSError, match=rf"^cannot write {target}: \w"):
            check_output_path(target)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_full_disk(self, overwrite: bool, path: Path, tmp_path: Path) -> None:
        if overwrite:
            path.write_text("old")
        with no_room(), pytest.raises(OSError, match=f"^cannot write {path}: File too large"):
            check_output_path(path, overwrite=overwrite)
        with no_room(), pytest.raises(OSError, match=f"^cannot write {path}: File too large"):
            write_safetensors(path, TENSORS, {}, kind="thing", overwrite=overwrite)
        assert [each.read_text() for each in tmp_path.iterdir()] == ["old"] * overwrite

    def test_device_in_place_of_a_file(self) -> None:
        with pytest.raises(ValueError, match=r"^cannot write /dev/null: it is a device"):
            check_output_path("/dev/null", overwrite=True)

    def test_a_name_as_long_as_names_can_be(self, tmp_path: Path) -> None:
        path = tmp_path / ("n" * os.pathconf(tmp_path, "PC_NAME_MAX"))
        assert check_output_path(path) == path
        assert list(tmp_path.iterdir()) == []
        write_safetensors(path, TENSORS, {}, kind="thing")
        assert list(tmp_path.iterdir()) == [path]


@contextmanager
def no_room() -> Iterator[None]:
    """As on a full disk: no file grows beyond a few bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class TestAtomicity:
    def test_existing_file_is_kept_without_overwrite(self, written: Path) -> None:
        before = written.read_bytes()
        with pytest.raises(FileExistsError):
            write_safetensors(written, {"c": torch.ones(1)}, {}, kind="thing")
        assert written.read_bytes() == before
        assert os.listdir(written.parent) == [written.name]

    def test_overwrite_replaces(self, written: Path) -> None:
        write_safetensors(written, {"c": torch.ones(1)}, {}, kind="thing", overwrite=True)
        assert read_safetensors(written, kind="thing")[0].keys() == {"c"}
        assert os.listdir(written.parent) == [written.name]

    @pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
    def test_file_that_appears_meanwhile_is_kept(
        self, path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
    ) -> None:
        def fsync_while_another_writes(handle: int) -> None:
            path.write_text("another's")

        monkeypatch.setattr(os, "fsync", fsync_while_another_writes)
        if not links:
            monkeypatch.setattr(os, "link", _no_links)
        with pytest.raises(FileExistsError, match="appeared while it was being written"):
            write_safetensors(path, TENSORS, {}, kind="thing")
        assert path.read_text() == "another's"
        assert os.listdir(path.parent) == [path.name]

    def test_file_system_without_links(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "link", _no_links)
        write_safetensors(path, TENSORS, {}, kind="thing")
        assert read_safetensors(path, kind="thing")[0].keys() == TENSORS.keys()
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_failure_leaves_nothing_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, overwrite: bool
    ) -> None:
        path = tmp_path / "thing.safetensors"
        if overwrite:
            path.write_text("before")

        def fail(handle: int) -> None:
            raise error

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(type(error)):
            write_safetensors(path, TENSORS, {}, kind="thing", overwrite=overwrite)
        assert os.listdir(tmp_path) == ([path.name] if overwrite else [])
        assert not overwrite or path.read_text() == "before"


def _no_links(source: str, target: Path) -> None:
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("path", [None, 3, ["a"], b"a"], ids=str)
def test_what_is_no_name_of_a_file_is_refused(path: Any) -> None:
    for call in (
        check_output_path,
        lambda path: read_safetensors(path, kind="thing"),
        lambda path: write_safetensors(path, TENSORS, {}, kind="thing"),
    ):
        with pytest.raises(TypeError, match=r"path must be the name of a file, a string or a Path, got "):
            call(path)
