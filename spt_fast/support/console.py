"""Standard output and error of a command: of any encoding, closed by their reader, or full."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import TextIO

# As a shell names a program that SIGPIPE has ended.
CLOSED_PIPE = 141
_SPELLED = {"\xb1": "+-"}


class ClosedPipeError(Exception):
    """Whoever read what is printed has gone, as `head` does after the last line that it wants."""


def is_the_command() -> bool:
    """Whether this process is `spt-fast` or `python -m spt_fast`, and not a program that uses the package."""
    path = next(iter(getattr(sys, "argv", ())), "")
    name = os.path.basename(path)
    # While Python looks for the module to run, `sys.argv` does not name it yet.
    by_module = name == "-m" and ("-m", "spt_fast") in pairwise(sys.orig_argv)
    return name == "spt-fast" or by_module or path.endswith(f"{os.sep}spt_fast{os.sep}__main__.py")


def accept_any_text() -> None:
    """Print characters that the encoding of the terminal lacks in other words, instead of an error."""
    codecs.register_error("spt_fast", _spell)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="spt_fast")


@contextmanager
def flushed_output() -> Iterator[None]:
    """Write out what was printed at the end of the context, also after an exception.

    Raises:
        ClosedPipeError: nobody reads standard output or standard error any more.
        OSError: standard output cannot be written, as on a full disk.
    """
    try:
        try:
            yield
        finally:
            _flush(sys.stdout)
    except BrokenPipeError:
        # It may be another pipe, such as that of a worker.
        if not any([_is_broken(sys.stdout), _is_broken(sys.stderr)]):
            raise
        raise ClosedPipeError from None


def _flush(stream: TextIO | None) -> None:
    if stream is None or stream.closed:
        return
    try:
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _silence(stream)
        raise OSError(f"standard output cannot be written: {error.strerror or error}") from error


def _is_broken(stream: TextIO | None) -> bool:
    """Whether `stream` is a pipe that nobody reads; it is silenced then."""
    if stream is None or stream.closed:
        return False
    try:
        waiting = select.poll()
        waiting.register(stream.fileno(), select.POLLOUT)
    except OSError:
        return False
    broken = any(event & select.POLLERR for _, event in waiting.poll(0))
    if broken:
        _silence(stream)
    return broken


def _silence(stream: TextIO) -> None:
    """Send the rest to nowhere: at its end the interpreter would complain about what is left."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _spell(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    wanted = error.object[error.start : error.end]
    spelled = (_SPELLED.get(each) or each.encode("ascii", "backslashreplace").decode() for each in wanted)
    return "".join(spelled), error.end
