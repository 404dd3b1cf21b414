"""A run in a folder: its files, what ends it and how it goes on, and what is refused."""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import spt_fast
from spt_fast import Recipe
from spt_fast.data.images import open_labelled_images
from spt_fast.support.files import read_safetensors
from spt_fast.support.tables import read_csv
from spt_fast.training.checkpoint import CHECKPOINT_NAME, Checkpoint
from spt_fast.training.evaluation import evaluate_classes
from spt_fast.training.folder import FILE_NAMES, run_folder
from spt_fast.training.history import HISTORY_COLUMNS
from spt_fast.training.loop import fit
from spt_fast.training.run import Run, train

QUICK = Recipe(epochs=3, warmup_epochs=1)
ALWAYS = {CHECKPOINT_NAME, "run.yaml", "tuned.safetensors", "train.csv", "train.png"}
Loader = list[tuple[Tensor, Tensor]]


@pytest.fixture
def make_tuned(make_vit: Callable[..., nn.Module]) -> Callable[..., spt_fast.PromptedViT]:
    """Factory of tiny models with two random prompts per block."""

    def make(seed: int = 0, **options: Any) -> spt_fast.PromptedViT:
        model = make_vit()
        torch.manual_seed(seed)
        return spt_fast.PromptedViT(model, 2, num_classes=4, **options)

    return make


# Runs in one process that has imported everything; each run is a fork of it, which may be killed.
_SCRIPT = r"""
import json, os, random, resource, signal, sys, traceback
import torch
from timm.models.vision_transformer import VisionTransformer
import spt_fast
from spt_fast import Recipe
from spt_fast.training.loop import shuffled_loader
from spt_fast.training.run import train

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
images = torch.randn(24, 3, 32, 32, generator=generator)
labels = torch.arange(24) % 4
others = [(images.flip(3), labels)]
recipe = Recipe(epochs=3, warmup_epochs=1, lr=0.02, prompt_dropout=0.1, ema=0.9, keep="best")

def run(out, seed=0, **options):
    torch.manual_seed(1)
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4)
    # A run that goes on does not depend on the prompts and the head that it is given.
    torch.manual_seed(seed)
    tuned = spt_fast.PromptedViT(model, 2, num_classes=4, prompt_dropout=0.1)
    loader = shuffled_loader(images, labels, batch_size=8, seed=3)
    options = {"test_data": others, "nmi": True, "save_every": 2, "progress": False, **options}
    return train(tuned, loader, others, recipe, out=out, **options)

# What is imported late is imported before the forks.
run("warm")

def in_a_fork(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def kill_at(moment):
    # Before or after a file gets its place or goes, before it is on the disk, and before a step.
    seen = 0
    def wrap(owner, name, after=True):
        original = getattr(owner, name)
        def patched(*args, **options):
            nonlocal seen
            for early in (True, False):
                seen += early or after
                if seen == moment and (early or after):
                    os.kill(os.getpid(), signal.SIGKILL)
                if early:
                    result = original(*args, **options)
            return result
        setattr(owner, name, patched)
    wrap(os, "replace")
    wrap(os, "unlink", after=False)
    wrap(os, "fsync", after=False)
    wrap(torch.optim.AdamW, "step", after=False)
"""


