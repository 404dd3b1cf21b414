"""Decoded images that are kept: the same batches as without, within the budget, decoded once."""

from __future__ import annotations

import mmap
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from spt_fast.data import datasets, loading, shipped
from spt_fast.data import images as images_module
from spt_fast.data.cache import ImageCache, split_transform
from spt_fast.data.folder import list_folder
from spt_fast.data.images import open_images, open_labelled_images
from spt_fast.data.loading import ImageLoader
from spt_fast.data.task import open_validation_images
from spt_fast.support.randomness import seeded

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
BUDGET = 2**20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven images of different sizes in two classes."""
    generator = np.random.default_rng(0)
    for index in range(7):
        place = tmp_path / "ab"[index % 2]
        place.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (30 + 3 * index, 41 - index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.png")
    return tmp_path


@pytest.fixture(scope="module")
def backbone() -> torch.nn.Module:
    return shipped.load_backbone()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that this process has opened as images."""
    opened: list[str] = []

    def note(path: str) -> Image.Image:
        opened.append(path)
        return original(path)

    original = datasets.open_image
    monkeypatch.setattr(datasets, "open_image", note)
    return opened


def epochs_of(loader: loading.ImageLoader, count: int = 2) -> list[list[tuple[Tensor, Tensor]]]:
    """The batches of some epochs; random numbers of this process begin at the same place each time."""
    with seeded(5):
        return [[(images, labels) for images, labels in loader] for _ in range(count)]


def assert_same_bits(found: list[Any], expected: list[Any]) -> None:
    assert [len(epoch) for epoch in found] == [len(epoch) for epoch in expected]
    for epoch, other in zip(found, expected, strict=True):
        for (images, labels), (other_images, other_labels) in zip(epoch, other, strict=True):
            assert torch.equal(images, other_images)
            assert images.stride() == other_images.stride()
            assert labels.dtype == other_labels.dtype
            assert torch.equal(labels, other_labels)


@pytest.mark.parametrize(
    ("budget", "workers", "training"),
    [(BUDGET, 0, True), (BUDGET, 2, False), (10_000, 2, True), (10_000, 0, False), (0, 0, True)],
)
def test_batches_are_the_same_with_and_without_a_cache(budget, workers, training, folder, backbone):
    options = {"batch_size": 3, "workers": workers, "training": training, "seed": 3}
    plain, kept = (
        open_labelled_images(str(folder), backbone, cache=cache, **options).loader
        for cache in (None, ImageCache("ram", budget))
    )
    assert len(kept) == len(plain)
    expected = epochs_of(plain)
    assert_same_bits(epochs_of(kept), expected)
    # Augmented images differ from epoch to epoch.
    assert torch.equal(expected[0][0][0], expected[1][0][0]) is not training


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_not_augmented_come_in_the_same_order(workers, folder, backbone, monkeypatch):
    """Shuffled, and read without workers from the second epoch on."""
    from timm.data import transforms_factory

    original = transforms_factory.create_transform
    plain_transform = lambda **options: original(**{**options, "is_training": False})  # noqa: E731
    monkeypatch.setattr(transforms_factory, "create_transform", plain_transform)
    options = {"batch_size": 2, "workers": workers, "training": True, "seed": 3}
    cache = ImageCache("ram", BUDGET)
    plain, kept = (
        open_labelled_images(str(folder), backbone, cache=each, **options).loader for each in (None, cache)
    )
    expected = epochs_of(plain, 3)
    assert_same_bits(epochs_of(kept, 3), expected)
    assert [labels.tolist() for _, labels in expected[0]] != [labels.tolist() for _, labels in expected[1]]
    assert cache.summary() == [f"{folder}: kept 7 of 7 images (0.1 MiB)"]


def test_each_image_is_decoded_once(folder, backbone, decoded):
    loader = open_labelled_images(str(folder), backbone, workers=0, cache=ImageCache()).loader
    epochs_of(loader)
    assert len(decoded) == len(set(decoded)) == 7


@pytest.mark.parametrize("training", [False, True])
def test_prototypes_and_training_decode_once_together(training, folder, backbone, decoded):
    """Also where training crops at random, and prototypes are of the centre of the image."""
    cache = ImageCache()
    options = {"workers": 0, "cache": cache}
    trained = open_labelled_images(str(folder), backbone, training=training, **options)
    pooled = open_images(str(folder), backbone, in_classes=True, **options)
    expected = epochs_of(open_images(str(folder), backbone, in_classes=True, workers=0))
    decoded.clear()
    epochs_of(trained.loader)
    assert_same_bits(epochs_of(pooled), expected)
    assert len(decoded) == len(set(decoded)) == 7
    assert len(cache.summary()) == 1


def test_what_does_not_fit_is_decoded_anew(folder, backbone, decoded):
    """64 x 64 pixels of three bytes: three images fit."""
    cache = ImageCache("ram", 40_000)
    loader = open_labelled_images(str(folder), backbone, workers=0, cache=cache).loader
    epochs_of(loader, 2)
    assert len(decoded) == 7 + 4
    assert cache.summary() == [f"{folder}: kept 3 of 7 images (0.0 MiB)"]


