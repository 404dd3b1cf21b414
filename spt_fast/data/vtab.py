"""The tasks of VTAB-1k in the layout that the field shares, and any other folder in this layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from spt_fast.data.listing import Listing
from spt_fast.data.lists import class_names, read_list
from spt_fast.data.places import compare_with_table, folders_in, same_name, the_only_one
from spt_fast.support.arguments import check_choice

TRAIN, VAL, TRAIN_AND_VAL, TEST = VTAB_SPLITS = ("train800", "val200", "train800val200", "test")
_IMAGES_TO_TUNE = {TRAIN: 800, VAL: 200, TRAIN_AND_VAL: 1000}
_GROUPS = ("natural", "specialized", "structured")
_LAYOUT = (
    "it should hold TASK/images/... and TASK/train800.txt, val200.txt, train800val200.txt, test.txt with "
    'lines such as "images/test/000000.jpg 7"'
)


class Task(NamedTuple):
    """A task of VTAB-1k: classes and images to test, by Table S1, and what else it is called."""

    classes: int
    test: int
    also: tuple[str, ...] = ()


# In the order of Table S1; the names are those of the folders that NOAH's script writes.
TASKS = {
    "caltech101": Task(102, 6_084, ("caltech",)),
    "cifar": Task(100, 10_000, ("cifar100",)),
    "dtd": Task(47, 1_880),
    "oxford_flowers102": Task(102, 6_149, ("flowers102", "flowers")),
    "oxford_iiit_pet": Task(37, 3_669, ("pets", "pet", "oxford_pets")),
    "svhn": Task(10, 26_032),
    "sun397": Task(397, 21_750, ("sun",)),
    "patch_camelyon": Task(2, 32_768, ("camelyon", "pcam")),
    "eurosat": Task(10, 5_400),
    "resisc45": Task(45, 6_300, ("resisc",)),
    "diabetic_retinopathy": Task(5, 42_670, ("retinopathy",)),
    "clevr_count": Task(8, 15_000),
    "clevr_dist": Task(6, 15_000, ("clevr_distance",)),
    "dmlab": Task(6, 22_735),
    "kitti": Task(4, 711, ("kitti_dist", "kitti_distance")),
    "dsprites_loc": Task(16, 73_728, ("dsprites_location",)),
    "dsprites_ori": Task(16, 73_728, ("dsprites_orientation",)),
    "smallnorb_azi": Task(18, 12_150, ("snorb_azi", "smallnorb_azimuth")),
    "smallnorb_ele": Task(9, 12_150, ("snorb_ele", "smallnorb_elevation")),
}


def open_vtab(name: str, root: str | Path, split: str) -> Listing:
    """The images of one split of a task.

    Args:
        name: of a task or of its folder, whatever the case and with or without "_" and "-".
        root: the folder that holds the tasks, in groups ("Natural/CIFAR100", as SPT's authors have it) or
            not, or a folder above.
        split: one of VTAB_SPLITS.

    Warns:
        UserWarning: a task of VTAB-1k has other numbers of classes or images than Table S1.

    Raises:
        FileNotFoundError: no folder of this task, or no such list in it.
        ValueError: no such split, two folders for the task, or a list that cannot be read.
    """
    check_choice("split", split, VTAB_SPLITS)
    folder = _find(name, Path(root))
    path = folder / f"{split}.txt"
    if not path.is_file():
        there = ", ".join(file.name for file in _lists(folder))
        raise FileNotFoundError(f"data: there is no {path} for vtab/{name}, split {split}; there is {there}")
    # A class may have no image in one of the lists.
    lists = {file.stem: read_list(file) for file in _lists(folder)}
    names = class_names(list(lists.values()))
    task = _task(name)
    if task is not None:
        images = len(lists[split].labels), _IMAGES_TO_TUNE.get(split, task.test)
        compare_with_table(
            f"vtab/{name}", {"classes": (len(names), task.classes), f"images of {split}": images}
        )
    return lists[split].listing(folder, names, [str(number) for number in range(len(names))])


def is_task(folder: Path) -> bool:
    """Whether a folder holds a task in the layout that `open_vtab` reads."""
    return bool(_lists(folder)) and (folder / "images").is_dir()


def _names(name: str) -> list[str]:
    """What the folder of a task may be called, as `same_name` has it; the name of a group may come first."""
    given = same_name(name.rpartition("/")[2])
    for task, facts in TASKS.items():
        known = [same_name(each) for each in (task, *facts.also)]
        if given in known:
            return known
    return [given]


def _task(name: str) -> Task | None:
    return next((facts for task, facts in TASKS.items() if same_name(task) in _names(name)), None)


def _find(name: str, root: Path) -> Path:
    """The folder of a task."""
    tasks = [folder for folder in _candidates(root) if _lists(folder)]
    wanted = _names(name)
    folder = the_only_one(
        (folder for folder in tasks if same_name(folder.name) in wanted), name, f"vtab/{name}"
    )
    if folder is None:
        there = ", ".join(sorted({folder.name for folder in tasks}))
        raise FileNotFoundError(
            f"data: there is no folder of vtab/{name} in {root}"
            + (f" (tasks there: {there})" if there else "")
            + f"; {_LAYOUT}; root (--root) names the folder that holds the tasks"
        )
    return folder


def _candidates(root: Path) -> Iterator[Path]:
    """Folders in `root`, in its groups, and in a folder of it that is called VTAB."""
    for folder in folders_in(root):
        yield folder
        if same_name(folder.name) in _GROUPS:
            yield from folders_in(folder)
        elif same_name(folder.name) in ("vtab", "vtab1k"):
            yield from _candidates(folder)


def _lists(folder: Path) -> list[Path]:
    return [path for split in VTAB_SPLITS if (path := folder / f"{split}.txt").is_file()]
