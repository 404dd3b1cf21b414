"""The five data sets of FGVC as their archives unpack, or by VPT's lists where these are there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from spt_fast.data.listing import Listing, name_order
from spt_fast.data.lists import merged, read_list
from spt_fast.data.places import compare_with_table, folders_in, same_name, the_only_one
from spt_fast.support.arguments import check_choice
from spt_fast.support.errors import first_line

FGVC_SPLITS = ("train", "val", "trainval", "test")
_LISTS = ("train", "val", "test")
# Changing it changes which images are "train" and which "val".
_SEED = "spt_fast 0"

Labels = dict[str, int]  # {file below the folder of images: number of its class}


@dataclass(frozen=True)
class Archive:
    """What the files of an archive say; `val` is None where it has no such split, `test` without labels."""

    images: Path
    train: Labels
    test: Labels | None
    val: Labels | None = None
    names: Mapping[int, str] | None = None


class FineGrained(NamedTuple):
    """A data set of FGVC: its numbers by Table S1, how it is read, what its folder is called and holds."""

    classes: int
    train: int
    val: int
    test: int
    read: Callable[[Path], Archive]
    layout: str
    images: str  # the folder that VPT's lists start from
    also: tuple[str, ...]
    marks: tuple[str, ...] = ()  # files by which the folder is known, where its archives make none


def open_fgvc(name: str, root: str | Path, split: str) -> Listing:
    """The images of one split of a data set.

    "train" and "val" are the archive's own (Flowers), those of VPT's lists, where these are there, or nine
    tenths and a tenth of its training images, which a fixed seed divides.

    Args:
        name: one of SETS, or what else its folder is called.
        root: the folder of the data set, or one that holds it.
        split: one of FGVC_SPLITS; "trainval" is "train" and "val" together.

    Warns:
        UserWarning: there are other numbers of classes or images than in Table S1.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: no such data set or split, or a file that cannot be read.
        ImportError: a .mat file needs SciPy, which is not installed.
    """
    key = _key(name)
    facts = SETS[key]
    check_choice("split", split, FGVC_SPLITS)
    folder = _find(key, Path(root))
    found = _by_lists(facts, folder, split) if _has_lists(folder) else _by_archive(key, folder, split)
    stated = facts.train + facts.val if split == "trainval" else getattr(facts, split)
    compare_with_table(
        f"fgvc/{key}",
        {
            "classes": (len(found.group_names), facts.classes),
            f"images of {split}": (len(found.paths), stated),
        },
    )
    return found


def _key(name: str) -> str:
    for key, facts in SETS.items():
        if same_name(name) in (key, *facts.also):
            return key
    raise ValueError(f"data: fgvc/{name} is not known; the data sets are fgvc/{', fgvc/'.join(SETS)}")


def _find(key: str, root: Path) -> Path:
    facts = SETS[key]
    names = (key, *facts.also)
    inside = [folder for folder in folders_in(root) if same_name(folder.name) == "fgvc"]
    candidates = [place for folder in (root, *inside) for place in folders_in(folder)]
    found = the_only_one(
        (place for place in candidates if same_name(place.name) in names), key, f"fgvc/{key}"
    )
    if found is not None:
        return found
    if same_name(root.resolve().name) in names or any((root / mark).exists() for mark in facts.marks):
        return root
    raise FileNotFoundError(
        f"data: there is no folder of fgvc/{key} in {root}; it should hold {facts.layout}, or VPT's "
        f"train.json, val.json and test.json; root (--root) names it, or the folder that holds it"
    )


def _has_lists(folder: Path) -> bool:
    return any((folder / f"{split}.json").is_file() for split in _LISTS)


def _by_lists(facts: FineGrained, folder: Path, split: str) -> Listing:
    """By VPT's lists, whose numbers of classes are counted through in their order."""
    wanted = ("train", "val") if split == "trainval" else (split,)
    there = [name for name in _LISTS if (folder / f"{name}.json").is_file()]
    lists = {name: read_list(folder / f"{name}.json") for name in {*wanted, *there}}
    names = sorted(set(chain(*(images.labels.values() for images in lists.values()))), key=name_order)
    images = merged(lists[name] for name in wanted)
    return images.listing(folder / facts.images, names, names)


