"""VTAB-1k by name: the nineteen tasks in the field's layout, their numbers, other folders in this layout."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from spt_fast.data.names import default_split, open_data
from spt_fast.data.vtab import TASKS, VTAB_SPLITS

SIZES = {"train800": 800, "val200": 200, "train800val200": 1000}


def write_task(folder: Path, classes: int, sizes: dict[str, int], *, images: bool = False) -> Path:
    """Lists of these sizes; with `images`, a grey image for each line, as bright as its label."""
    for split, size in sizes.items():
        (folder / "images" / split).mkdir(parents=True)
        files = [f"images/{split}/{index:06}.png" for index in range(size)]
        labels = [index % classes for index in range(size)]
        lines = (f"{file} {label}\n" for file, label in zip(files, labels, strict=True))
        (folder / f"{split}.txt").write_text("".join(lines))
        for file, label in zip(files if images else [], labels, strict=False):
            Image.new("L", (2, 2), label).save(folder / file)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_a_task_opens_with_the_numbers_of_table_s1(task, tmp_path):
    """Without a warning, which pytest takes for an error."""
    facts = TASKS[task]
    write_task(tmp_path / "vtab-1k" / task, facts.classes, {**SIZES, "test": facts.test})
    opened = open_data(f"vtab/{task}", root=tmp_path, use="test", allow_missing=True)
    assert len(opened.dataset) == len(opened.paths) == facts.test
    assert opened.class_names == tuple(map(str, range(facts.classes)))
    assert opened.description[0].startswith(
        f"vtab/{task}, split test: {facts.test} images of {facts.classes} classes"
    )


def test_the_tasks_are_those_of_the_paper():
    """Table S1 has 19 tasks; the head of the mean task has 940 / 19 classes (Params in Table 3)."""
    assert len(TASKS) == 19
    assert sum(task.classes for task in TASKS.values()) == 940


def test_splits_of_a_task(tmp_path):
    write_task(tmp_path / "kitti", 4, {**SIZES, "test": 711})
    opened = {
        split: open_data("vtab/kitti", root=tmp_path, split=split, allow_missing=True)
        for split in VTAB_SPLITS
    }
    assert [len(each.dataset) for each in opened.values()] == [800, 200, 1000, 711]
    assert opened["val200"].paths[3] == tmp_path / "kitti/images/val200/000003.png"
    with pytest.raises(ValueError, match=r"split must be one of 'train800', 'val200', .*, got 'train'"):
        open_data("vtab/kitti", root=tmp_path, split="train")


def test_a_task_may_be_named_with_its_group(tmp_path):
    write_task(tmp_path / "Specialized" / "EuroSAT", 10, {**SIZES, "test": 5400})
    for name in ("vtab/Specialized/EuroSAT", "vtab/eurosat"):
        opened = open_data(name, root=tmp_path, split="val200", allow_missing=True)
        assert len(opened.dataset) == 200


def test_defaults_are_the_papers_protocol():
    assert default_split("vtab/dtd", "train") == "train800val200"
    assert default_split("vtab/dtd", "train", "val200") == "train800"
    assert default_split("vtab/dtd", "train", "test") == "train800val200"
    assert default_split("vtab/dtd", "val") == "val200"
    assert default_split("vtab/dtd", "test") == "test"
    assert default_split("folder", "test") is None


@pytest.mark.filterwarnings("ignore:vtab:UserWarning")
@pytest.mark.parametrize(
    ("folder", "names"),
    [
        ("Natural/CIFAR100", ("cifar", "cifar100", "CIFAR100", "CIFAR-100")),
        ("vtab-1k/oxford_iiit_pet", ("pets", "oxford_iiit_pet", "Pets")),
        ("Specialized/Patch_Camelyon", ("camelyon", "patch_camelyon", "pcam")),
        ("Specialized/Retinopathy", ("retinopathy", "diabetic_retinopathy")),
        ("VTAB-1k/Structured/Smallnorb_azi", ("snorb_azi", "smallnorb_azi")),
        ("oxford_flowers102", ("flowers102", "flowers")),
        ("Structured/Clevr_Count", ("clevr_count",)),
    ],
)
def test_names_of_tasks_and_folders(folder, names, tmp_path):
    write_task(tmp_path / folder, 2, {"test": 2}, images=True)
    for name in names:
        opened = open_data(f"vtab/{name}", root=tmp_path, use="test")
        assert opened.paths[0] == tmp_path / folder / "images/test/000000.png"


def test_images_and_labels_of_a_task_belong_together(tmp_path):
    write_task(tmp_path / "grocery", 3, {"train800": 7, "test": 2}, images=True)
    (tmp_path / "grocery" / "classes.txt").write_text("ant\nbee\ncat")
    opened = open_data("vtab/grocery", root=tmp_path, split="train800")
    opened.dataset.transform = lambda image: image.getpixel((0, 0))[0]
    items = [opened.dataset[index] for index in range(7)]
    assert all(level == label for level, label in items)
    assert opened.class_names == ("ant", "bee", "cat")
    # Classes are those of all lists, since one of them may lack some.
    assert open_data("vtab/grocery", root=tmp_path, use="test").class_names == ("ant", "bee", "cat")


def test_other_numbers_are_a_warning_that_names_both(tmp_path):
    write_task(tmp_path / "cifar", 5, {"train800": 10, "test": 20})
    with pytest.warns(
        UserWarning, match=r"^vtab/cifar: 5 classes, but 100 in Table S1; 20 images of test, but 10,000 in"
    ):
        open_data("vtab/cifar", root=tmp_path, use="test", allow_missing=True)
    with pytest.warns(UserWarning, match=r"10 images of train800, but 800 in Table S1"):
        open_data("vtab/cifar100", root=tmp_path, split="train800", allow_missing=True)


def test_a_missing_folder_is_told_with_its_layout(tmp_path):
    write_task(tmp_path / "dtd", 2, {"test": 2})
    expected = (
        r"no folder of vtab/svhn in .* \(tasks there: dtd\); it should hold TASK/images/.* and TASK/train8"
    )
    with pytest.raises(FileNotFoundError, match=expected):
        open_data("vtab/svhn", root=tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"no .*dtd/val200.txt for vtab/dtd, split val200; there is test"
    ):
        open_data("vtab/dtd", root=tmp_path, split="val200")


def test_without_a_root_tasks_lie_here(tmp_path, monkeypatch):
    write_task(tmp_path / "vtab" / "toy", 2, {"test": 2}, images=True)
    monkeypatch.chdir(tmp_path)
    assert len(open_data("vtab/toy", use="test").dataset) == 2


def test_a_task_given_as_a_folder_is_told_by_its_name(tmp_path):
    """Its folders are splits and no classes, and all splits are not to be read as one."""
    write_task(tmp_path / "toy", 2, {"train800": 2, "test": 2}, images=True)
    for in_classes in (True, False):
        with pytest.raises(ValueError, match=rf"give vtab/toy and root={tmp_path} \(--root\)"):
            open_data(str(tmp_path / "toy"), in_classes=in_classes)


@pytest.mark.filterwarnings("ignore:vtab:UserWarning")
def test_two_folders_for_a_task_are_refused_unless_one_has_the_name(tmp_path):
    for folder in ("cifar", "Natural/CIFAR100"):
        write_task(tmp_path / folder, 2, {"test": 2}, images=True)
    with pytest.raises(ValueError, match=r"vtab/cifar-100 may be .*CIFAR100 or .*cifar; give another root"):
        open_data("vtab/cifar-100", root=tmp_path, use="test")
    opened = open_data("vtab/cifar", root=tmp_path, use="test")
    assert opened.paths[0].is_relative_to(tmp_path / "cifar")
