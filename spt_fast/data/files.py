"""Images by their files: those named one by one, and those of folders, in the order given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from spt_fast.data.folder import FolderListing, list_folder


def list_files(data: Sequence[str | os.PathLike[str]]) -> FolderListing:
    """The images that files and folders hold, in the order given; the group of each is its place.

    A file is taken for an image whatever its name is. Folders are read as by `list_folder`, at any depth. A
    file that is named twice is there twice.

    Raises:
        FileNotFoundError: a file or folder does not exist.
        TypeError: `data` is a single name.
        ValueError: `data` is empty, or a folder holds no image.
        OSError: a folder cannot be read.
    """
    if isinstance(data, str | os.PathLike):
        raise TypeError(f"data must be a list of files and folders, got {data!r}")
    paths: list[Path] = []
    left_out: dict[str, list[str]] = {}
    for path in map(Path, data):
        if path.is_dir():
            listing = list_folder(path, classes=False)
            paths += listing.paths
            for kind, names in listing.left_out.items():
                left_out.setdefault(kind, []).extend(str(path / name) for name in names)
        elif path.exists():
            paths.append(path)
        else:
            raise FileNotFoundError(f"data: there is no file or folder {path}")
    if not paths:
        raise ValueError("data must name files or folders of images, got none")
    return FolderListing(
        paths=tuple(paths),
        groups=tuple(range(len(paths))),
        group_names=tuple(map(str, paths)),
        classes=False,
        left_out=left_out,
    )
