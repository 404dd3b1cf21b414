"""A pass is a function of seed and epoch: whoever reads it, however, and after whatever other pass."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from spt_fast.data import prefetch, shipped
from spt_fast.data.cache import ImageCache
from spt_fast.data.datasets import FileImages
from spt_fast.data.images import LabelledImages, open_images, open_labelled_images
from spt_fast.data.loading import ImageLoader, shuffled_loader
from spt_fast.data.prefetch import ahead
from spt_fast.support.distributed import Processes

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
COUNTS = {"a": 2, "b": 5, "c": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 images of noise in three classes."""
    place = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name, count in COUNTS.items():
        (place / name).mkdir()
        for index in range(count):
            pixels = generator.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / name / f"{index}.png")
    return place


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    return shipped.load_backbone()


@pytest.fixture
def opened(folder: Path, backbone: torch.nn.Module) -> Any:
    """Opens the folder to train on, in batches of 4, without workers, unless told otherwise."""

    def open_it(**options: Any) -> LabelledImages:
        read = {"batch_size": 4, "workers": 0, "training": True, "seed": 3, **options}
        return open_labelled_images(str(folder), backbone, **read)

    return open_it


def ranks(size: int) -> list[Processes]:
    """What `size` processes know of themselves."""
    found = []
    for rank in range(size):
        each = Processes()
        each.rank, each.size = rank, size
        found.append(each)
    return found


def assert_same_bits(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, other, strict=True))


@pytest.fixture
def epochs(opened: Any) -> list[list[Any]]:
    """Three passes, one after the other."""
    loader = opened().loader
    return [list(loader) for _ in range(3)]


@pytest.mark.parametrize("augment", ["resized-crop", "crop"])
@pytest.mark.parametrize(("workers", "cached"), [(0, True), (1, False), (3, False), (3, True)])
def test_neither_workers_nor_a_cache_change_a_bit(workers, cached, augment, opened):
    plain = opened(augment=augment).loader
    loader = opened(augment=augment, workers=workers, cache=ImageCache() if cached else None).loader
    for _ in range(2):
        assert_same_bits(list(loader), list(plain))


@pytest.mark.parametrize(("workers", "cached"), [(0, False), (0, True), (3, False)])
def test_a_pass_is_that_of_its_epoch_whatever_came_before(workers, cached, opened, epochs):
    loader = opened(workers=workers, cache=ImageCache() if cached else None).loader
    for epoch in (3, 1, 2):
        random.seed(epoch)
        torch.manual_seed(epoch)
        loader.set_epoch(epoch)
        assert_same_bits(list(loader), epochs[epoch - 1])
    # The next one follows.
    assert_same_bits(list(loader), epochs[2])
    # Images and order change from epoch to epoch.
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("skip", [0, 1, 3, 4])
def test_skipping_gives_the_tail_of_the_pass(skip, workers, opened, epochs):
    loader = opened(workers=workers).loader
    loader.set_epoch(2, skip)
    assert_same_bits(list(loader), epochs[1][skip:])
    assert len(loader) == 4
    assert_same_bits(list(loader), epochs[2])


def test_a_pass_that_was_left_early_changes_no_other(opened, epochs):
    loader = opened(workers=2).loader
    next(iter(loader))
    assert_same_bits(list(loader), epochs[1])


