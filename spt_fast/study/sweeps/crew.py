"""Who does the runs of a sweep: this process, or several worker processes that end with it."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Mapping
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from spt_fast.study.runs import Row
from spt_fast.study.sweeps.execute import Workshop
from spt_fast.study.sweeps.plan import PlannedRun


class Crew(Protocol):
    """Does runs, as many at a time as it has workers."""

    running: list[PlannedRun]
    size: int

    def start(self, planned: PlannedRun) -> None:
        """Begin a run; only where fewer than `size` are running."""

    def wait(self) -> tuple[PlannedRun, Row]:
        """The next run that is finished; what one raised is raised."""

    def end(self) -> None:
        """End the workers, and with them whatever runs."""


class Alone:
    """One run at a time, in this process."""

    size = 1

    def __init__(self, workshop: Workshop) -> None:
        self.running: list[PlannedRun] = []
        self._workshop = workshop

    def start(self, planned: PlannedRun) -> None:
        """Take note of it: it is done where it is waited for."""
        self.running.append(planned)

    def wait(self) -> tuple[PlannedRun, Row]:
        """Do it."""
        planned = self.running[0]
        row = self._workshop.run(planned)
        self.running.remove(planned)
        return planned, row

    def end(self) -> None:
        """There is nobody to end."""


class _Worker(NamedTuple):
    process: Any
    pipe: Any


class Workers:
    """Processes that are started anew, each with a GPU of its own, or a share of the cores.

    Args:
        size: how many.
        device: as the user named it; None is a GPU each, where there are any.
        workshop: arguments of `Workshop` before its device.
    """

    def __init__(
        self, size: int, device: torch.device, *workshop: Any, make: Callable[..., Workshop] = Workshop
    ) -> None:
        self.size = size
        self.running: list[PlannedRun] = []
        self._of: dict[int, PlannedRun] = {}
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // size)
        readers = multiprocessing.get_start_method()
        self._workers: list[_Worker] = []
        try:
            for number in range(size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_work,
                    args=(theirs, make, workshop, _device_of(device, number), size, threads, readers),
                )
                # A process of a sweep has workers of its own, which read images.
                process.start()
                theirs.close()
                self._workers.append(_Worker(process, ours))
        except BaseException:
            self.end()
            raise

    def start(self, planned: PlannedRun) -> None:
        """Give it to a worker that has nothing to do."""
        number = next(number for number in range(self.size) if number not in self._of)
        self._workers[number].pipe.send(planned)
        self._of[number] = planned
        self.running.append(planned)

    def wait(self) -> tuple[PlannedRun, Row]:
        """The next run that is finished.

        Raises:
            RuntimeError: a worker died; or what a run raised.
        """
        pipes = {worker.pipe: number for number, worker in enumerate(self._workers) if number in self._of}
        ready: Any = connection.wait(list(pipes))[0]
        number = pipes[ready]
        planned = self._of.pop(number)
        try:
            row, error = ready.recv()
        except (EOFError, ConnectionError):
            worker = self._workers[number].process
            worker.join(5)
            raise RuntimeError(
                f"the process that did {planned.name} ended with code {worker.exitcode}; if memory ran out, "
                "give fewer jobs; the same command goes on"
            ) from None
        self.running.remove(planned)
        if error is not None:
            raise error
        return planned, row

    def end(self) -> None:
        """End the processes; a run that is not finished goes on from its checkpoint another time."""
        for number, worker in enumerate(self._workers):
            # One that waits for a run ends by itself, and gives back what it has.
            worker.pipe.close()
            if number in self._of:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join()


def _device_of(device: torch.device, number: int) -> str:
    """A GPU for each worker, in turns, unless one is named."""
    several = device.type == "cuda" and str(device) == "cuda"
    return f"cuda:{number % torch.cuda.device_count()}" if several else str(device)


def _work(
    pipe: Any,
    make: Callable[..., Workshop],
    workshop: tuple[Mapping[str, Any], Mapping[str, Any], Path],
    device: str,
    sharing: int,
    threads: int,
    readers: str,
) -> None:
    """Do what comes through the pipe, until it is closed or the parent is gone."""
    # A process that was started anew would start its readers of images so, too: none could share a cache.
    multiprocessing.set_start_method(readers, force=True)
    # Ctrl-C reaches all processes of a terminal; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    workers = make(*workshop, torch.device(device), sharing)
    while True:
        try:
            planned = pipe.recv()
        except EOFError:
            return
        try:
            answer: tuple[Row | None, Exception | None] = workers.run(planned), None
        except Exception as error:
            answer = None, _portable(error)
        pipe.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error, where it can be sent to another process as it is; else its class and message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