_OUTCOMES = r"""
assert in_a_fork(lambda: run("unbroken")) == 0
draw = random.Random(SEED)
kills = []

def killed_and_resumed(name, attempt):
    kills.append(0)
    while (code := in_a_fork(attempt)) != 0:
        draw.random()
        assert code == -9, code
        kills[-1] += 1
        assert kills[-1] < 100

for trial in range(3):
    def attempt():
        kill_at(draw.randint(1, 90))
        goes_on = os.path.exists(f"killed-{trial}/checkpoint.pt")
        run(f"killed-{trial}", seed=99 if goes_on else 0, resume=True)
    killed_and_resumed(trial, attempt)

def at_any_time():
    if kills[-1] < 4:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.05, 0.4))
    run("killed-3", resume=True)
killed_and_resumed(3, at_any_time)

def full():
    # The checkpoint of the second epoch is written with room for the small files only.
    import spt_fast.training.checkpoint as checkpoint
    write = checkpoint.Checkpoint.write
    def limited(self, path):
        if self.trainer["epoch"] == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10000, resource.RLIM_INFINITY))
        write(self, path)
    checkpoint.Checkpoint.write = limited
    try:
        run("full")
    except OSError as error:
        with open("said", "w") as file:
            file.write(str(error))

assert in_a_fork(full) == 0
assert in_a_fork(lambda: run("full", resume=True)) == 0

def with_a_worker():
    # A worker that outlives the run, as those of a DataLoader do for some seconds.
    from spt_fast.training.folder import run_folder
    with run_folder("locked"):
        worker = os.fork()
        if worker == 0:
            import time
            time.sleep(20)
            os._exit(0)
        with open("worker", "w") as file:
            file.write(str(worker))
        os.kill(os.getpid(), signal.SIGKILL)

assert in_a_fork(with_a_worker) == -9
assert in_a_fork(lambda: run("locked", resume=True)) == 0
os.kill(int(open("worker").read()), signal.SIGKILL)
print(json.dumps({"kills": kills, "said": open("said").read()}))
"""


@pytest.fixture(scope="module")
def outcomes(
    tmp_path_factory: pytest.TempPathFactory, run_script: Callable[..., Any]
) -> tuple[Path, dict[str, Any]]:
    """The folder of the runs that were killed, and what was found there."""
    place = tmp_path_factory.mktemp("runs")
    # Other moments every time; what fails is printed.
    seed = int.from_bytes(os.urandom(3), "big")
    print(f"seed {seed}")
    done = run_script(_SCRIPT + _OUTCOMES.replace("SEED", str(seed)), place)
    assert done.returncode == 0, done.stderr[-3000:]
    return place, json.loads(done.stdout.splitlines()[-1])


def content(folder: Path) -> dict[str, Any]:
    """Everything in the folder of a run but seconds and figures, bit for bit."""
    found: dict[str, Any] = {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.suffix not in (".png", ".pt") and path.name != "train.csv"
    }
    seconds = HISTORY_COLUMNS.index("seconds")
    found["train.csv"] = [
        [cell for column, cell in enumerate(line.split(",")) if column != seconds]
        for line in (folder / "train.csv").read_text().splitlines()
    ]
    state = dict(Checkpoint.read(folder / CHECKPOINT_NAME).trainer)
    del state["history"], state["running"]
    found["state"] = repr(
        torch.utils._pytree.tree_map(lambda x: x.tolist() if isinstance(x, Tensor) else x, state)
    )
    return found


def test_runs_that_are_killed_and_resumed_end_as_one_that_is_not(outcomes: tuple[Path, Any]) -> None:
    """Killed at random moments, several times, also between two files and in the middle of one."""
    place, found = outcomes
    assert sum(found["kills"]) > 2, found
    expected = content(place / "unbroken")
    names = {"tuned.safetensors", "ema.safetensors", "classes.csv", "confusion.csv", "nmi.csv", "test.csv"}
    assert names < expected.keys()
    assert len(expected["train.csv"]) == 1 + 3
    for trial in range(len(found["kills"])):
        assert_same(content(place / f"killed-{trial}"), expected)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_how_to_go_on(outcomes: tuple[Path, Any]) -> None:
    place, found = outcomes
    assert found["said"].startswith(
        "cannot write full/checkpoint.pt: File too large; full holds the run up to "
    )
    assert found["said"].endswith("epoch 1, step 2 of epoch 2; go on from there with resume=True (--resume)")
    assert_same(content(place / "full"), content(place / "unbroken"))


def test_a_killed_run_leaves_no_lock_even_if_its_workers_live(outcomes: tuple[Path, Any]) -> None:
    place, _ = outcomes
    assert_same(content(place / "locked"), content(place / "unbroken"))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name


