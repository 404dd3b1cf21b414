"""Images in a folder: which files are read, in which order, of which class, and what is left out."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from spt_fast.data.decode import is_image_name

_HIDDEN = "hidden files and folders"
_OTHER_KIND = "files that are not named as images"
_EMPTY = "folders without images"
_KNOWN = "links to folders that are read already"
_OUTSIDE = "images outside the folders of the classes"
_NAMES_SHOWN = 5
_SPLIT = re.compile(
    r"(?:(?:train|val|valid|test)(?:ing|idation)?[-_ ]?(?:set|split|data|images)?[-_ ]?\d*)+", re.IGNORECASE
)
# Also a class, of CIFAR-100 and others.
_CLASS_OR_SPLIT = "train"

Parts = tuple[str, ...]


@dataclass(frozen=True)
class FolderListing:
    """The images of a folder.

    Attributes:
        paths: of the images, in `name_order` of their folders and files.
        groups: for each image the place of its folder in `group_names`.
        group_names: the classes, or, where images of any depth were asked for, the folders that hold images.
        classes: whether these are classes.
        left_out: what was not read, as {kind of things: names below the folder}.
    """

    paths: tuple[Path, ...]
    groups: tuple[int, ...]
    group_names: tuple[str, ...]
    classes: bool
    left_out: dict[str, list[str]]

    def description(self) -> list[str]:
        """Images, classes and images in each, in one line; then a line for each kind of things left out."""
        groups = "of {} classes" if self.classes else "in {} folders"
        each = (
            f"{len(self.paths)} images {groups.format(len(self.group_names))}, {spread(self.groups)} in each"
        )
        left_out = (
            f"left out {what} ({len(names)}): {some_names(names)}" for what, names in self.left_out.items()
        )
        return [each, *left_out]


def name_order(name: str) -> tuple[list[str | int], str]:
    """Sort key: letters regardless of case and numbers by value; then, among equals, by code points.

    "2" is before "10", "001" before "01" before "1", and "Cat" before "cat".
    """
    parts = re.split(r"(\d+)", name.lower(), flags=re.ASCII)
    # Text and digits take turns, so that numbers meet numbers only.
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def list_folder(folder: str | Path, *, classes: bool, known: Collection[str] = ()) -> FolderListing:
    """The images of `folder`, found by their names.

    Hidden files and folders and those of macOS's archives ("._x.jpg", "__MACOSX") are not read. Links to
    folders are followed, but no folder is read twice.

    Args:
        classes: True reads the folders directly under `folder`, one for each class; False any depth.
        known: names of classes that are no splits, whatever they look like.

    Raises:
        ValueError: there is no image; with `classes`, images lie deeper, or in folders with names of splits.
        OSError: a folder cannot be read.
    """
    walk = _Walk(Path(folder))
    images = walk.images
    if not images:
        found = "; ".join(
            f"{why} ({len(names)}): {some_names(names)}" for why, names in walk.left_out.items()
        )
        raise ValueError(f"data: {folder} holds no image" + (f" ({found})" if found else ""))
    if classes:
        _check_layout(folder, images, known)
        outside = [parts[0] for parts in images if len(parts) == 1]
        images = [parts for parts in images if len(parts) > 1]
        if outside:
            walk.left_out[_OUTSIDE] = outside
    images.sort(key=lambda parts: [name_order(part) for part in parts])
    names = ["/".join(parts[:-1]) for parts in images]
    group_names = tuple(dict.fromkeys(names))
    place = {name: index for index, name in enumerate(group_names)}
    return FolderListing(
        paths=tuple(Path(folder, *parts) for parts in images),
        groups=tuple(place[name] for name in names),
        group_names=group_names,
        classes=classes,
        left_out=walk.left_out,
    )


class _Walk:
    """All images below a folder, each as the names that lead to it, and what else is there."""

    def __init__(self, root: Path) -> None:
        self.images: list[Parts] = []
        self.left_out: dict[str, list[str]] = {}
        self._read: set[tuple[int, int]] = set()
        self._visit(root, ())

    def _visit(self, folder: Path, parts: Parts) -> None:
        before = len(self.images)
        self._read.add(_identity(folder.stat()))
        empty = []
        for entry in _entries(folder):
            place = (*parts, entry.name)
            hidden = entry.name.startswith(".") or entry.name == "__MACOSX"
            if _is_folder(entry):
                if hidden:
                    self._leave_out(_HIDDEN, place)
                elif _identity(entry.stat()) in self._read:
                    self._leave_out(_KNOWN, place)
                elif not self._holds_images(Path(entry.path), place):
                    empty.append(place)
            # A link that leads nowhere counts as an image, which then cannot be read.
            elif is_image_name(entry.name) and (entry.is_symlink() or entry.is_file()):
                if hidden:
                    self._leave_out(_HIDDEN, place)
                else:
                    self.images.append(place)
            elif not hidden:
                self._leave_out(_OTHER_KIND, place)
        # Where nothing below holds an image, the folder above is named instead.
        if len(self.images) > before or not parts:
            for place in empty:
                self._leave_out(_EMPTY, place)

    def _holds_images(self, folder: Path, parts: Parts) -> bool:
        before = len(self.images)
        self._visit(folder, parts)
        return len(self.images) > before

    def _leave_out(self, reason: str, parts: Parts) -> None:
        self.left_out.setdefault(reason, []).append("/".join(parts))


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, links last: a folder is read where it lies rather than through a link to it."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: (entry.is_symlink(), name_order(entry.name)))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link that leads to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _check_layout(folder: str | Path, images: Sequence[Parts], known: Collection[str]) -> None:
    """Raise ValueError unless the folders directly under `folder` can be classes and hold all images."""
    tops = list(dict.fromkeys(parts[0] for parts in images if len(parts) > 1))
    deep = [parts for parts in images if len(parts) > 2]
    splits = [name for name in tops if _SPLIT.fullmatch(name) and name not in known]
    if (
        splits == [_CLASS_OR_SPLIT]
        and len(tops) > 2
        and not any(parts[0] == _CLASS_OR_SPLIT for parts in deep)
    ):
        splits = []
    rule = "a class is a folder directly under the data folder"
    if splits:
        raise ValueError(
            f"data: {folder} holds folders with names of splits ({', '.join(splits)}), but {rule}; "
            + _advice(folder, splits, deep)
        )
    if deep:
        instead = ""
        if len(tops) == 1:
            inner = Path(folder, tops[0])
            _check_layout(inner, [parts[1:] for parts in deep], known)
            instead = f", such as {inner}"
        raise ValueError(
            f"data: {folder} holds images in deeper folders, such as {'/'.join(deep[0])}, but {rule}; "
            f"give the folder whose folders are the classes{instead}"
        )
    if not tops:
        raise ValueError(
            f"data: {folder} must hold its images in one folder per class, but they are in no folder"
        )


def _advice(folder: str | Path, splits: Sequence[str], deep: Sequence[Parts]) -> str:
    with_classes = [name for name in splits if any(parts[0] == name for parts in deep)]
    # The one to train on, if its name says so.
    name = min(with_classes or splits, key=lambda name: not name.lower().startswith("train"))
    if not with_classes:
        return f"sort the images of {name} into one folder per class and give that"
    return f"give one of them, such as {Path(folder, name)}"


def spread(groups: Sequence[int]) -> str:
    """How many images the groups have, from the smallest to the largest: "12" or "9 to 15"."""
    sizes = Counter(groups).values()
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low} to {high}"


def some_names(names: Sequence[str]) -> str:
    """The first few of `names`, and how many more there are."""
    shown = [printable(name) for name in names[:_NAMES_SHOWN]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def printable(name: str) -> str:
    """`name`, with escapes for bytes that are no UTF-8."""
    return name.encode(errors="backslashreplace").decode()
