"""Commands on data by name: which split each takes, and that all prepare images alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import spt_fast
from spt_fast.backbones.open import open_model
from spt_fast.commands import main as cli
from spt_fast.data import shipped
from spt_fast.data.transforms import Preprocessing, recorded

SIZES = {"train800": 8, "val200": 4, "train800val200": 12, "test": 6}
QUICK = ("--epochs", 1, "--warmup-epochs", 0, "--batch-size", 4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task "toy" of two classes in the layout of VTAB; its images are wide, no two alike."""
    root = tmp_path_factory.mktemp("tasks")
    folder = root / "toy" / "images"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    for index in range(18):
        pixels = torch.randint(256, (20, 40, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    first = {"train800": 0, "val200": 8, "train800val200": 0, "test": 12}
    for split, size in SIZES.items():
        images = range(first[split], first[split] + size)
        lines = (f"images/{index}.png {index % 2}\n" for index in images)
        (root / "toy" / f"{split}.txt").write_text("".join(lines))
    return root


def run(command: str, *arguments: object) -> int:
    return cli.main([command, "--model", "shipped", "--workers", "0", *map(str, arguments)])


def test_splits_follow_the_papers_protocol_and_are_said(tasks, tmp_path, capsys):
    data = ("--data", "vtab/toy", "--root", tasks)
    recipe = (*data, "--method", "vpt-deep", "--num-prompts", 2, *QUICK)
    assert run("train", *recipe, "--val-split", "val200", "--out", tmp_path / "a") == 0
    printed = capsys.readouterr().out
    assert "training: vtab/toy, split train800: 8 images of 2 classes, 4 in each\n" in printed
    assert "validation: vtab/toy, split val200: 4 images of 2 classes, 2 in each\n" in printed
    assert "training: the paper's rows: --resize vtab in its text, but short in its code;" in printed
    assert printed.count("the paper's rows") == 1
    assert run("train", *recipe, "--out", tmp_path / "b") == 0
    assert "training: vtab/toy, split train800val200: 12 images" in capsys.readouterr().out
    assert run("eval", *data, "--tuned", tmp_path / "b" / "tuned.safetensors") == 0
    printed = capsys.readouterr().out
    assert "images: vtab/toy, split test: 6 images of 2 classes, 3 in each\n" in printed
    assert "accuracy " in printed
    assert " of 6 images" in printed


def test_validation_on_the_images_of_training_is_refused(tasks, tmp_path, only_error):
    data = (
        "--data",
        "vtab/toy",
        "--root",
        tasks,
        "--split",
        "train800val200",
        "--method",
        "vpt-deep",
        "--num-prompts",
        2,
    )
    code = run("train", *data, "--val-split", "val200", "--out", tmp_path)
    assert "4 of 4 validation images are training images too" in only_error(code, "train")


def test_a_tuned_file_says_how_images_are_prepared(tasks, tmp_path, capsys):
    """`eval` takes that for images from elsewhere, and names a difference."""
    tuned = tmp_path / "tuned.safetensors"
    data = ("--data", "vtab/toy", "--root", tasks)
    wanted = ("--resize", "short", "--mean-std", "imagenet")
    assert (
        run("train", *data, *wanted, "--method", "vpt-deep", "--num-prompts", 2, *QUICK, "--out", tmp_path)
        == 0
    )
    made = Preprocessing("short", "imagenet")
    assert recorded(tuned) == made
    assert spt_fast.PromptedViT.from_file(tuned, open_model("shipped")).preprocessing == made
    capsys.readouterr()

    listed = tmp_path / "test.json"
    files = (tasks / "toy" / "test.txt").read_text().split("\n")[:-1]
    listed.write_text(json.dumps({line.split()[0]: int(line.split()[1]) for line in files}))
    elsewhere = ("--data", listed, "--root", tasks / "toy", "--tuned", tuned)
    assert run("eval", *elsewhere) == 0
    printed = capsys.readouterr()
    assert "images: transform: --resize short (" in printed.out
    assert "--mean-std imagenet" in printed.out
    assert "warning" not in printed.err
    assert run("eval", *elsewhere, "--resize", "vtab") == 0
    assert (
        f"spt-fast eval: warning: {tuned} was made with --resize short --mean-std imagenet, "
        "not with --resize vtab --mean-std imagenet as now"
    ) in capsys.readouterr().err


def test_prototypes_say_how_images_are_prepared(tasks, tmp_path, capsys):
    """`train` and `nmi` go on with it."""
    out = tmp_path / "p.safetensors"
    data = ("--data", "vtab/toy", "--root", tasks)
    assert run("prototypes", *data, "--num-prompts", 2, "--resize", "short", "--out", out) == 0
    printed = capsys.readouterr().out
    assert "images: vtab/toy, split train800val200: 12 images" in printed
    assert "images: transform: --resize short (" in printed
    made = Preprocessing("short", "model")
    assert recorded(out) == made
    assert run("train", *data, "--prompts", out, *QUICK, "--out", tmp_path / "out") == 0
    assert recorded(tmp_path / "out" / "tuned.safetensors") == made
    capsys.readouterr()
    nmi = ("--prompts", out, "--max-images", 4, "--resize", "vtab", "--out", tmp_path / "nmi")
    assert run("nmi", *data, *nmi) == 0
    assert f"spt-fast nmi: warning: {out} was made with --resize short" in capsys.readouterr().err


def test_augmentation_is_asked_for_by_name(tasks, tmp_path, capsys, only_error):
    data = ("--data", "vtab/toy", "--root", tasks, "--method", "vpt-deep", "--num-prompts", 2, *QUICK)
    assert run("train", *data, "--resize", "short", "--augment", "crop", "--out", tmp_path / "a") == 0
    printed = capsys.readouterr().out
    assert "training: transform: --resize short (" in printed
    assert "random crops in place of the centre, and flips" in printed
    code = run("train", *data[:2], "--root", tasks, "--split", "train", "--out", tmp_path / "b")
    assert "split must be one of 'train800', 'val200'" in only_error(code, "train")


def test_the_digits_are_tested_on_their_test_images(tmp_path, capsys):
    tuned = spt_fast.PromptedViT(shipped.load_backbone(), 2, num_classes=10)
    tuned.class_names = shipped.DIGITS_CLASSES
    tuned.save(tmp_path / "t.safetensors")
    assert recorded(tmp_path / "t.safetensors") is None
    assert run("eval", "--data", "digits", "--tuned", tmp_path / "t.safetensors") == 0
    assert "images: digits, split test: 600 images of 10 classes" in capsys.readouterr().out


def test_root_may_be_for_the_validation_images_alone(tasks, folders, tmp_path, capsys):
    """And is then not refused for the folder to train on."""
    listed = tmp_path / "val.txt"
    listed.write_text("images/16.png even\nimages/17.png odd\n")
    data = (
        "--data",
        folders / "train",
        "--val-data",
        listed,
        "--root",
        tasks / "toy",
        "--method",
        "vpt-deep",
        "--num-prompts",
        1,
    )
    assert run("train", *data, *QUICK, "--out", tmp_path / "out") == 0
    assert f"validation: {listed}: 2 images of 2 classes, 1 in each" in capsys.readouterr().out