def test_the_files_of_a_run(make_tuned: Any, loader: Loader, tmp_path: Path) -> None:
    tuned = make_tuned()
    recipe = QUICK.replace(ema=0.9)
    facts = {"data": "waves", "model": "tiny"}
    run = train(tuned, loader, loader[:2], recipe, out=tmp_path / "run", test_data=loader[2:], facts=facts)
    assert isinstance(run, Run)
    tables = {"classes.csv", "confusion.csv", "test.csv", "test-classes.csv", "test-confusion.csv"}
    assert run.paths.keys() == ALWAYS | tables | {"ema.safetensors"}
    assert {path.name for path in run.folder.iterdir()} == run.paths.keys()

    twin = make_tuned()
    history = fit(twin, loader, loader[:2], recipe, progress=False)
    assert (run.history.loss, run.history.val_accuracy) == (history.loss, history.val_accuracy)
    saved, _ = read_safetensors(run.paths["tuned.safetensors"], kind="prompted_vit")
    assert torch.equal(saved["prompts"], twin.prompts)
    assert torch.equal(tuned.prompts, twin.prompts)
    averaged, _ = read_safetensors(run.paths["ema.safetensors"], kind="prompted_vit")
    assert not torch.equal(averaged["prompts"], saved["prompts"])

    assert run.evaluation == evaluate_classes(tuned, loader[:2])
    assert run.test == evaluate_classes(tuned, loader[2:])
    rows = dict(read_csv(run.paths["test.csv"], ("images", "accuracy"), ("weights",)))
    assert rows[("kept",)] == (24, run.test.accuracy)
    twin.load(run.paths["ema.safetensors"])
    assert rows[("ema",)] == (24, evaluate_classes(twin, loader[2:]).accuracy)

    about = yaml.safe_load(run.paths["run.yaml"].read_text())
    assert Recipe(**about["recipe"]) == recipe
    assert (about["data"], about["batches"], about["trainable_parameters"]) == (
        "waves",
        5,
        3 * 2 * 32 + 4 * 33,
    )
    assert about["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert str(tmp_path) not in run.paths["run.yaml"].read_text()


def test_a_finished_run_is_returned_without_training(
    make_tuned: Any, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"out": tmp_path, "test_data": loader[:1], "resume": True}
    first = train(make_tuned(), loader, loader[:2], QUICK.replace(keep="best"), **options)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("a step was made"))
    again = train(make_tuned(seed=9), loader, loader[:2], QUICK.replace(keep="best"), **options)
    assert (again.history, again.evaluation, again.test) == (first.history, first.evaluation, first.test)
    assert torch.equal(again.tuned.prompts, first.tuned.prompts)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_finished_run_can_be_tested_later_but_on_one_set_of_images(
    make_tuned: Any, loader: Loader, tmp_path: Path
) -> None:
    plain = train(make_tuned(), loader, recipe=QUICK, out=tmp_path)
    assert plain.test is None
    tested = train(make_tuned(), loader, recipe=QUICK, out=tmp_path, test_data=loader[:3], resume=True)
    assert tested.test == evaluate_classes(plain.tuned, loader[:3])
    assert "test.csv" in tested.paths
    with pytest.raises(ValueError, match=r"holds a test on .*'batches': 3.* is tested once; got .*4.*eval"):
        train(make_tuned(), loader, recipe=QUICK, out=tmp_path, test_data=loader[:4], resume=True)


