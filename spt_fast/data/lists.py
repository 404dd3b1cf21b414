"""Images in a list: a text file of "path label" lines, or a JSON object of file and class."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spt_fast.data.decode import is_image_name
from spt_fast.data.listing import Listing, name_order

LIST_SUFFIXES = (".txt", ".json")
_CLASSES_NAME = "classes.txt"
_AGAIN = "lines that name an image again"
# A larger label is no number of a class, but a year or an identifier.
_LARGEST_LABEL = 999_999
_NUMBER = re.compile(r"0|[1-9][0-9]*")


class _Line(NamedTuple):
    file: str
    label: str
    where: str


@dataclass(frozen=True)
class ImageList:
    """What a list says, in its order.

    Attributes:
        path: of the list.
        labels: {file, as the list names it: label}.
        again: files that the list names more than once, always with the same label.
    """

    path: Path
    labels: dict[str, str]
    again: tuple[str, ...] = ()

    @property
    def numbered(self) -> bool:
        """Whether all labels are integers from 0."""
        return all(map(_NUMBER.fullmatch, set(self.labels.values())))

    @property
    def largest(self) -> int:
        """The largest label of a numbered list.

        Raises:
            ValueError: a label is no integer from 0, or none of a class.
        """
        labels = set(self.labels.values())
        for label in labels:
            if not _NUMBER.fullmatch(label) or int(label) > _LARGEST_LABEL:
                raise ValueError(
                    f"data: {self.path} must have labels from 0 to {_LARGEST_LABEL}, got {label!r}"
                )
        return max(map(int, labels))

    def listing(self, root: Path, class_names: Sequence[str], numbers: Sequence[str]) -> Listing:
        """The images below `root`; the label `numbers[i]` stands for the class `class_names[i]`."""
        places = {label: place for place, label in enumerate(numbers)}
        return Listing(
            paths=tuple(Path(root, file) for file in self.labels),
            groups=tuple(places[label] for label in self.labels.values()),
            group_names=tuple(class_names),
            left_out={_AGAIN: list(self.again)} if self.again else {},
        )


def open_list(path: str | Path, root: str | Path | None = None) -> Listing:
    """The images that a list names, below `root`, or below the list's own folder.

    In a text list, integers are places of classes: 3 is the fourth. These classes have their names from the
    lines of "classes.txt" beside the list, where there is one, else their numbers for names. In a JSON list,
    integers are names, in their order, as in VPT's lists. All other labels are names, in `name_order`.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: a line is no "path label", one file has two labels, or a label is no class.
    """
    images = read_list(Path(path))
    root = images.path.parent if root is None else Path(root)
    if images.numbered and images.path.suffix.lower() == ".txt":
        names = class_names([images])
        return images.listing(root, names, [str(number) for number in range(len(names))])
    found = sorted(set(images.labels.values()), key=name_order)
    return images.listing(root, found, found)


def class_names(lists: Sequence[ImageList]) -> list[str]:
    """The classes of numbered lists of one folder: the lines of its "classes.txt", else numbers.

    Raises:
        ValueError: a label is beyond the last line, or names are not unique.
    """
    labelled = max(lists, key=lambda images: images.largest)
    count = labelled.largest + 1
    path = labelled.path.with_name(_CLASSES_NAME)
    if not path.is_file():
        return [str(number) for number in range(count)]
    lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if len(names) < count:
        raise ValueError(
            f"data: {labelled.path} has the label {count - 1}, but {path} names {len(names)} classes"
        )
    if len(set(names)) != len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ValueError(f"data: {path} must name each class once, got {twice!r} again")
    return names


def read_list(path: Path) -> ImageList:
    """What a list says; errors as in `open_list`."""
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"data: there is no list {path}") from error
    lines = _json_lines(path, text) if path.suffix.lower() == ".json" else _text_lines(path, text)
    labels: dict[str, str] = {}
    again = []
    for file, label, where in lines:
        if label[0] == "-" and _NUMBER.fullmatch(label[1:]):
            raise ValueError(f"{where} has the label {label}; allowed are integers from 0, and names")
        if file not in labels:
            labels[file] = label
        elif labels[file] == label:
            again.append(file)
        else:
            raise ValueError(f"{where} gives {file} the label {label}, but it had {labels[file]} before")
    if not labels:
        raise ValueError(f"data: {path} names no image")
    return ImageList(path, labels, tuple(again))


def _text_lines(path: Path, text: str) -> Iterator[_Line]:
    """A path may hold spaces; a label may, where a tab stands before it."""
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"data: {path}, line {number},"
        parts = [part.strip() for part in line.rsplit("\t" if "\t" in line else None, 1)]
        if len(parts) < 2 or ("." in parts[1] and _is_cut_name(*parts)):
            raise ValueError(f"{where} must be a path and a label, got {line!r}")
        yield _Line(os.path.normpath(parts[0]), parts[1], where)


def _is_cut_name(path: str, label: str) -> bool:
    """Whether a line without a label was cut at a space of its path."""
    return is_image_name(label) and not is_image_name(path)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object, with keys that come twice."""


def _json_lines(path: Path, text: str) -> Iterator[_Line]:
    try:
        pairs = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f"data: {path} is no JSON ({error})") from error
    if not isinstance(pairs, _Pairs):
        raise ValueError(f"data: {path} must be a JSON object of file and class, got {text[:40]!r}")
    for file, label in pairs:
        if isinstance(label, bool) or not isinstance(label, int | str) or not str(label).strip():
            raise ValueError(f"data: {path} must give {file} an integer or a name, got {label!r}")
        yield _Line(os.path.normpath(file), str(label).strip(), f"data: {path}")


def merged(lists: Iterable[ImageList]) -> ImageList:
    """Several lists as one; a file in two of them is named again.

    Raises:
        ValueError: a file has two labels.
    """
    first, *others = lists
    labels, again = dict(first.labels), list(first.again)
    for images in others:
        for file, label in images.labels.items():
            if labels.setdefault(file, label) != label:
                raise ValueError(f"data: {images.path} gives {file} another label than {first.path}")
        again += [file for file in images.labels if file in first.labels]
        again += images.again
    return ImageList(first.path, labels, tuple(again))
