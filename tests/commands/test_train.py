"""`spt-fast train` and `eval`: what they write, against the library's own steps, and what they refuse."""

from __future__ import annotations

import random
import re
import shutil
import signal
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch

import spt_fast
from spt_fast.backbones.open import open_model
from spt_fast.commands import main as cli
from spt_fast.commands import options
from spt_fast.data import shipped
from spt_fast.data.images import open_images, open_labelled_images
from spt_fast.methods import vipamin
from spt_fast.methods.parameter_groups import PROMPT_LR_FACTOR
from spt_fast.support.files import read_safetensors
from spt_fast.support.tables import read_csv
from spt_fast.training.evaluation import Evaluation
from spt_fast.training.folder import TUNED_NAME
from spt_fast.training.history import HISTORY_COLUMNS
from spt_fast.training.loop import fit
from spt_fast.training.outputs import Outputs

CLASSES = ("even", "odd")
VPT = ("--method", "vpt-deep", "--num-prompts", 2)
WRITTEN = {
    "run.yaml", "checkpoint.pt", "prototypes.safetensors", "tuned.safetensors", "train.csv", "train.png",
    "classes.csv", "confusion.csv",
}  # fmt: skip
QUICK = ("--epochs", 2, "--warmup-epochs", 1, "--batch-size", 5, "--workers", 0)


def train(*arguments: object) -> int:
    return cli.main(["train", "--model", "shipped", *map(str, (*QUICK, *arguments))])


def evaluate(*arguments: object) -> int:
    return cli.main(["eval", "--model", "shipped", *map(str, arguments)])


def reopened(path):
    return spt_fast.PromptedViT.from_file(path, open_model("shipped"))


