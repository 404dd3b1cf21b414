"""A lock on a folder, so that one process at a time writes into it; it ends with that process in any case.

Limits: `flock`, which some network file systems lack; there a warning says that nothing is locked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_NAME = ".spt_fast.lock"
_NOT_SUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# Forks, such as workers that read images, inherit open files and with them the lock, and may live longer.
_held: set[int] = set()


@contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Within the context no other context of this kind, of this process or another, has the same folder.

    The lock is a file in the folder, which is removed at the end. A killed process leaves it, unlocked.

    Raises:
        ValueError: another one has the folder now.
        OSError: the file cannot be made.
    """
    path = Path(folder, LOCK_NAME)
    handle = _lock(path)
    _held.add(handle)
    try:
        yield
    finally:
        # Removed while it is locked, so that it is no other's.
        with suppress(OSError):
            path.unlink()
        if handle in _held:
            _held.remove(handle)
            os.close(handle)


def _lock(path: Path) -> int:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise type(error)(f"cannot write {path}: {error.strerror}") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 64).decode(errors="replace").strip()
            os.close(handle)
            raise ValueError(
                f"out: {path.parent} is in use: another run{f' (process {owner})' * bool(owner)} writes into "
                "it; wait for its end, or give another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                os.close(handle)
                raise type(error)(f"cannot lock {path}: {error.strerror}") from error
            warnings.warn(f"{path.parent} cannot be locked ({error.strerror})", stacklevel=4)
        # Whoever had the lock before may have removed the file meanwhile.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                os.truncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        os.close(handle)


def _leave_to_parent() -> None:
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_leave_to_parent)
