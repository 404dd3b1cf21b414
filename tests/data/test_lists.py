"""Lists of images: what a line may be, which classes there are, and what is refused or said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from spt_fast.data import shipped
from spt_fast.data.images import open_labelled_images
from spt_fast.data.lists import open_list
from spt_fast.data.names import open_data


@pytest.fixture
def write(tmp_path: Path):
    """A function that writes a list of this name and gives its path."""

    def write(text: str | bytes, name: str = "list.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_numbers_are_places_of_classes(write, tmp_path):
    path = write("# CUB\nb/2.jpg 2\n\na b/1 x.jpg\t 0 \r\nc.jpg   0\n")
    found = open_list(path)
    assert found.paths == (tmp_path / "b/2.jpg", tmp_path / "a b/1 x.jpg", tmp_path / "c.jpg")
    assert found.groups == (2, 0, 0)
    assert found.group_names == ("0", "1", "2")
    assert found.description() == ["3 images of 3 classes, 1 to 2 in each", "classes without images (1): 1"]
    assert open_list(path, "/elsewhere").paths[2] == Path("/elsewhere/c.jpg")


def test_numbers_have_names_where_a_file_has_them(write):
    path = write("x.jpg 1\n")
    write("cat\nbig dog\nowl\n", "classes.txt")
    found = open_list(path)
    assert (found.groups, found.group_names) == ((1,), ("cat", "big dog", "owl"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("x.jpg cat\ny z.jpg Ant\n", ("Ant", "cat")),
        ("x.jpg\tbig cat\ny.jpg\tant\n", ("ant", "big cat")),
        ("x.jpg 010\ny.jpg 009\n", ("009", "010")),
        ("\ufeffx.jpg cat\ny.jpg ant\n", ("ant", "cat")),
    ],
)
def test_names_of_classes_are_sorted(text, names, write):
    found = open_list(write(text))
    assert found.group_names == names
    assert found.groups == (1, 0)


def test_a_name_need_not_be_utf_8(write):
    found = open_list(write(b"caf\xe9.jpg cat\n"))
    assert found.paths[0].name.encode(errors="surrogateescape") == b"caf\xe9.jpg"


@pytest.mark.parametrize(
    ("content", "names", "groups"),
    [
        ({"a.jpg": 3, "b.jpg": 10, "c.jpg": 3}, ("3", "10"), (0, 1, 0)),
        ({"a.jpg": "cat", "b.jpg": "ant"}, ("ant", "cat"), (1, 0)),
    ],
)
def test_numbers_of_a_json_list_are_counted_through(content, names, groups, write):
    found = open_list(write(json.dumps(content), "train.json"))
    assert (found.group_names, found.groups) == (names, groups)


def test_what_is_named_again_is_left_out_and_said(write):
    found = open_list(write("a.jpg 0\nx/../a.jpg 0\nb.jpg 1\n"))
    assert len(found.paths) == 2
    assert found.description()[1] == "left out lines that name an image again (1): a.jpg"


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("a.jpg 0\nb.jpg\n", "l.txt", r"l.txt, line 2, must be a path and a label, got 'b.jpg'"),
        ("my photo.jpg\n", "l.txt", "must be a path and a label, got 'my photo.jpg'"),
        ("a.jpg -1\n", "l.txt", "has the label -1; allowed are integers from 0, and names"),
        ("a.jpg 1\na.jpg 2\n", "l.txt", "line 2, gives a.jpg the label 2, but it had 1 before"),
        ("a.jpg 20260101\n", "l.txt", "must have labels from 0 to 999999, got '20260101'"),
        ("# nothing\n", "l.txt", "names no image"),
        ("{", "l.json", "l.json is no JSON"),
        ("[1]", "l.json", r"must be a JSON object of file and class, got '\[1\]'"),
        ('{"a.jpg": 1.5}', "l.json", "must give a.jpg an integer or a name, got 1.5"),
        ('{"a.jpg": {"b": 1}}', "l.json", "must give a.jpg an integer or a name"),
        ('{"a.jpg": true}', "l.json", "got True"),
        ('{"a.jpg": 1, "a.jpg": 2}', "l.json", "gives a.jpg the label 2, but it had 1 before"),
    ],
)
def test_bad_lists_are_refused(text, name, expected, write):
    with pytest.raises(ValueError, match=expected):
        open_list(write(text, name))


@pytest.mark.parametrize(
    ("names", "expected"),
    [("cat\n", "has the label 1, but .*classes.txt names 1 classes"), ("a\na\n", "once, got 'a' again")],
)
def test_bad_names_of_classes_are_refused(names, expected, write):
    write(names, "classes.txt")
    with pytest.raises(ValueError, match=expected):
        open_list(write("x.jpg 1\n"))


def test_missing_files_are_counted_and_named_or_skipped(write, tmp_path):
    Image.effect_noise((8, 8), 9).save(tmp_path / "a.png")
    data = str(write("a.png 0\ngone/b.png 1\nc.png 1\n"))
    with pytest.raises(
        FileNotFoundError, match=r"^data: 2 of the 3 files .* not there: .*gone/b.png, .*c.png"
    ):
        open_data(data)
    opened = open_labelled_images(data, shipped.load_backbone(), workers=0, bad_images="skip")
    (images, labels), *rest = list(opened.loader)
    assert not rest
    assert labels.tolist() == [0]
    assert images.shape == (1, 3, 64, 64)
    assert sorted(opened.loader.unreadable) == [str(tmp_path / "c.png"), str(tmp_path / "gone/b.png")]


def test_a_list_is_read_as_the_folder_it_lists(write, tmp_path):
    lines = []
    for name in ("ant", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(3):
            Image.effect_noise((20, 30), 30.0 * index).save(tmp_path / "photos" / name / f"{index} x.png")
            lines.append(f"{name}/{index} x.png {name}\n")
    data = write("".join(reversed(lines)))
    model = shipped.load_backbone()
    folder = open_labelled_images(str(tmp_path / "photos"), model, workers=0)
    listed = open_labelled_images(str(data), model, root=tmp_path / "photos", workers=0)
    assert listed.class_names == folder.class_names
    assert listed.paths == folder.paths[::-1]
    (ours, labels), (theirs, others) = (next(iter(each.loader)) for each in (listed, folder))
    assert torch.equal(ours, theirs.flip(0))
    assert torch.equal(labels, others.flip(0))


def test_a_list_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no list .*x.txt"):
        open_data(str(tmp_path / "x.txt"))
