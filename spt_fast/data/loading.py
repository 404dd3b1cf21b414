"""Images read batch by batch: what cannot be read is an error that names it, or left out."""

from __future__ import annotations

import copy
import gc
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from spt_fast.data.datasets import Unreadable
from spt_fast.data.order import Order
from spt_fast.data.reading import Asked, BatchReader, collate_readable, empty_batch
from spt_fast.data.transforms import Preprocessing
from spt_fast.support.arguments import check_choice, check_int, check_seed
from spt_fast.support.errors import first_line
from spt_fast.support.interrupts import held

BadImages = Literal["error", "skip"]
BAD_IMAGES = ("error", "skip")
# As torch begins the message of an error that a worker has met.
_IN_WORKER = re.compile(r"Caught (\w+) in DataLoader worker process \d+\.\n")
_SHARED_MEMORY_IS_FULL = ("shared memory", "(shm)", "/torch_", "Bus error")
_SHARED_MEMORY = "/dev/shm"
# More than the locks of its queues take, a page each; what its batches take is known when they are there.
_BYTES_OF_A_WORKER = 1 << 17


class ImageLoader:
    """Batches [images [B, C, H, W], labels [B]] of a data set; it has a length where the data set has one.

    Seed and epoch alone decide the order of a pass; seed, epoch and image how it is cropped and flipped.
    Workers, processes and earlier passes have no influence. The k-th pass is that of epoch k, unless
    `set_epoch` says otherwise. Images of a data set that can only be iterated come as it gives them.

    An image that cannot be read ends the iteration with a ValueError that names it. With
    `bad_images="skip"` its batch comes without it, or not at all where nothing else is left of it. An error
    in a worker is raised here, of the same class, with its message alone.

    Workers start with the first iteration and serve all of them, so only one iteration goes on at a time.

    Args:
        order: fields of `order.Order` besides these.

    Attributes:
        dataset: what is read.
        num_images: in all batches together, unreadable ones included; None where nobody knows.
        description: lines that say what is read.
        preprocessing: what is done to the images; None where nothing is.
        unreadable: {name: reason} of what was skipped so far, in any pass.
        is_random: whether an image may be another in another pass, as with random crops.
        augment: how images are augmented, of `transforms.AUGMENTS`; None where nobody knows.
        batch_size: images of a batch, of all processes that share the images together.
        every_batch: whether a batch without any readable image for this process comes as images [0, C, H, W]
            and labels [0], so that a pass has `len(loader)` batches, or not at all. True where several
            processes share each batch.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        num_images: int | None,
        description: Sequence[str] = (),
        preprocessing: Preprocessing | None = None,
        augment: str | None = None,
        bad_images: str = "error",
        num_workers: int = 0,
        batch_size: int = 1,
        seed: int = 0,
        pin_memory: bool = False,
        **order: Any,
    ) -> None:
        self.dataset = dataset
        self.num_images = num_images
        self.description = tuple(description)
        self.preprocessing = preprocessing
        self.augment = "none" if type(dataset) is TensorDataset else augment
        self.unreadable: dict[str, str] = {}
        self._skip = check_choice("bad_images", bad_images, BAD_IMAGES) == "skip"
        self._iterations = 0
        self._next = (1, 0)
        self._new_loader = partial(
            DataLoader,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_be_quiet_when_left,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(seed),
        )
        self._order: Order | None = None
        self.batch_size = batch_size
        self.every_batch = False
        if isinstance(dataset, IterableDataset):
            self.is_random = True
            self._open = partial(
                self._new_loader, dataset, batch_size=batch_size, collate_fn=collate_readable
            )
            self._loader = self._opened()
        else:
            self._reader = BatchReader(dataset, seed)
            self.is_random = self._reader.is_random
            self._read_in(Order(len(dataset), batch_size, seed, **order))

    def __len__(self) -> int:
        return len(self._loader)

    @property
    def rows(self) -> Sequence[int] | None:
        """The indices in `dataset` of the images that are taken; None is all of them."""
        return None if self._order is None else self._order.images

    @property
    def is_balanced(self) -> bool:
        """Whether images are drawn by weights, so that all classes come equally often."""
        return self._order is not None and self._order.weights is not None

    @property
    def is_shuffled(self) -> bool:
        """Whether each pass may have another order; True where only the data set knows."""
        return self._order is None or self._order.shuffle or self.is_balanced

    @property
    def drops_last(self) -> bool | None:
        """Whether a last batch that is not full is left out; None where there is none, or nobody knows."""
        if self._order is None or self._order.total % self._order.batch_size == 0:
            return None
        return self._order.drop_last

    @property
    def smallest_share(self) -> tuple[int, int] | None:
        """The images of the smallest batch, and how many processes share them; None where reading tells."""
        order = self._order
        if order is None or self._skip or not (order.in_step or order.processes.size == 1):
            return None
        last = 0 if order.drop_last else order.total % order.batch_size
        return last or order.batch_size, order.processes.size

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Make the next pass that of `epoch`, counted from 1, from its batch `skip` on.

        Raises:
            TypeError: a number is not an integer, or the data set can only be iterated.
            ValueError: `epoch` is below 1, or `skip` is not in 0 ... len(loader).
        """
        self._known_order()
        epoch, skip = check_int("epoch", epoch, 1), check_int("skip", skip, 0)
        if skip > len(self):
            raise ValueError(f"skip must be at most {len(self)}, the number of batches, got {skip}")
        self._next = epoch, skip

    def index_batches(self) -> Iterator[list[int]]:
        """The indices in `dataset` of each batch of the next pass, which counts as done; nothing is read."""
        return self._known_order().batches(*self._begin())

    def in_order(self) -> ImageLoader:
        """The same data set with the same transform: each image once, in its order, all in each process."""
        loader = copy.copy(self)
        loader._iterations = 0
        loader._next = (1, 0)
        loader._read_in(self._known_order().each_once())
        return loader

    def __iter__(self) -> Iterator[Any]:
        self._iterations += 1
        iteration = self._iterations
        if self._order is not None:
            self._sampler.start(*self._begin())
        _check_shared_memory(self._loader.num_workers)
        # Workers that Ctrl-C finds half started would stay.
        with _any_number_of_workers(), _explained_worker_errors(), held(), _garbage_kept_from_workers():
            batches = iter(self._loader)
        try:
            while True:
                if iteration != self._iterations:
                    raise RuntimeError("this iteration of the images has ended: another one has begun since")
                with _explained_worker_errors():
                    found = next(batches, None)
                if found is None:
                    return
                yield from self._checked(*found)
        except Exception as error:
            del batches
            self._end_workers(error)
            raise

    def _checked(self, batch: Any, unreadable: Sequence[Unreadable]) -> Iterator[Any]:
        """`batch`, unless it is None, once what is unreadable in it is noted, or is an error."""
        if unreadable and not self._skip:
            name, reason = unreadable[0]
            raise ValueError(
                f"{name} cannot be read ({reason}); repair or remove it, or leave such images "
                "out (bad_images='skip', --bad-images skip)"
            )
        self.unreadable.update(unreadable)
        if batch is not None:
            yield batch
        elif self.every_batch:
            yield empty_batch(self.dataset)

    def _read_in(self, order: Order) -> None:
        """Read the data set in this order from now on."""
        self._order = order
        self.batch_size = order.batch_size * (1 if order.in_step else order.processes.size)
        self.every_batch = order.in_step and order.processes.size > 1
        self._sampler = _Pass(order)
        self._open = partial(
            self._new_loader, self._reader, batch_sampler=self._sampler, collate_fn=_as_it_is
        )
        self._loader = self._opened()

    def _opened(self) -> DataLoader[Any]:
        with _any_number_of_workers():
            return self._open()

    def _known_order(self) -> Order:
        if self._order is None:
            raise TypeError("loader must be of a data set that is read by index, which has epochs")
        return self._order

    def _begin(self) -> tuple[int, int]:
        """The epoch of the next pass and its first batch, which is then begun."""
        begun = self._next
        self._next = begun[0] + 1, 0
        return begun

    def _end_workers(self, error: BaseException | None) -> None:
        """End them after an error, which must not keep their iterator in its frames.

        If that is collected as garbage, torch waits seconds for each worker, whose queue is then gone.
        """
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__
        if self._loader.num_workers:
            self._loader = self._opened()


