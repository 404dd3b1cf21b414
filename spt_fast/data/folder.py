"""Images in a folder: which files are read, in which order, of which class, and what is left out."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Collection, Sequence
from pathlib import Path

from spt_fast.data.decode import is_image_name
from spt_fast.data.listing import Listing, name_order, some_names

_HIDDEN = "hidden files and folders"
_OTHER_KIND = "files that are not named as images"
_EMPTY = "folders without images"
_KNOWN = "links to folders that are read already"
_LINK = "links in the archive"
_OUTSIDE = "images outside the folders of the classes"
_SPLIT = re.compile(
    r"(?:(?:train|val|valid|test)(?:ing|idation)?[-_ ]?(?:set|split|data|images)?[-_ ]?\d*)+", re.IGNORECASE
)
# Also a class, of CIFAR-100 and others.
_CLASS_OR_SPLIT = "train"

Parts = tuple[str, ...]


def list_folder(folder: str | Path, *, classes: bool, known: Collection[str] = ()) -> Listing:
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
    return arrange(folder, walk.images, walk.left_out, classes=classes, known=known)


def list_tar(
    path: str | Path, *, classes: bool, known: Collection[str] = ()
) -> tuple[Listing, list[tarfile.TarInfo]]:
    """The images in a tar archive, by the rules of `list_folder`, and where each of them lies in it.

    Raises:
        ValueError: as `list_folder`; the archive is compressed or cannot be read.
        OSError: the archive cannot be read.
    """
    members: dict[Parts, tarfile.TarInfo] = {}
    left_out: dict[str, list[str]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                parts = tuple(part for part in member.name.split("/") if part not in ("", "."))
                reason = _why_not(member, parts)
                if reason is None:
                    members[parts] = member
                elif reason:
                    left_out.setdefault(reason, []).append("/".join(parts))
    except tarfile.TarError as error:
        raise ValueError(
            f"data: {path} cannot be read ({error}); it must be a .tar that is not compressed: unpack "
            "others, and give the folder"
        ) from error
    listing = arrange(path, list(members), left_out, classes=classes, known=known)
    return listing, [members[image.relative_to(path).parts] for image in listing.paths]


def _why_not(member: tarfile.TarInfo, parts: Parts) -> str | None:
    """What a member of an archive is instead of an image, "" for folders; None for an image."""
    if member.isdir():
        return ""
    if any(_is_hidden(part) for part in parts):
        return _HIDDEN
    if not is_image_name(parts[-1]):
        return _OTHER_KIND
    return None if member.isfile() else _LINK


def arrange(
    folder: str | Path,
    images: list[Parts],
    left_out: dict[str, list[str]],
    *,
    classes: bool,
    known: Collection[str],
) -> Listing:
    """Images below `folder`, given as the names that lead to them, in order and in their classes."""
    if not images:
        found = "; ".join(f"{why} ({len(names)}): {some_names(names)}" for why, names in left_out.items())
        raise ValueError(f"data: {folder} holds no image" + (f" ({found})" if found else ""))
    if classes:
        _check_layout(folder, images, known)
        outside = [parts[0] for parts in images if len(parts) == 1]
        images = [parts for parts in images if len(parts) > 1]
        if outside:
            left_out[_OUTSIDE] = outside
    images.sort(key=lambda parts: [name_order(part) for part in parts])
    names = ["/".join(parts[:-1]) for parts in images]
    group_names = tuple(dict.fromkeys(names))
    place = {name: index for index, name in enumerate(group_names)}
    return Listing(
        paths=tuple(Path(folder, *parts) for parts in images),
        groups=tuple(place[name] for name in names),
        group_names=group_names,
        classes=classes,
        left_out=left_out,
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
            hidden = _is_hidden(entry.name)
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


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


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
