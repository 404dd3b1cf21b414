"""Pooling and final norm: MAE's in the paper's form unless told otherwise; files know their form."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from spt_fast import PromptedViT
from spt_fast.backbones.open import open_model
from spt_fast.data.shipped import load_backbone
from spt_fast.support.files import read_safetensors, write_safetensors

MAE = "vit_base_patch16_224.mae"
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32}
PAPER = {"pool": "avg-with-prompts", "norm": "own"}


def open_mae(**options: Any) -> nn.Module:
    """MAE's ViT-B, made small, with random weights."""
    return open_model(MAE, pretrained=False, model_options=SMALL, **options)


@pytest.fixture
def mae_file(tmp_path: Path) -> Callable[[str], Path]:
    """The file of a small ViT whose norm is none of a fresh one, under a name."""

    def write(name: str) -> Path:
        model = open_mae(pool=None)
        generator = torch.Generator().manual_seed(3)
        for parameter in model.norm.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
        torch.save({"model": model.state_dict()}, tmp_path / name)
        return tmp_path / name

    return write


def written_out(path: Path, prompts: Tensor, head: nn.Linear, images: Tensor, pool: str, norm: str) -> Tensor:
    """The logits of deep prompts as tokens, in float64: eq. 6 and 13, and what comes after the blocks."""
    model = VisionTransformer(patch_size=16, num_classes=0, **SMALL)
    model.load_state_dict(torch.load(path)["model"])
    model = model.double().eval()
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images.double()))))
    outputs = x
    for block, own in zip(model.blocks, prompts.double(), strict=True):
        outputs = block(torch.cat([outputs[:, : x.shape[1]], own.expand(len(x), -1, -1)], dim=1))
    final = model.norm if norm == "own" else nn.LayerNorm(32, eps=model.norm.eps, dtype=torch.float64)
    if pool == "token":
        features = final(outputs)[:, 0]
    elif pool == "avg":
        features = final(outputs[:, 1 : x.shape[1]].mean(dim=1))
    else:
        # The released code: x[:, 1:].mean(dim=1), in which the prompts are, then MAE's norm.
        features = final(outputs[:, 1:].mean(dim=1))
    return features @ head.weight.double().T + head.bias.double()


@pytest.mark.parametrize("norm", ["own", "new"])
@pytest.mark.parametrize("pool", ["token", "avg", "avg-with-prompts"])
def test_each_form_is_the_one_written_out(
    pool: str, norm: str, mae_file: Callable[[str], Path], make_images: Callable[..., Tensor]
) -> None:
    path, images = mae_file("weights.pth"), make_images()
    # As timm's own weights come: all but the norm has its name.
    model = open_model(MAE, checkpoint=path, model_options=SMALL, pool=pool, norm=norm)
    tuned = PromptedViT(model, torch.randn(2, 5, 32), num_classes=3).eval()
    assert not any(each.requires_grad for each in (*model.norm.parameters(), *model.fc_norm.parameters()))
    with torch.no_grad():
        found = tuned(images)
        expected = written_out(path, tuned.prompts, tuned.head, images, pool, norm)
    assert (found - expected).abs().max() < 7e-7 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "file"), [(MAE, "weights.pth"), ("vit_base_patch16_224", "mae_pretrain_vit_base.pth")]
)
def test_mae_has_the_papers_form_by_default(
    name: str, file: str, mae_file: Callable[[str], Path], make_images: Callable[..., Tensor], capsys: Any
) -> None:
    path = mae_file(file)
    model = open_model(name, checkpoint=path, model_options=SMALL)
    assert "pool='avg-with-prompts', norm='own', the paper's for MAE" in capsys.readouterr().err
    tuned = PromptedViT(model, torch.randn(2, 5, 32), num_classes=3).eval()
    images = make_images()
    with torch.no_grad():
        expected = written_out(path, tuned.prompts, tuned.head, images, **PAPER)
        torch.testing.assert_close(tuned(images), expected.float(), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "pool"),
    [
        ("vit_base_patch16_224.augreg_in21k", {}, "token"),
        (MAE, {"global_pool": "avg"}, "avg"),
        (MAE, {"global_pool": "token"}, "token"),
    ],
)
def test_other_weights_and_options_are_left_as_they_are(
    name: str, options: dict[str, Any], pool: str, capsys: Any
) -> None:
    model = open_model(name, pretrained=False, model_options={**SMALL, **options})
    assert model.global_pool == pool
    assert not PromptedViT(model, 2, num_classes=3).pool_prompts
    assert "pooling" not in capsys.readouterr().err


