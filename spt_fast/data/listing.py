"""What a source of images holds: files, their classes, what is left out, and the words that say so."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_NAMES_SHOWN = 5


@dataclass(frozen=True)
class Listing:
    """The images of a folder or of a list.

    Attributes:
        paths: of the images, in a stated order.
        groups: for each image the place of its class, or of its folder, in `group_names`.
        group_names: the classes, or, where images of any depth were asked for, the folders that hold images.
        classes: whether these are classes.
        left_out: what was not read, as {kind of things: names}.
    """

    paths: tuple[Path, ...]
    groups: tuple[int, ...]
    group_names: tuple[str, ...]
    classes: bool = True
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def description(self) -> list[str]:
        """Images, classes and images in each, in one line; then a line for each kind of things left out."""
        groups = "of {} classes" if self.classes else "in {} folders"
        each = (
            f"{len(self.paths)} images {groups.format(len(self.group_names))}, {spread(self.groups)} in each"
        )
        used = set(self.groups)
        unused = [name for place, name in enumerate(self.group_names) if place not in used]
        without = [f"classes without images ({len(unused)}): {some_names(unused)}"] if unused else []
        left_out = (
            f"left out {what} ({len(names)}): {some_names(names)}" for what, names in self.left_out.items()
        )
        return [each, *without, *left_out]

    def missing(self) -> list[Path]:
        """Those of `paths` that are not there."""
        held: dict[Path, set[str]] = {}
        for folder in {path.parent for path in self.paths}:
            try:
                held[folder] = set(os.listdir(folder))
            except (FileNotFoundError, NotADirectoryError):
                held[folder] = set()
        # A file system may know a file by another spelling of its name.
        return [path for path in self.paths if path.name not in held[path.parent] and not path.exists()]


def name_order(name: str) -> tuple[list[str | int], str]:
    """Sort key: letters regardless of case and numbers by value; then, among equals, by code points.

    "2" is before "10", "001" before "01" before "1", and "Cat" before "cat".
    """
    parts = re.split(r"(\d+)", name.lower(), flags=re.ASCII)
    # Text and digits take turns, so that numbers meet numbers only.
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


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
