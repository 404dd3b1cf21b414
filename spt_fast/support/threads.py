"""Independent tasks on the CPU, each in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")


@contextmanager
def side_by_side(work: Callable[[int], Result], tasks: Sequence[int]) -> Iterator[Callable[[int], Result]]:
    """Start `work(task)` for all tasks. Yields a function that waits for a task and returns its result.

    As many tasks run at once as torch has threads, and share those out among them. Tasks of many small
    steps end sooner so: threads that share a step must wait for each other at its end, and wait long where
    other programs keep the cores busy. An error of a task is raised when its result is asked for. When the
    context ends, tasks that have not started are dropped.
    """
    num_threads = torch.get_num_threads()
    at_once = min(num_threads, len(tasks))
    if at_once < 2:
        yield work
        return
    pool = ThreadPoolExecutor(at_once, "spt_fast", torch.set_num_threads, (num_threads // at_once,))
    try:
        futures = {task: pool.submit(work, task) for task in tasks}
        yield lambda task: futures[task].result()
    finally:
        pool.shutdown(cancel_futures=True)
        # Threads that are started later would otherwise get the workers' number.
        torch.set_num_threads(num_threads)
