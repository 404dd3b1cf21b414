"""linear, bias, partial, full: what learns, that it is plain fine-tuning, and that all of it comes back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import spt_fast
from spt_fast.training import fit

NAMES = ("linear", "bias", "partial", "full")


def learns(method: str, name: str) -> bool:
    """Written out for three blocks."""
    wanted = {
        "linear": False,
        "bias": name.endswith(".bias"),
        "partial": name.startswith(("blocks.2.", "norm.", "fc_norm.")),
        "full": True,
    }
    return name.startswith("head.") or wanted[method]


@pytest.mark.parametrize("method", NAMES)
def test_it_is_plain_fine_tuning(
    make_vit: Any, flavour: dict[str, Any], method: str, make_images: Any
) -> None:
    """Outputs and all gradients against a copy of the model whose weights are opened by hand."""
    model = make_vit(**flavour)
    expected = copy.deepcopy(model).eval()
    for name, parameter in expected.named_parameters():
        parameter.requires_grad_(learns(method, name))
    tuned = spt_fast.tune(model, method)
    images, labels = make_images(4), torch.tensor([0, 1, 2, 3])
    F.cross_entropy(tuned(images), labels).backward()
    F.cross_entropy(expected(images), labels).backward()
    wanted = {name: each.grad for name, each in expected.named_parameters() if each.requires_grad}
    found = {name: each.grad for name, each in tuned.model.named_parameters() if each.requires_grad}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", NAMES)
def test_training_saving_loading_releasing_and_merging(
    make_vit: Any, make_loader: Any, make_images: Any, method: str, tmp_path: Path
) -> None:
    model, images = make_vit(), make_images(3)
    state = copy.deepcopy(model.state_dict())
    tuned = spt_fast.tune(model, method, num_classes=4, head_norm="batch")
    tuned.class_names = ("a", "b", "c", "d")
    history = fit(tuned, make_loader(8), epochs=20, lr=1e-3, progress=False)
    assert history.loss[-1] < history.loss[0]
    logits = tuned.eval()(images)
    tuned.save(tmp_path / "tuned.safetensors")
    assert tuned.release() is model
    assert_same(model, state)
    assert not any("taken" in name for name in vars(model))

    again = spt_fast.load_tuned(tmp_path / "tuned.safetensors", model).eval()
    assert (again.method, again.class_names) == (method, tuned.class_names)
    assert torch.equal(again(images), logits)
    merged = again.merge()
    assert merged is model
    torch.testing.assert_close(merged.eval()(images), logits, rtol=1e-5, atol=1e-5)
    assert merged.num_classes == 4
    # A plain model of timm: nothing is left that would run beside it, and it can be tuned again.
    assert not [module for module in merged.modules() if "forward" in vars(module)]
    spt_fast.tune(merged, "linear").release()


def assert_same(model: nn.Module, state: dict[str, Tensor]) -> None:
    found = model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.items())


@pytest.mark.parametrize(
    ("name", "body", "bias"),
    [
        ("vit_base_patch16_224", 85_798_656, 102_912),
        ("vit_large_patch16_224", 303_301_632, 11 * 1024 * 24 + 2 * 1024),
        ("vit_huge_patch14_224", 630_764_800, 11 * 1280 * 32 + 2 * 1280),
    ],
)
def test_numbers_that_learn_are_those_of_the_formulas(name: str, body: int, bias: int) -> None:
    """Facts of the paper's tables: backbone without head, 11 D L + 2 D biases, head (D + 1) C."""
    with torch.device("meta"):
        model = timm.create_model(name)
    width, blocks = model.embed_dim, len(model.blocks)
    assert bias == 11 * width * blocks + 2 * width
    numbers = {"linear": 0, "bias": bias, "partial": 12 * width**2 + 13 * width + 2 * width, "full": body}
    for method, number in numbers.items():
        tuned = spt_fast.tune(model, method, num_classes=100)
        assert tuned.num_trainable(head=False) == number
        assert tuned.num_trainable() == number + 100 * (width + 1)
        tuned.release()


def test_a_file_of_one_method_is_not_loaded_as_another(make_vit: Any, tmp_path: Path) -> None:
    spt_fast.tune(make_vit(), "bias").save(tmp_path / "bias.safetensors")
    model = make_vit()
    tuned = spt_fast.tune(model, "full")
    with pytest.raises(ValueError, match=r"bias.safetensors was tuned by 'bias', but .* tuned by 'full'"):
        tuned.load(tmp_path / "bias.safetensors")
    tuned.release()
    with pytest.raises(ValueError, match=r"was tuned by 'bias', which is no PromptedViT; spt_fast\.load"):
        spt_fast.PromptedViT.from_file(tmp_path / "bias.safetensors", model)
    other = make_vit(depth=2)
    with pytest.raises(ValueError, match=r"bias\.safetensors .*num_blocks"):
        spt_fast.load_tuned(tmp_path / "bias.safetensors", other)
    spt_fast.PromptedViT(model, 2).release()
    spt_fast.PromptedViT(other, 2).release()


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("biass", {}, ValueError, r"method must be one of .*, got 'biass'; did you mean bias"),
        (3, {}, TypeError, "method must be a string, got 3"),
        (
            "bias",
            {"num_blocks": 2},
            ValueError,
            r"'num_blocks' is no option of method 'bias'.*; partial have it",
        ),
        ("partial", {"num_block": 2}, ValueError, r"'num_block' is no option .*did you mean num_blocks"),
        (
            "partial",
            {"num_blocks": 4},
            ValueError,
            "num_blocks must be at most 3, the blocks of the model, got 4",
        ),
        ("partial", {"num_blocks": 0}, ValueError, "num_blocks must be an integer >= 1, got 0"),
        ("full", {"prompts": 3}, ValueError, "prompts must be None for method 'full', which has none, got 3"),
        (
            "spt-deep",
            {"prompts": 3},
            ValueError,
            "prompts must be Prototypes or a tensor for method 'spt-deep'",
        ),
        (
            "vpt-deep",
            {"prompts": torch.ones(3, 2, 32)},
            ValueError,
            "prompts must be a number for method 'vpt-",
        ),
    ],
)
def test_bad_input_leaves_the_model_alone(
    make_vit: Any, method: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make_vit()
    state, forwards = copy.deepcopy(model.state_dict()), [vars(m).get("forward") for m in model.modules()]
    with pytest.raises(error, match=message):
        spt_fast.tune(model, method, **options)
    assert_same(model, state)
    assert [vars(m).get("forward") for m in model.modules()] == forwards
    assert all(parameter.requires_grad for parameter in model.parameters())
    spt_fast.tune(model, "linear").release()


def test_prompts_are_no_plain_weights(make_vit: Any) -> None:
    tuned = spt_fast.tune(make_vit(), "vpt-deep")
    with pytest.raises(
        ValueError, match="merge is for methods that end in plain weights, which 'vpt-deep' does"
    ):
        tuned.merge()
    half = spt_fast.tune(make_vit(), "bias", weight_dtype="bf16")
    with pytest.raises(ValueError, match="merge needs the model in its own dtype"):
        half.merge()
