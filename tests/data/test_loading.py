"""Images from files in batches: nothing stands in for what cannot be read; and what two sets share."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from spt_fast.data import images, shipped
from spt_fast.data.datasets import NamedImages
from spt_fast.data.images import open_images, open_labelled_images
from spt_fast.data.loading import ImageLoader
from spt_fast.data.overlap import find_overlap


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four grey images for each of the classes a, b, c; all of b are cut off."""
    for place, name in enumerate("abc"):
        (tmp_path / name).mkdir()
        for index in range(4):
            path = tmp_path / name / f"{index}.png"
            Image.effect_noise((32, 32), 50.0 * (place + 1)).save(path)
            if name == "b":
                path.write_bytes(path.read_bytes()[:100])
    return tmp_path


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    return shipped.load_backbone()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_an_error_that_names_it(workers, folder, backbone):
    loader = open_labelled_images(str(folder), backbone, workers=workers, batch_size=3).loader
    expected = rf"^{folder}/b/0\.png cannot be read \(.*\); repair or remove it, .*--bad-images skip\)$"
    with pytest.raises(ValueError, match=expected):
        list(loader)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_images_leave_nothing_in_their_place(workers, folder, backbone):
    # Two of the six batches hold nothing else.
    opened = open_labelled_images(str(folder), backbone, workers=workers, batch_size=2, bad_images="skip")
    for _ in range(2):
        batches = list(opened.loader)
        assert [labels.tolist() for _, labels in batches] == [[0, 0], [0, 0], [2, 2], [2, 2]]
        assert sorted(opened.loader.unreadable) == [f"{folder}/b/{index}.png" for index in range(4)]
    assert opened.num_images == 12
    rest = torch.cat([images for images, _ in batches])
    whole = open_labelled_images(str(folder), backbone, workers=0, batch_size=5, bad_images="skip").loader
    assert torch.equal(rest, torch.cat([images for images, _ in whole]))


def test_prototypes_read_the_images_of_training(folder, backbone):
    (folder / "a" / "0.png").rename(folder / "stray.png")
    counts = {
        in_classes: open_images(str(folder), backbone, workers=0, in_classes=in_classes).num_images
        for in_classes in (True, False)
    }
    assert counts == {True: 11, False: 12}


def test_a_last_batch_that_is_not_full_is_dropped_if_asked(tmp_path, backbone):
    """As PyTorch's DataLoader of the released code: floor(M / B) full batches, others in each epoch."""
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(7):
            Image.new("RGB", (32, 32), (20 * index, 10 * (name == "b"), 0)).save(
                tmp_path / name / f"{index}.png"
            )
    read = {"workers": 0, "batch_size": 4, "training": True, "augment": "none"}
    loader = open_labelled_images(str(tmp_path), backbone, drop_last=True, **read).loader
    kept = open_labelled_images(str(tmp_path), backbone, **read).loader
    assert [len(labels) for _, labels in kept] == [4, 4, 4, 2]
    epochs = [[images for images, _ in loader] for _ in range(3)]
    assert [[len(images) for images in batches] for batches in epochs] == [[4, 4, 4]] * 3
    assert len(loader) == 14 // 4
    # 14 colours: which two are left out changes.
    assert len({tuple(sorted(torch.cat(batches)[:, 0, 0, 0].tolist())) for batches in epochs}) > 1
    for wrong, message in (
        ({"batch_size": 15}, "drop_last leaves nothing of 14 images with batch_size 15"),
        ({"training": False, "augment": None}, "drop_last is for training images"),
    ):
        with pytest.raises(ValueError, match=message):
            open_labelled_images(str(tmp_path), backbone, drop_last=True, **{**read, **wrong})


def test_bad_images_must_be_known(folder, backbone):
    with pytest.raises(ValueError, match="bad_images must be one of 'error', 'skip', got 'replace'"):
        open_images(str(folder), backbone, bad_images="replace")