def test_validation_images_share_the_budget_and_have_the_labels_of_the_model(folder, backbone):
    cache = ImageCache()
    names = ("z", "b", "a")
    val = open_validation_images(
        "digits", backbone, val_data=str(folder), class_names=names, workers=0, cache=cache, root=None
    )
    expected = [2] * 4 + [1] * 3
    for _ in range(2):
        assert torch.cat([labels for _, labels in val.loader]).tolist() == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_are_skipped_or_an_error_in_every_epoch(workers, folder, backbone):
    broken = folder / "a" / "2.png"
    broken.write_bytes(broken.read_bytes()[:60])
    options = {"batch_size": 1, "workers": workers}
    plain, kept = (
        open_labelled_images(str(folder), backbone, bad_images="skip", cache=cache, **options).loader
        for cache in (None, ImageCache())
    )
    assert_same_bits(epochs_of(kept), epochs_of(plain))
    assert kept.unreadable == plain.unreadable != {}
    strict = open_labelled_images(str(folder), backbone, cache=ImageCache(), **options).loader
    for _ in range(2):
        with pytest.raises(ValueError, match=r"2\.png cannot be read"):
            epochs_of(strict)


def test_other_colours_and_bytes_come_back_as_they_were():
    """Grey images are kept in one channel; every byte goes through the table as through the transform."""

    class Grey(datasets.DecodedImages):
        transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.3], [0.7])])

        def __len__(self) -> int:
            return 1

        def read(self, index: int) -> tuple[Image.Image, int]:
            return Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)), 4

    cache = ImageCache()
    loader = images_module.CachedLoader(cache.wrap(Grey(), "grey"), cache, num_images=1, batch_size=1)
    first, second = epochs_of(loader, 2)
    assert_same_bits([second], [first])
    assert torch.equal(second[0][0][0], Grey()[0][0])


def test_an_image_that_cannot_be_transformed_is_named(folder):
    def fail(image: Image.Image) -> Image.Image:
        raise ValueError("too thin")

    dataset = datasets.FileImages(list_folder(folder, classes=True))
    for step, reason in ((fail, "too thin"), (transforms.Resize((0, 0)), "height and width must be > 0")):
        dataset.transform = transforms.Compose([transforms.Resize((8, 8)), step])
        for each in (dataset, ImageCache().wrap(dataset, "images")):
            with pytest.raises(RuntimeError, match=rf"^{folder}/a/0.png cannot be transformed \({reason}\)$"):
                each[0]


def test_workers_that_share_no_memory_decode_for_themselves(folder, backbone, monkeypatch):
    monkeypatch.setattr(multiprocessing.get_context(), "get_start_method", lambda: "spawn")
    cache = ImageCache()
    assert type(open_labelled_images(str(folder), backbone, workers=1, cache=cache).loader) is ImageLoader
    assert cache.description() == [
        "decoded images are not kept: workers that are not forks of this process cannot share them; "
        "--workers 0 keeps them"
    ]
    open_labelled_images(str(folder), backbone, workers=0, cache=cache)
    assert len(cache.summary()) == 1


def test_images_in_memory_are_not_kept_again(backbone):
    cache = ImageCache()
    open_labelled_images("digits", backbone, split="val", cache=cache)
    assert cache.description() == cache.summary() == []


def test_only_known_steps_are_fixed():
    resize, crop, flip = transforms.Resize(4), transforms.CenterCrop(4), transforms.RandomHorizontalFlip()
    assert split_transform(transforms.Compose([resize, crop, flip, crop])) == ([resize, crop], [flip, crop])
    assert split_transform(flip) == ([], [flip])
    assert split_transform(transforms.Compose([resize])) == ([resize], [])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("disk",), ValueError, "cache must be one of 'auto', 'ram', 'device', got 'disk'"),
        (("ram", "lots"), ValueError, "cache_budget must be a number with a unit"),
        (("ram", -1), ValueError, "cache_budget must be an integer >= 0"),
        (("ram", "1000TiB"), ValueError, "cache_budget must be at most the memory that is free, "),
    ],
)
def test_bad_arguments_of_the_cache(arguments, error, message):
    with pytest.raises(error, match=message):
        ImageCache(*arguments)


def test_a_system_that_promises_less_gets_a_smaller_budget_or_an_error(monkeypatch):
    def careful(place: int, size: int) -> mmap.mmap:
        if size > 2**16:
            raise OSError(12, "Cannot allocate memory")
        return original(place, size)

    original = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", careful)
    assert 2**15 <= ImageCache().budget <= 2**16
    with pytest.raises(ValueError, match=r"cache_budget: the system does not give 1\.0 MiB .*--cache off"):
        ImageCache("ram", "1MiB")


def test_without_locks_for_processes_this_process_keeps_images(folder, backbone, decoded, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing.get_context(), "Lock", refuse)
    epochs_of(open_labelled_images(str(folder), backbone, workers=0, cache=ImageCache()).loader)
    assert len(decoded) == 7


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["auto", "ram", "device"])
def test_batches_on_a_gpu_have_the_same_bits(where, folder, backbone):
    cache = ImageCache(where, device="cuda")
    plain = open_labelled_images(str(folder), backbone, workers=0, batch_size=3).loader
    kept = open_labelled_images(str(folder), backbone, workers=0, batch_size=3, cache=cache).loader
    epochs_of(kept, 1)
    found = [[(images.cpu(), labels) for images, labels in epoch] for epoch in epochs_of(kept)]
    assert_same_bits(found, epochs_of(plain))
    assert ("copied to cuda" in cache.summary()[0]) is (where != "ram")