def test_train_and_eval_of_a_folder(folders, tmp_path, capsys):
    data = ("--data", folders / "train", "--num-prompts", 3, "--out", tmp_path)
    assert train(*data, "--val-data", folders / "odd") == 0
    printed = capsys.readouterr().out
    even, odd = (len(list((folders / "train" / name).iterdir())) for name in CLASSES)
    each = f"{min(even, odd)} to {max(even, odd)}" if even != odd else str(even)
    assert f"training: {folders / 'train'}: 24 images of 2 classes, {each} in each\n" in printed
    assert (
        f"validation: {folders / 'odd'}: {len(list((folders / 'odd' / 'odd').iterdir()))} images" in printed
    )
    assert all(f"wrote {path}\n" in printed for path in tmp_path.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == WRITTEN
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    rows = [numbers for _, numbers in read_csv(tmp_path / "train.csv", HISTORY_COLUMNS)]
    assert [row[0] for row in rows] == [1, 2]

    tuned = reopened(tmp_path / TUNED_NAME)
    assert tuned.class_names == CLASSES
    assert tuned.prompts.shape[:2] == (6, 3)
    # By hand: the folder has one of the two classes, whose label is 1 to the model.
    images = torch.cat([batch[0] for batch in open_images(str(folders / "odd"), tuned.model, workers=0)])
    with torch.no_grad():
        expected = float((tuned(images).argmax(dim=1) == 1).double().mean())
    assert rows[-1][2] == pytest.approx(expected)
    assert evaluate("--tuned", tmp_path / TUNED_NAME, "--data", folders / "odd", "--workers", 0) == 0
    assert f"accuracy {expected:.2%} of {len(images)} images" in capsys.readouterr().out


def test_train_is_prototypes_and_fit(folders, tmp_path):
    """The command against the library calls that it stands for; it makes its folder."""
    recipe = ("--lr", 0.02, "--prompt-lr", 0.5, "--weight-decay", 0.01, "--epochs", 1, "--warmup-epochs", 0.5)
    data = str(folders / "train")
    assert train("--data", data, "--num-prompts", 2, "--seed", 4, *recipe, "--out", tmp_path / "out") == 0

    model = open_model("shipped")
    images = open_images(data, model, batch_size=5, workers=0, seed=4)
    built = spt_fast.build_prototypes(model, images, num_prompts=2, seed=4, progress=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        tuned = spt_fast.PromptedViT(model, built, num_classes=2)
    loader = open_labelled_images(data, model, batch_size=5, workers=0, seed=4, training=True).loader
    rates = {"lr": 0.02, "prompt_lr": 0.5, "weight_decay": 0.01}
    fit(tuned, loader, epochs=1, warmup_epochs=0.5, seed=4, progress=False, **rates)
    learned = reopened(tmp_path / "out" / TUNED_NAME)
    torch.testing.assert_close(learned.prompts, tuned.prompts)
    torch.testing.assert_close(learned.head.weight, tuned.head.weight)


def test_the_run_is_the_same_with_and_without_a_cache_and_says_what_is_kept(folders, tmp_path, capsys):
    base = ("--data", folders / "train", "--val-data", folders / "odd", "--num-prompts", 2)
    budget = ("--cache-budget", "1MiB")
    for name, cache in (("kept", ("ram", *budget)), ("off", ("off",))):
        assert train(*base, "--cache", *cache, "--out", tmp_path / name) == 0
        printed = capsys.readouterr().out
        assert ("decoded images are kept in memory, up to 1.0 MiB\n" in printed) is (name == "kept")
        assert (f"{folders / 'train'}: kept 24 of 24 images (0.3 MiB)\n" in printed) is (name == "kept")
        assert (f"{folders / 'odd'}: kept " in printed) is (name == "kept")
    kept, off = (reopened(tmp_path / name / TUNED_NAME) for name in ("kept", "off"))
    assert torch.equal(kept.prompts, off.prompts)
    assert torch.equal(kept.head.weight, off.head.weight)


def test_training_images_are_augmented_and_those_of_eval_are_not(folders):
    model, data = shipped.load_backbone(), str(folders / "odd")
    first, again = (
        torch.cat([images for images, _ in open_labelled_images(data, model, workers=0).loader])
        for _ in range(2)
    )
    assert torch.equal(first, again)
    augmented = open_labelled_images(str(folders / "train"), model, workers=0, training=True, seed=1)
    epochs = [torch.cat([images for images, _ in augmented.loader]) for _ in range(2)]
    assert not torch.equal(*epochs)
    assert epochs[0].shape == (augmented.num_images, 3, 64, 64)


@pytest.mark.parametrize(
    ("start", "depth", "num_prompts"),
    [
        (("--method", "vpt-deep", "--num-prompts", 4), "deep", 4),
        (("--method", "spt-shallow", "--num-prompts", 3), "shallow", 3),
        (("--freeze-prompts",), "deep", 20),
        (("--method", "vpt-deep", "--method-option", "project=4", "--num-prompts", 3, "--nmi"), "deep", 3),
        (("--method", "vfpt", "--prompt-init", "prototypes", "--num-prompts", 3, "--nmi"), "deep", 3),
        (("--method", "linear"), "deep", 0),
        (("--method", "bias"), "deep", 0),
    ],
)
def test_other_starts(start, depth, num_prompts, folders, tmp_path):
    base = ("--data", folders / "train", "--epochs", 1, "--warmup-epochs", 0)
    assert train(*base, *start, "--out", tmp_path) == 0
    model = open_model("shipped", pool="avg-with-prompts" if num_prompts else "avg")
    tuned = spt_fast.load_tuned(tmp_path / TUNED_NAME, model)
    assert (getattr(tuned, "depth", None), getattr(tuned, "num_prompts", 0)) == (depth, num_prompts)


def test_vipamin_starts_a_run_and_is_not_made_again(folders, tmp_path, monkeypatch, only_error):
    how = ("--method", "bpt", "--num-prompts", 3, "--method-option", "rank=3")
    init = ("--prompt-init", "vipamin", "--prompt-init-option", "k=2")
    base = ("--data", folders / "train", "--epochs", 2, "--warmup-epochs", 0, *how, *init)
    seen = []
    original = vipamin.vipamin_prompts

    def made(model, loader, count, **given):
        seen.append((count, given, loader.num_images))
        return original(model, loader, count, **given)

    monkeypatch.setattr(vipamin, "vipamin_prompts", made)
    assert train(*base, "--out", tmp_path / "unbroken") == 0
    assert seen == [(3, {"k": 2, "depth": "deep", "seed": 0}, 24)]
    kept = read_safetensors(tmp_path / "unbroken" / "start.safetensors", kind="prompt_start")[0]["prompts"]
    model = open_model("shipped", pool="avg-with-prompts")
    images = open_images(str(folders / "train"), model, workers=0, in_classes=True, max_images=256)
    assert torch.equal(kept, original(model, images, 3, k=2))

    written = Outputs.after_epoch

    def stopped(*given):
        written(*given)
        raise OSError("no space left")

    monkeypatch.setattr(Outputs, "after_epoch", stopped)
    assert "no space left" in only_error(train(*base, "--out", tmp_path / "out"), "train")
    monkeypatch.setattr(Outputs, "after_epoch", written)
    monkeypatch.setattr(vipamin, "vipamin_prompts", lambda *_, **__: pytest.fail("made again"))
    assert train(*base, "--out", tmp_path / "out", "--resume") == 0
    for name in (TUNED_NAME, "start.safetensors", "run.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    error = only_error(train(*base, "--prompts", "p.safetensors", "--out", tmp_path / "no"), "train")
    assert "prompts and prompt_init both say where prompts start, got p.safetensors and 'vipamin'" in error


def test_an_interrupted_run_goes_on(folders, tmp_path, only_error, monkeypatch, ctrl_c, capsys):
    steps = []

    def interrupted(self: torch.optim.AdamW, *args: object, **options: object) -> object:
        steps.append(1)
        # 24 images in batches of 5: before the second step of the second epoch.
        if len(steps) == 7:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args, **options)

    base = ("--data", folders / "train", "--val-data", folders / "odd", "--num-prompts", 2)
    assert train(*base, "--out", tmp_path / "unbroken") == 0
    capsys.readouterr()
    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    base = (*base, "--out", tmp_path / "out")
    assert train(*base) == cli.INTERRUPTED
    errors = capsys.readouterr().err.splitlines()
    kept = f"{tmp_path / 'out'} holds the run up to epoch 1"
    assert errors[-2:] == [f"spt-fast train: {kept}; go on from there with --resume", "spt-fast: interrupted"]
    assert reopened(tmp_path / "out" / TUNED_NAME).num_prompts == 2
    assert len(read_csv(tmp_path / "out" / "train.csv", ("epoch",))) == 1
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "holds a run already; go on with it" in only_error(train(*base), "train")
    error = only_error(train(*base, "--resume", "--lr", 0.5), "train")
    assert "these differ: lr: 0.01 in the folder, 0.5 now; give" in error
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before

    # Prototypes are read and not built again.
    monkeypatch.setattr("spt_fast.prototypes.build.build_prototypes", lambda *_, **__: pytest.fail("built"))
    assert train(*base, "--resume") == 0
    assert f"resume: {kept}\n" in capsys.readouterr().out
    for name in ("tuned.safetensors", "prototypes.safetensors", "classes.csv", "run.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
    assert len(steps) == 7 + 5
    assert train(*base, "--resume") == 0
    assert len(steps) == 7 + 5


def test_test_images_are_asked_for_by_name_and_evaluated_once(folders, tmp_path, only_error, capsys):
    base = ("--data", folders / "train", *VPT)
    error = only_error(train(*base, "--test-data", folders / "odd", "--out", tmp_path / "a"), "train")
    assert "test_data is for eval_test (--eval-test)" in error
    error = only_error(train(*base, "--eval-test", "--out", tmp_path / "a"), "train")
    assert "test_split is for data sets with splits" in error
    error = only_error(
        train(*base, "--eval-test", "--test-data", folders / "train", "--out", tmp_path), "train"
    )
    assert "test_data and test_split must name other images than those of training" in error
    both = ("--val-data", folders / "odd", "--eval-test", "--test-data", folders / "odd")
    error = only_error(train(*base, *both, "--keep", "best", "--out", tmp_path / "a"), "train")
    assert "test_data and test_split must name other images than those of validation" in error
    assert list(tmp_path.iterdir()) == []

    out = tmp_path / "out"
    assert train(*base, "--eval-test", "--test-data", folders / "odd", "--out", out) == 0
    printed = capsys.readouterr().out
    [(_, (images, accuracy))] = read_csv(out / "test.csv", ("images", "accuracy"))
    assert f"test accuracy {accuracy:.2%} of {images:.0f} images\n" in printed
    assert evaluate("--tuned", out / TUNED_NAME, "--data", folders / "odd", "--workers", 0) == 0
    assert f"accuracy {accuracy:.2%} of {images:.0f} images" in capsys.readouterr().out


def test_test_images_of_a_data_set_are_its_test_split(tmp_path, monkeypatch, capsys):
    def not_trained(*_: object, **__: object) -> None:
        raise ValueError("not trained")

    monkeypatch.setattr("spt_fast.training.run.Trainer", not_trained)
    assert train("--data", "digits", *VPT, "--eval-test", "--out", tmp_path / "digits") == 2
    assert "test: digits, split test: 600 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (("--data", "{odd}"), "two classes or more"),
        (("--data", "{flat}"), "must hold its images in one folder per class, but they are in no folder"),
        (
            ("--data", "{root}"),
            "holds folders with names of splits (train), but a class is a folder directly",
        ),
        (("--split", "val"), "split is for data sets with splits, got val for the folder"),
        (("--root", "{tmp}"), "root is for lists and data sets, got {tmp} for the folder"),
        (
            ("--num-prompts", "99999999"),
            "at most the number of patch tokens, 1536 per layer (24 images with 64",
        ),
        (("--data", "no_such_folder"), "there is no folder no_such_folder"),
        (("--data", "digits", "--split", "tset"), "split must be one of"),
        (("--val-data", "{train}"), "must name other images than those of training"),
        (("--val-data", "{train}/../train/", "--val-split", "val"), "other images than those of training"),
        (("--val-split", "val"), "val_split is for data sets with splits"),
        (("--eval-test",), "but data is {train}: give test_data (--test-data)"),
        (("--val-data", "{foreign}"), "1 classes that the model does not know (prime); it knows 2 ("),
        (("--data", __file__), f"data: {__file__} is no folder; give a folder of images"),
        (("--cache-budget", "lots"), "cache_budget must be a number with a unit"),
        (("--cache", "off", "--cache-budget", "1MB"), "cache_budget is without effect with cache='off'"),
        (("--epochs", "0"), "epochs must be an integer >= 1, got 0"),
        (("--lr", "nan"), "lr must be a finite number"),
        (("--warmup-epochs", "2"), "warmup_epochs must be below epochs (2), got 2"),
        (("--prompts", "no_such_file"), "there is no file no_such_file"),
        (("--num-prompts", "0"), "num_prompts must be an integer >= 1, got 0"),
        (("--out", "{tmp}/missing", "--data", "no_such_folder"), "there is no folder no_such_folder"),
        (("--method", "linear", "--nmi"), "nmi=True (--nmi) follows prompts while they learn"),
        (("--save-every", "0"), "save_every must be an integer >= 1 or None, got 0"),
        (("--resume", "--overwrite"), "resume goes on with what is in out, and overwrite replaces it"),
        (("--patience", "2"), "patience=2 is chosen by validation images: give val_data or val_split"),
        (
            ("--method", "vpt-deep", "--prompts", "p.safetensors"),
            "prompts is for methods whose prompts may start from a file, got p.safetensors",
        ),
    ],
    ids=" ".join,
)
def test_bad_input_of_train_is_one_line(changes, expected, folders, tmp_path, only_error):
    places = {
        "{tmp}": tmp_path,
        "{root}": folders,
        **{f"{{{path.name}}}": path for path in folders.iterdir()},
    }
    expected = expected.replace("{tmp}", str(tmp_path)).replace("{train}", str(folders / "train"))
    arguments = [*changes]
    for name, value in {"--data": "{train}", "--out": "{tmp}"}.items():
        arguments += [] if name in changes else [name, value]
    if not {"--prompts", "--num-prompts", "--method"} & {*changes}:
        arguments += map(str, VPT)
    for name, path in places.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    assert expected in only_error(train(*arguments), "train")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["prompts", "checkpoint"])