@pytest.mark.parametrize("option", [{"split": "test"}, {"root": "elsewhere"}])
def test_options_of_data_sets_are_refused_for_a_folder(option, folder, backbone):
    with pytest.raises(ValueError, match=r"is for .*data sets.*, got .* for the folder"):
        open_images(str(folder), backbone, **option)


class FakeReader:
    """As timm's readers: an open file and a label; `class_to_idx`."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths
        self.class_to_idx = {"b": 1, "a": 0}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.paths[index].open("rb"), index % 2


def test_timms_own_data_sets_replace_nothing_either(folder):
    from timm.data.dataset import ImageDataset

    paths = [folder / "a" / "0.png", folder / "b" / "0.png", folder / "c" / "0.png"]
    dataset = NamedImages(ImageDataset("", reader=FakeReader(paths)), "hfds/some")
    dataset.transform = lambda image: torch.tensor(image.getpixel((0, 0)))
    assert dataset.class_names() == ["a", "b"]
    assert [item[1] for item in (dataset[0], dataset[2])] == [0, 0]
    assert dataset[1].name == "image 1 (counted from 0) of hfds/some"


def test_torchvisions_folders_are_read_as_ours(folder):
    from torchvision.datasets import ImageFolder

    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("L", (4, 2))
    image.save(folder / "a" / "0.png", exif=exif)
    dataset = NamedImages(ImageFolder(str(folder)), "torch/image_folder")
    dataset.transform = lambda image: image.size
    assert dataset[0] == ((2, 4), 0)
    assert dataset.labels() == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset[4].name.startswith("image 4")


class Grey(TensorDataset):
    """As torchvision's MNIST: grey images in memory."""

    targets = torch.tensor([4])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("L", (2, 2), 7), 4


def test_grey_images_of_a_data_set_are_made_rgb():
    dataset = NamedImages(Grey(torch.zeros(1)), "torch/mnist")
    dataset.transform = lambda image: image.getpixel((0, 0))
    assert dataset[0] == ((7, 7, 7), 4)
    assert dataset.labels() == [4]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_more_workers_than_cores_are_no_warning(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    data = TensorDataset(torch.arange(4))
    loader = ImageLoader(data, num_images=4, num_workers=2, batch_size=2)
    assert [batch[0].tolist() for batch in loader] == [[0, 1], [2, 3]]


def test_overlap_is_found_by_bytes(tmp_path):
    contents = {
        "a": b"one" * 999,
        "b": b"two" * 999,
        "c": b"longer" * 999,
        "d": b"",
        "e": b"xne" + b"one" * 998,
    }
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for place, names in ((ours, "abd"), (theirs, "bcde")):
        place.mkdir()
        for name in names:
            (place / name).write_bytes(contents[name])
    (theirs / "link").symlink_to(ours / "a")
    (theirs / "broken").symlink_to(ours / "gone")
    found = find_overlap(sorted(ours.iterdir()), sorted(theirs.iterdir()))
    assert [path.name for path in found] == ["b", "link"]
    assert find_overlap(list(ours.iterdir()), []) == []


class Failing(Dataset):
    """Raises one error for every image."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> None:
        raise self.error from KeyError("a cause with a traceback of its own")


def error_of(loader: ImageLoader) -> tuple[type[Exception], str, str]:
    """Class, message and message of the cause; frames would keep the workers until they are collected."""
    try:
        list(loader)
    except Exception as error:
        return type(error), str(error), str(error.__cause__)
    raise AssertionError("there was no error")


class OddError(Exception):
    """Of no class that the loader knows, and not to be made from a message alone."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} {second}")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("pixels: 3\n  and more"), ValueError, "pixels: 3\n  and more"),
        (FileNotFoundError(2, "not there", "x"), OSError, "[Errno 2] not there: 'x'"),
        (KeyError("key"), RuntimeError, "'key'"),
        (OddError("a", "b"), RuntimeError, "a b"),
        (AssertionError(), RuntimeError, "AssertionError"),
    ],
)
def test_an_error_in_a_worker_is_its_message(error, kind, message):
    found, text, cause = error_of(ImageLoader(Failing(error), num_images=2, num_workers=1))
    assert issubclass(found, kind)
    assert text == message
    # The worker's traceback is that of the cause.
    assert "Traceback" in cause


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_full_shared_memory_names_the_way_out(monkeypatch):
    # As torch words it.
    error = RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left (28)")
    _, text, _ = error_of(ImageLoader(Failing(error), num_images=2, num_workers=1))
    assert re.search(r"shared memory .*--workers 0.*\(unable to .*\(28\)\)$", text)
    full = os.statvfs("/")
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=3, f_frsize=full.f_frsize))
    loader = ImageLoader(TensorDataset(torch.arange(4)), num_images=4, num_workers=2)
    with pytest.raises(RuntimeError, match=r"--workers 0.*bytes are free"):
        list(loader)


