"""`nearest_patches` against all distances at once; the places and pictures that it names; its figure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import spt_fast
from spt_fast import PromptedViT, Prototypes, build_prototypes, nearest_patches, plots
from spt_fast.backbones.anatomy import block_input_hooks
from spt_fast.backbones.token_extractor import TokenExtractor
from spt_fast.support.errors import NonFiniteError

Loader = list[tuple[Tensor, Tensor]]


@pytest.fixture
def vit(make_vit: Callable[..., VisionTransformer]) -> VisionTransformer:
    """Two blocks; images of 32 x 32 in 4 x 4 patches."""
    return make_vit(depth=2)


@pytest.fixture
def loader(make_loader: Callable[..., Loader]) -> Loader:
    return make_loader(20, 6)


@pytest.fixture
def protos(vit: VisionTransformer, loader: Loader) -> Prototypes:
    return build_prototypes(vit, loader, num_prompts=5, progress=False)


def find(prompts: Any, model: nn.Module, loader: Any, **options: Any) -> Any:
    return nearest_patches(prompts, model, loader, **{"progress": False, "k": 3, **options})


def all_distances(prompts: Tensor, model: nn.Module, loader: Loader) -> list[Tensor]:
    """[N_p, images, N_e] of each layer, float64."""
    taken: dict[int, list[Tensor]] = {}
    with TokenExtractor(model, lambda layer, x: taken.setdefault(layer, []).append(x.double())) as tap:
        for images, _ in loader:
            tap.run(images)
    layers = [torch.cat(taken[layer]) for layer in sorted(taken)]
    return [
        torch.cdist(p.double(), x.flatten(0, 1)).view(-1, *x.shape[:2])
        for p, x in zip(prompts, layers, strict=True)
    ]


def test_finds_the_nearest_of_all(vit: VisionTransformer, loader: Loader, protos: Prototypes) -> None:
    found = find(protos, vit, loader, k=7)
    for layer, distances in enumerate(all_distances(protos.prompts, vit, loader)):
        expected = distances.flatten(1).sort(1)
        torch.testing.assert_close(
            found.distances[layer].double(), expected.values[:, :7], rtol=1e-3, atol=1e-3
        )
        flat = found.images[layer] * 16 + found.rows[layer] * 4 + found.columns[layer]
        torch.testing.assert_close(
            distances.flatten(1).gather(1, flat), expected.values[:, :7], rtol=1e-3, atol=1e-3
        )
        assert all(len(set(row)) == 7 for row in flat.tolist())


def test_one_per_image(vit: VisionTransformer, loader: Loader, protos: Prototypes) -> None:
    found = find(protos, vit, loader, k=20, one_per_image=True)
    for layer, distances in enumerate(all_distances(protos.prompts, vit, loader)):
        expected = distances.amin(2).sort(1).values
        torch.testing.assert_close(found.distances[layer].double(), expected, rtol=1e-3, atol=1e-3)
        assert all(sorted(row) == list(range(20)) for row in found.images[layer].tolist())


def test_batches_change_nothing(
    vit: VisionTransformer, make_loader: Callable[..., Loader], protos: Prototypes
) -> None:
    found = [find(protos, vit, make_loader(20, size)) for size in (20, 1, 7)]
    for other in found[1:]:
        assert torch.equal(found[0].images, other.images)
        assert torch.equal(found[0].rows, other.rows)
        assert torch.equal(found[0].pictures, other.pictures)


@pytest.mark.parametrize("context", [0, 1, 2])
def test_pictures_are_the_patches_and_what_is_around_them(
    vit: VisionTransformer, loader: Loader, protos: Prototypes, context: int
) -> None:
    found = find(protos, vit, loader, context=context)
    images = torch.cat([batch for batch, _ in loader])
    margin = 8 * context
    padded = nn.functional.pad(images, (margin,) * 4, mode="replicate")
    side = 8 * (2 * context + 1)
    assert found.pictures.shape == (2, 5, 3, 3, side, side)
    for place in ((0, 0, 0), (1, 4, 2), (0, 3, 1)):
        image, row, column = (int(x[place]) for x in (found.images, found.rows, found.columns))
        expected = padded[image, :, 8 * row : 8 * row + side, 8 * column : 8 * column + side]
        assert torch.equal(found.pictures[place], expected)


def test_prompts_may_be_shallow_or_of_one_block(
    vit: VisionTransformer, loader: Loader, protos: Prototypes
) -> None:
    runs: list[int] = []
    vit.blocks[0].attn.register_forward_hook(lambda *_: runs.append(1))
    one = find(protos.prompts[:1], vit, loader)
    assert not runs, "no block has to run for the first block's input"
    assert torch.equal(one.images[0], find(protos, vit, loader).images[0])


def test_of_a_prompted_vit_are_the_tokens_that_meet_its_prompts(
    vit: VisionTransformer, loader: Loader, protos: Prototypes
) -> None:
    tuned = PromptedViT(vit, protos).train()
    found = find(tuned, tuned, loader)
    assert tuned.training
    taken: dict[int, list[Tensor]] = {}
    tuned.eval()

    def keep(layer: int, x: Tensor) -> None:
        taken.setdefault(layer, []).append(tuned.prompts_and_tokens(layer, x)[1].detach().double())

    with block_input_hooks(tuned.prompted_blocks, keep):
        for images, _ in loader:
            tuned(images)
    for layer, prompts in enumerate(tuned.prompts.detach().double()):
        expected = torch.cdist(prompts, torch.cat(taken[layer]).flatten(0, 1)).sort(1).values[:, :3]
        torch.testing.assert_close(found.distances[layer].double(), expected, rtol=1e-3, atol=1e-3)


def test_backbone_of_a_tuned_model_is_refused(
    vit: VisionTransformer, loader: Loader, protos: Prototypes
) -> None:
    before = find(protos, vit, loader)
    tuned = PromptedViT(vit, protos)
    for model in (vit, nn.DataParallel(vit)):
        with pytest.raises(ValueError, match="model already belongs to a tuned model, so that its tokens"):
            find(protos, model, loader)
    tuned.release()
    assert torch.equal(find(protos, vit, loader).distances, before.distances)


def test_model_comes_back_as_it_was(vit: VisionTransformer, loader: Loader, protos: Prototypes) -> None:
    vit.train()
    spoilt = [loader[0], (torch.full_like(loader[1][0], 3e38), loader[1][1])]
    with pytest.raises(NonFiniteError) as raised:
        find(protos, vit, spoilt)
    assert (raised.value.image, raised.value.layer) == (6, 0)
    assert vit.training
    assert not vit.blocks[0]._forward_pre_hooks


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k must be an integer >= 1"),
        ({"k": 321}, ValueError, "k must be at most the number of patches, 320, got 321"),
        ({"k": 21, "one_per_image": True}, ValueError, "k must be at most the number of images, 20, got 21"),
        ({"context": -1}, ValueError, "context must be an integer >= 0"),
        (
            {"prompts": torch.ones(3, 5, 32)},
            ValueError,
            "prompts must be for 1 or 2 layers of this model, got 3",
        ),
        ({"prompts": torch.ones(2, 5, 31)}, ValueError, "prompts must have the tokens' width 32, got 31"),
        ({"prompts": 5}, TypeError, "prompts must be a tensor, got int"),
        ({"prompts": torch.full((2, 5, 32), torch.nan)}, NonFiniteError, "prompts must be finite"),
        ({"loader": []}, ValueError, "loader must give at least one batch"),
        ({"loader": [torch.ones(2, 3, 40, 24)]}, ValueError, "do not fit"),
    ],
)
def test_bad_input(
    vit: VisionTransformer,
    loader: Loader,
    protos: Prototypes,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    given = {"prompts": protos, "loader": loader, **change}
    with pytest.raises(error, match=message):
        find(given.pop("prompts"), vit, given.pop("loader"), **given)


class TestFigure:
    def test_shows_the_pictures(self, vit: VisionTransformer, loader: Loader, protos: Prototypes) -> None:
        pytest.importorskip("matplotlib")
        found = find(protos, vit, loader)
        figure = plots.nearest_patches(found, 1, prompts=[4, 0], mean=[0.5] * 3, std=[0.25] * 3, title="T")
        (axes,) = figure.axes
        shown = axes.images[0].get_array()
        picture = found.pictures[1, 0, 2].permute(1, 2, 0) * 0.25 + 0.5
        top, left = 27, 2 * 27  # a picture of 24 pixels and a gap of 3
        assert torch.allclose(
            torch.as_tensor(shown[top : top + 24, left : left + 24]).float(), picture.clamp(0, 1), atol=1e-6
        )
        assert [label.get_text() for label in axes.get_yticklabels()] == ["4", "0"]
        assert figure.get_suptitle() == "T"

    def test_grey_images(self, make_vit: Callable[..., VisionTransformer]) -> None:
        pytest.importorskip("matplotlib")
        vit = make_vit(depth=2, in_chans=1)
        found = find(torch.randn(1, 2, 32), vit, [torch.randn(4, 1, 32, 32)], context=0)
        shown = plots.nearest_patches(found).axes[0].images[0].get_array()
        assert (shown[..., 0] == shown[..., 2]).all()

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"layer": 2}, ValueError, "layer must be 0 to 1, got 2"),
            ({"prompts": [5]}, ValueError, "prompts must be some of 0 to 4"),
            ({"prompts": [0.5]}, TypeError, r"prompts must be integers, such as \[0, 3\], .* got \[0.5\]"),
            ({"prompts": 2}, TypeError, "prompts must be integers, .* got 2"),
            ({"mean": [0.5] * 3}, ValueError, "mean and std must be given together"),
            (
                {"mean": [0.5] * 2, "std": [0.5] * 3},
                ValueError,
                "mean must hold a number for each of 3 channels, got 2",
            ),
            ({"mean": "ab", "std": [1.0] * 3}, TypeError, r"mean must be numbers \[C\], got str"),
            ({"title": 3}, TypeError, "title must be a string, got 3"),
            ({"ax": "left"}, TypeError, "ax must be one Axes, got str"),
        ],
    )
    def test_bad_input(
        self,
        vit: VisionTransformer,
        loader: Loader,
        protos: Prototypes,
        options: dict[str, Any],
        error: type[Exception],
        message: str,
    ) -> None:
        with pytest.raises(error, match=message):
            plots.nearest_patches(find(protos, vit, loader), **options)

    def test_something_else_is_refused(self) -> None:
        with pytest.raises(
            TypeError, match=r"found must be what spt_fast.nearest_patches returns, got Tensor"
        ):
            plots.nearest_patches(torch.zeros(2))  # type: ignore[arg-type]


def test_is_public() -> None:
    assert spt_fast.nearest_patches is nearest_patches