@pytest.mark.parametrize("pool", ["avg", "avg-with-prompts"])
def test_the_shipped_backbone_is_normalised_after_the_average(
    pool: str, make_images: Callable[..., Tensor]
) -> None:
    tuned = PromptedViT(open_model("shipped", pool=pool), 5, num_classes=3).eval()
    images, plain = make_images(size=64), load_backbone()
    with torch.no_grad():
        x = plain._pos_embed(plain.patch_embed(images))
        outputs = x
        for block, prompts in zip(plain.blocks, tuned.prompts, strict=True):
            tokens = torch.cat([outputs[:, : x.shape[1]], prompts.expand(len(x), -1, -1)], dim=1)
            outputs = block(tokens)
        pooled = outputs if pool == "avg-with-prompts" else outputs[:, : x.shape[1]]
        expected = tuned.head(plain.norm(pooled.mean(dim=1)))
        torch.testing.assert_close(tuned(images), expected, atol=2e-5, rtol=1e-5)


FORMS = [
    {"pool": "token", "norm": "own"},
    {"pool": "avg", "norm": "own"},
    PAPER,
    {"pool": "avg-with-prompts", "norm": "new"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_file_opened_in_another_form_is_refused_with_both_named(
    form: dict[str, str], tmp_path: Path
) -> None:
    """MAE's ViT-B of random weights, one block of it: no weight tells one form from another."""
    one_block = {"depth": 1, "img_size": 32}

    def opened(form: dict[str, str]) -> nn.Module:
        return open_model(MAE, pretrained=False, model_options=one_block, **form)

    PromptedViT(opened(form), 2, num_classes=3).save(tmp_path / "tuned.safetensors")
    for other in FORMS:
        model = opened(other)
        if other == form:
            PromptedViT.from_file(tmp_path / "tuned.safetensors", model)
            continue
        with pytest.raises(ValueError, match="is for pool=") as error:
            PromptedViT.from_file(tmp_path / "tuned.safetensors", model)
        for each in (form, other):
            assert f"pool={each['pool']!r}, norm={each['norm']!r}" in str(error.value)
        tuned = PromptedViT(model, 2, num_classes=3)
        with pytest.raises(ValueError, match=r"is for (global_pool|pool_prompts|norm) "):
            tuned.load(tmp_path / "tuned.safetensors")


def test_files_of_before_mean_what_they_meant(tmp_path: Path, make_images: Callable[..., Tensor]) -> None:
    """They state no norm; the pooling is timm's, and a model that timm made takes them."""
    import timm

    before = timm.create_model("vit_base_patch16_224", num_classes=0, **SMALL)
    tuned = PromptedViT(before, 2, num_classes=3).eval()
    tuned.save(tmp_path / "tuned.safetensors")
    tensors, facts = read_safetensors(tmp_path / "tuned.safetensors", kind="prompted_vit")
    assert "norm" not in facts
    expected = tuned(make_images())
    again = PromptedViT.from_file(tmp_path / "tuned.safetensors", tuned.release()).eval()
    assert torch.equal(again(make_images()), expected)
    write_safetensors(tmp_path / "bad.safetensors", tensors, {**facts, "norm": "old"}, kind="prompted_vit")
    with pytest.raises(ValueError, match="norm must be one of 'own', 'new', got 'old'"):
        PromptedViT.from_file(tmp_path / "bad.safetensors", again.release())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pool": "max"}, "pool must be one of 'auto', 'token', 'avg', 'avg-with-prompts', got 'max'"),
        ({"norm": "old"}, "norm must be one of 'own', 'new', got 'old'"),
        (
            {"pool": "avg", "model_options": {"global_pool": "token"}},
            "pool='avg' sets global_pool of model_options, which must not be given",
        ),
    ],
)
def test_bad_forms_are_named(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        open_model(MAE, pretrained=False, **options)


def test_a_model_without_a_class_token_is_not_pooled_by_it() -> None:
    with pytest.raises(ValueError, match=r"pool='token' needs .*, got 'avg': it has no class token"):
        open_model("shipped", pool="token")


@pytest.mark.parametrize("saved_after", [True, False])
def test_a_norm_on_the_other_side_of_the_average_is_refused(saved_after: bool, tmp_path: Path) -> None:
    """No weight of the shipped backbone tells where its norm stands."""

    def opened(after: bool) -> nn.Module:
        return open_model("shipped", pool="avg" if after else None)

    PromptedViT(opened(saved_after), 2, num_classes=3).save(tmp_path / "tuned.safetensors")
    PromptedViT.from_file(tmp_path / "tuned.safetensors", opened(saved_after))
    other = opened(not saved_after)
    places = ("after", "before") if saved_after else ("before", "after")
    message = "is for a norm {} the average of the tokens, but this model has it {}".format(*places)
    with pytest.raises(ValueError, match=message):
        PromptedViT.from_file(tmp_path / "tuned.safetensors", other)
    with pytest.raises(ValueError, match=message):
        PromptedViT(other, 2, num_classes=3).load(tmp_path / "tuned.safetensors")
