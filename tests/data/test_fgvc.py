"""FGVC by name: the five data sets as their archives unpack and by VPT's lists, their numbers and splits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spt_fast.data.fgvc import SETS
from spt_fast.data.names import default_split, open_data

# Images of an archive by Table S1: (train and val, test).
SIZES = {
    "cub": (5_994, 5_794),
    "nabirds": (23_929, 24_633),
    "flowers": (2_040, 6_149),
    "dogs": (12_000, 8_580),
    "cars": (8_144, 8_041),
}
SMALL = (20, 6)


def save_mat(path: Path, **content: Any) -> None:
    pytest.importorskip("scipy.io").savemat(path, content)


def texts(values: list[str]) -> np.ndarray:
    """A cell array [n, 1], as the archives have it."""
    cells = np.empty((len(values), 1), dtype=object)
    cells[:, 0] = values
    return cells


def write_birds(folder: Path, labels: list[int], train: int, names: dict[int, str]) -> dict[str, int]:
    files = {f"{label:04}/{index}.png": label for index, label in enumerate(labels)}
    numbers = range(1, len(files) + 1)
    rows = {
        "images.txt": files,
        "image_class_labels.txt": labels,
        "train_test_split.txt": [int(index < train) for index in range(len(files))],
    }
    for name, values in rows.items():
        lines = (f"{number} {value}\n" for number, value in zip(numbers, values, strict=True))
        (folder / name).write_text("".join(lines))
    (folder / "classes.txt").write_text("".join(f"{number} {name}\n" for number, name in names.items()))
    return {f"images/{file}": label for file, label in files.items()}


def write_cub(folder: Path, labels: list[int], train: int) -> dict[str, int]:
    return write_birds(folder, labels, train, {label: f"{label:03}.Bird" for label in sorted(set(labels))})


def write_nabirds(folder: Path, labels: list[int], train: int) -> dict[str, int]:
    """Numbers with gaps, and classes above the species that no image has."""
    numbers = [300 + 2 * label for label in labels]
    names = {0: "Birds", **{number: f"Bird {number} (Adult)" for number in sorted(set(numbers))}}
    return write_birds(folder, numbers, train, names)


def write_flowers(folder: Path, labels: list[int], train: int) -> dict[str, int]:
    save_mat(folder / "imagelabels.mat", labels=np.array([labels], dtype=np.uint8))
    numbers = np.arange(1, len(labels) + 1)
    half = train // 2
    sets = {"trnid": numbers[:half], "valid": numbers[half:train], "tstid": numbers[train:]}
    save_mat(folder / "setid.mat", **{key: value[None] for key, value in sets.items()})
    return {f"jpg/image_{index + 1:05}.jpg": label for index, label in enumerate(labels)}


def write_dogs(folder: Path, labels: list[int], train: int) -> dict[str, int]:
    files = [f"n{label:08}-Dog/n_{index}.jpg" for index, label in enumerate(labels)]
    for split, part in (("train", slice(train)), ("test", slice(train, None))):
        numbers = np.array(labels[part], dtype=np.uint8)[:, None]
        save_mat(folder / f"{split}_list.mat", file_list=texts(files[part]), labels=numbers)
    return {f"Images/{file}": label for file, label in zip(files, labels, strict=True)}


def annotations(columns: dict[str, list[Any]]) -> np.ndarray:
    """A struct array [1, n]."""
    rows = np.empty((1, len(next(iter(columns.values())))), dtype=[(name, object) for name in columns])
    for name, values in columns.items():
        rows[name][0] = values
    return rows


def car_names(labels: list[int]) -> np.ndarray:
    return texts([f"Car {label}" for label in range(1, max(labels) + 1)]).T


def write_cars(folder: Path, labels: list[int], train: int) -> dict[str, int]:
    files = [f"car_ims/{index:06}.jpg" for index in range(1, len(labels) + 1)]
    used = [int(index >= train) for index in range(len(labels))]
    rows = annotations({"relative_im_path": files, "class": labels, "test": used})
    save_mat(folder / "cars_annos.mat", annotations=rows, class_names=car_names(labels))
    return dict(zip(files, labels, strict=True))


def write_newer_cars(folder: Path, labels: list[int], train: int) -> dict[str, int]:
    (folder / "devkit").mkdir()
    save_mat(folder / "devkit" / "cars_meta.mat", class_names=car_names(labels))
    found = {}
    for name, images, part in (
        ("devkit/cars_train_annos.mat", "cars_train", slice(train)),
        ("cars_test_annos_withlabels.mat", "cars_test", slice(train, None)),
    ):
        files = [f"{index:05}.jpg" for index in range(1, len(labels[part]) + 1)]
        save_mat(folder / name, annotations=annotations({"class": labels[part], "fname": files}))
        found |= {f"{images}/{file}": label for file, label in zip(files, labels[part], strict=True)}
    return found


ARCHIVES: dict[str, tuple[str, str, Callable[..., dict[str, int]]]] = {
    "cub": ("cub", "CUB_200_2011", write_cub),
    "nabirds": ("nabirds", "nabirds", write_nabirds),
    "flowers": ("flowers", "flowers-102", write_flowers),
    "dogs": ("dogs", "StanfordDogs", write_dogs),
    "cars": ("cars", "stanford_cars", write_cars),
    "newer cars": ("cars", "Cars", write_newer_cars),
}


def write_archive(root: Path, archive: str, sizes: tuple[int, int]) -> tuple[str, Path, dict[str, int]]:
    """The name of the data set, its folder, and {file: number of its class}; no images."""
    name, folder_name, write = ARCHIVES[archive]
    folder = root / folder_name
    folder.mkdir()
    classes = min(SETS[name].classes, 3 if sizes == SMALL else 10_000)
    labels = [index % classes + 1 for index in range(sum(sizes))]
    return name, folder, write(folder, labels, sizes[0])


@pytest.mark.parametrize("name", SETS)
def test_an_archive_opens_with_the_numbers_of_table_s1(name, tmp_path):
    """Without a warning, which pytest takes for an error."""
    _, folder, files = write_archive(tmp_path, name, SIZES[name])
    opened = {
        split: open_data(f"fgvc/{name}", root=tmp_path, split=split, allow_missing=True)
        for split in ("train", "val", "test")
    }
    facts = SETS[name]
    sizes = {split: len(each.dataset) for split, each in opened.items()}
    assert sizes == {"train": facts.train, "val": facts.val, "test": facts.test}
    assert {len(each.class_names) for each in opened.values()} == {facts.classes}
    paths = {split: set(each.paths) for split, each in opened.items()}
    assert set.union(*paths.values()) == {folder / file for file in files}
    assert sum(map(len, paths.values())) == len(files)


@pytest.mark.filterwarnings("ignore:fgvc:UserWarning")
@pytest.mark.parametrize("archive", ARCHIVES)
def test_images_and_labels_of_an_archive_belong_together(archive, tmp_path):
    name, folder, files = write_archive(tmp_path, archive, SMALL)
    order = sorted(set(files.values()))
    for file, number in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        # JPEG keeps flat grey as it is.
        Image.new("L", (8, 8), 8 * order.index(number)).save(folder / file)
    for split in ("trainval", "test"):
        dataset = open_data(f"fgvc/{name}", root=folder if name != "cub" else tmp_path, split=split).dataset
        dataset.transform = lambda image: image.getpixel((0, 0))[0]
        items = [dataset[index] for index in range(len(dataset))]
        assert len(items) == (20 if split == "trainval" else 6)
        assert all(abs(level - 8 * label) <= 1 for level, label in items)


@pytest.mark.filterwarnings("ignore:fgvc:UserWarning")
def test_names_of_classes(tmp_path):
    expected = {
        "cub": ("001.Bird", "002.Bird", "003.Bird"),
        "nabirds": ("Bird 302 (Adult)", "Bird 304 (Adult)", "Bird 306 (Adult)"),
        "flowers": ("1", "2", "3"),
        "dogs": ("n00000001-Dog", "n00000002-Dog", "n00000003-Dog"),
        "cars": ("Car 1", "Car 2", "Car 3"),
    }
    for name in expected:
        write_archive(tmp_path, name, SMALL)
    found = {
        name: open_data(f"fgvc/{name}", root=tmp_path, allow_missing=True).class_names for name in expected
    }
    assert found == expected


@pytest.mark.filterwarnings("ignore:fgvc:UserWarning")
def test_which_images_validate_is_fixed_for_good(tmp_path):
    """Another division would make another task of the same name; it does not depend on their order."""
    _, folder, _ = write_archive(tmp_path, "cub", SMALL)
    val = open_data("fgvc/cub", root=tmp_path, split="val", allow_missing=True)
    assert [path.name for path in val.paths] == VALIDATION_OF_SMALL
    lines = (folder / "images.txt").read_text().splitlines(keepends=True)
    (folder / "images.txt").write_text("".join(reversed(lines)))
    again = open_data("fgvc/cub", root=tmp_path, split="val", allow_missing=True)
    assert set(again.paths) == set(val.paths)


VALIDATION_OF_SMALL = ["8.png", "9.png"]


@pytest.mark.filterwarnings("ignore:fgvc:UserWarning")
@pytest.mark.parametrize("name", SETS)
def test_vpts_lists_come_first(name, tmp_path):
    """Numbers with a gap are counted through, over all three lists."""
    _, folder, _ = write_archive(tmp_path, name, SMALL)
    lists = {"train": {"a.jpg": 2, "b.jpg": 7}, "val": {"c.jpg": 7}, "test": {"d.jpg": 9}}
    for split, files in lists.items():
        (folder / f"{split}.json").write_text(json.dumps(files))
    images = folder / {"cub": "images", "nabirds": "images", "dogs": "Images"}.get(name, "")
    for split, expected in {"train": "ab", "val": "c", "trainval": "abc", "test": "d"}.items():
        opened = open_data(f"fgvc/{name}", root=tmp_path, split=split, allow_missing=True)
        assert opened.paths == tuple(images / f"{letter}.jpg" for letter in expected)
        assert opened.class_names == ("2", "7", "9")
    (folder / "val.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no list .*val.json"):
        open_data(f"fgvc/{name}", root=tmp_path, split="val")


def test_defaults_are_the_papers_protocol():
    assert [default_split("fgvc/cub", use) for use in ("train", "val", "test")] == ["train", "val", "test"]


def test_other_numbers_are_a_warning_that_names_both(tmp_path):
    write_archive(tmp_path, "cub", SMALL)
    expected = "^fgvc/cub: 3 classes, but 200 in Table S1; 6 images of test, but 5,794 in Table S1"
    with pytest.warns(UserWarning, match=expected):
        open_data("fgvc/CUB-200-2011", root=tmp_path, use="test", allow_missing=True)


@pytest.mark.parametrize("name", SETS)
def test_a_missing_folder_or_file_is_told_with_its_layout(name, tmp_path):
    layout = {"flowers": "jpg/image_00001.jpg", "dogs": "Images/BREED", "cars": "cars_annos.mat"}
    expected = (
        rf"should hold {layout.get(name, 'images/CLASS')}.*, or VPT's train.json, val.json and test.json"
    )
    with pytest.raises(FileNotFoundError, match=rf"no folder of fgvc/{name} in .*{expected}; root"):
        open_data(f"fgvc/{name}", root=tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=rf"there is no .*; fgvc/{name} {expected}"):
        open_data(f"fgvc/{name}", root=tmp_path)


@pytest.mark.filterwarnings("ignore:fgvc:UserWarning")
def test_newer_cars_train_without_labels_of_the_test_images(tmp_path):
    _, folder, _ = write_archive(tmp_path, "newer cars", SMALL)
    (folder / "cars_test_annos_withlabels.mat").unlink()
    assert len(open_data("fgvc/cars", root=tmp_path, allow_missing=True).dataset) == 18
    with pytest.raises(
        FileNotFoundError, match=r"has no labels of test images; .*cars_test_annos_withlabels"
    ):
        open_data("fgvc/cars", root=tmp_path, use="test")


def test_damaged_archives_are_refused(tmp_path):
    for archive in ("cub", "flowers"):
        write_archive(tmp_path, archive, SMALL)
    birds, flowers = tmp_path / "CUB_200_2011", tmp_path / "flowers-102"
    (birds / "classes.txt").write_text("1 001.Bird\n2 002.Bird\n")
    with pytest.raises(ValueError, match="CUB_200_2011 names no class 3, which images have"):
        open_data("fgvc/cub", root=tmp_path)
    (birds / "image_class_labels.txt").write_text("1 1\n")
    with pytest.raises(ValueError, match=r"image '2' of .*images.txt is not in the other lists"):
        open_data("fgvc/cub", root=tmp_path)
    save_mat(flowers / "imagelabels.mat", other=np.zeros(3))
    with pytest.raises(
        ValueError, match=r"flowers-102 cannot be read \('labels'\); fgvc/flowers should hold"
    ):
        open_data("fgvc/flowers", root=tmp_path)
    (flowers / "setid.mat").write_bytes(b"MATLAB 5.0 MAT-file".ljust(128) + b"\0" * 20)
    (flowers / "imagelabels.mat").write_bytes(b"no such file of MATLAB" * 9)
    with pytest.raises(ValueError, match=r"imagelabels.mat cannot be read"):
        open_data("fgvc/flowers", root=tmp_path)


def test_scipy_is_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    write_archive(tmp_path, "flowers", SMALL)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"imagelabels.mat .* \(pip install scipy\); VPT's train.json"):
        open_data("fgvc/flowers", root=tmp_path)


@pytest.mark.filterwarnings("ignore:fgvc:UserWarning")
def test_a_split_without_images_is_refused(tmp_path):
    write_archive(tmp_path, "cub", (20, 0))
    with pytest.raises(ValueError, match=r"^data: fgvc/cub, split test holds no image"):
        open_data("fgvc/cub", root=tmp_path, use="test")


def test_a_data_set_must_be_known():
    with pytest.raises(
        ValueError, match=r"fgvc/planes is not known; the data sets are fgvc/cub, fgvc/nabirds"
    ):
        open_data("fgvc/planes")
