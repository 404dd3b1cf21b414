"""What ships with the package: the digits and the backbone, and files that are none."""

from __future__ import annotations

import itertools
from importlib.resources import files

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from spt_fast.data import shipped
from spt_fast.data.images import open_labelled_images

ASSETS = files("spt_fast") / "assets"


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    labels = torch.cat([shipped.load_digits(split)[1] for split in ("train", "val", "test")])
    assert np.array_equal(labels.numpy(), original.target)
    # Each corner pixel of a bilinear upsampling by four is the corner pixel itself.
    images, _ = shipped.load_digits("val")
    facts = shipped.backbone_facts()
    grey = images[:, 0] * facts["std"][0] + facts["mean"][0]
    first, last = shipped.DIGITS_SPLITS["val"]
    np.testing.assert_allclose(grey[:, 0, 0], original.images[first:last, 0, 0] / 16, atol=1e-6)
    np.testing.assert_allclose(grey[:, -1, -1], original.images[first:last, -1, -1] / 16, atol=1e-6)


def test_splits_are_disjoint_and_cover_all():
    ranges = [shipped.DIGITS_SPLITS[split] for split in ("train", "val", "test")]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == 1797
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_each_split_holds_every_digit(split):
    images, labels = shipped.load_digits(split)
    assert images.shape == (len(labels), 3, 64, 64)
    assert images.dtype == torch.float32
    assert torch.bincount(labels, minlength=10).min() >= 25


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split must be one of"):
        shipped.load_digits("holdout")


def test_few_per_class_is_balanced_and_follows_the_seed():
    labels = shipped.load_digits("train")[1]
    rows = shipped.few_per_class(labels, 4, seed=1)
    assert torch.equal(torch.bincount(labels[rows]), torch.full((10,), 4))
    assert len(set(rows.tolist())) == 40
    assert torch.equal(rows, shipped.few_per_class(labels, 4, seed=1))
    assert not torch.equal(rows, shipped.few_per_class(labels, 4, seed=2))


@pytest.mark.parametrize(("per_class", "error"), [(0, ValueError), (500, ValueError), (2.5, TypeError)])
def test_few_per_class_refuses_numbers_it_cannot_give(per_class, error):
    with pytest.raises(error, match=f"^per_class must be .*, got {per_class}$"):
        shipped.few_per_class(shipped.load_digits("train")[1], per_class, seed=0)


def test_backbone_is_ready_for_use_with_timm():
    from timm.data import resolve_model_data_config

    model = shipped.load_backbone()
    config = resolve_model_data_config(model)
    facts = shipped.backbone_facts()
    assert not model.training
    assert config["input_size"] == (3, 64, 64)
    assert list(config["mean"]) == facts["mean"]
    assert list(config["std"]) == facts["std"]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        assert model(shipped.load_digits("val")[0][:3]).shape == (3, facts["architecture"]["embed_dim"])


def test_backbone_file_is_small_and_trained():
    facts = shipped.backbone_facts()
    file = ASSETS.joinpath("backbone.safetensors")
    assert file.stat().st_size <= 6 * 2**20
    # An untrained decoder's loss on patches of unit variance is 1 or above.
    assert facts["loss"] < 0.7


def test_truncated_backbone_is_refused(tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(ASSETS.joinpath("backbone.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"broken\.safetensors is truncated or not a safetensors file"):
        shipped.load_backbone(broken)


def test_foreign_safetensors_is_no_backbone():
    with pytest.raises(ValueError, match=r"was not written by examples/pretrain_backbone\.py"):
        shipped.load_backbone(ASSETS.joinpath("digits.safetensors"))


@pytest.mark.parametrize("patches", [(48, 32), 16], ids=["not square", "square"])
def test_digits_come_in_the_size_of_the_model(patches):
    model = VisionTransformer(
        img_size=patches, patch_size=8, embed_dim=16, depth=1, num_heads=1, num_classes=0
    )
    loader = open_labelled_images("digits", model, split="val", batch_size=7).loader
    images, labels = next(iter(loader))
    assert images.shape[2:] == ((48, 32) if patches == (48, 32) else (16, 16))
    original, known = shipped.load_digits("val")
    expected = torch.nn.functional.interpolate(original, size=images.shape[2:], mode="bilinear")
    dataset = loader.dataset.tensors
    torch.testing.assert_close(dataset[0], expected)
    assert torch.equal(dataset[1], known)
    assert model(images).shape == (7, 16)
    assert len(labels) == 7
