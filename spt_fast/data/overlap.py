"""Images that two sets have in common: the same file, or another one with the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

_TAIL_BYTES = 1024


def find_overlap(training: Sequence[Path], other: Sequence[Path]) -> list[Path]:
    """Those of `other` whose bytes are those of a file of `training`; empty and missing files are left out.

    Only files are read whose size another has.

    Raises:
        OSError: a file cannot be read.
    """
    trained, shared = (
        [path for path in paths if path.exists() and _size(path)] for paths in (training, other)
    )
    # Each key is dearer than the one before and is taken of fewer files.
    keys: tuple[Callable[[Path], Hashable], ...] = (_size, _tail, _digest)
    for key in keys:
        ours, theirs = ([(key(path), path) for path in paths] for paths in (trained, shared))
        common = {value for value, _ in ours} & {value for value, _ in theirs}
        trained = [path for value, path in ours if value in common]
        shared = [path for value, path in theirs if value in common]
    return shared


def _size(path: Path) -> int:
    return path.stat().st_size


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, _size(path) - _TAIL_BYTES))
        return file.read()


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
