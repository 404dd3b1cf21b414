"""Decoded images that are kept from one epoch to the next, as bytes, in memory that all workers share.

A transform is a fixed stage, the same in every epoch, and a random rest. What is kept is the image after the
fixed stage; the rest runs where it would run without a cache, with the same random numbers, so that all
results are the same. Where nothing is random, batches are read from what is kept, without workers.

Limits: one machine. Workers must be forks of this process.
"""

from __future__ import annotations

import mmap
import multiprocessing
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from spt_fast.data.datasets import DecodedImages, Unreadable
from spt_fast.data.loading import ImageLoader
from spt_fast.data.reading import collate_readable
from spt_fast.data.transforms import split_transform
from spt_fast.support.arguments import check_choice, parse_bytes
from spt_fast.support.memory import free_memory, mebibytes

Where = Literal["auto", "ram", "device"]
WHERE = ("auto", "ram", "device")
# What images may take of free memory, unless told: in RAM and on a device; and of a device that nobody chose.
_SHARE, _SHARE_OF_AUTO = 0.5, 0.25
_CHANNELS = {"L": 1, "RGB": 3}
_UNKNOWN, _UNREADABLE = -1, -2
_RECORD = np.dtype([("offset", "i8"), ("label", "i8"), ("height", "i4"), ("width", "i4"), ("channels", "i4")])


class ImageCache:
    """The memory in which the data sets of a run keep their decoded images, within one budget.

    Data sets of the same files share what they keep. What does not fit is decoded anew each time.

    Args:
        where: "ram"; "device": once all images of a data set are kept and none is augmented, their bytes are
            copied to `device`; "auto": the same where they take at most a quarter of its free memory. On the
            CPU all three are the same.
        budget: bytes, or text such as "4GiB"; None is half of the memory that is free now.
        device: where batches are normalised that are read from what is kept.
        sharing: how many processes of this machine have such a cache each, and share that half.

    Raises:
        TypeError: `budget` is neither an integer nor a string.
        ValueError: there is no such `where`, or `budget` is beyond the free memory.
    """

    def __init__(
        self,
        where: Where = "auto",
        budget: int | str | None = None,
        *,
        device: torch.device | str = "cpu",
        sharing: int = 1,
    ) -> None:
        self.where = check_choice("cache", where, WHERE)
        self.device = torch.device(device)
        free = free_memory()
        self.budget = int(free * _SHARE) // sharing if budget is None else parse_bytes("cache_budget", budget)
        if self.budget > free:
            raise ValueError(
                f"cache_budget must be at most the memory that is free, {mebibytes(free)}, "
                f"got {mebibytes(self.budget)}"
            )
        while True:
            try:
                self._memory = _SharedMemory(self.budget)
                break
            except OSError as error:
                if budget is not None or self.budget == 0:
                    raise ValueError(
                        f"cache_budget: the system does not give {mebibytes(self.budget)} ({error}); "
                        "give less, or keep no images (--cache off)"
                    ) from error
                # A system that promises no memory twice may have less to promise than there is free.
                self.budget //= 2
        self._kept: dict[Hashable, _Kept] = {}
        self._refused = False

    def works_with(self, workers: int) -> bool:
        """Whether so many worker processes of a DataLoader can share the memory: whether they are forks."""
        if workers == 0 or multiprocessing.get_context().get_start_method() == "fork":
            return True
        self._refused = True
        return False

    def wrap(self, dataset: DecodedImages, name: str) -> CachedImages:
        """`dataset` with its images kept; it is not to be used by itself any more.

        Args:
            name: what `summary` calls it.
        """
        fixed, rest = split_transform(dataset.transform)
        steps = [repr(step) for step in fixed]
        # The images of another data set that are kept at an earlier step of ours will do.
        for count in range(len(fixed), -1, -1):
            kept = self._kept.get((dataset.identity(), tuple(steps[:count])))
            if kept is not None:
                return CachedImages(dataset, fixed[:count], fixed[count:] + rest, kept)
        kept = _Kept(name, len(dataset), self._memory)
        self._kept[dataset.identity(), tuple(steps)] = kept
        return CachedImages(dataset, fixed, rest, kept)

    def description(self) -> list[str]:
        """A line that says where images are kept, and up to how many bytes; none where there is no need."""
        if not self._kept:
            reason = "workers that are not forks of this process cannot share them; --workers 0 keeps them"
            return [f"decoded images are not kept: {reason}"] if self._refused else []
        on_device = self.device.type == "cuda" and self.where != "ram"
        place = "in memory" + (f", and without augmentation on {self.device}" if on_device else "")
        return [f"decoded images are kept {place}, up to {mebibytes(self.budget)}"]

    def summary(self) -> list[str]:
        """For each data set, how many images are kept and how many bytes they take, in a line."""
        return [kept.summary() for kept in self._kept.values()]

    def device_bytes(self) -> int:
        """How many bytes may be copied to the device now."""
        if self.device.type != "cuda" or self.where == "ram":
            return 0
        share = _SHARE_OF_AUTO if self.where == "auto" else _SHARE
        return int(torch.cuda.mem_get_info(self.device)[0] * share)