def test_overwrite_takes_away_no_file_that_the_run_reads(folders, tmp_path, only_error, name):
    kept = tmp_path / "prototypes.safetensors"
    kept.write_bytes(b"dear to somebody")
    where = ("--data", str(folders / "train"), "--out", str(tmp_path))
    message = only_error(train(*where, "--overwrite", f"--{name}", str(kept)), "train")
    assert f"{name} must not be a file that overwrite takes away, got {kept}" in message
    assert kept.read_bytes() == b"dear to somebody"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (("--save-every", "0"), "save_every must be an integer >= 1 or None, got 0"),
        (("--nmi", "--freeze-prompts"), "nmi=True (--nmi) follows prompts while they learn"),
        (("--method-option", "bottleneck=8"), "'bottleneck' is no option of method 'spt-deep'"),
        (("--method-option", "engine=fast"), "engine must be one of"),
    ],
    ids=" ".join,
)
def test_bad_options_are_found_before_prototypes_are_built(
    changes, expected, folders, tmp_path, only_error, monkeypatch
):
    monkeypatch.setattr("spt_fast.prototypes.build.build_prototypes", lambda *_, **__: pytest.fail("built"))
    assert expected in only_error(train("--data", folders / "train", "--out", tmp_path, *changes), "train")


def test_validation_images_that_are_trained_on_are_refused(folders, tmp_path, only_error, capsys):
    copied = shutil.copytree(folders / "odd", tmp_path / "val")
    shutil.copy(next((folders / "train" / "odd").iterdir()), copied / "odd" / "again.png")
    base = (
        "--data",
        folders / "train",
        *VPT,
        "--epochs",
        1,
        "--warmup-epochs",
        0,
    )
    arguments = (*base, "--val-data", copied, "--out", tmp_path / "out")
    total = len(list((copied / "odd").iterdir()))
    message = f"1 of {total} validation images are training images too, byte for byte: {copied}/odd/again.png"
    assert message in only_error(train(*arguments), "train")
    assert not (tmp_path / "out").exists()
    assert train(*arguments, "--allow-overlap") == 0
    assert message in capsys.readouterr().out


