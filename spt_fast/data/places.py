"""Folders of data sets, found by any of their names; and their numbers, held against the paper's table."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import Path


def same_name(name: str) -> str:
    """A name without what names of one thing differ in: case, "_", "-" and the like."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder; none where there is no such folder."""
    return sorted(place for place in folder.iterdir() if place.is_dir()) if folder.is_dir() else []


def the_only_one(found: Iterable[Path], folder_name: str, data: str) -> Path | None:
    """The folder of `data`: the one called `folder_name`, or the only one; None where there is none.

    Raises:
        ValueError: there are several.
    """
    places = list({place.resolve(): place for place in found}.values())
    exact = [place for place in places if place.name == folder_name] or places
    if len(exact) > 1:
        raise ValueError(f"data: {data} may be {' or '.join(map(str, exact))}; give another root (--root)")
    return exact[0] if exact else None


def compare_with_table(data: str, numbers: dict[str, tuple[int, int]]) -> None:
    """Warn of each number found that is not the one stated in Table S1: {what: (found, stated)}."""
    different = [
        f"{found:,} {what}, but {stated:,} in Table S1"
        for what, (found, stated) in numbers.items()
        if found != stated
    ]
    if different:
        warnings.warn(f"{data}: {'; '.join(different)}", stacklevel=2)