class CachedImages(DecodedImages):
    """A data set whose images are decoded, and taken through the first steps of its transform, only once."""

    def __init__(
        self, dataset: DecodedImages, fixed: Sequence[Any], rest: Sequence[Any], kept: _Kept
    ) -> None:
        self._dataset = dataset
        self._fixed, self._rest = tuple(fixed), tuple(rest)
        self.kept = kept
        self.source: _Source | None = None
        self.transform = partial(_apply, self._rest)
        self.target_transform = dataset.target_transform

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        """As the data set calls it."""
        return self._dataset.name(index)

    def labels(self) -> list[int] | None:
        """As the data set knows them."""
        return self._dataset.labels()

    def portable_names(self) -> list[str]:
        """As the data set gives them."""
        return self._dataset.portable_names()

    def is_random(self) -> bool:
        """Whether the whole transform of the data set is."""
        return self._dataset.is_random()

    def blank(self) -> Any:
        """As the whole transform of the data set makes it."""
        return self._dataset.blank()

    def load(self, index: int) -> Unreadable | tuple[Any, Any]:
        """The image after the fixed steps, as it is kept or from its file, and its label."""
        found = self.kept.get(index)
        if found is not None:
            pixels, label = found
            return _image_of(pixels), label
        loaded: Any = self._dataset.load(index)
        if isinstance(loaded, Unreadable):
            self.kept.mark_unreadable(index)
            return loaded
        image, label = self.transformed(partial(_apply, self._fixed), loaded[0], index), loaded[1]
        self.kept.put(index, image, label)
        return image, label

    def is_pointwise(self) -> bool:
        """Whether what follows what is kept maps each byte to a number by itself, without chance."""
        from timm.data.transforms import MaybeToTensor
        from torchvision import transforms

        first, *others = self._rest or (None,)
        return type(first) in (transforms.ToTensor, MaybeToTensor) and all(
            type(step) is transforms.Normalize for step in others
        )

    def table(self, channels: int) -> Tensor:
        """What the rest of the transform makes of each byte, [channels, 256], where it is pointwise."""
        levels = np.arange(256, dtype=np.uint8)[None, :]
        table: Tensor = self.transform(_image_of(np.stack([levels] * channels, axis=2)))
        return table[:, 0]


class CachedLoader(ImageLoader):
    """An `ImageLoader` of `CachedImages`, with the same batches in the same order.

    Once every image is kept and what is left to do is the same every time, it needs no workers: bytes are
    gathered into a batch, and looked up in a table on the device of `cache`, where the batch then is.
    """

    def __init__(self, dataset: CachedImages, cache: ImageCache, **options: Any) -> None:
        super().__init__(dataset, **options)
        self._cached, self._cache = dataset, cache

    def __iter__(self) -> Iterator[Any]:
        # One for all loaders of the data set: it may hold the bytes of all images on the device.
        source = self._cached.source
        if source is None and self._cached.is_pointwise() and self._cached.kept.is_complete():
            source = self._cached.source = _Source(self._cached, self._cache)
        if source is None:
            yield from super().__iter__()
            return
        self._end_workers(None)
        for numbers in self.index_batches():
            yield from self._checked(*source.batch(self._cached, numbers))


