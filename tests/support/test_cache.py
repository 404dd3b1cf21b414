"""The user's cache folder: where it is, and files that are whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from spt_fast.support.cache import cache_folder, read_cached, write_cached


@pytest.mark.parametrize(
    ("base", "expected"), [("/some/where", "/some/where"), ("", "/me/.cache"), ("relative", "/me/.cache")]
)
def test_the_folder_is_where_xdg_has_it(base: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/me")
    monkeypatch.setenv("XDG_CACHE_HOME", base)
    assert cache_folder() == Path(expected, "spt_fast")


def test_no_home_is_an_os_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(OSError, match="there is no home folder"):
        cache_folder()


def test_what_is_written_is_read_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    assert read_cached(path) is None
    for text in ("one", "two"):
        write_cached(path, text)
        assert read_cached(path) == text
    assert list(path.parent.iterdir()) == [path]
    path.write_bytes(b"\xff")
    assert read_cached(path) is None


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_cached(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
