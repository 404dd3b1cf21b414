"""Images read from files, batch by batch: what cannot be read is an error that names it, or left out."""

from __future__ import annotations

import gc
import io
import os
import re
import tarfile
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from spt_fast.data.decode import open_image, to_rgb
from spt_fast.data.listing import Listing, printable
from spt_fast.data.transforms import Preprocessing
from spt_fast.support.arguments import check_choice
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


class Unreadable(NamedTuple):
    """What a data set gives in place of an image that cannot be read."""

    name: str
    reason: str


class DecodedImages(Dataset[Any]):
    """A data set of (image, label), in which an `Unreadable` takes the place of what cannot be read."""

    transform: Callable[[Any], Any]
    target_transform: Callable[[int], int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What an error calls this image."""
        raise NotImplementedError

    def read(self, index: int) -> tuple[Any, Any]:
        """An image, decoded, and its label."""
        raise NotImplementedError

    def identity(self) -> Hashable:
        """Equal for data sets whose images, with their labels in the files, are the same at each index."""
        return self

    def load(self, index: int) -> Unreadable | tuple[Any, Any]:
        """An image and its label as `read` gives them, or what stands for an image that cannot be read."""
        try:
            return self.read(index)
        except MemoryError:
            raise
        except Exception as error:
            # Decoders raise errors of many classes for damaged files.
            return Unreadable(printable(self.name(index)), printable(first_line(error)))

    def __getitem__(self, index: int) -> Any:
        loaded = self.load(index)
        if isinstance(loaded, Unreadable):
            return loaded
        label: Any
        image, label = loaded
        if self.target_transform is not None:
            label = self.target_transform(label)
        return self.transformed(self.transform, image, index), label

    def transformed(self, transform: Callable[[Any], Any], image: Any, index: int) -> Any:
        """`transform` of an image; a RuntimeError that names the image where that fails."""
        try:
            return transform(image)
        except Exception as error:
            name = printable(self.name(index))
            raise RuntimeError(f"{name} cannot be transformed ({first_line(error)})") from error


class FileImages(DecodedImages):
    """The images of a folder or a list; labels are places in `listing.group_names`."""

    def __init__(self, listing: Listing) -> None:
        self.listing = listing

    def __len__(self) -> int:
        return len(self.listing.paths)

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.listing.paths[index])

    def identity(self) -> Hashable:
        """The paths and their labels."""
        return self.listing.paths, self.listing.groups

    def read(self, index: int) -> tuple[Any, Any]:
        """Decoded by `open_image`."""
        return open_image(str(self.listing.paths[index])), self.listing.groups[index]


class TarImages(FileImages):
    """The images of a tar archive; `members` says where each of them lies."""

    def __init__(self, path: Path, listing: Listing, members: Sequence[tarfile.TarInfo]) -> None:
        super().__init__(listing)
        self._path = path
        self._members = members

    def identity(self) -> Hashable:
        """The archive, and the paths and labels in it."""
        return self._path, super().identity()

    def read(self, index: int) -> tuple[Any, Any]:
        """Decoded by `open_image`."""
        # Opened anew, because processes that read in turns cannot share one position in a file.
        with tarfile.open(self._path, "r:") as archive:
            file = archive.extractfile(self._members[index])
            assert file is not None
            return open_image(io.BytesIO(file.read())), self.listing.groups[index]


class NamedImages(DecodedImages):
    """A timm data set read by index, without timm's habit of giving another image for a damaged one."""

    def __init__(self, dataset: Any, data: str) -> None:
        self._dataset = dataset
        self._data = data
        # timm's own data sets open files by a reader, torchvision's by a loader or in their own way.
        self._reader = getattr(dataset, "reader", None)
        if hasattr(dataset, "loader"):
            dataset.loader = open_image

    def __len__(self) -> int:
        return len(self._dataset)

    def class_names(self) -> Sequence[str] | None:
        """In the order of their labels, where the data set names them."""
        numbers = getattr(self._reader, "class_to_idx", None)
        return sorted(numbers, key=numbers.get) if numbers else getattr(self._dataset, "classes", None)

    def labels(self) -> list[int] | None:
        """Of all images, where the data set knows them without reading the images."""
        found = getattr(self._dataset, "targets", getattr(self._dataset, "labels", None))
        return None if found is None else [int(label) for label in found]

    def name(self, index: int) -> str:
        """Its number, and the name of the data set."""
        return f"image {index} (counted from 0) of {self._data}"

    def read(self, index: int) -> tuple[Any, Any]:
        """Decoded by `open_image` where the data set hands out files, else made RGB."""
        source, label, *_ = self._dataset[index] if self._reader is None else self._reader[index]
        image = to_rgb(source) if isinstance(source, Image.Image) else _open_and_close(source)
        return image, -1 if label is None else label


class ImageLoader:
    """Batches [images [B, C, H, W], labels [B]] of a data set; it has a length where the data set has one.

    An image that cannot be read ends the iteration with a ValueError that names it. With
    `bad_images="skip"` its batch comes without it, or not at all where nothing else is left of it. An error
    in a worker is raised here, of the same class, with its message alone.

    Workers start with the first iteration and serve all of them, so only one iteration goes on at a time.

    Attributes:
        num_images: in all batches together, unreadable ones included; None where nobody knows.
        description: lines that say what is read.
        preprocessing: what is done to the images; None where nothing is.
        unreadable: {name: reason} of what was skipped so far, in any pass.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        num_images: int | None,
        description: Sequence[str] = (),
        preprocessing: Preprocessing | None = None,
        bad_images: str = "error",
        num_workers: int = 0,
        shuffle: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        self.num_images = num_images
        self.description = tuple(description)
        self.preprocessing = preprocessing
        self.unreadable: dict[str, str] = {}
        self._skip = check_choice("bad_images", bad_images, BAD_IMAGES) == "skip"
        self._iterations = 0
        if shuffle:
            # A generator of its own: torch draws from that of the loader once, or for every pass, or not at
            # all, as workers persist, and the order is not to depend on that.
            options["sampler"] = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed))
        self._open = partial(
            DataLoader,
            dataset,
            collate_fn=collate_readable,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )
        with _any_number_of_workers():
            self._loader: DataLoader[Any] = self._open()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        self._iterations += 1
        iteration = self._iterations
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
                if (batch := self._checked(*found)) is not None:
                    yield batch
        except Exception as error:
            del batches
            self._end_workers(error)
            raise

    def _checked(self, batch: Any, unreadable: Sequence[Unreadable]) -> Any:
        """`batch`, once what is unreadable in it is noted, or is an error."""
        if unreadable and not self._skip:
            name, reason = unreadable[0]
            raise ValueError(
                f"{name} cannot be read ({reason}); repair or remove it, or leave such images "
                "out (bad_images='skip', --bad-images skip)"
            )
        self.unreadable.update(unreadable)
        return batch

    def _end_workers(self, error: BaseException | None) -> None:
        """End them after an error, which must not keep their iterator in its frames.

        If that is collected as garbage, torch waits seconds for each worker, whose queue is then gone.
        """
        while error is not None:
            traceback.clear_frames(error.__traceback__)
            error = error.__cause__
        if self._loader.num_workers:
            with _any_number_of_workers():
                self._loader = self._open()


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


def collate_readable(items: list[Any]) -> tuple[Any, list[Unreadable]]:
    """A batch of what is readable, None where nothing is, and what is unreadable."""
    unreadable = [item for item in items if isinstance(item, Unreadable)]
    readable = [item for item in items if not isinstance(item, Unreadable)]
    return default_collate(readable) if readable else None, unreadable


def _open_and_close(source: str | Path | BinaryIO) -> Image.Image:
    try:
        return open_image(source)
    finally:
        if not isinstance(source, str | Path):
            source.close()


@contextmanager
def _any_number_of_workers() -> Iterator[None]:
    """Without torch's warning that there are fewer cores: the number is what the user asked for."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield
