"""Pruning of E2VPT: importance is the gradient of masks, what matters least goes, and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from spt_fast.methods.e2vpt_pruning import Importance, importance, prune
from spt_fast.methods.registry import load_tuned, tune
from spt_fast.training.prune import fit_pruned

MakeViT = Callable[..., VisionTransformer]
NUM_PROMPTS, WIDTH, DEPTH = 6, 32, 3


@pytest.fixture
def tuned(make_random: MakeViT) -> Any:
    return tune(make_random(), "e2vpt", prompts=NUM_PROMPTS)


@pytest.fixture
def loader(make_loader: Any) -> list[tuple[Tensor, Tensor]]:
    return make_loader(16)  # type: ignore[no-any-return]


def test_importance_is_the_gradient_of_masks(tuned: Any, loader: list[tuple[Tensor, Tensor]]) -> None:
    """By autograd through masks that multiply the prompts, written out."""
    learned = tuned.source.prompts.detach().clone()
    tokens = torch.ones(NUM_PROMPTS, requires_grad=True)
    pieces = torch.ones(NUM_PROMPTS, 16, requires_grad=True)
    found = [torch.zeros_like(tokens), torch.zeros_like(pieces)]
    for images, labels in loader:
        masked = learned * tokens[:, None] * pieces.repeat_interleave(WIDTH // 16, dim=1)
        (gradient,) = torch.autograd.grad(F.cross_entropy(tuned(images), labels), [tuned.source.prompts])
        for total, each in zip(found, torch.autograd.grad(masked, [tokens, pieces], gradient), strict=True):
            total += each.abs() / len(loader)
    tuned.train()
    given = importance(tuned, loader)
    torch.testing.assert_close(given.tokens, found[0])
    torch.testing.assert_close(given.pieces, found[1])
    assert tuned.training
    assert all(each.grad is None for each in tuned.parameters())


def test_what_matters_least_goes(tuned: Any, make_images: Callable[..., Tensor], tmp_path: Path) -> None:
    before, images = tuned.prompts.detach().clone(), make_images(3)
    of = Importance(torch.tensor([3.0, 1.0, 9.0, 2.0, 5.0, 4.0]), torch.rand(NUM_PROMPTS, 16))
    kept = prune(tuned, of, tokens=0.5, pieces=0.3)
    assert kept.tolist() == [2, 4, 5]
    of_kv = tuned.kv_prompts.numel()
    assert tuned.num_trainable(head=False) == DEPTH * 3 * WIDTH * 12 // 16 + of_kv
    assert (tuned.source.prompts != 0).sum() == DEPTH * 3 * WIDTH * 12 // 16
    assert tuned.prompts.shape == (DEPTH, 3, WIDTH)
    for row, token in enumerate(kept.tolist()):
        smallest = set(of.pieces[token].argsort()[:4].tolist())
        for piece in range(16):
            channels = slice(piece * 2, piece * 2 + 2)
            expected = 0 * before[:, token, channels] if piece in smallest else before[:, token, channels]
            assert torch.equal(tuned.prompts[:, row, channels], expected)
    tuned(images).square().sum().backward()
    assert torch.equal(tuned.source.prompts.grad == 0, (tuned.source.mask == 0).expand(DEPTH, -1, -1))
    expected = tuned(images)
    tuned.save(tmp_path / "file")
    loaded: Any = load_tuned(tmp_path / "file", tuned.release())
    assert torch.equal(loaded(images), expected)
    assert torch.equal(loaded.source.mask, tuned.source.mask)
    assert loaded.num_trainable(head=False) == DEPTH * 3 * WIDTH * 12 // 16 + of_kv
    # As E2VPT from the prompts that are left.
    plain: Any = tune(loaded.release(), "e2vpt", prompts=loaded.prompts.detach())
    with torch.no_grad():
        plain.kv_prompts.copy_(loaded.kv_prompts)
    assert torch.equal(plain(images), expected)


def test_pruning_nothing_changes_nothing(tuned: Any, make_images: Callable[..., Tensor]) -> None:
    images = make_images(3)
    expected = tuned(images)
    of = Importance(torch.rand(NUM_PROMPTS), torch.rand(NUM_PROMPTS, 16))
    assert prune(tuned, of, 0, 0).tolist() == list(range(NUM_PROMPTS))
    assert torch.equal(tuned(images), expected)


def test_training_is_rewound(make_random: MakeViT, loader: list[tuple[Tensor, Tensor]]) -> None:
    tuned: Any = tune(make_random(), "e2vpt", prompts=NUM_PROMPTS, num_classes=4)
    # The number of prompts is that of the first stage.
    given = {"epochs": 4, "lr": 1e-2, "warmup_epochs": 0, "progress": False, "num_prompts": NUM_PROMPTS}
    first, second = fit_pruned(tuned, loader, tokens=0.5, pieces=0.25, **given)  # type: ignore[arg-type]
    assert first.epochs == second.epochs == 4
    assert second.loss[-1] < 0.8 * second.loss[0]
    # It starts anew, near where the first run did and not where that ended.
    assert abs(second.loss[0] - first.loss[0]) < abs(second.loss[0] - first.loss[-1])
    assert tuned.prompts.shape == (DEPTH, 3, WIDTH)
    assert (tuned.prompts == 0).sum() == DEPTH * 3 * WIDTH // 4


def test_bad_input_is_refused(tuned: Any, make_vit: MakeViT, loader: list[tuple[Tensor, Tensor]]) -> None:
    of = Importance(torch.rand(NUM_PROMPTS), torch.rand(NUM_PROMPTS, 16))
    for given, message in (
        ({"tokens": 1}, "tokens must be a share below 1, got 1"),
        ({"pieces": -0.1}, "pieces must be a finite number >= 0"),
        ({"of": Importance(of.tokens[1:], of.pieces)}, r"of\.tokens must"),
    ):
        with pytest.raises(ValueError, match=message):
            prune(tuned, **{"of": of, **given})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tokens must be a share below 1"):
        fit_pruned(tuned, loader, tokens=1.0)
    with pytest.raises(ValueError, match="loader must give at least one batch"):
        importance(tuned, [])
    other: Any = tune(make_vit(), "vpt-deep")
    with pytest.raises(TypeError, match="tuned must be an E2VPT, got PromptedViT"):
        importance(other, loader)
    narrow: Any = tune(make_vit(embed_dim=24), "e2vpt")
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        importance(narrow, loader)
    tuned.release()
    with pytest.raises(RuntimeError, match="has released its model"):
        prune(tuned, of)


def test_prompts_that_do_not_learn_are_refused(
    make_random: MakeViT, loader: list[tuple[Tensor, Tensor]]
) -> None:
    frozen = tune(make_random(), "e2vpt", prompts=NUM_PROMPTS, freeze_prompts=True)
    of = Importance(torch.ones(NUM_PROMPTS), torch.ones(NUM_PROMPTS, 16))
    for refused in (lambda: importance(frozen, loader), lambda: prune(frozen, of)):
        with pytest.raises(ValueError, match="tuned must have prompts that learn, got freeze_prompts=True"):
            refused()
    assert not frozen.source.prompts.requires_grad
