"""The data of a sweep: for each task the images to learn from, to choose by and to test with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spt_fast.data.names import default_split, has_splits, kind_of, takes_root
from spt_fast.support.arguments import check_int, check_number
from spt_fast.support.names import instead

# How images are found and read, for all tasks of a sweep.
IMAGE_OPTIONS = ("root", "download", "workers", "bad_images", "cache", "cache_budget", "allow_overlap")
# Of the images to learn from, drawn by the seed of a run.
SUBSETS = ("share", "per_class")
_KEYS = ("data", "split", "val_data", "val_split", "test_data", "test_split")


@dataclass(frozen=True)
class Task:
    """Names as `open_task` takes them.

    Attributes:
        name: short, for the names of runs and files.
    """

    data: str
    split: str | None = None
    val_data: str | None = None
    val_split: str | None = None
    test_data: str | None = None
    test_split: str | None = None
    name: str = ""

    def names(self) -> dict[str, str]:
        """The arguments of `open_task` that are stated."""
        return {key: value for key, value in asdict(self).items() if key in _KEYS and value is not None}

    def takes(self, option: str) -> bool:
        """Whether an option of IMAGE_OPTIONS is for this data: not all lie below a root, or are fetched."""
        sources = [name for name in (self.data, self.val_data, self.test_data) if name is not None]
        if option == "root":
            return any(map(takes_root, sources))
        return option != "download" or "timm" in map(kind_of, sources)


def read_tasks(given: Any, taken: Sequence[str] = ()) -> tuple[Task, ...]:
    """The tasks of a name, a mapping with the keys of `Task`, or a list of those.

    Args:
        taken: short names that others have.

    Raises:
        TypeError, ValueError: a key is unknown or missing, a task comes twice, or images to test with are
            not named.
    """
    listed = given if isinstance(given, list | tuple) else [given]
    found: list[Task] = []
    for each in listed:
        task = _completed(_read(each))
        if any(task.names() == other.names() for other in found):
            raise ValueError(f"data: {task.data} is given more than once")
        found.append(_named(task, [*taken, *(other.name for other in found)]))
    return tuple(found)


def _read(given: Any) -> Task:
    if isinstance(given, str):
        return Task(given)
    if not isinstance(given, Mapping):
        raise TypeError(f"data must be names, or mappings with {', '.join(_KEYS)}, got {given!r:.60}")
    for key, value in given.items():
        if key not in _KEYS:
            raise ValueError(f"data: {key!r} is no key of a task{instead(str(key), _KEYS)}")
        if value is not None and not isinstance(value, str):
            raise TypeError(f"data: {key} must be text, got {value!r}")
    if not given.get("data"):
        raise ValueError(f"data must be named, got {dict(given)}")
    return Task(**given)


def _completed(task: Task) -> Task:
    """With the splits that are usual, where the source has some."""
    found = asdict(task)
    for use in ("val", "test"):
        if found[f"{use}_data"] is None and found[f"{use}_split"] is None:
            if has_splits(task.data):
                found[f"{use}_split"] = default_split(task.data, use)
            elif use == "test":
                raise ValueError(
                    f"data: {task.data} has no splits: give test_data, to test with, and val_data, to choose "
                    "by ({data: A, val_data: B, test_data: C}; --val-data, --test-data)"
                )
    return Task(**found)


def _named(task: Task, taken: Sequence[str]) -> Task:
    """With its short name: the end of the data's name, or all of it where another task has that."""
    parts = [part for part in re.split(r"[/\\]", str(Path(task.data)).removesuffix(".tar")) if part]
    for count in range(1, len(parts) + 1):
        name = re.sub(r"[^\w.+-]", "_", "-".join(parts[-count:]))
        if name not in taken:
            return Task(**{**asdict(task), "name": name})
    raise ValueError(f"data: two tasks would have the name {name}; give other names")


def read_subset(given: Any, where: str) -> dict[str, Any]:
    """{"share": 0.1} or {"per_class": 10}; whether a class has so many is seen with the images.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if not isinstance(given, Mapping) or len(given) > 1 or not set(given) <= set(SUBSETS):
        raise ValueError(f"{where} must be {{share: X}} or {{per_class: N}}, got {given!r}")
    return {name: check_subset(f"{where}: {name}", name, value) for name, value in given.items()}


def check_subset(where: str, name: str, value: Any) -> float | int:
    """A value of SUBSETS: a share above 0 and up to 1, or a whole number of images of each class.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if name == "share":
        return check_number(where, value, above=0, maximum=1)
    return check_int(where, value, 1)
