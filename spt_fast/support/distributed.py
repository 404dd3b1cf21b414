"""Several processes that work on one result: what the ranks of a torch.distributed group exchange.

Limits: gloo and NCCL (NCCL has never been run here). Every rank makes every call, in the same order. If a
rank dies, the calls of the others end with a RuntimeError, at the latest after the group's timeout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spt_fast.support.errors import NonFiniteError

Result = TypeVar("Result")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Processes:
    """The processes that work on one result. Without a group it is this process alone, and calls are free."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    def gather(self, value: Result) -> list[Result]:
        """The value of every rank, in order of rank; anything that can be pickled, in host memory."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.size
        with _explained():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks: the same bits on each of them."""
        if self._group is None:
            return values
        total = values.to(self._device(), copy=True).contiguous()
        with _explained():
            dist.all_reduce(total, group=self._group)
        return total.to(values.device)

    def concatenate(self, rows: Tensor) -> Tensor:
        """The rows [n, ...] of all ranks, in order of rank; only n may differ, and be 0."""
        if self._group is None:
            return rows
        everyone = []
        for rank, size in enumerate(self.gather(len(rows))):
            theirs = rows if rank == self.rank else rows.new_empty(size, *rows.shape[1:])
            theirs = theirs.contiguous().to(self._device())
            if theirs.numel():
                # As bytes: not every backend knows every dtype.
                with _explained():
                    dist.broadcast(theirs.view(torch.uint8), group=self._group, group_src=rank)
            everyone.append(theirs.to(rows.device))
        return torch.cat(everyone)

    def parallel(self, module: nn.Module) -> nn.Module:
        """`module`, whose backward then averages gradients over all ranks; alone, it is left as it is."""
        if self._group is None:
            return module
        device = next(module.parameters()).device
        ids = [device] if device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, process_group=self._group)

    def work_of(self, count: int) -> range:
        """Which of the items 0 to `count` - 1 this rank does in `split_work`."""
        return range(self.rank, count, self.size)

    def split_work(self, count: int, work: Callable[[int], Result]) -> list[Result]:
        """`work(0)` to `work(count - 1)`, each done by one rank; every rank gets every result."""
        with self.together():
            done = {index: work(index) for index in self.work_of(count)}
        results = {index: result for share in self.gather(done) for index, result in share.items()}
        return [results[index] for index in range(count)]

    def on_rank_0(self, work: Callable[[], object]) -> None:
        """`work()` by rank 0 alone, as for files and output; an exception is raised on all ranks."""
        with self.together():
            if self.rank == 0:
                work()

    def rank_0_first(self, work: Callable[[], Result]) -> Result:
        """`work()` by every rank, first by rank 0: the others find the files that it has downloaded."""
        done = []
        for turn_of_rank_0 in (True, False):
            with self.together():
                if (self.rank == 0) == turn_of_rank_0:
                    done.append(work())
        return done[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Wait at the end of the context for all ranks; an exception on one rank is raised on all of them.

        The other ranks raise it with the number of its rank in front of the message: as NonFiniteError, with
        the same attributes, ValueError, TypeError or OSError if it is one of these, else as RuntimeError.
        """
        try:
            yield
        except Exception as error:
            # This error is raised in any case, also where the other ranks are gone and cannot be told.
            with suppress(RuntimeError):
                self._report(error)
            raise
        self._report(None)

    def _report(self, error: Exception | None) -> None:
        """Tell all ranks of the error here, or of none; without one here, raise the first of another rank."""
        reports = self.gather(None if error is None else _describe(error))
        for rank, report in enumerate(reports):
            if report is not None and error is None:
                kind, message, attributes = report
                raise kind(f"rank {rank}: {message}", **attributes)

    def check_same(self, settings: Mapping[str, object]) -> None:
        """Raise ValueError where another rank has other settings than this one."""
        for rank, theirs in enumerate(self.gather(dict(settings))):
            for name in {**settings, **theirs}:
                value = settings.get(name)
                if theirs.get(name) != value:
                    raise ValueError(
                        f"{name} must be the same on all ranks, got {value!r} on rank {self.rank} "
                        f"and {theirs.get(name)!r} on rank {rank}"
                    )

    def share_of(self, total: int) -> range:
        """This rank's share of `total` things: consecutive, none twice, sizes that differ by at most one."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def _device(self) -> torch.device:
        if dist.get_backend(self._group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


ALONE = Processes()


def find_processes(process_group: Any) -> Processes:
    """The ranks of `process_group`; None is the default group where torch.distributed is initialised.

    Raises:
        TypeError: not a process group, or not one that this process belongs to.
    """
    if process_group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return Processes(dist.group.WORLD)
    # A group that this process does not belong to is a number, whatever new_group's annotation says.
    if not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(
            "process_group must be a torch.distributed process group that this process belongs to, "
            f"got {process_group!r}"
        )
    return Processes(process_group)


@contextmanager
def joined_by_environment(device: torch.device) -> Iterator[Processes]:
    """The processes that torchrun started together with this one, joined while the context is open.

    gloo for the CPU, NCCL for CUDA. Without torchrun's environment variables it is this process alone; where
    torch.distributed is initialised already, its default group.
    """
    started = all(name in os.environ for name in _ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1
    if not started or dist.is_initialized():
        yield find_processes(None)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _explained():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield find_processes(None)
    finally:
        dist.destroy_process_group()


def check_single_process(command: str) -> None:
    """Raise ValueError where torchrun started this process together with others."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise ValueError(f"{command} runs in one process, got WORLD_SIZE={size}; start it without torchrun")


def processes_of_this_machine() -> int:
    """How many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def device_of_this_process(device: str | None) -> torch.device:
    """`device`, by default CUDA where there is one; "cuda" alone is the one of torchrun's LOCAL_RANK.

    Raises:
        ValueError: one GPU for several processes, which NCCL does not serve.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and chosen.index is not None and processes_of_this_machine() > 1:
        raise ValueError(
            f"device must be cuda or cpu for {processes_of_this_machine()} processes, each of which takes "
            f"the GPU of its LOCAL_RANK, got {chosen} (--device)"
        )
    if str(chosen) == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return chosen


def _describe(error: Exception) -> tuple[type[Exception], str, dict[str, int | None]]:
    """Class, message and attributes with which another rank raises the error; all of them can be pickled."""
    message = str(error) or type(error).__name__
    if isinstance(error, NonFiniteError):
        where = {"row": error.row, "image": error.image, "layer": error.layer, "step": error.step}
        return NonFiniteError, message, where
    kinds = (ValueError, TypeError, OSError)
    return next((kind for kind in kinds if isinstance(error, kind)), RuntimeError), message, {}


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"another process of the group died, or did not answer within the group's timeout ({error})"
        ) from error