def _by_archive(key: str, folder: Path, split: str) -> Listing:
    layout = f"fgvc/{key} should hold {SETS[key].layout}, or VPT's train.json, val.json and test.json"
    try:
        archive = SETS[key].read(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {layout}") from error
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"data: {folder} cannot be read ({first_line(error)}); {layout}") from error
    if archive.test is None and split == "test":
        raise FileNotFoundError(f"data: {folder} has no labels of test images; {layout}")
    train, val = (archive.train, archive.val) if archive.val is not None else _divided(archive.train)
    test = archive.test or {}
    labels = {"train": train, "val": val, "trainval": {**train, **val}, "test": test}[split]
    numbers = sorted({*train.values(), *val.values(), *test.values()})
    places = {number: place for place, number in enumerate(numbers)}
    return Listing(
        paths=tuple(archive.images / file for file in labels),
        groups=tuple(places[number] for number in labels.values()),
        group_names=_class_names(folder, numbers, archive.names),
    )


def _class_names(folder: Path, numbers: list[int], names: Mapping[int, str] | None) -> tuple[str, ...]:
    if names is None:
        return tuple(map(str, numbers))
    unnamed = [number for number in numbers if number not in names]
    if unnamed:
        raise ValueError(f"data: {folder} names no class {unnamed[0]}, which images have")
    found = [names[number] for number in numbers]
    if len(set(found)) < len(found):
        found = [f"{number} {name}" for number, name in zip(numbers, found, strict=True)]
    return tuple(found)


