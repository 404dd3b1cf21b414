"""The images of a task: three sets, what they may share, and where each is found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import nn

from spt_fast.data.shipped import load_backbone
from spt_fast.data.task import open_task, own_place


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_backbone()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Folders "train", "val" and "test" of two classes with two images each, all of them different."""
    for place, name in enumerate(("train", "val", "test")):
        for label, group in enumerate(("cats", "dogs")):
            folder = tmp_path / name / group
            folder.mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (8, 8), (100 * place, 100 * label, 100 * index)).save(
                    folder / f"{index}.png"
                )
    return tmp_path


def opened(photos: Path, model: nn.Module, **options: Any) -> Any:
    names = {name: str(photos / name) for name in ("train", "val", "test")}
    return open_task(
        model,
        names["train"],
        **{"val_data": names["val"], "test_data": names["test"], "training": {}, "workers": 0, **options},
    )


def test_three_sets_and_lines_that_describe_them(photos: Path, model: nn.Module) -> None:
    task = opened(photos, model, training={"seed": 3, "augment": "none"})
    assert [each.num_images for each in (task.train, task.val, task.test)] == [4, 4, 4]
    uses = [line.partition(":")[0] for line in task.description]
    assert list(dict.fromkeys(uses)) == ["training", "validation", "test"]
    alone = opened(photos, model, val_data=None, test_data=None)
    assert (alone.val, alone.test) == (None, None)


def test_images_that_two_sets_share(photos: Path, model: nn.Module) -> None:
    shutil.copy(photos / "train/cats/0.png", photos / "test/cats/again.png")
    with pytest.raises(ValueError, match=r"1 of 5 test images are training images too.*test on them all the"):
        opened(photos, model)
    lines = opened(photos, model, allow_overlap=True).description
    assert any(line.startswith("test: 1 of 5 test images are training images too") for line in lines)
    (photos / "test/cats/again.png").unlink()

    # What validation and test share matters where validation chooses.
    shutil.copy(photos / "val/dogs/1.png", photos / "test/dogs/again.png")
    opened(photos, model)
    with pytest.raises(ValueError, match="1 of 5 test images are validation images too"):
        opened(photos, model, chooses=True)


def test_splits_of_one_data_set(model: nn.Module) -> None:
    options: dict[str, Any] = {"training": {}, "workers": 0, "val_split": "val"}
    task = open_task(model, "digits", test_split="", chooses=True, **options)
    assert [each.num_images for each in (task.train, task.val, task.test)] == [897, 300, 600]
    with pytest.raises(ValueError, match="must name other images than those of validation, got digits"):
        open_task(model, "digits", test_split="val", chooses=True, **options)
    options["val_split"] = "test"
    # Asked for without a name, it is the split to test with, here that of validation.
    with pytest.raises(ValueError, match="must name other images than those of validation, got digits"):
        open_task(model, "digits", test_split="", chooses=True, **options)
    assert open_task(model, "digits", test_split="", **options).test.num_images == 600
    options["val_split"] = "val"
    assert open_task(model, "digits", test_split="val", **options).test.num_images == 300
    with pytest.raises(ValueError, match="must name other images than those of training, got digits"):
        open_task(model, "digits", test_split="train", **options)


@pytest.mark.parametrize(
    ("data", "others", "root", "download"),
    [
        ("folder", ["list.txt", None], None, True),
        ("list.txt", ["folder", None], "here", True),
        ("folder", ["torch/cifar10"], None, False),
        ("torch/cifar10", ["folder"], "here", True),
        # For none of them: the error says so.
        ("folder", [None], "here", True),
    ],
)
def test_places_of_other_sets_are_not_those_of_the_training_images(data, others, root, download):
    assert own_place(data, others, root="here", download=True) == {"root": root, "download": download}
