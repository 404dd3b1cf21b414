"""Sources of images by name: folders, lists, archives, VTAB-1k, FGVC, timm's data sets, the digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import IterableDataset, TensorDataset

from spt_fast.data.datasets import FileImages, NamedImages, TarImages
from spt_fast.data.fgvc import open_fgvc
from spt_fast.data.folder import list_folder, list_tar
from spt_fast.data.listing import Listing, printable, some_names, spread
from spt_fast.data.lists import LIST_SUFFIXES, open_list
from spt_fast.data.shipped import DIGITS_CLASSES, load_digits
from spt_fast.data.vtab import is_task, open_vtab
from spt_fast.support.errors import first_line

Use = Literal["train", "val", "test"]

SHIPPED_IMAGES = "digits"
_TIMM_PREFIXES = ("torch/", "hfds/", "hfids/", "tfds/", "wds/")
# {prefix: (module, package that has it)}
_PACKAGES = {
    "hfds": ("datasets", "datasets"),
    "hfids": ("datasets", "datasets"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets tensorflow"),
    "wds": ("webdataset", "webdataset"),
}
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
# What a split is where none is named; of VTAB, the paper trains on all 1,000 images, and chooses on val200.
_SPLITS: dict[str, dict[Use, str]] = {
    "digits": {"train": "train", "val": "val", "test": "test"},
    "timm": {"train": "train", "val": "validation", "test": "validation"},
    "vtab": {"train": "train800val200", "val": "val200", "test": "test"},
    "fgvc": {"train": "train", "val": "val", "test": "test"},
}
_TAKE_ROOT = ("list", "timm", "vtab", "fgvc")


@dataclass(frozen=True)
class Opened:
    """A source of images, opened.

    Attributes:
        dataset: torch's, of (image, label). Images are PIL's in RGB where it has no `transform`; the digits
            are normalised tensors.
        kind: "folder", "list", "tar", "vtab", "fgvc", "timm" or "digits".
        title: name and split.
        description: lines that say what is read: title, images, classes, and what is left out.
        class_names: of the labels 0, 1, ...; None where the source does not name them.
        paths: of the images where each is a file; empty for other sources.
    """

    dataset: Any
    kind: str
    title: str
    description: tuple[str, ...]
    class_names: tuple[str, ...] | None
    paths: tuple[Path, ...] = ()


def open_data(
    name: str,
    *,
    root: str | Path | None = None,
    split: str | None = None,
    use: Use = "train",
    download: bool = False,
    in_classes: bool = True,
    known: Sequence[str] = (),
    allow_missing: bool = False,
) -> Opened:
    """The images that a name stands for (docs/data.md).

    Args:
        name: a folder; a list ("x.txt", "x.json") or archive ("x.tar"); "vtab/TASK"; "fgvc/SET"; a data set
            of timm ("torch/cifar10", "hfds/..."; see `timm.data.create_dataset`); or "digits".
        root: the folder below which the files of a list, or the data set, lie. None is a list's own folder,
            and for VTAB and FGVC the current one.
        split: of a source that has several; None is what `use` stands for.
        use: what the images are for: "train", "val" or "test".
        download: let timm fetch the data set.
        in_classes: read a folder or an archive as classes; False reads images of any depth.
        known: names of classes that are no splits, whatever they look like.
        allow_missing: leave files that a list names and that are not there to the reader, which reports them.

    Warns:
        UserWarning: a task of VTAB-1k or a set of FGVC has other numbers than Table S1.

    Raises:
        FileNotFoundError: there is no such folder, list or file; the message says what should be there.
        ImportError: the source needs a package that is not installed.
        ValueError: an argument is without effect or has a value that is not allowed, or the source cannot be
            read.
    """
    kind = kind_of(name)
    _check_options(name, kind, root, split, download)
    split = split or default_split(name, use)
    if kind == "digits":
        images, labels = load_digits(str(split))
        dataset = TensorDataset(images, labels)
        title = f"{name}, split {split}"
        return Opened(dataset, kind, title, (_counted(title, labels.tolist()),), DIGITS_CLASSES)
    if kind == "timm":
        return _open_timm(name, root, str(split), download)
    if kind == "tar":
        listing, members = list_tar(_existing_tar(name), classes=in_classes, known=known)
        return _of_files(TarImages(Path(name), listing, members), name, kind, split)
    listing = {
        "folder": partial(_list_folder, name, in_classes, known),
        "list": partial(open_list, name, root),
        "vtab": partial(open_vtab, name.partition("/")[2], root or ".", str(split)),
        "fgvc": partial(open_fgvc, name.partition("/")[2], root or ".", str(split)),
    }[kind]()
    if kind != "folder" and not allow_missing:
        _check_present(name, listing)
    return _of_files(FileImages(listing), name, kind, split)


def kind_of(name: str) -> str:
    """What kind of source a name is of, as `Opened.kind` has it."""
    if name == SHIPPED_IMAGES:
        return "digits"
    for kind in ("vtab", "fgvc"):
        if name.lower().startswith(f"{kind}/"):
            return kind
    if name.lower().startswith(_TIMM_PREFIXES):
        return "timm"
    if not Path(name).is_dir():
        if name.lower().endswith(LIST_SUFFIXES):
            return "list"
        if name.lower().endswith(_TAR_SUFFIXES):
            return "tar"
    return "folder"


def has_splits(name: str) -> bool:
    """Whether the source is divided by `split`; folders, lists and archives are not."""
    return kind_of(name) in _SPLITS


def takes_root(name: str) -> bool:
    """Whether `root` says where the source lies."""
    return kind_of(name) in _TAKE_ROOT


def default_split(name: str, use: Use, validation: str | None = None) -> str | None:
    """The split where none is named; None for sources without splits.

    For "train" the split to validate with matters: VTAB's "train800" goes with "val200".
    """
    kind = kind_of(name)
    if kind not in _SPLITS:
        return None
    if kind == "vtab" and use == "train" and validation == _SPLITS[kind]["val"]:
        return "train800"
    return _SPLITS[kind][use]


def are_same_images(name: str, split: str | None, other: str, other_split: str | None) -> bool:
    """Whether two pairs of names are of the same images; files are compared as the places they lead to."""
    if has_splits(name) and has_splits(other):
        return (name.lower(), split) == (other.lower(), other_split)
    return not (has_splits(name) or has_splits(other)) and Path(name).resolve() == Path(other).resolve()


def _check_options(name: str, kind: str, root: object, split: object, download: bool) -> None:
    what = "the folder" if kind == "folder" else f"the {kind} file" if kind in ("list", "tar") else ""
    if split is not None and kind not in _SPLITS:
        raise ValueError(f"split is for data sets with splits, got {split} for {what} {name}")
    if root is not None and kind not in _TAKE_ROOT:
        raise ValueError(f"root is for lists and data sets, got {root} for {what or name} {name}")
    if download and kind != "timm":
        raise ValueError(f"download is for data sets of timm, got it for {name}")


def _list_folder(name: str, in_classes: bool, known: Sequence[str]) -> Listing:
    if not Path(name).is_dir():
        what = f"{name} is no folder" if Path(name).exists() else f"there is no folder {name}"
        raise FileNotFoundError(
            f"data: {what}; give a folder of images, a list (x.txt, x.json), an archive "
            f"(x.tar), vtab/TASK, fgvc/SET, a timm data set such as torch/cifar10, or {SHIPPED_IMAGES!r}"
        )
    if is_task(Path(name)):
        # Its images of all splits are one heap, and their classes are in the lists.
        path = Path(name).resolve()
        raise ValueError(
            f"data: {name} is a task in the layout of VTAB-1k; give vtab/{path.name} and root={path.parent} "
            "(--root)"
        )
    return list_folder(name, classes=in_classes, known=known)


def _existing_tar(name: str) -> str:
    if not Path(name).is_file():
        raise FileNotFoundError(f"data: there is no archive {name}")
    return name


def _check_present(name: str, listing: Listing) -> None:
    missing = listing.missing()
    if missing:
        raise FileNotFoundError(
            f"data: {len(missing)} of the {len(listing.paths)} files that {name} names are not there: "
            f"{some_names([str(path) for path in missing])}; check root (--root), or leave them out "
            "(bad_images='skip', --bad-images skip)"
        )


def _of_files(dataset: FileImages, name: str, kind: str, split: str | None) -> Opened:
    listing = dataset.listing
    title = printable(name) + (f", split {split}" if split else "")
    if not listing.paths:
        raise ValueError(f"data: {title} holds no image")
    return Opened(
        dataset,
        kind,
        title,
        tuple(f"{title}: {line}" for line in listing.description()),
        listing.group_names if listing.classes else None,
        () if isinstance(dataset, TarImages) else listing.paths,
    )


def _open_timm(name: str, root: str | Path | None, split: str, download: bool) -> Opened:
    dataset = _create_dataset(name, root, split, download)
    title = f"{name}, split {split}"
    if isinstance(dataset, IterableDataset):
        return Opened(dataset, "timm", title, (f"{title}: number of images not known",), None)
    images = NamedImages(dataset, name)
    labels = images.labels()
    line = f"{title}: {len(images)} images" if labels is None else _counted(title, labels)
    names = images.class_names()
    return Opened(images, "timm", title, (line,), tuple(map(str, names)) if names else None)


def _create_dataset(name: str, root: str | Path | None, split: str, download: bool) -> Any:
    from timm.data.dataset_factory import create_dataset

    prefix = name.partition("/")[0].lower()
    if prefix == "torch" and root is None:
        raise ValueError(f"root must name the folder of {name} (--root FOLDER), or where to download it")
    module, package = _PACKAGES.get(prefix, ("torchvision", "torchvision"))
    if find_spec(module) is None:
        raise ImportError(f"data: {name} needs the package {module}: pip install {package}")
    try:
        return create_dataset(name, root=None if root is None else str(root), split=split, download=download)
    except AssertionError as error:
        # timm's way to say that there is no data set or split of this name.
        raise ValueError(f"data: timm cannot open {name}, split {split} ({first_line(error)})") from error
    except RuntimeError as error:
        raise RuntimeError(
            f"data: {name}, split {split}, cannot be had from {root} ({first_line(error)}); see root "
            "(--root) and download (--download)"
        ) from error


def _counted(title: str, labels: Sequence[int]) -> str:
    return f"{title}: {len(labels)} images of {len(set(labels))} classes, {spread(labels)} in each"