def _divided(labels: Labels) -> tuple[Labels, Labels]:
    """Nine tenths to train on, rounded down, and the rest to validate with.

    Which image goes where is a matter of its name alone, so that it is the same on every machine.
    """

    def draw(file: str) -> bytes:
        return hashlib.sha256(f"{_SEED} {file}".encode(errors="surrogateescape")).digest()

    val = set(sorted(labels, key=draw)[len(labels) * 9 // 10 :])
    train_labels = {file: number for file, number in labels.items() if file not in val}
    return train_labels, {file: number for file, number in labels.items() if file in val}


def _read_birds(folder: Path) -> Archive:
    """CUB-200-2011 and NABirds: five text files, whose lines begin with the number of an image or class."""
    files = _table(folder, "images.txt")
    labels = _table(folder, "image_class_labels.txt")
    in_training = _table(folder, "train_test_split.txt")
    names = {int(number): name for number, name in _table(folder, "classes.txt").items()}
    try:
        found = {
            used: {files[image]: int(labels[image]) for image in files if in_training[image] == used}
            for used in ("1", "0")
        }
    except KeyError as error:
        raise ValueError(
            f"data: image {error} of {folder / 'images.txt'} is not in the other lists"
        ) from error
    return Archive(folder / "images", found["1"], found["0"], names=names)


def _table(folder: Path, name: str) -> dict[str, str]:
    """Lines of a number or identifier and what belongs to it."""
    text = _existing(folder / name).read_text(encoding="utf-8", errors="surrogateescape")
    rows = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
    if any(len(row) != 2 for row in rows):
        raise ValueError(f"data: {folder / name} must have lines of a number and a value")
    return {number: value.strip() for number, value in rows}


def _read_flowers(folder: Path) -> Archive:
    """Oxford Flowers: jpg/image_00001.jpg and on; imagelabels.mat; setid.mat with three splits."""
    labels = _mat(folder / "imagelabels.mat")["labels"]
    sets = _mat(folder / "setid.mat")
    train, val, test = (
        {f"image_{int(number):05}.jpg": int(labels[number - 1]) for number in sets[key]}
        for key in ("trnid", "valid", "tstid")
    )
    return Archive(folder / "jpg", train, test, val)


def _read_dogs(folder: Path) -> Archive:
    """Stanford Dogs: Images/n02085620-Chihuahua/*.jpg and two .mat files with files and labels from 1."""
    lists = folder / "lists" if (folder / "lists").is_dir() else folder
    train, test = (_read_dog_list(lists / f"{split}_list.mat") for split in ("train", "test"))
    names = {number: Path(file).parent.name for file, number in {**train, **test}.items()}
    return Archive(folder / "Images", train, test, names=names)


def _read_dog_list(path: Path) -> Labels:
    found = _mat(path)
    return {str(file): int(label) for file, label in zip(found["file_list"], found["labels"], strict=True)}


def _read_cars(folder: Path) -> Archive:
    """Stanford Cars: the older cars_annos.mat, or the newer devkit."""
    if (folder / "cars_annos.mat").is_file():
        found = _mat(folder / "cars_annos.mat")
        train, test = (
            {
                row["relative_im_path"]: int(row["class"])
                for row in found["annotations"]
                if row["test"] == used
            }
            for used in (0, 1)
        )
        return Archive(folder, train, test, names=dict(enumerate(map(str, found["class_names"]), start=1)))
    devkit = folder / "devkit"
    names = _mat(devkit / "cars_meta.mat")["class_names"]
    with_labels = "cars_test_annos_withlabels.mat"
    tests = [place / with_labels for place in (folder, devkit) if (place / with_labels).is_file()]
    return Archive(
        folder,
        _read_car_list(devkit / "cars_train_annos.mat", "cars_train"),
        _read_car_list(tests[0], "cars_test") if tests else None,
        names=dict(enumerate(map(str, names), start=1)),
    )


def _read_car_list(path: Path, images: str) -> Labels:
    return {f"{images}/{row['fname']}": int(row["class"]) for row in _mat(path)["annotations"]}


def _mat(path: Path) -> dict[str, Any]:
    """A file of MATLAB, as arrays of numbers and texts, and dicts."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            f"data: {path.name} is a file of MATLAB, which SciPy reads (pip install scipy); "
            "VPT's train.json, val.json and test.json do without"
        ) from error
    try:
        found: dict[str, Any] = loadmat(str(_existing(path)), simplify_cells=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        # SciPy raises errors of many classes for damaged files.
        raise ValueError(f"data: {path} cannot be read ({first_line(error)})") from error
    return found


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no {path}")
    return path


_BIRDS = "images/CLASS/..., images.txt, image_class_labels.txt, train_test_split.txt and classes.txt"
SETS = {
    "cub": FineGrained(
        200, 5_394, 600, 5_794, _read_birds, _BIRDS, "images", ("cub200", "cub2002011", "cub200birds")
    ),
    "nabirds": FineGrained(555, 21_536, 2_393, 24_633, _read_birds, _BIRDS, "images", ("nabirds555",)),
    "flowers": FineGrained(
        102,
        1_020,
        1_020,
        6_149,
        _read_flowers,
        "jpg/image_00001.jpg and on, imagelabels.mat and setid.mat",
        "",
        ("flowers102", "oxfordflowers", "oxfordflowers102", "102flowers"),
        ("setid.mat",),
    ),
    "dogs": FineGrained(
        120,
        10_800,
        1_200,
        8_580,
        _read_dogs,
        "Images/BREED/..., train_list.mat and test_list.mat (these may lie in lists/)",
        "Images",
        ("stanforddogs",),
        ("train_list.mat", "lists/train_list.mat"),
    ),
    "cars": FineGrained(
        196,
        7_329,
        815,
        8_041,
        _read_cars,
        "cars_annos.mat and car_ims/..., or devkit/cars_train_annos.mat, devkit/cars_meta.mat, "
        "cars_test_annos_withlabels.mat, cars_train/... and cars_test/...",
        "",
        ("stanfordcars",),
        ("cars_annos.mat", "devkit/cars_train_annos.mat"),
    ),
}
