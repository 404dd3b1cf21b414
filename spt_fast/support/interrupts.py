"""Ctrl-C in a command: it ends the process with code 130, without a traceback, and files stay whole.

Python raises KeyboardInterrupt wherever the main thread happens to be. In an import libraries take it for
another error, in a `__del__` it is printed and forgotten, in a worker it prints a traceback. So a command
handles the signal itself. Limits: the signal is noticed by the main thread, between two steps of Python.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130
MESSAGE = "spt-fast: interrupted"
# How long to wait for an import or a `__del__` to end before looking again.
_SOON = 0.05
# Where a library has swallowed the exception, it is raised once more after this many seconds.
_AGAIN = 5.0

_held = 0
_waiting = False
_interrupted = False


def leave_at_once() -> None:
    """From now on Ctrl-C ends the process at once: for the time in which there is nothing to clean up."""
    global _interrupted
    process, _interrupted = os.getpid(), False

    def leave(*_: object) -> None:
        # A second signal, after `raised_once`, changes nothing: the process is ending.
        if os.getpid() == process and not _interrupted:
            # Not by print, which may be what was interrupted.
            os.write(2, f"\n{MESSAGE}\n".encode())
            os._exit(INTERRUPTED)

    if _is_ours_to_handle():
        signal.signal(signal.SIGINT, leave)


@contextmanager
def raised_once() -> Iterator[None]:
    """Within the context Ctrl-C raises one KeyboardInterrupt, where it is not lost.

    Imports and `__del__` methods are waited for, and so are `held` contexts. Further signals change nothing,
    so that what cleans up is not interrupted. Processes forked from this one take no notice. Whatever else
    was raised, or nothing at all, the context ends with KeyboardInterrupt.
    """
    global _waiting, _interrupted
    if not _is_ours_to_handle():
        yield
        return
    handler = _Handler(sys._getframe())
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        signal.signal(signal.SIGALRM, handler.look_again)
        signal.signal(signal.SIGINT, handler.start)
        try:
            yield
        except BaseException as error:
            if handler.started:
                raise KeyboardInterrupt from error
            raise
        if handler.started:
            raise KeyboardInterrupt
    finally:
        handler.finished = True
        _waiting, _interrupted = False, handler.started
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def held() -> Iterator[None]:
    """Within `raised_once`, Ctrl-C waits for the end of this context, which must be short."""
    global _held
    _held += 1
    try:
        yield
    finally:
        _held -= 1
        if _waiting and not _held:
            signal.raise_signal(signal.SIGALRM)


class _Handler:
    """What `raised_once` does with the signals; `base` is the frame below which nothing is looked at."""

    def __init__(self, base: FrameType) -> None:
        self.started = False
        self.finished = False
        self._base = base
        self._process = os.getpid()

    def start(self, _: int, frame: FrameType | None) -> None:
        if not self.started:
            self._interrupt(frame)

    def look_again(self, _: int, frame: FrameType | None) -> None:
        if self.started:
            self._interrupt(frame)

    def _interrupt(self, frame: FrameType | None) -> None:
        global _waiting
        if self.finished or os.getpid() != self._process:
            return
        self.started = True
        _waiting = bool(_held) or self._would_be_lost(frame)
        if _waiting:
            signal.setitimer(signal.ITIMER_REAL, _SOON)
            return
        signal.setitimer(signal.ITIMER_REAL, _AGAIN)
        raise KeyboardInterrupt

    def _would_be_lost(self, frame: FrameType | None) -> bool:
        while frame is not None and frame is not self._base:
            code = frame.f_code
            if code.co_name == "__del__" or code.co_filename.startswith("<frozen importlib"):
                return True
            frame = frame.f_back
        return False


def _is_ours_to_handle() -> bool:
    """Whether this is the main thread, and Ctrl-C is not ignored, as for a job in the background."""
    is_main = threading.current_thread() is threading.main_thread()
    return is_main and signal.getsignal(signal.SIGINT) != signal.SIG_IGN