def test_unreadable_images_are_an_error_or_left_out(folders, tmp_path, only_error, capsys):
    data = shutil.copytree(folders / "train", tmp_path / "data")
    arguments = ("--data", data, "--num-prompts", 2, "--epochs", 1, "--warmup-epochs", 0)
    broken = sorted((data / "even").iterdir(), key=lambda path: int(path.stem))
    for path in broken[1:]:
        path.write_bytes(path.read_bytes()[:100])
    assert "cannot be read" in only_error(train(*arguments, "--out", tmp_path / "a"), "train")
    assert train(*arguments, "--bad-images", "skip", "--out", tmp_path / "a") == 0
    listed = [
        f"left out {len(broken) - 1} images that cannot be read:",
        *(f"  {path} (" for path in broken[1:]),
    ]
    assert all(line in capsys.readouterr().out for line in listed[:1])
    tuned = ("--tuned", tmp_path / "a" / TUNED_NAME, "--data", data, "--workers", 0)
    assert f"{broken[1]} cannot be read" in only_error(evaluate(*tuned), "eval")
    assert evaluate(*tuned, "--bad-images", "skip") == 0
    printed = capsys.readouterr().out
    assert f"of {24 - len(broken) + 1} images\n" in printed
    assert all(line in printed for line in listed)


