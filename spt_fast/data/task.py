"""The images of a task: those to train on, to validate with and to test with, which must not be the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from spt_fast.data.images import LabelledImages, open_labelled_images
from spt_fast.data.listing import some_names
from spt_fast.data.names import are_same_images, default_split, has_splits, kind_of, takes_root
from spt_fast.data.overlap import find_overlap

_USES = {"val": "validation", "test": "test"}


@dataclass(frozen=True)
class TaskImages:
    """Labelled images by what they are for.

    Attributes:
        train: to learn from.
        val: to validate with, or None.
        test: to test with, or None.
        description: lines that say what is read, and what the sets have in common.
    """

    train: LabelledImages
    val: LabelledImages | None
    test: LabelledImages | None
    description: tuple[str, ...]


def open_task(
    model: nn.Module,
    data: str,
    *,
    root: str | Path | None = None,
    split: str | None = None,
    val_data: str | None = None,
    val_split: str | None = None,
    test_data: str | None = None,
    test_split: str | None = None,
    training: Mapping[str, Any],
    chooses: bool = False,
    allow_overlap: bool = False,
    **options: Any,
) -> TaskImages:
    """The images of a task, in the size of `model`; classes are those of the training images.

    Args:
        data, root, split: name the training images; None as `split` is the one beside the validation images.
        val_data, val_split: name the validation images; None is the data of training, and the split to
            validate with. There are none where neither is given.
        test_data, test_split: likewise, to test with.
        training: options of `open_labelled_images` for the training images alone.
        chooses: whether validation decides anything, so that the test images must be others.
        allow_overlap: accept images that two of the sets share, byte for byte, and say how many.
        options: as in `open_labelled_images`, for all of them.

    Raises:
        FileNotFoundError: a name is neither a folder nor that of a data set, or files are missing.
        ValueError: two sets are the same, or share images and not `allow_overlap`; or as
            `open_labelled_images`.
    """
    split = split or training_split(data, val_data, val_split)
    where: dict[str, Any] = {"root": root, "download": options.pop("download", False)}
    own = own_place(data, (val_data, test_data), **where)
    train = open_labelled_images(data, model, split=split, training=True, **own, **training, **options)
    options |= {**where, "split": split, "class_names": train.class_names}
    options["tuned"] = train.loader.preprocessing
    val = open_validation_images(data, model, val_data=val_data, val_split=val_split, **options)
    # An empty test_split asks for test images, too.
    tests = test_data is not None or test_split is not None
    if chooses and (val_data or val_split) and tests:
        _check_others("test", test_data or data, test_split, val_data or data, val_split, "validation", "val")
    test = open_test_images(data, model, test_data=test_data, test_split=test_split, **options)
    lines = [f"training: {line}" for line in train.loader.description]
    sets = [("training", train), ("validation", val), ("test", test)]
    for place, (use, images) in enumerate(sets[1:], start=1):
        if images is None:
            continue
        lines += [f"{use}: {line}" for line in images.loader.description]
        for other_use, other in sets[: place if chooses else 1]:
            if other is not None:
                lines += _shared(other_use, other, use, images, allow_overlap)
    return TaskImages(train, val, test, tuple(lines))


def own_place(
    data: str, others: Iterable[str | None], *, root: str | Path | None, download: bool
) -> dict[str, Any]:
    """`root` and `download` of the training images: not those that only the validation or test images take.

    Where none takes them they stay, and `open_data` says so.
    """
    named = [other for other in others if other is not None]
    is_timms = [kind_of(name) == "timm" for name in (data, *named)]
    return {
        "root": root if takes_root(data) or not any(map(takes_root, named)) else None,
        "download": download and (is_timms[0] or not any(is_timms)),
    }


def open_validation_images(
    data: str,
    model: nn.Module,
    *,
    val_data: str | None = None,
    val_split: str | None = None,
    split: str | None = None,
    **options: Any,
) -> LabelledImages | None:
    """Labelled images to validate with, beside those to train on; None where neither is asked for.

    Args:
        data, split: name the training images.
        val_data, val_split: name the validation images; None is the data of training, and the split to
            validate with.
        options: as in `open_labelled_images`.

    Raises:
        FileNotFoundError: `val_data` is neither a folder nor the name of a data set, or files are missing.
        ValueError: `val_split` without a data set that has splits; the images are those of training; or as
            `open_labelled_images`.
    """
    split = split or training_split(data, val_data, val_split)
    return _open_beside("val", data, split, model, val_data, val_split, options)


def open_test_images(
    data: str,
    model: nn.Module,
    *,
    test_data: str | None = None,
    test_split: str | None = None,
    split: str | None = None,
    **options: Any,
) -> LabelledImages | None:
    """Labelled images to test with, as `open_validation_images`; an empty `test_split` is the usual one."""
    return _open_beside(
        "test", data, split or default_split(data, "train"), model, test_data, test_split, options
    )


def training_split(data: str, val_data: str | None = None, val_split: str | None = None) -> str | None:
    """The split of `data` to train on beside these validation images, where none is named."""
    if val_data is None and val_split is None:
        return default_split(data, "train")
    return default_split(data, "train", val_split or default_split(val_data or data, "val"))


def _open_beside(
    use: Literal["val", "test"],
    data: str,
    split: str | None,
    model: nn.Module,
    other: str | None,
    other_split: str | None,
    options: dict[str, Any],
) -> LabelledImages | None:
    if other is None and other_split is None:
        return None
    if other is None and not has_splits(data):
        raise ValueError(
            f"{use}_split is for data sets with splits, but data is {data}: give {use}_data (--{use}-data)"
        )
    other = other or data
    other_split = other_split or default_split(other, use)
    if not takes_root(other):
        options["root"] = None
    if kind_of(other) != "timm":
        options["download"] = False
    _check_others(use, other, other_split, data, split, "training")
    return open_labelled_images(other, model, split=other_split, use=use, **options)


def _check_others(
    use: Literal["val", "test"],
    data: str,
    split: str | None,
    other: str,
    other_split: str | None,
    other_use: str,
    default: Literal["val"] | None = None,
) -> None:
    """ValueError where two names are of the same images."""
    split = split or default_split(data, use)
    if default is not None:
        other_split = other_split or default_split(other, default)
    if are_same_images(data, split, other, other_split):
        raise ValueError(
            f"{use}_data and {use}_split must name other images than those of {other_use}, got {data}"
            + ("" if split is None else f", split {split}")
        )


def _shared(
    first_use: str, first: LabelledImages, use: str, images: LabelledImages, allow: bool
) -> Sequence[str]:
    """Refuse images that two sets share, or say how many there are, or that nobody knows."""
    if not (first.paths and images.paths):
        if first.loader.preprocessing is None:
            # The shipped images, whose splits share none.
            return ()
        return (f"{use}: not checked for {first_use} images: they do not all lie in files of their own",)
    shared = find_overlap(first.paths, images.paths)
    if not shared:
        return ()
    message = (
        f"{len(shared)} of {len(images.paths)} {use} images are {first_use} images too, byte for byte: "
        + some_names([str(path) for path in shared])
    )
    if allow:
        return (f"{use}: {message}",)
    what = "validate on them" if use == _USES["val"] else "test on them"
    raise ValueError(f"{message}; remove them, or {what} all the same with --allow-overlap")