def test_test_images_are_known_by_their_number(make_tuned: Any, loader: Loader, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": QUICK.replace(epochs=2), "out": tmp_path / "run", "progress": False}
    with pytest.raises(
        TypeError, match=r"test_data must be a loader that can be read again, .* list_iterator"
    ):
        train(make_tuned(), loader, test_data=iter(loader), **options)
    assert list(tmp_path.iterdir()) == []
    options["resume"] = True
    first = train(make_tuned(), loader, test_data=loader[:1], **options)
    images, labels = loader[0]
    for others in ([(images[:3], labels[:3])], DataLoader(TensorDataset(images[:3], labels[:3]), 3)):
        with pytest.raises(ValueError, match=r"'images': 8\}, and a run is tested once; got .*'images': 3\}"):
            train(make_tuned(), loader, test_data=others, **options)
    # As older versions noted it.
    path = tmp_path / "run" / CHECKPOINT_NAME
    written = Checkpoint.read(path)
    replace(written, test={**written.test, "facts": {"batches": 1}}).write(path)
    assert train(make_tuned(), loader, test_data=loader[:1], **options).test == first.test


def test_images_of_which_nothing_is_known_are_tested_again(
    make_tuned: Any, loader: Loader, tmp_path: Path
) -> None:
    class Unsized:
        def __init__(self, batches: Loader) -> None:
            self._batches = batches

        def __iter__(self) -> Any:
            return iter(self._batches)

    options: dict[str, Any] = {"recipe": QUICK.replace(epochs=2), "out": tmp_path, "progress": False}
    for count in (1, 3):
        run = train(make_tuned(), loader, test_data=Unsized(loader[:count]), resume=True, **options)
        assert run.test == evaluate_classes(run.tuned, loader[:count])


def test_another_recipe_data_or_model_is_refused(make_tuned: Any, loader: Loader, tmp_path: Path) -> None:
    train(make_tuned(), loader, recipe=QUICK, out=tmp_path, facts={"data": "waves"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = make_tuned()
    with torch.no_grad():
        other.model.blocks[0].attn.qkv.weight.mul_(2)
    with pytest.raises(ValueError, match="these differ") as raised:
        train(
            other,
            loader[:3],
            recipe=QUICK.replace(lr=0.5),
            out=tmp_path,
            facts={"data": "noise"},
            resume=True,
        )
    for line in (
        "lr: 0.01 in the folder, 0.5 now",
        "data: waves in the folder, noise now",
        "batches: 5 in the",
    ):
        assert line in str(raised.value)
    assert "backbone_fingerprint: " in str(raised.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_results_are_neither_lost_nor_mixed(make_tuned: Any, loader: Loader, tmp_path: Path) -> None:
    first = train(make_tuned(), loader, loader[:1], QUICK.replace(ema=0.5), out=tmp_path, nmi=True)
    assert {"nmi.csv", "nmi.png", "ema.safetensors", "classes.csv"} < first.paths.keys()
    with pytest.raises(FileExistsError, match=r"holds a run already; go on with it .* --overwrite"):
        train(make_tuned(), loader, recipe=QUICK, out=tmp_path)
    with pytest.raises(ValueError, match="give one of them"):
        train(make_tuned(), loader, recipe=QUICK, out=tmp_path, resume=True, overwrite=True)
    second = train(make_tuned(), loader, recipe=QUICK, out=tmp_path, overwrite=True)
    assert second.paths.keys() == ALWAYS
    assert {path.name for path in tmp_path.iterdir()} == ALWAYS
    (tmp_path / CHECKPOINT_NAME).unlink()
    with pytest.raises(FileExistsError, match="exists already"):
        train(make_tuned(), loader, recipe=QUICK, out=tmp_path, resume=True)


def test_a_run_that_fails_before_a_step_leaves_nothing(
    make_tuned: Any, loader: Loader, tmp_path: Path
) -> None:
    wrong = [(images, labels + 7) for images, labels in loader]
    with pytest.raises(ValueError, match="label"):
        train(make_tuned(), wrong, recipe=QUICK, out=tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="tuned must be a PromptedViT, or of another method, got Linear"):
        train(nn.Linear(2, 2), loader, recipe=QUICK, out=tmp_path / "a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="save_every must be an integer >= 1 or None, got 0"):
        train(make_tuned(), loader, recipe=QUICK, out=tmp_path / "a", save_every=0)
    with pytest.raises(TypeError, match=r"facts must map names to plain values, got 'a': \[1\]"):
        train(make_tuned(), loader, recipe=QUICK, out=tmp_path / "a", facts={"a": [1]})
    assert list(tmp_path.iterdir()) == []


def test_a_refused_resume_leaves_what_a_killed_run_started_from(
    make_tuned: Any, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr("spt_fast.training.folder.RunFolder.discard_a_start", lambda _: None)
        killed.setattr("torch.optim.AdamW.step", lambda *_, **__: sys.exit(1))
        with pytest.raises(SystemExit):
            train(make_tuned(), loader, recipe=QUICK, out=tmp_path, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {CHECKPOINT_NAME, "run.yaml"} <= {*before}
    with pytest.raises(ValueError, match="epochs"):
        train(make_tuned(), loader, recipe=QUICK.replace(epochs=9), out=tmp_path, resume=True, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    run = train(make_tuned(), loader, recipe=QUICK, out=tmp_path, resume=True, progress=False)
    assert run.history.epochs == QUICK.epochs


def test_a_loss_that_is_nan_leaves_the_last_good_epoch(
    make_tuned: Any, loader: Loader, tmp_path: Path
) -> None:
    class Breaks(list[Any]):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            for images, labels in super().__iter__():
                yield images.clone().fill_(3e38) if self.passes == 2 else images, labels

    with pytest.raises(FloatingPointError) as raised:
        train(make_tuned(), Breaks(loader), recipe=QUICK, out=tmp_path)
    assert "loss is nan at epoch 2, step 1" in str(raised.value)
    assert f"{tmp_path} holds the run up to epoch 1; to resume it would lead here" in str(raised.value)
    assert Checkpoint.read(tmp_path / CHECKPOINT_NAME).trainer["epoch"] == 1
    saved, _ = read_safetensors(tmp_path / "tuned.safetensors", kind="prompted_vit")
    assert saved["prompts"].isfinite().all()


def test_two_runs_in_one_folder_are_refused(make_tuned: Any, loader: Loader, tmp_path: Path) -> None:
    with (
        run_folder(tmp_path),
        pytest.raises(ValueError, match=rf"{tmp_path} is in use: another run \(process {os.getpid()}\)"),
    ):
        train(make_tuned(), loader, recipe=QUICK, out=tmp_path, resume=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_into_is_found_before_training(
    make_tuned: Any, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: pytest.fail("a step was made"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="out must be a folder"):
        train(make_tuned(), loader, recipe=QUICK, out=tmp_path / "file")
    # Nobody can write there, root neither.
    with pytest.raises(OSError, match="/proc/run"):
        train(make_tuned(), loader, recipe=QUICK, out="/proc/run")


def test_nmi_wants_prompts_that_learn(make_tuned: Any, loader: Loader, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nmi=True .* no prompts learn"):
        train(make_tuned(freeze_prompts=True), loader, recipe=QUICK, out=tmp_path / "a", nmi=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"out": None}, TypeError, "out must be the name of a folder, a string or a Path, got None"),
        ({"recipe": "paper"}, TypeError, "recipe must be a Recipe, as .* got 'paper'"),
        ({"recipe": Recipe(method="linear")}, ValueError, "method='linear' of the recipe .* has 'vpt-deep'"),
        ({"recipe": Recipe(num_prompts=7)}, ValueError, "num_prompts=7 of the recipe is not that .* has 2;"),
        ({"facts": "birds"}, TypeError, "facts must map names to plain values, got 'birds'"),
        ({"facts": {"recipe": "mine"}}, ValueError, "facts must have other names than those .*, got recipe"),
        ({"facts": {"tuned_method": "mine", "data": "birds"}}, ValueError, "got tuned_method$"),
    ],
)
def test_other_arguments_are_refused(
    make_tuned: Any, loader: Loader, tmp_path: Path, options: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        train(
            make_tuned(), loader, **{"out": tmp_path / "out", "recipe": QUICK, "progress": False, **options}
        )
    assert list(tmp_path.iterdir()) == []


def test_images_whose_labels_count_other_classes_are_refused(make_vit: Any, tmp_path: Path) -> None:
    for name in ("train/ant", "train/bee", "train/cat", "val/bee", "val/cat"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(2):
            colour = (number, len(name), ord(name[-1]))
            Image.new("RGB", (32, 32), colour).save(tmp_path / name / f"{number}.png")
    model, out = make_vit(), tmp_path / "out"
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    options: dict[str, Any] = {"recipe": QUICK, "out": out, "progress": False}
    learned = open_labelled_images(str(tmp_path / "train"), model, training=True, workers=0)
    others = open_labelled_images(str(tmp_path / "val"), model, workers=0)
    tuned = spt_fast.PromptedViT(model, 2, num_classes=3)
    for argument in ("val_data", "test_data"):
        with pytest.raises(
            ValueError, match=f"{argument} must have the classes of tuned .* ant, bee, cat, got bee, cat"
        ):
            train(tuned, learned, **options, **{argument: others})
    with pytest.raises(ValueError, match="train_data must have the classes of tuned"):
        train(tuned, others, **options)
    assert not out.exists()
    # As docs/train.md has it.
    same = open_labelled_images(
        str(tmp_path / "val"),
        model,
        class_names=learned.class_names,
        tuned=learned.loader.preprocessing,
        workers=0,
    )
    run = train(tuned, learned, same, **options)
    assert [labels.tolist() for _, labels in same.loader] == [[1, 1, 2, 2]]
    assert len(run.history.val_accuracy) == QUICK.epochs


def test_the_recipe_in_a_folder_starts_another_run(make_tuned: Any, loader: Loader, tmp_path: Path) -> None:
    run = train(make_tuned(), loader, recipe=QUICK.replace(ema=0.9), out=tmp_path / "a", progress=False)
    assert Recipe.from_yaml(run.paths["run.yaml"], ema=None) == QUICK


def test_tensorboard_is_asked_for_before_training(
    make_tuned: Any, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'needs the package tensorboard: pip install "spt_fast\[train\]"'):
        train(make_tuned(), loader, recipe=QUICK, out=tmp_path / "a", tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_each_epoch_and_goes_on_behind_the_checkpoint(
    make_tuned: Any, loader: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a writer that notes what it is given; the package need not be there."""
    opened: list[tuple[str, int]] = []
    scalars: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            opened.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            scalars.append((name, value, step))

        def flush(self) -> None: ...
        def close(self) -> None: ...

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    options: dict[str, Any] = {"recipe": QUICK, "out": tmp_path, "tensorboard": True, "nmi": True}

    class Stops(list[Any]):
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            if self.passes == 3:
                raise KeyboardInterrupt
            return super().__iter__()

    with pytest.raises(KeyboardInterrupt):
        train(make_tuned(), Stops(loader), loader[:1], **options)
    run = train(make_tuned(), loader, loader[:1], resume=True, **options)
    assert opened == [(str(tmp_path / "tensorboard"), epoch) for epoch in (1, 3)]
    found = {name: [value for each, value, _ in scalars if each == name] for name, _, _ in scalars}
    assert found["loss"] == run.history.loss
    assert found["val_accuracy"] == run.history.val_accuracy
    assert found["lr"] == run.history.lr
    assert [step for name, _, step in scalars if name == "nmi/mean"] == [1, 2, 3]
    assert len(found["nmi/block_3"]) == 3


def test_the_real_tensorboard_reads_what_is_written(make_tuned: Any, loader: Loader, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(make_tuned(), loader, recipe=QUICK, out=tmp_path, tensorboard=True)
    found = events.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(run.history.loss)
    again = train(make_tuned(), loader, recipe=QUICK, out=tmp_path, overwrite=True)
    assert not (tmp_path / "tensorboard").exists()
    assert again.paths.keys() <= set(FILE_NAMES)
