"""A folder of images: what is read, of which class, in which order; what is left out or refused."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from spt_fast.data.folder import list_folder
from spt_fast.data.listing import Listing, name_order, some_names


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a folder with empty files of these names; a name that ends in "/" is a folder."""

    def make(*names: str) -> Path:
        for name in names:
            place = tmp_path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith("/"):
                place.mkdir()
            else:
                place.touch()
        return tmp_path

    return make


def below(folder: Path, listing: Listing) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in listing.paths]


def test_a_class_is_a_folder_of_images_of_any_format(made):
    folder = made("b/1.webp", "b/2.TIFF", "a/10.jpg", "a/2.bmp")
    for classes in (True, False):
        listing = list_folder(folder, classes=classes)
        assert below(folder, listing) == ["a/2.bmp", "a/10.jpg", "b/1.webp", "b/2.TIFF"]
        assert listing.groups == (0, 0, 1, 1)
        assert listing.group_names == ("a", "b")
        assert listing.left_out == {}
    assert list_folder(folder, classes=True).description() == ["4 images of 2 classes, 2 in each"]


def test_what_is_left_out_is_named(made):
    names = ["a/0.png", "a/1.png", "b/0.png", "a/notes.txt", "empty/", "nested/empty/", "stray.png"]
    hidden = ["a/._0.png", ".git/x.png", "__MACOSX/a/._0.png", "a/.DS_Store"]
    listing = list_folder(made(*names, *hidden), classes=True)
    assert len(listing.paths) == 3
    assert listing.description() == [
        "3 images of 2 classes, 1 to 2 in each",
        "left out hidden files and folders (3): .git, __MACOSX, a/._0.png",
        "left out files that are not named as images (1): a/notes.txt",
        "left out folders without images (2): empty, nested",
        "left out images outside the folders of the classes (1): stray.png",
    ]


def test_without_classes_any_depth_is_read(made):
    folder = made("0.png", "a/0.png", "a/b/c/0.png", "train/0.png", "a/b/.x.png")
    listing = list_folder(folder, classes=False)
    assert below(folder, listing) == ["0.png", "a/0.png", "a/b/c/0.png", "train/0.png"]
    assert listing.description()[0] == "4 images in 4 folders, 1 in each"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train/a/0.png", "val/a/0.png"), "with names of splits .train, val., .* such as .*/train$"),
        (
            ("train800/0.png", "val200/0.png", "test/0.png"),
            ".test, train800, val200., .* into one folder per class",
        ),
        (("Training/0.png", "Validation_set/0.png"), ".Training, Validation_set., but"),
        (("test/a/0.png", "train/a/0.png"), "names of splits .test, train., .* such as .*/train$"),
        (
            ("images/test/a/0.png", "images/train/b/0.png"),
            "/images holds .* .test, train., .* such as .*/train$",
        ),
        (("x/images/a/0.png", "x/images/b/0.png"), "x holds images in deeper .* such as .*/x/images$"),
        (("train/0.png",), "names of splits .train., but"),
        (
            ("train/a/0.png", "a/0.png", "b/0.png"),
            "names of splits .train., .* such as .*/train$",
        ),
        (
            ("images/a/0.png", "images/b/0.png"),
            "deeper folders, such as images/a/0.png, .*, such as .*/images$",
        ),
        (("a/0.png", "b/c/0.png"), "deeper folders, such as b/c/0.png, .* whose folders are the classes$"),
        (("0.png", "1.png"), "must hold its images in one folder per class, but they are in no folder"),
        (("a/",), "holds no image .folders without images .1.: a.$"),
        (("a/x.txt", "a/._0.png"), "holds no image .hidden .* .1.: a/._0.png; files .* .1.: a/x.txt; .* a.$"),
    ],
)
def test_other_layouts_are_refused_with_what_to_give(names, expected, made):
    with pytest.raises(ValueError, match=expected):
        list_folder(made(*names), classes=True)


def test_a_class_may_be_called_train_among_others(made):
    folder = made("train/0.png", "bus/0.png", "tram/0.png")
    assert list_folder(folder, classes=True).group_names == ("bus", "train", "tram")


def test_a_class_of_the_model_is_no_split(made):
    folder = made("train/0.png", "test/0.png")
    assert list_folder(folder, classes=True, known=("test", "train")).group_names == ("test", "train")


def test_no_folder_is_read_twice(made, tmp_path):
    folder = made("a/0.png", "b/0.png", "elsewhere.txt")
    (folder / "a" / "up").symlink_to(folder)
    (folder / "a" / "here").symlink_to(folder / "a")
    (folder / "0_again").symlink_to(folder / "b")
    for classes in (True, False):
        listing = list_folder(folder, classes=classes)
        assert below(folder, listing) == ["a/0.png", "b/0.png"]
        links = listing.left_out["links to folders that are read already"]
        assert sorted(links) == ["0_again", "a/here", "a/up"]


def test_links_to_themselves_are_no_folders(made):
    folder = made("a/0.png")
    for name in ("loop", "loop.png"):
        (folder / "a" / name).symlink_to(folder / "a" / name)
    listing = list_folder(folder, classes=True)
    # As any link that leads nowhere: reading will say so.
    assert below(folder, listing) == ["a/0.png", "a/loop.png"]
    assert listing.left_out["files that are not named as images"] == ["a/loop"]


def test_links_elsewhere_are_followed(made, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    (other / "0.png").touch()
    folder = made("b/0.png")
    (folder / "a").symlink_to(other)
    (folder / "b" / "1.png").symlink_to(other / "0.png")
    (folder / "b" / "2.png").symlink_to(other / "gone.png")
    listing = list_folder(folder, classes=True)
    # The last cannot be read, which reading will say.
    assert below(folder, listing) == ["a/0.png", "b/0.png", "b/1.png", "b/2.png"]


def test_order_of_names():
    names = ["001", "01", "1", "2", "10", "a", "B", "Cat", "cat", "cat2", "cat10", "é"]
    for seed in range(5):
        assert sorted(random.Random(seed).sample(names, len(names)), key=name_order) == names


def test_order_of_classes_does_not_depend_on_the_hash_seed(made, child_environment):
    folder = made(*(f"{name}/0.png" for name in ("Cat", "cat", "CAT", "1", "01", "001")))
    script = (
        "import sys; from spt_fast.data.folder import list_folder as f; print(f(sys.argv[1], classes=True))"
    )
    printed = subprocess.check_output(
        [sys.executable, "-c", script, str(folder)],
        # Not the seed of this process.
        env={**child_environment, "PYTHONHASHSEED": "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"},
        text=True,
    )
    assert printed == f"{list_folder(folder, classes=True)}\n"
    assert "group_names=('001', '01', '1', 'CAT', 'Cat', 'cat')" in printed


def test_special_files_are_no_images(made):
    folder = made("a/0.png")
    os.mkfifo(folder / "a" / "pipe.png")
    assert list_folder(folder, classes=True).left_out == {
        "files that are not named as images": ["a/pipe.png"]
    }


def test_some_names_are_shown():
    assert some_names(["a", "b"]) == "a, b"
    assert some_names(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert some_names(["\udcff"]) == "\\udcff"