def test_the_file_is_that_of_the_best_epoch_after_every_epoch(folders, tmp_path, monkeypatch, capsys):
    """Accuracies that rise and fall; what is on disk after each epoch is the best so far."""
    right = iter([1, 3, 2, 3])
    files = []

    def measured(*_: object, **__: object) -> Evaluation:
        # The file of the epoch before this one.
        files.append((tmp_path / TUNED_NAME).read_bytes() if (tmp_path / TUNED_NAME).exists() else b"")
        hits = next(right)
        return Evaluation(CLASSES, {(0, 0): hits, (0, 1): 4 - hits})

    monkeypatch.setattr("spt_fast.training.loop.evaluate_classes", measured)
    data = ("--data", folders / "train", "--val-data", folders / "odd", *VPT, "--out", tmp_path)
    assert train(*data, "--epochs", 4, "--keep", "best") == 0
    last = (tmp_path / TUNED_NAME).read_bytes()
    assert files[0] == b""
    assert files[1] != files[2]
    assert files[2] == files[3] == last
    rows = read_csv(tmp_path / "train.csv", ("epoch", "val_accuracy", "kept"))
    assert [numbers for _, numbers in rows] == [(1, 0.25, 0), (2, 0.75, 1), (3, 0.5, 0), (4, 0.75, 0)]
    assert "kept epoch 2, best by validation: 75.00%" in capsys.readouterr().out


