"""Images of a task as one data set: which are taken, what is known of them, and that each is decoded once."""

from __future__ import annotations

import pytest
import torch

from spt_fast.data import shipped
from spt_fast.data.cache import ImageCache
from spt_fast.data.decode import open_image
from spt_fast.data.images import open_images, open_labelled_images
from spt_fast.data.pool import Pool, draw_share
from spt_fast.data.task import open_task


@pytest.fixture
def photos(tmp_path):
    """Folders of small images: 8 of two classes to learn from, 4 of one of them to choose by, 2 to test."""
    from torchvision.utils import save_image

    generator = torch.Generator().manual_seed(0)
    counts = {"train": {"cat": 5, "dog": 3}, "val": {"dog": 4}, "test": {"cat": 1, "dog": 1}}
    for place, classes in counts.items():
        for name, count in classes.items():
            folder = tmp_path / place / name
            folder.mkdir(parents=True)
            for number in range(count):
                save_image(torch.rand(3, 32, 32, generator=generator), folder / f"{number}.png")
    return tmp_path


def opened(model, photos, cache=None, augment="none", **options):
    images = open_task(
        model,
        str(photos / "train"),
        val_data=str(photos / "val"),
        test_data=str(photos / "test"),
        training={"augment": augment},
        batch_size=3,
        workers=0,
    )
    return Pool(images, cache, 3, **options)


def test_parts_hold_the_images_of_the_task_with_their_labels(photos):
    pool = opened(shipped.load_backbone(), photos)
    assert [len(pool.rows(part)) for part in ("train", "val", "train+val")] == [8, 4, 12]
    assert pool.class_names == ("cat", "dog")
    both = pool.training(pool.rows("train+val"), seed=0)
    assert both.labels == (0,) * 5 + (1,) * 7
    assert both.num_images == len(both.paths) == 12
    val = pool.validation()
    # Its folder has one class only, which is the second of the task.
    assert torch.cat([labels for _, labels in val.loader]).tolist() == [1] * 4
    assert {path.parent.parent.name for path in val.paths} == {"val"}
    assert pool.test.num_images == 2
    prints = {each.fingerprint for each in (both, val, pool.training(pool.rows("train"), seed=0))}
    assert len(prints) == 3


def test_training_gives_the_batches_of_open_labelled_images(photos):
    model = shipped.load_backbone()
    wanted = open_labelled_images(
        str(photos / "train"), model, training=True, augment="crop", batch_size=3, workers=0, seed=4
    )
    pool = opened(model, photos, augment="crop")
    found = pool.training(pool.rows("train"), seed=4)
    for _ in range(2):
        for ours, theirs in zip(found.loader, wanted.loader, strict=True):
            assert all(map(torch.equal, ours, theirs))


def test_plain_gives_the_batches_of_open_images(photos):
    model = shipped.load_backbone()
    wanted = open_images(str(photos / "train"), model, batch_size=3, workers=0, seed=4, in_classes=True)
    pool = opened(model, photos)
    for ours, theirs in zip(pool.plain(pool.rows("train"), seed=4), wanted, strict=True):
        assert torch.equal(ours[0], theirs[0])


def test_with_a_cache_each_image_is_decoded_once_for_all_runs(photos, monkeypatch):
    decoded = []

    def noted(path):
        decoded.append(path)
        return open_image(path)

    monkeypatch.setattr("spt_fast.data.datasets.open_image", noted)
    model = shipped.load_backbone()
    pool = opened(model, photos, ImageCache("ram", "1MiB"))
    plain = opened(model, photos)
    for seed in (0, 1):
        for part in ("train", "train+val"):
            rows = pool.rows(part)
            for ours, theirs in zip(
                pool.training(rows, seed=seed).loader, plain.training(rows, seed=seed).loader, strict=True
            ):
                assert all(map(torch.equal, ours, theirs))
        list(pool.validation().loader)
        list(pool.test.loader)
        list(pool.plain(pool.rows("train"), seed=seed))
    of_cache = [path for path in decoded if decoded.count(path) == 1]
    # The pool without a cache reads each of its images in every pass.
    kept = 14
    assert len(decoded) == kept + 2 * (8 + 12)
    assert {str(path) for path in pool.images.test.paths} == set(of_cache)


def test_shares_are_drawn_by_the_seed_of_each_class_and_lie_in_larger_ones():
    labels = torch.tensor([0] * 10 + [1] * 3 + [2])
    tenth, half, all_ = (set(draw_share(labels, share, seed=3).tolist()) for share in (0.1, 0.5, 1.0))
    assert len(tenth) == 3
    assert [sum(int(labels[row]) == label for row in half) for label in range(3)] == [5, 2, 1]
    assert tenth < half < all_ == set(range(14))
    assert draw_share(labels, 0.5, seed=3).tolist() == draw_share(labels, 0.5, seed=3).tolist()
    assert half != set(draw_share(labels, 0.5, seed=4).tolist())
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="share must be a finite number > 0 and <= 1"):
            draw_share(labels, share, seed=0)


def test_few_images_of_each_class(photos):
    pool = opened(shipped.load_backbone(), photos)
    rows = pool.rows("train", per_class=2, seed=1)
    assert pool.training(rows, seed=0).labels == (0, 0, 1, 1)
    assert pool.rows("val", share=0.5) == pool.rows("val", share=0.5)
    with pytest.raises(ValueError, match="images must be share or per_class"):
        pool.rows("train", per_class=2, share=0.5)
    with pytest.raises(ValueError, match="per_class must be at most 3"):
        pool.rows("train", per_class=4)


def test_balance_of_a_part_is_that_of_its_classes(photos):
    pool = opened(shipped.load_backbone(), photos)
    rows = pool.rows("train")
    balanced = pool.training(rows, seed=0, balance="sampler").loader
    drawn = [label for _ in range(40) for _, labels in balanced for label in labels.tolist()]
    assert len(drawn) == 40 * 8
    assert abs(sum(drawn) / len(drawn) - 0.5) < 0.12
    with pytest.raises(ValueError, match="drop_last leaves nothing of 2 images with batch_size 3"):
        pool.training(rows[:2], seed=0, drop_last=True)


def test_the_digits_are_one_tensor():
    images = open_task(shipped.load_backbone(), "digits", val_split="val", test_split="test", training={})
    pool = Pool(images, None, 100)
    val = torch.cat([batch for batch, _ in pool.validation().loader])
    assert torch.equal(val, shipped.load_digits("val")[0])
    assert pool.training(pool.rows("train+val"), seed=0).num_images == 897 + 300


def test_without_validation_images_there_are_none(photos):
    images = open_task(
        shipped.load_backbone(),
        str(photos / "train"),
        test_data=str(photos / "test"),
        training={"augment": "none"},
        workers=0,
    )
    pool = Pool(images, None, 3)
    assert pool.rows("train+val") == pool.rows("train")
    with pytest.raises(ValueError, match="val_data or val_split must name images"):
        pool.validation()
