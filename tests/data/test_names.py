"""Sources of images by name: what a name is taken for, archives, timm's data sets, and what is refused."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from spt_fast.data import shipped
from spt_fast.data.images import open_images, open_labelled_images
from spt_fast.data.names import default_split, kind_of, open_data
from spt_fast.data.task import open_validation_images, training_split


def write_tar(path: Path, names: list[str], mode: str = "w") -> Path:
    """A tar archive with a grey image for each name, as bright as its place, or with text."""
    with tarfile.open(path, mode) as archive:
        for place, name in enumerate(names):
            content = io.BytesIO(b"text")
            if not name.endswith(".txt"):
                content = io.BytesIO()
                Image.new("L", (4, 4), place).save(content, format="PNG")
            member = tarfile.TarInfo(name)
            member.size = len(content.getvalue())
            content.seek(0)
            archive.addfile(member, content)
    return path


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("digits", "digits"),
        ("photos", "folder"),
        ("photos/lists.TXT", "list"),
        ("train.json", "list"),
        ("images.tar", "tar"),
        ("VTAB/cifar", "vtab"),
        ("fgvc/cub", "fgvc"),
        ("Torch/cifar10", "timm"),
        ("hfds/a/b", "timm"),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_a_folder_may_be_called_as_a_list(tmp_path):
    (tmp_path / "x.json").mkdir()
    assert kind_of(str(tmp_path / "x.json")) == "folder"


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("x.txt", {"split": "val"}, "split is for data sets with splits, got val for the list file x.txt"),
        ("x.tar", {"root": "r"}, "root is for lists and data sets, got r for the tar file x.tar"),
        ("digits", {"root": "r"}, "root is for lists and data sets, got r for digits"),
        ("vtab/dtd", {"download": True}, "download is for data sets of timm, got it for vtab/dtd"),
        ("torch/cifar10", {}, "root must name the folder of torch/cifar10"),
        ("torch/cifar11", {"root": "r"}, "timm cannot open torch/cifar11, .* cifar11"),
    ],
)
def test_options_without_effect_and_unknown_names_are_refused(name, options, expected):
    with pytest.raises(ValueError, match=expected):
        open_data(name, **options)


def test_a_data_set_of_torchvision_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        RuntimeError, match=rf"torch/cifar10, split train, cannot be had from {tmp_path} .*--download"
    ):
        open_data("torch/cifar10", root=tmp_path)


@pytest.mark.parametrize("name", ["no/such folder", "no such list.txt", "no such archive.tar"])
def test_what_is_not_there_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"there is no .* {name}"):
        open_data(name)


@pytest.mark.parametrize(
    ("name", "package"),
    [("hfds/x", "datasets"), ("tfds/x", "tensorflow-datasets tensorflow"), ("wds/x", "webdataset")],
)
def test_a_missing_package_is_named(name, package, monkeypatch):
    monkeypatch.setattr("spt_fast.data.names.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=f"data: {name} needs the package .*: pip install {package}$"):
        open_data(name, root="r")


def test_an_archive_is_read_by_the_rules_of_folders(tmp_path):
    names = ["b/1.webp", "./a/10.png", "a/2.png", "a/._2.png", "__MACOSX/a/2.png", "a/notes.txt", "x.png"]
    path = write_tar(tmp_path / "photos.tar", names)
    opened = open_data(str(path))
    assert opened.description == (
        f"{path}: 3 images of 2 classes, 1 to 2 in each",
        f"{path}: left out hidden files and folders (2): a/._2.png, __MACOSX/a/2.png",
        f"{path}: left out files that are not named as images (1): a/notes.txt",
        f"{path}: left out images outside the folders of the classes (1): x.png",
    )
    assert (opened.class_names, opened.paths) == (("a", "b"), ())
    opened.dataset.transform = lambda image: image.getpixel((0, 0))[0]
    assert [opened.dataset[index] for index in range(3)] == [(2, 0), (1, 0), (0, 1)]
    assert len(open_data(str(path), in_classes=False).dataset) == 4
    with pytest.raises(ValueError, match="names of splits"):
        open_data(str(write_tar(tmp_path / "splits.tar", ["train/a/1.png", "val/a/1.png"])))


def test_a_compressed_archive_is_refused(tmp_path):
    path = write_tar(tmp_path / "photos.tar.gz", ["a/1.png"], "w:gz")
    with pytest.raises(ValueError, match=r"must be a .tar that is not compressed: unpack others"):
        open_data(str(path))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_read_archives_and_a_damaged_image_is_named(tmp_path):
    path = write_tar(tmp_path / "photos.tar", ["a/1.png", "b/1.png", "a/2.png", "b/2.png"])
    model = shipped.load_backbone()
    batches = {
        workers: [
            (images, labels)
            for images, labels in open_labelled_images(str(path), model, workers=workers, batch_size=2).loader
        ]
        for workers in (0, 2)
    }
    for (images, labels), (again, others) in zip(*batches.values(), strict=True):
        assert torch.equal(images, again)
        assert torch.equal(labels, others)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"IHDR", b"IHDX", 1))
    with pytest.raises(ValueError, match=rf"{path}/a/1.png cannot be read"):
        list(open_labelled_images(str(path), model, workers=0).loader)


def test_timms_folders_by_name(tmp_path):
    for split, levels in {"train": (3, 4), "validation": (5,)}.items():
        for name in "ab":
            for level in levels:
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                Image.new("L", (4, 4), level).save(tmp_path / split / name / f"{level}.png")
    train, test = (open_data("torch/image_folder", root=tmp_path, use=use) for use in ("train", "test"))
    assert train.description == ("torch/image_folder, split train: 4 images of 2 classes, 2 in each",)
    assert test.description == ("torch/image_folder, split validation: 2 images of 2 classes, 1 in each",)
    assert train.class_names == ("a", "b")


def test_splits_beside_validation():
    assert training_split("vtab/dtd") == "train800val200"
    assert training_split("vtab/dtd", None, "val200") == "train800"
    assert training_split("vtab/dtd", "vtab/dtd") == "train800"
    assert training_split("vtab/dtd", "other.txt") == "train800val200"
    assert training_split("photos", "others") is None
    assert training_split("digits", None, "val") == "train"
    assert default_split("digits", "test") == "test"
    assert default_split("torch/cifar10", "test") == "validation"


def test_validation_takes_the_split_to_validate_with():
    model = shipped.load_backbone()
    val = open_validation_images("digits", model, val_data="digits")
    assert val.num_images == 300
    with pytest.raises(ValueError, match=r"must name other images than those of training, .*, split train"):
        open_validation_images("digits", model, val_split="train")


def test_the_digits_come_as_they_are():
    model = shipped.load_backbone()
    with pytest.raises(ValueError, match="resize is for images in files, got 'vtab' for the digits"):
        open_images("digits", model, resize="vtab")
    with pytest.raises(ValueError, match="augment is for training images, got 'crop'"):
        open_labelled_images("digits", model, augment="crop")
    assert open_labelled_images("digits", model).num_images == 600
    assert open_images("digits", model).preprocessing is None