def test_the_starts_of_the_released_code_reach_the_run(folders, tmp_path, monkeypatch):
    """Dropped batches, head and dropout, as the trainer gets them."""
    seen = {}

    def noted(tuned, train_loader, val_loader, recipe, **_):
        seen.update(tuned=tuned, steps=len(train_loader), recipe=recipe)
        raise ValueError("seen")

    monkeypatch.setattr("spt_fast.training.run.Trainer", noted)
    code = ("--drop-last", "--prompt-dropout", 0.1, "--head-init", "trunc_normal", "--head-std", 0.01)
    decay = ("--weight-decay", 0.01, "--head-weight-decay", 0.5)
    assert train("--data", folders / "train", *VPT, "--out", tmp_path, *code, *decay) == 2
    assert seen["steps"] == 24 // 5
    assert seen["tuned"].prompt_dropout.p == 0.1
    assert not seen["tuned"].head.bias.any()
    assert 0 < float(seen["tuned"].head.weight.detach().abs().max()) < 0.06
    assert (seen["recipe"].weight_decay, seen["recipe"].head_weight_decay) == (0.01, 0.5)


def test_the_best_epoch_wants_validation_images(tmp_path, only_error):
    error = only_error(train("--data", "digits", "--keep", "best", "--out", tmp_path), "train")
    assert "keep='best' is chosen by validation images: give val_data or val_split" in error


@pytest.mark.parametrize(
    "recipe", [("--head-weight-decay", -1), ("--epochs", 0), ("--lr", "nan"), ("--weight-decay", -1)]
)
def test_a_bad_recipe_is_refused_before_any_work(recipe, tmp_path, only_error, monkeypatch):
    monkeypatch.setattr(options, "open_model", lambda _: pytest.fail("work was begun"))
    name = recipe[0].strip("-").replace("-", "_")
    error = only_error(train("--data", "digits", *recipe, "--out", tmp_path), "train")
    assert f"{name} must be" in error


def test_both_rates_are_said_and_written(folders, tmp_path, capsys):
    base = (
        "--data",
        folders / "train",
        "--epochs",
        1,
        "--warmup-epochs",
        0,
        *VPT,
        "--lr",
        0.002,
    )
    assert train(*base, "--out", tmp_path / "default") == 0
    # VPT's uniform values for patches of 8 x 8 and width 192 have about this root mean square.
    expected = PROMPT_LR_FACTOR * 0.002 * (2 / (3 * 8 * 8 + 192)) ** 0.5
    said = re.search(r"^learning rates: head 0.002, prompts (\S+)$", capsys.readouterr().out, re.MULTILINE)
    assert float(said[1]) == pytest.approx(expected, rel=0.1)
    assert train(*base, "--prompt-lr", 0.5, "--freeze-prompts", "--out", tmp_path / "frozen") == 0
    assert "learning rates: head 0.002\n" in capsys.readouterr().out
    [(_, (prompt_lr,))] = read_csv(tmp_path / "frozen" / "train.csv", ("prompt_lr",))
    assert prompt_lr is None