class Process(Dataset):
    """The number of the process that reads."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_serve_every_pass_and_end_with_the_loader():
    loader = ImageLoader(Process(), num_images=8, num_workers=2)
    passes = [{int(each[0]) for each in loader} for _ in range(3)]
    assert passes[0] == passes[1] == passes[2]
    assert len(passes[0]) == 2
    assert {each.pid for each in multiprocessing.active_children()} >= passes[0]
    del loader
    assert not {each.pid for each in multiprocessing.active_children()} & passes[0]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_second_iteration_ends_the_first(workers):
    loader = ImageLoader(TensorDataset(torch.arange(6)), num_images=6, num_workers=workers)
    first = iter(loader)
    assert int(next(first)[0]) == 0
    second = iter(loader)
    assert [int(batch[0]) for batch in second] == list(range(6))
    with pytest.raises(RuntimeError, match="another one has begun since"):
        next(first)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_the_order_does_not_depend_on_workers():
    orders = []
    for workers in (0, 2):
        data = TensorDataset(torch.arange(20))
        loader = ImageLoader(data, num_images=20, num_workers=workers, shuffle=True, seed=3)
        orders.append([[int(batch[0]) for batch in loader] for _ in range(3)])
    assert orders[0] == orders[1]
    assert orders[0][0] != orders[0][1] != orders[0][2]


class Collecting(TensorDataset):
    """Its workers collect garbage, as Python may do at any time."""

    def __getitem__(self, index):
        gc.collect()
        return super().__getitem__(index)


class Cycle:
    """Garbage once its name is gone, as the iterator of a loader may be; says which process collects it."""

    def __init__(self):
        self.itself = self

    def __del__(self):
        os.write(2, f"{os.getpid()}\n".encode())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_do_not_collect_what_the_parent_is_done_with(capfd):
    loader = ImageLoader(Collecting(torch.zeros(4)), num_images=4, num_workers=1)
    gc.collect()
    Cycle()
    assert len(list(loader)) == 4
    gc.collect()
    assert capfd.readouterr().err == f"{os.getpid()}\n"


class _Left(Dataset):
    """What the thread that hands over a worker's batches does with an error."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        for error in (ConnectionResetError("the parent is gone"), EOFError(), ValueError("a real one")):
            sys.excepthook(type(error), error, None)
        return torch.zeros(1), 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_says_nothing_of_a_parent_that_is_gone(capfd, monkeypatch):
    # torch.distributed leaves a hook of its own behind, which says the rank.
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    list(ImageLoader(_Left(), num_images=1, num_workers=1))
    assert capfd.readouterr().err == "ValueError: a real one\n"
    assert sys.excepthook is sys.__excepthook__


def test_labels_of_no_class_stay_none_of_them():
    dataset = SimpleNamespace(target_transform=None)
    images._renumber(dataset, "hfds/some", ("b", "c", "a"), ("a", "b", "c"))
    assert [dataset.target_transform(label) for label in (-1, 0, 1, 2)] == [-1, 1, 2, 0]


def test_targets_that_are_more_than_a_number_are_known_with_the_images_only():
    class Many(Dataset):
        targets = torch.zeros(3, 8)

        def __len__(self):
            return 3

    assert NamedImages(Many(), "torch/qmnist").labels() is None
