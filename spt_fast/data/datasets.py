"""Data sets of images that are read by index; nothing stands in for what cannot be read."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from spt_fast.data.decode import open_image, to_rgb
from spt_fast.data.listing import Listing, printable
from spt_fast.data.transforms import is_random
from spt_fast.support.errors import first_line

_BLANK_SIZE = (64, 64)


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

    def labels(self) -> list[int] | None:
        """Of all images, as `read` gives them; None where they are not known without reading the images."""
        return None

    def portable_names(self) -> list[str]:
        """What tells these images from others, wherever the data lie."""
        return []

    def is_random(self) -> bool:
        """Whether the transform may make something else of an image when it is read again."""
        return is_random(self.transform)

    def blank(self) -> Any:
        """What the transform makes of an image without content, which has the shape of all others."""
        return self.transform(Image.new("RGB", _BLANK_SIZE))

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

    def labels(self) -> list[int]:
        """Their places in `listing.group_names`."""
        return list(self.listing.groups)

    def portable_names(self) -> list[str]:
        """The paths, from the folder on that all of them have in common."""
        paths = [os.path.abspath(path) for path in self.listing.paths]
        common = os.path.commonpath([os.path.dirname(path) for path in paths])
        return [path[len(common) :].lstrip(os.sep).replace(os.sep, "/") for path in paths]

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
        # Targets may be more than a number for each image.
        if found is None or getattr(found, "ndim", 1) != 1:
            return None
        return [int(label) for label in found]

    def portable_names(self) -> list[str]:
        """The name of the data set, and the number of its images."""
        return [self._data, str(len(self))]

    def name(self, index: int) -> str:
        """Its number, and the name of the data set."""
        return f"image {index} (counted from 0) of {self._data}"

    def read(self, index: int) -> tuple[Any, Any]:
        """Decoded by `open_image` where the data set hands out files, else made RGB."""
        source, label, *_ = self._dataset[index] if self._reader is None else self._reader[index]
        image = to_rgb(source) if isinstance(source, Image.Image) else _open_and_close(source)
        return image, -1 if label is None else label


def _open_and_close(source: str | Path | BinaryIO) -> Image.Image:
    try:
        return open_image(source)
    finally:
        if not isinstance(source, str | Path):
            source.close()