def test_warm_up_is_a_tenth_of_the_epochs_unless_given(folders, tmp_path):
    """The first of ten steps, two in each epoch: the last step of the first epoch is at the highest rate."""
    command = f"train --model shipped --data {folders / 'train'} --workers 0 --batch-size 12"
    assert (
        cli.main([*command.split(), *map(str, VPT), "--epochs", "5", "--lr", "0.01", "--out", str(tmp_path)])
        == 0
    )
    rates = [numbers[0] for _, numbers in read_csv(tmp_path / "train.csv", ("lr",))]
    assert rates[0] == pytest.approx(0.01)
    assert rates == sorted(rates, reverse=True)


def test_the_seed_decides_a_run_and_leaves_the_callers_random_states(folders, tmp_path):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    losses = []
    for name in "ab":
        before = states()
        base = (
            "--data",
            folders / "train",
            *VPT,
            "--epochs",
            1,
            "--warmup-epochs",
            0,
        )
        assert train(*base, "--seed", 3, "--out", tmp_path / name) == 0
        assert states() == before
        losses.append(read_csv(tmp_path / name / "train.csv", ("loss",)))
        # Another state to start from.
        random.random()
        np.random.rand()
        torch.rand(1)
    assert losses[0] == losses[1]


def test_random_weights_are_the_same_every_time():
    before = torch.get_rng_state()
    first, second = (open_model("test_vit", pretrained=False) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("change", [{"patch_size": "4x4"}, {"num_blocks": "7"}])
def test_prototypes_of_another_backbone_are_refused(change, tmp_path, only_error):
    model = shipped.load_backbone()
    images = [shipped.load_digits("val")[0][:8]]
    built = spt_fast.build_prototypes(model, images, num_prompts=2, progress=False)
    replace(built, metadata={**built.metadata, **change}).save(tmp_path / "p.safetensors")
    options = ("--data", "digits", "--prompts", tmp_path / "p.safetensors", "--out", tmp_path / "out")
    ((key, theirs),) = change.items()
    assert f"p.safetensors is for {key} {theirs!r}, but" in only_error(train(*options), "train")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_classes", [2, 1000, 0])
def test_eval_without_class_names_wants_the_number_of_classes(
    num_classes, folders, tmp_path, capsys, only_error
):
    tuned = spt_fast.PromptedViT(shipped.load_backbone(), 2, num_classes=num_classes)
    tuned.save(tmp_path / "t.safetensors")
    base = ("--tuned", tmp_path / "t.safetensors", "--workers", 0, "--data")
    code = evaluate(*base, folders / "train")
    if num_classes == 2:
        assert code == 0
        assert "t.safetensors does not name its classes; they are taken to be those of" in (
            capsys.readouterr().err
        )
    else:
        error = only_error(code, "eval")
        assert f"has 2 classes, but the head of the model is for {num_classes}" in error


def test_two_processes_are_as_one(folders, tmp_path, run_two_ranks):
    """The same curve to 1e-4 and one writer; an error of one rank ends both; a resume by one process."""
    base = ["train", "--model", "shipped", *map(str, QUICK), "--data", str(folders / "train")]
    base += ["--val-data", str(folders / "odd"), "--num-prompts", "2", "--nmi"]
    run_two_ranks(f"""
import contextlib, io
from spt_fast.commands.main import main
base = {base!r}
def work(rank):
    said, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        assert main([*base, "--out", "two"]) == 0, errors.getvalue()
        assert main([*base, "--out", "two"]) == 2
    assert bool(said.getvalue()) == (rank == 0)
    message = "two holds a run already"
    assert (message if rank == 0 else "rank 0: " + message) in errors.getvalue(), errors.getvalue()
""")
    assert cli.main([*base, "--out", str(tmp_path / "one")]) == 0
    two, one = (
        [numbers for _, numbers in read_csv(tmp_path / name / "train.csv", ("loss", "val_accuracy", "lr"))]
        for name in ("two", "one")
    )
    np.testing.assert_allclose(two, one, rtol=1e-4)
    ours, theirs = (reopened(tmp_path / name / TUNED_NAME) for name in ("two", "one"))
    torch.testing.assert_close(ours.prompts, theirs.prompts, rtol=1e-3, atol=1e-4)
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names == WRITTEN | {"nmi.csv", "nmi.png"}
    assert cli.main([*base, "--out", str(tmp_path / "two"), "--resume"]) == 0


def test_labels_of_the_digits_are_places_in_the_models_classes():
    model = shipped.load_backbone()
    names = (*"9876543210", "ten")
    loader = open_labelled_images("digits", model, split="val", class_names=names).loader
    labels = torch.cat([labels for _, labels in loader])
    assert torch.equal(labels, 9 - shipped.load_digits("val")[1])


def test_validation_on_an_archive_is_said_to_be_unchecked(folders, tmp_path, capsys):
    with tarfile.open(tmp_path / "same.tar", "w") as archive:
        archive.add(folders / "train", ".")
    data = (
        "--data",
        folders / "train",
        "--val-data",
        tmp_path / "same.tar",
        *VPT,
    )
    assert train(*data, "--out", tmp_path / "out") == 0
    assert "validation: not checked for training images" in capsys.readouterr().out


def test_a_folder_without_a_readable_image_says_so(folders, tmp_path, only_error):
    shutil.copytree(folders / "train", tmp_path / "train")
    for file in (tmp_path / "train").glob("*/*"):
        file.write_bytes(b"")
    tuned = spt_fast.PromptedViT(shipped.load_backbone(), 2, num_classes=2)
    tuned.class_names = CLASSES
    tuned.save(tmp_path / "t.safetensors")
    data = ("--data", tmp_path / "train", "--bad-images", "skip", "--workers", 0)
    calls = {
        "train": lambda: train(*data, "--out", tmp_path / "out"),
        "eval": lambda: evaluate("--tuned", tmp_path / "t.safetensors", *data),
        "prototypes": lambda: cli.main(
            [*map(str, ("prototypes", "--model", "shipped", *data, "--out", tmp_path / "p.safetensors"))]
        ),
        "nmi": lambda: cli.main(
            [
                *map(
                    str,
                    (
                        "nmi",
                        "--model",
                        "shipped",
                        "--random",
                        2,
                        *data,
                        "--out",
                        tmp_path / "nmi",
                    ),
                )
            ]
        ),
    }
    for command, call in calls.items():
        said = only_error(call(), command)
        assert "data: none of the 24 images can be read, such as " in said, command
        assert "cannot identify image file" in said, command


def test_bad_input_of_eval_is_one_line(folders, tmp_path, only_error):
    missing = ("--tuned", tmp_path / "no_such_file", "--data", "digits")
    assert "there is no file" in only_error(evaluate(*missing), "eval")
    tuned = spt_fast.PromptedViT(shipped.load_backbone(), 2, num_classes=2)
    tuned.class_names = CLASSES
    tuned.save(tmp_path / "t.safetensors")
    foreign = ("--tuned", tmp_path / "t.safetensors", "--data", folders / "foreign")
    assert "classes that the model does not know (prime)" in only_error(evaluate(*foreign), "eval")
    digits = ("--tuned", tmp_path / "t.safetensors", "--data", "digits")
    assert "10 classes that the model does not know (0, 1, 2, 3, 4 and 5 more)" in only_error(
        evaluate(*digits), "eval"
    )


def test_a_last_batch_of_one_image_is_found_before_prototypes(tmp_path, only_error, monkeypatch):
    monkeypatch.setattr("spt_fast.prototypes.build.build_prototypes", lambda *_, **__: pytest.fail("built"))
    digits = ("--data", "digits", "--head-norm", "batch", "--out", tmp_path / "run", "--batch-size", 28)
    error = only_error(train(*digits), "train")
    assert "data must hold two images or more in every batch" in error
    assert "of 897 images in batches of 28 the last has 1; leave out" in error
    assert "--drop-last" in error
    assert not (tmp_path / "run").exists()