def shuffled_loader(images: Tensor, labels: Tensor, *, batch_size: int, seed: int) -> ImageLoader:
    """A loader over tensors in memory, in an order that is new in each epoch and depends on `seed` alone."""
    dataset = TensorDataset(images, labels)
    return ImageLoader(
        dataset,
        num_images=len(dataset),
        batch_size=batch_size,
        seed=check_seed(seed),
        shuffle=True,
    )


class _Pass:
    """What a DataLoader asks a `BatchReader` for in a pass."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._start = (1, 0)

    def start(self, epoch: int, skip: int) -> None:
        """Make the next pass that of `epoch`, from its batch `skip` on."""
        self._start = epoch, skip

    def __iter__(self) -> Iterator[Asked]:
        epoch, skip = self._start
        batches = zip(self._order.batches(epoch, skip), self._order.draws(skip), strict=True)
        return (Asked(epoch, indices, draws) for indices, draws in batches)

    def __len__(self) -> int:
        return len(self._order)


def _as_it_is(batch: Any) -> Any:
    return batch


def _be_quiet_when_left(_worker: int) -> None:
    """In a worker: no traceback where the process that fetches its batches ends meanwhile.

    A thread of multiprocessing hands batches over, and gives `sys.excepthook` the error of such an end.
    """
    report = sys.excepthook

    def unless_left(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not isinstance(error, ConnectionError | EOFError):
            report(kind, error, trace)

    sys.excepthook = unless_left


@contextmanager
def _garbage_kept_from_workers() -> Iterator[None]:
    """Workers that are forked in this context never collect what the parent has at that moment.

    A worker that collects the iterator of another loader, which the parent is done with, would end that
    loader's workers: it prints tracebacks, and closes files that are now others.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _explained_worker_errors() -> Iterator[None]:
    """Raise an error of a worker with its message alone; torch makes the worker's traceback the message."""
    try:
        yield
    except Exception as error:
        message = _message_in_worker(str(error))
        if any(sign in str(error) for sign in _SHARED_MEMORY_IS_FULL):
            raise _shared_memory_is_full(message or first_line(error)) from error
        if message is None:
            raise
        known = (kind for kind in (ValueError, TypeError, OSError) if isinstance(error, kind))
        raise next(known, RuntimeError)(message) from error


def _message_in_worker(text: str) -> str | None:
    """The message of the error in a worker, from that of torch's; None where `text` is none of torch's."""
    found = _IN_WORKER.match(text)
    if found is None:
        return None
    # A traceback ends with the class and the message; before them there may be those of other errors.
    ends = list(re.finditer(rf"^[\w.]*\b{found[1]}(: |$)", text, re.MULTILINE))
    return text[ends[-1].end() :].strip() or found[1] if ends else None


def _check_shared_memory(workers: int) -> None:
    """RuntimeError where workers cannot even start."""
    if workers and os.path.isdir(_SHARED_MEMORY):
        found = os.statvfs(_SHARED_MEMORY)
        free = found.f_bavail * found.f_frsize
        if free < workers * _BYTES_OF_A_WORKER:
            raise _shared_memory_is_full(f"{free} bytes are free")


def _shared_memory_is_full(reason: str) -> RuntimeError:
    return RuntimeError(
        f"workers find too little shared memory ({_SHARED_MEMORY}) for their batches: read the images "
        f"without workers (workers=0, --workers 0), or in smaller batches ({reason})"
    )


@contextmanager
def _any_number_of_workers() -> Iterator[None]:
    """Without torch's warning that there are fewer cores: the number is what the user asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield
