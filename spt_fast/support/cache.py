"""The user's cache folder, and small files in it that many processes may read and write at once."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where spt_fast keeps what it can make again: `spt_fast` in XDG_CACHE_HOME, by default in ~/.cache.

    Raises:
        OSError: there is no home folder.
    """
    # The specification has relative paths ignored.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        try:
            base = Path.home() / ".cache"
        except RuntimeError as error:
            raise OSError(f"there is no home folder ({error})") from error
    return base / "spt_fast"


def write_cached(path: Path, text: str) -> None:
    """Write a small file whole or not at all; of several writers the last one wins, and none waits.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def read_cached(path: Path) -> str | None:
    """The text of a file; None where it is not there, cannot be read or is no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
