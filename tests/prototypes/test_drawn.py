"""`sampling="all"`: prompts drawn from the tokens or windows of all images, as in the released code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from spt_fast.backbones.token_extractor import TokenExtractor
from spt_fast.prototypes.build import build_prototypes
from spt_fast.prototypes.pooling import windows_of_images

Loader = list[tuple[Tensor, Tensor]]


@pytest.fixture
def vit(make_vit: Callable[..., VisionTransformer]) -> VisionTransformer:
    """Two blocks, 16 patch tokens."""
    return make_vit(depth=2)


def build(model: VisionTransformer, loader: Loader, strategy: str, **options: Any) -> Any:
    chosen = {"num_prompts": 6, "sampling": "all", "progress": False, **options}
    return build_prototypes(model, loader, strategy=strategy, **chosen)


def tokens_of(model: VisionTransformer, loader: Loader) -> list[Tensor]:
    """Tokens [images, N_e, D] of each layer."""
    taken: dict[int, list[Tensor]] = {}
    with TokenExtractor(model, lambda layer, x: taken.setdefault(layer, []).append(x.clone())) as tap:
        for images, _ in loader:
            tap.run(images)
    return [torch.cat(taken[layer]) for layer in sorted(taken)]


def released_windows(tokens: Tensor, num_prompts: int, strategy: str) -> Tensor:
    """The released code's windows, one after the other: L // (N_p - 1) tokens, and what is left over."""
    found = []
    for image in tokens:
        size = len(image) // (num_prompts - 1)
        for start in range(0, size * (num_prompts - 1), size):
            found.append(image[start : start + size])
        if len(image) > size * (num_prompts - 1):
            found.append(image[size * (num_prompts - 1) :])
    return torch.stack([w.mean(0) if strategy == "mean" else w.amax(0) for w in found])


def positions(prompts: Tensor, candidates: Tensor) -> list[int]:
    """Which of the candidates each prompt is; fails where it is none."""
    gaps = torch.cdist(prompts, candidates, compute_mode="donot_use_mm_for_euclid_dist")
    assert float(gaps.amin(1).max()) < 1e-6
    return gaps.argmin(1).tolist()


@pytest.mark.parametrize("strategy", ["mean", "max"])
@pytest.mark.parametrize("num_prompts", [2, 5, 6, 9, 12, 17])
def test_windows_are_those_of_the_released_code(strategy: str, num_prompts: int) -> None:
    tokens = torch.randn(3, 16, 7, dtype=torch.float64)
    ours = windows_of_images(strategy, tokens, num_prompts)
    assert ours.shape[:1] == (3,)
    torch.testing.assert_close(ours.flatten(0, 1), released_windows(tokens, num_prompts, strategy))


def test_one_prompt_is_the_whole_image() -> None:
    tokens = torch.randn(3, 16, 7)
    torch.testing.assert_close(windows_of_images("max", tokens, 1)[:, 0], tokens.amax(1))


@pytest.mark.parametrize("strategy", ["random", "mean", "max"])
def test_prompts_are_candidates_of_all_images_each_once(
    vit: VisionTransformer, make_loader: Callable[..., Loader], strategy: str
) -> None:
    loader = make_loader(12, 5)
    found = []
    for layer, tokens in enumerate(tokens_of(vit, loader)):
        candidates = tokens.flatten(0, 1) if strategy == "random" else released_windows(tokens, 6, strategy)
        chosen = [
            positions(build(vit, loader, strategy, seed=s).prompts[layer], candidates) for s in range(4)
        ]
        assert all(len(set(each)) == 6 for each in chosen)
        per_image = len(candidates) // 12
        # 24 draws from 12 images come from one batch of 5 with a chance of about 1e-9.
        assert len({position // per_image for each in chosen for position in each}) > 5
        found.append(chosen)
    assert found[0] != found[1], "each layer draws anew"


def test_every_token_has_the_same_chance(vit: VisionTransformer, make_loader: Callable[..., Loader]) -> None:
    loader = make_loader(8, 3)
    (tokens,) = tokens_of(vit, loader)[:1]
    hits = torch.zeros(8)
    for seed in range(60):
        prompts = build(vit, loader, "random", depth="shallow", num_prompts=16, seed=seed).prompts[0]
        chosen = torch.tensor(positions(prompts, tokens.flatten(0, 1)))
        hits += (chosen // 16).bincount(minlength=8)
    # 120 each on average; the standard deviation is below sqrt(960 * 7 / 64) = 10.3.
    assert 70 <= float(hits.min()) <= float(hits.max()) <= 170


def test_counts_and_inertia_are_exact_while_the_sample_holds_all(
    vit: VisionTransformer, make_loader: Callable[..., Loader]
) -> None:
    loader = make_loader(10, 4)
    protos = build(vit, loader, "mean")
    for layer, tokens in enumerate(tokens_of(vit, loader)):
        squared, nearest = torch.cdist(tokens.flatten(0, 1), protos.prompts[layer]).square().min(1)
        assert torch.equal(protos.counts[layer], nearest.bincount(minlength=6).double())
        assert float(protos.inertia[layer]) == pytest.approx(float(squared.sum()), rel=1e-4)
    assert (protos.num_images, protos.metadata["sampling"]) == (10, "all")


def test_counts_are_estimates_beyond_the_sample(
    vit: VisionTransformer, make_loader: Callable[..., Loader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spt_fast.prototypes.drawn.SAMPLE_TOKENS", 200)
    loader = make_loader(60, 20)
    protos = build(vit, loader, "random", depth="shallow")
    (tokens,) = tokens_of(vit, loader)[:1]
    exact = float(torch.cdist(tokens.flatten(0, 1), protos.prompts[0]).square().amin(1).sum())
    assert float(protos.counts.sum()) == pytest.approx(960, rel=1e-6)
    assert float(protos.inertia[0]) == pytest.approx(exact, rel=0.3)


def test_bad_input(vit: VisionTransformer, make_loader: Callable[..., Loader]) -> None:
    loader = make_loader(4, 2)
    with pytest.raises(ValueError, match=r"num_prompts must be at most 17 for windows of single images"):
        build(vit, loader, "mean", num_prompts=18)
    with pytest.raises(ValueError, match="sampling is for strategy 'mean', 'max', 'random', got 'all'"):
        build(vit, loader, "kmeans")
    with pytest.raises(ValueError, match="sampling must be one of 'batch', 'all'"):
        build(vit, loader, "mean", sampling="image")
    with pytest.raises(ValueError, match="num_prompts must be at most the number of patch tokens"):
        build(vit, loader, "random", num_prompts=65)