def test_every_image_epoch_and_seed_has_crops_of_its_own(backbone, tmp_path):
    """Four files of the same pixels, each read in two epochs by two seeds: 16 crops."""
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    for name in ("a/0", "a/1", "b/0", "b/1"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    crops = []
    for seed in (0, 1):
        loader = open_labelled_images(str(tmp_path), backbone, workers=0, training=True, seed=seed).loader
        crops += [crop for _ in range(2) for images, _ in loader for crop in images]
    assert len({crop.numpy().tobytes() for crop in crops}) == 16


def test_reading_leaves_the_generators_of_this_process_alone(opened):
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    for loader in (opened().loader, opened(cache=ImageCache()).loader):
        found = []
        for read in (False, True):
            random.seed(1)
            np.random.seed(1)
            torch.manual_seed(1)
            if read:
                list(loader)
                loader.in_order()
            found.append(draws())
        assert found[0] == found[1]


class Drawing(Dataset):
    """Random numbers of all three generators, as transforms of others may use them."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


def test_other_data_sets_have_the_same_random_numbers_everywhere():
    passes = [
        torch.cat(list(ImageLoader(Drawing(), num_images=5, num_workers=workers, batch_size=size, seed=1)))
        for workers, size in ((0, 2), (2, 3), (3, 1))
    ]
    assert torch.equal(passes[0], passes[1])
    assert torch.equal(passes[0], passes[2])
    assert len(passes[0].unique()) == 15


def test_index_batches_say_what_a_pass_reads(opened):
    loader, other = opened().loader, opened().loader
    labels = torch.tensor(opened().labels)
    for _ in range(2):
        batches = list(other.index_batches())
        assert [labels[batch].tolist() for batch in batches] == [each.tolist() for _, each in loader]
        assert sorted(chain(*batches)) == list(range(13))


@pytest.mark.parametrize("cached", [False, True])
def test_in_order_is_each_image_once(cached, opened):
    read = {"augment": "none", "drop_last": True, "balance": "sampler"}
    for processes in ranks(2):
        opened_here = opened(**read, processes=processes, cache=ImageCache() if cached else None)
        loader = opened_here.loader
        list(loader)
        ordered = loader.in_order()
        assert type(ordered) is type(loader)
        assert ordered.dataset is loader.dataset
        for _ in range(2):
            batches = list(ordered)
            assert torch.cat([labels for _, labels in batches]).tolist() == list(opened_here.labels)
        whole = opened(training=False, augment=None).loader
        assert_same_bits(batches, list(whole))
        assert [len(batch) for batch in loader.index_batches()] == [2] * 3


def test_what_is_random(opened, folder, backbone):
    assert opened().loader.is_random
    assert opened(augment="crop", cache=ImageCache()).loader.is_random
    assert not opened(augment="none", cache=ImageCache()).loader.is_random
    assert not opened(training=False).loader.is_random
    assert not open_images(str(folder), backbone, workers=0).is_random
    assert not open_labelled_images("digits", backbone, training=True).loader.is_random


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("balance", ["none", "sampler"])
def test_shares_together_are_the_batches_of_one_process(size, balance, opened):
    whole = opened(balance=balance).loader
    shares = [opened(balance=balance, processes=each, workers=0).loader for each in ranks(size)]
    for _ in range(2):
        expected = list(whole)
        parts = list(zip(*shares, strict=True))
        assert len(parts) == len(expected) == len(whole) == len(shares[-1])
        for (images, labels), batch in zip(expected, parts, strict=True):
            assert torch.equal(torch.cat([each[0] for each in batch]), images)
            assert torch.equal(torch.cat([each[1] for each in batch]), labels)
            counts = [len(each[1]) for each in batch]
            assert max(counts) - min(counts) <= 1
    # 13 images in batches of 4: the last has one image, and all ranks but one have none.
    assert sorted(len(each[1]) for each in parts[-1]) == [0] * (size - 1) + [1]
    assert all(each[0].shape[1:] == images.shape[1:] for each in parts[-1])
    assert all(each[1].dtype == torch.int64 for each in parts[-1])


@pytest.mark.parametrize("source", ["files", "digits"])
def test_an_empty_share_has_the_form_of_others(source, opened, backbone):
    read = {"batch_size": 448, "training": True, "processes": ranks(2)[0]}
    labelled = (
        open_labelled_images("digits", backbone, **read)
        if source == "digits"
        else opened(batch_size=12, processes=ranks(2)[0], workers=1)
    )
    first, *_, last = labelled.loader
    assert [len(values) for values in last] == [0, 0]
    assert [values.shape[1:] for values in last] == [values.shape[1:] for values in first]
    assert [values.dtype for values in last] == [values.dtype for values in first]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_leave_all_ranks_the_same_number_of_steps(workers, tmp_path, backbone):
    for name in "ab":
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (32, 32)).save(tmp_path / name / f"{index}.png")
            if name == "b":
                (tmp_path / name / f"{index}.png").write_bytes(b"none")
    read = {"workers": workers, "batch_size": 2, "training": True, "bad_images": "skip"}
    loaders = [
        open_labelled_images(str(tmp_path), backbone, **read, processes=each).loader for each in ranks(2)
    ]
    for _ in range(2):
        shares = [[len(labels) for _, labels in loader] for loader in loaders]
        assert [len(each) for each in shares] == [3, 3]
        assert sum(map(sum, shares)) == 3
    assert len(loaders[0].unreadable | loaders[1].unreadable) == 3
    # One process does without, unless it is asked to count them.
    alone = open_labelled_images(str(tmp_path), backbone, **{**read, "batch_size": 1}).loader
    assert len(list(alone)) == 3
    alone.every_batch = True
    assert len(list(alone)) == 6


@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_each_image_is_evaluated_by_one_process(size, opened):
    seen = []
    for each in ranks(size):
        loader = opened(training=False, processes=each).loader
        batches = [images for images, _ in loader]
        assert all(0 < len(images) <= -(-4 // size) for images in batches)
        seen += batches
    expected = torch.cat([images for images, _ in opened(training=False).loader])
    # In order of rank, as `Processes.concatenate` puts them together.
    assert torch.equal(torch.cat(seen), expected)


def test_balanced_draws_have_every_class_as_often(opened):
    loader, again = (opened(balance="sampler").loader for _ in range(2))
    labels = opened().labels
    drawn: Counter[int] = Counter()
    for _ in range(300):
        indices = list(chain(*loader.index_batches()))
        assert indices == list(chain(*again.index_batches()))
        assert len(indices) == 13
        drawn.update(labels[index] for index in indices)
    # Of 3,900 draws each class gets 1,300, with a standard deviation of 29.4: six of them.
    assert all(abs(drawn[label] - 1300) < 177 for label in range(3))


def test_an_image_that_is_drawn_again_is_cropped_otherwise(opened):
    loader, again = (opened(balance="sampler", workers=each).loader for each in (0, 2))
    indices = list(chain(*loader.index_batches()))
    loader.set_epoch(1)
    batches = list(loader)
    assert_same_bits(list(again), batches)
    crops = torch.cat([images for images, _ in batches])
    assert len(set(indices)) < len(indices) == len(crops.flatten(1).unique(dim=0))


def test_balance_wants_training_and_labels(opened, monkeypatch):
    with pytest.raises(ValueError, match="balance is for training images, got 'sampler'"):
        opened(training=False, balance="sampler")
    with pytest.raises(ValueError, match="balance must be one of 'none', 'loss', 'sampler', got 'all'"):
        opened(balance="all")
    assert_same_bits(list(opened(balance="loss").loader), list(opened().loader))
    monkeypatch.setattr(FileImages, "labels", lambda self: None)
    with pytest.raises(ValueError, match=r"balance='sampler' needs the labels of all images, but .*photos"):
        opened(balance="sampler")
    assert opened().labels is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0,), ValueError, "epoch must be an integer >= 1, got 0"),
        ((1.5,), TypeError, "epoch must be an integer >= 1, got 1.5"),
        ((1, -1), ValueError, "skip must be an integer >= 0, got -1"),
        ((1, 5), ValueError, "skip must be at most 4, the number of batches, got 5"),
    ],
)
def test_bad_epochs(arguments, error, message, opened):
    with pytest.raises(error, match=message):
        opened().loader.set_epoch(*arguments)


class Endless(IterableDataset):
    """As timm's data sets that can only be iterated."""

    def __iter__(self):
        return iter([(torch.zeros(2), 1)] * 3)


def test_images_that_can_only_be_iterated_have_no_epochs():
    loader = ImageLoader(Endless(), num_images=None, batch_size=2)
    assert [len(labels) for _, labels in loader] == [2, 1]
    for call in (lambda: loader.set_epoch(1), loader.index_batches, loader.in_order):
        with pytest.raises(TypeError, match="loader must be of a data set that is read by index"):
            call()


def test_labels_are_those_of_the_batches(opened, backbone):
    names = ("c", "x", "a", "b")
    for labelled in (opened(training=False, class_names=names), opened(training=False, cache=ImageCache())):
        read = torch.cat([labels for _, labels in labelled.loader]).tolist()
        assert list(labelled.labels) == read
    digits = open_labelled_images("digits", backbone, split="val", class_names=[*map(str, range(9, -1, -1))])
    assert list(digits.labels) == torch.cat([labels for _, labels in digits.loader]).tolist()


def test_the_fingerprint_is_of_names_labels_and_classes(folder, backbone, tmp_path, opened):
    def fingerprint(place: Path, **options: Any) -> str:
        return open_labelled_images(str(place), backbone, workers=0, **options).fingerprint

    base = fingerprint(folder)
    assert len(base) == 16
    assert base == opened(cache=ImageCache(), batch_size=2).fingerprint
    moved = tmp_path / "elsewhere"
    moved.symlink_to(folder)
    assert fingerprint(moved) == base
    listed = tmp_path / "list.txt"
    lines = [f"{name}/{index}.png\t{name}" for name, count in COUNTS.items() for index in range(count)]
    listed.write_text("\n".join(lines))
    assert fingerprint(listed, root=folder) == base
    listed.write_text("\n".join([*lines[:-1], "c/5.png\ta"]))
    others = [
        fingerprint(listed, root=folder),
        fingerprint(folder, class_names=["a", "b", "c", "d"]),
        *(open_labelled_images("digits", backbone, split=each).fingerprint for each in ("val", "test")),
    ]
    listed.write_text("\n".join(lines[:-1]))
    others.append(fingerprint(listed, root=folder))
    assert len({base, *others}) == 6


def test_tensors_in_memory_come_in_whole_batches():
    images, labels = torch.randn(7, 2, 3), torch.arange(7)
    loader, again = (shuffled_loader(images, labels, batch_size=3, seed=2) for _ in range(2))
    passes = [list(loader) for _ in range(3)]
    for epoch, batches in enumerate(passes, start=1):
        again.set_epoch(epoch)
        indices = list(again.index_batches())
        assert [len(each) for each in indices] == [3, 3, 1]
        assert_same_bits(batches, [(images[each], labels[each]) for each in indices])
        assert sorted(chain(*indices)) == list(range(7))
    assert passes[0][0][1].tolist() != passes[1][0][1].tolist()
    assert isinstance(loader.dataset, TensorDataset)
    assert torch.equal(torch.cat([each for each, _ in loader.in_order()]), images)


def test_ahead_passes_on_what_is_not_for_cuda():
    batches = [[torch.zeros(2), torch.ones(1)], {"image": torch.zeros(3)}]
    assert [id(each) for each in ahead(batches, torch.device("cpu"))] == [id(each) for each in batches]


def test_ahead_leaves_labels_on_the_host_without_a_stream(monkeypatch):
    """The path for CUDA, with streams that do nothing and copies that stay on the host."""
    streams = SimpleNamespace(wait_stream=lambda _: None)
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: streams)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(prefetch, "send", lambda tensor, _: tensor + 1)
    batches = [
        (torch.zeros(2), torch.tensor([1, 2]), "name"),
        {"image": torch.ones(3), "label": torch.ones(3).long()},
    ]
    first, second = ahead(batches, torch.device("cuda"))
    assert first[0].tolist() == [1, 1]
    assert first[1] is batches[0][1]
    assert first[2] == "name"
    assert second["image"].tolist() == [2, 2, 2]
    assert second["label"] is batches[1]["label"]


@pytest.mark.gpu
def test_ahead_copies_every_batch_before_it_is_used():
    images = [torch.randn(64, 3, 224, 224).pin_memory() for _ in range(4)]
    batches = [[each, torch.full((64,), place), "name"] for place, each in enumerate(images)]
    device = torch.device("cuda")
    sums = []
    for place, (batch, labels, name) in enumerate(ahead(batches, device)):
        assert (batch.is_cuda, labels.is_cuda, name) == (True, False, "name")
        sums.append((batch.double().sum(), labels.sum()))
        assert place < len(images)
    for (total, of_labels), batch in zip(sums, batches, strict=True):
        torch.testing.assert_close(total.cpu(), batch[0].double().sum())
        assert int(of_labels) == int(batch[1].sum())
    mapped = list(ahead([{"image": images[0]}], device))
    assert torch.equal(mapped[0]["image"].cpu(), images[0])


@pytest.mark.gpu
def test_ahead_raises_what_reading_raises():
    def failing():
        yield torch.zeros(1)
        raise ValueError("no image")

    with pytest.raises(ValueError, match="no image"):
        list(ahead(failing(), torch.device("cuda")))