class _Source:
    """Batches of a data set whose images are all kept, in one size, or known to be unreadable."""

    def __init__(self, dataset: CachedImages, cache: ImageCache) -> None:
        self._kept, self._device = dataset.kept, cache.device
        table = dataset.table(self._kept.shape()[2])
        self._table = table.flatten().to(self._device)
        self._starts = 256 * torch.arange(len(table), dtype=torch.int32, device=self._device).view(-1, 1, 1)
        self._on_device: Tensor | None = None
        if 0 < self._kept.bytes() <= cache.device_bytes():
            self._on_device = self._copied_to_device(len(dataset))
            self._kept.copied_to = str(self._device)

    def batch(self, dataset: CachedImages, numbers: Sequence[int]) -> tuple[Any, list[Unreadable]]:
        """Images and labels of its data set, or None where no image is readable, and what is unreadable."""
        if not numbers or not all(self._kept.holds(number) for number in numbers):
            return collate_readable([dataset[number] for number in numbers])
        labels = [self._kept.label(number) for number in numbers]
        if dataset.target_transform is not None:
            labels = [dataset.target_transform(label) for label in labels]
        return [self._normalised(self._bytes(numbers)), torch.tensor(labels, device="cpu")], []

    def _bytes(self, numbers: Sequence[int]) -> Tensor:
        """[B, H, W, C] uint8 on the device."""
        if self._on_device is not None:
            return self._on_device[torch.tensor(numbers, device=self._device)]
        return torch.from_numpy(self._kept.gather(numbers)).to(self._device)

    def _copied_to_device(self, count: int) -> Tensor:
        """The bytes of all images [M, H, W, C], zeros for those that are unreadable."""
        pixels = torch.zeros(count, *self._kept.shape(), dtype=torch.uint8, device=self._device)
        for number in range(count):
            if self._kept.holds(number):
                pixels[number] = torch.from_numpy(self._kept.gather([number])[0])
        return pixels

    def _normalised(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W]: read from the table, which gives the same bits on every device."""
        places = (pixels.permute(0, 3, 1, 2) + self._starts).contiguous()
        return self._table.index_select(0, places.flatten()).view(places.shape)


class _SharedMemory:
    """Bytes that forked workers share, handed out from the first to the last; pages are taken when written.

    Anonymous, not a file in /dev/shm, which is small in many containers.
    """

    def __init__(self, size: int) -> None:
        # Also guards what `_Kept` notes: the processes of a machine may see writes in another order.
        self.lock = _lock()
        self.bytes = _shared_array(size, np.dtype(np.uint8))
        self._used = _shared_array(1, np.dtype(np.int64))

    def take(self, size: int) -> int | None:
        """Where `size` bytes begin that nobody else has; None where so many are not left. Under the lock."""
        start = int(self._used[0])
        if start + size > len(self.bytes):
            return None
        self._used[0] = start + size
        return start


class _Kept:
    """The images of one data set that are kept: where they lie, and their labels. All workers share it."""

    def __init__(self, name: str, count: int, memory: _SharedMemory) -> None:
        self.copied_to = ""
        self._name, self._memory = name, memory
        self._records = _shared_array(count, _RECORD)
        self._records["offset"] = _UNKNOWN

    def get(self, index: int) -> tuple[np.ndarray[Any, Any], int] | None:
        """The pixels [H, W, C], not copied, and the label of an image; None where it is not kept."""
        with self._memory.lock:
            record = self._records[index].copy()
        return (self._pixels(record), int(record["label"])) if record["offset"] >= 0 else None

    def put(self, index: int, image: Any, label: Any) -> None:
        """Keep an image, if it is of a kind that comes back as it was, and fits."""
        channels = _CHANNELS.get(getattr(image, "mode", ""))
        if channels is None or not isinstance(label, int | np.integer):
            return
        pixels = np.asarray(image).reshape(image.height, image.width, channels)
        with self._memory.lock:
            start = self._memory.take(pixels.size)
        if start is None:
            return
        self._memory.bytes[start : start + pixels.size] = pixels.reshape(-1)
        with self._memory.lock:
            self._records[index] = (start, label, *pixels.shape)

    def mark_unreadable(self, index: int) -> None:
        """Note that an image cannot be read; it is not waited for."""
        with self._memory.lock:
            self._records[index]["offset"] = _UNREADABLE

    def is_complete(self) -> bool:
        """Whether each image is kept or unreadable, and all that are kept have one size."""
        with self._memory.lock:
            records = self._records.copy()
        held = records[records["offset"] >= 0]
        sizes = np.unique(held[["height", "width", "channels"]])
        return len(sizes) == 1 and not (records["offset"] == _UNKNOWN).any()

    def holds(self, index: int) -> bool:
        """Whether an image is kept."""
        return bool(self._records[index]["offset"] >= 0)

    def label(self, index: int) -> int:
        """The label of an image that is kept."""
        return int(self._records[index]["label"])

    def shape(self) -> tuple[int, int, int]:
        """[H, W, C] of the images of a complete set."""
        record = self._records[self._records["offset"] >= 0][0]
        return int(record["height"]), int(record["width"]), int(record["channels"])

    def gather(self, numbers: Sequence[int]) -> np.ndarray[Any, Any]:
        """A copy of the pixels of images that are kept and have one size, [B, H, W, C]."""
        return np.stack([self._pixels(self._records[number]) for number in numbers])

    def bytes(self) -> int:
        """How many bytes of pixels are kept."""
        held = self._records[self._records["offset"] >= 0]
        return int((held["height"].astype(np.int64) * held["width"] * held["channels"]).sum())

    def summary(self) -> str:
        """How many images are kept, their bytes, and where."""
        held = int((self._records["offset"] >= 0).sum())
        where = f", copied to {self.copied_to}" if self.copied_to else ""
        return f"{self._name}: kept {held} of {len(self._records)} images ({mebibytes(self.bytes())}{where})"

    def _pixels(self, record: Any) -> np.ndarray[Any, Any]:
        shape = int(record["height"]), int(record["width"]), int(record["channels"])
        start = int(record["offset"])
        return self._memory.bytes[start : start + shape[0] * shape[1] * shape[2]].reshape(shape)


def _lock() -> Any:
    try:
        return multiprocessing.get_context().Lock()
    except (ImportError, OSError):
        # Where processes can have no locks, no workers can start either.
        return threading.Lock()


def _shared_array(count: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    # At least a byte: no mapping is empty.
    return np.frombuffer(mmap.mmap(-1, max(1, count * dtype.itemsize)), dtype, count=count)


def _image_of(pixels: np.ndarray[Any, Any]) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _apply(steps: Sequence[Callable[[Any], Any]], image: Any) -> Any:
    for step in steps:
        image = step(image)
    return image
