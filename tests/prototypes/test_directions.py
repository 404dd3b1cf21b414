"""`metric="cosine"`: k-means of directions, at the mean length of the tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from spt_fast.prototypes import Prototypes, build_prototypes, concatenate, merge
from spt_fast.support.errors import NonFiniteError

Loader = list[tuple[Tensor, Tensor]]
NUM_PROMPTS = 5


def build(model: nn.Module, loader: Any, **options: Any) -> Prototypes:
    given = {"num_prompts": NUM_PROMPTS, "progress": False, "metric": "cosine", **options}
    return build_prototypes(model, loader, **given)


@pytest.fixture(scope="module")
def vit(make_vit: Callable[..., VisionTransformer]) -> VisionTransformer:
    return make_vit(depth=2).eval()


@pytest.fixture(scope="module")
def loader(make_loader: Callable[..., Loader]) -> Loader:
    return make_loader(24)


class Plain(nn.Module):
    """Blocks over the patches of an image, which are its tokens; or over these at length 1."""

    def __init__(self, *, unit: bool) -> None:
        super().__init__()
        self.unit, self.embed_dim, self.num_prefix_tokens = unit, 48, 0
        self.blocks = nn.Sequential(nn.Linear(48, 48))

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)
        return self.blocks(F.normalize(tokens, dim=-1) if self.unit else tokens)  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["stream", "exact"])
def test_is_kmeans_of_unit_vectors(mode: str, make_images: Callable[..., Tensor]) -> None:
    images = make_images(10, size=12) * torch.linspace(0.1, 4, 10)[:, None, None, None]
    batches = list(images.split(4))
    found = build(Plain(unit=False), batches, mode=mode)
    expected = build(Plain(unit=True), batches, mode=mode, metric="euclidean")
    lengths = images.unfold(2, 4, 4).unfold(3, 4, 4).square().sum((1, 4, 5)).sqrt().mean()
    assert lengths > 2
    torch.testing.assert_close(found.prompts, F.normalize(expected.prompts, dim=-1) * lengths)
    torch.testing.assert_close(found.inertia, expected.inertia)
    assert torch.equal(found.counts, expected.counts)
    assert found.metadata["metric"] == "cosine"


def test_lengths_of_tokens_do_not_matter(vit: VisionTransformer, make_loader: Callable[..., Loader]) -> None:
    """Tokens of block 1 without positions and biases are as long as the images are bright."""
    loader = make_loader(24)
    with torch.no_grad():
        vit.patch_embed.proj.bias.zero_()
    factors = torch.linspace(0.5, 20, len(loader))
    scaled = [(images * factor, labels) for factor, (images, labels) in zip(factors, loader, strict=True)]
    given = {"depth": "shallow", "mode": "exact", "position_embedding": False}
    one, other = (build(vit, each, **given) for each in (loader, scaled))
    torch.testing.assert_close(F.normalize(one.prompts, dim=-1), F.normalize(other.prompts, dim=-1))
    assert (other.prompts.norm(dim=-1) > 2 * one.prompts.norm(dim=-1)).all()
    plain = build(vit, scaled, **given, metric="euclidean")
    assert not torch.allclose(F.normalize(plain.prompts, dim=-1), F.normalize(other.prompts, dim=-1))


def test_other_lengths_and_files_have_the_same_length(
    vit: VisionTransformer, loader: Loader, tmp_path: Path
) -> None:
    found = build(vit, loader, last_output=True)
    found.save(tmp_path / "file", with_sample=True)
    for each in (found.select(3), Prototypes.load(tmp_path / "file").select(3)):
        lengths = found.prompts.norm(dim=-1)[:, :3]
        torch.testing.assert_close(each.prompts.norm(dim=-1), lengths)
    assert found.last_output is not None
    assert len(found.metadata["token_lengths"].split()) == 3


def test_merging_weighs_the_lengths(vit: VisionTransformer, make_loader: Callable[..., Loader]) -> None:
    loaders = make_loader(24), [(3 * images, labels) for images, labels in make_loader(8, 8, seed=2)]
    merged = merge([build(vit, loader) for loader in loaders])
    together = build(vit, [*loaders[0], *loaders[1]])
    torch.testing.assert_close(merged.prompts.norm(dim=-1), together.prompts.norm(dim=-1))
    assert merged.metadata["metric"] == "cosine"
    plain = build(vit, loaders[0], metric="euclidean")
    for combine in (merge, concatenate):
        with pytest.raises(ValueError, match="must all be of one metric, got euclidean, cosine"):
            combine([plain, merged])


@pytest.mark.parametrize("mode", ["stream", "exact"])
def test_tokens_that_are_not_finite_are_named(
    mode: str, vit: VisionTransformer, make_images: Callable[..., Tensor]
) -> None:
    images = make_images(6)
    # Too large to be squared, where a unit vector would be zero.
    images[4] *= 1e30
    with pytest.raises(NonFiniteError) as caught:
        build(vit, [images[:3], images[3:]], mode=mode)
    assert caught.value.image == 4


@pytest.mark.parametrize("mode", ["stream", "exact"])
def test_a_centre_of_zeros_stays_zero(mode: str) -> None:
    """Letterboxed images without a bias: the others are long, so that their mean over 0 is infinite."""
    images = torch.ones(6, 3, 12, 12) * 100
    images[:, :, 8:] = 0
    found = build(Plain(unit=False), [images], num_prompts=2, mode=mode)
    lengths = found.prompts.norm(dim=-1)[0].sort().values
    torch.testing.assert_close(lengths, torch.tensor([0.0, 2 / 3 * 100 * 48**0.5]))


def test_other_strategies_have_no_metric(vit: VisionTransformer, loader: Loader) -> None:
    with pytest.raises(ValueError, match="metric='cosine' is for strategy='kmeans', got strategy='mean'"):
        build(vit, loader, strategy="mean")
    with pytest.raises(ValueError, match="metric must be"):
        build(vit, loader, metric="angle")
    assert "metric" not in build(vit, loader, metric="euclidean").metadata
