"""What a recipe makes of a model: prompts by method, the new head and its start, pooling, what is refused."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spt_fast import PromptedViT, Recipe, build_prototypes, load_tuned, tune
from spt_fast.backbones.open import open_model
from spt_fast.backbones.pooling import Pooling, set_pooling
from spt_fast.methods import names as method_names
from spt_fast.methods.base import TunedViT
from spt_fast.prototypes.result import Prototypes
from spt_fast.support.randomness import seeded
from spt_fast.training.build import build, check_buildable, start_head

NAMES = [str(number) for number in range(400)]


@pytest.fixture(scope="module")
def prototypes(make_vit: Callable[..., nn.Module], make_loader: Callable[..., Any]) -> Prototypes:
    return build_prototypes(make_vit(), make_loader(), num_prompts=2, progress=False)


def test_spt_starts_from_prototypes_or_a_file_of_them(
    make_vit: Callable[..., nn.Module], prototypes: Prototypes, tmp_path: Path
) -> None:
    prototypes.save(tmp_path / "prompts.safetensors")
    for given in (prototypes, tmp_path / "prompts.safetensors", str(tmp_path / "prompts.safetensors")):
        tuned = build(make_vit(), Recipe(), given, class_names=("a", "b"))
        assert torch.equal(tuned.prompts, prototypes.prompts)
        assert (tuned.depth, tuned.class_names) == ("deep", ("a", "b"))
        assert tuned.head.out_features == 2
    shallow = build(make_vit(), Recipe(method="spt-shallow"), prototypes.prompts[:1], class_names=("a", "b"))
    assert (shallow.depth, list(shallow.prompts.shape)) == ("shallow", [1, 2, 32])


@pytest.mark.parametrize(
    ("fields", "shape", "depth"),
    [
        ({"method": "vpt-deep"}, [3, 20, 32], "deep"),
        ({"method": "vpt-shallow"}, [1, 100, 32], "shallow"),
        ({"method": "vpt-deep", "num_prompts": 4}, [3, 4, 32], "deep"),
    ],
)
def test_vpt_draws_its_prompts(
    fields: dict[str, Any], shape: list[int], depth: str, vit: nn.Module, make_images: Callable[..., Tensor]
) -> None:
    state = torch.get_rng_state()
    tuned = build(vit, Recipe(**fields, seed=3), class_names=NAMES)
    assert torch.equal(torch.get_rng_state(), state)
    assert (list(tuned.prompts.shape), tuned.depth) == (shape, depth)
    assert tuned(make_images()).shape == (4, 400)
    learning = {name for name, each in tuned.named_parameters() if each.requires_grad}
    assert learning == {"model.head.weight", "model.head.bias", "prompts"}


def test_any_method_is_built_with_its_options(make_vit: Callable[..., nn.Module]) -> None:
    for fields, learning in (({"method": "linear"}, 0), ({"method": "bias"}, 11 * 32 * 3 + 2 * 32)):
        assert (
            build(make_vit(), Recipe(**fields), class_names=("a", "b")).num_trainable(head=False) == learning
        )
    options = {"method_options": {"num_blocks": 2}}
    tuned = build(make_vit(), Recipe(method="partial", **options), class_names=("a", "b"))
    assert (tuned.method, tuned.options) == ("partial", {"num_blocks": 2})
    with pytest.raises(ValueError, match=r"'num_blocks' is no option of method 'bias', .*; partial have it"):
        build(make_vit(), Recipe(method="bias", **options), class_names=("a", "b"))
    with pytest.raises(
        ValueError, match=r"'engin' is no option of method 'spt-deep', .*; did you mean engine"
    ):
        build(
            make_vit(), Recipe(method_options={"engin": "kv"}), torch.ones(3, 2, 32), class_names=("a", "b")
        )


@pytest.mark.parametrize("method", method_names())
def test_a_method_is_tried_without_its_prompts_and_the_model_is_left_as_it_was(
    method: str, make_vit: Callable[..., nn.Module], make_images: Callable[..., Tensor]
) -> None:
    model, images = make_vit().eval(), make_images()
    before = model(images)
    check_buildable(model, Recipe(method=method), ("a", "b"))
    assert torch.equal(model(images), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_built_is_found_without_its_prompts(make_vit: Callable[..., nn.Module]) -> None:
    for start in (None, "vipamin"):
        recipe = Recipe(method="spt-deep", prompt_init=start, method_options={"engine": "fast"})
        with pytest.raises(ValueError, match="engine must be one of"):
            check_buildable(make_vit(), recipe, ("a", "b"))


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("head_norm", "the recipe's head_norm"),
        ("weight_dtype", "the recipe's weight_dtype"),
        ("freeze_prompts", "the recipe's freeze_prompts"),
        ("prompt_dropout", "the recipe's prompt_dropout"),
        ("pool_prompts", "the recipe's pool"),
        ("allow_other_backbone", r"allow_other_backbone \(--allow-other-backbone\)"),
    ],
)
def test_what_has_a_place_of_its_own_is_no_option_of_the_method(
    option: str, place: str, vit: nn.Module
) -> None:
    recipe = Recipe(method="vpt-deep", method_options={option: None})
    with pytest.raises(ValueError, match=f"must not hold '{option}', which is said by {place}"):
        build(vit, recipe, class_names=("a", "b"))


@pytest.mark.parametrize("start", ["prototypes", "vipamin"])
def test_a_stated_start_must_be_given(start: Any, vit: nn.Module, prototypes: Prototypes) -> None:
    recipe = Recipe(method="bpt", prompt_init=start)
    with pytest.raises(ValueError, match=f"prompts must be given for prompt_init='{start}': spt_fast"):
        build(vit, recipe, class_names=("a", "b"))
    with pytest.raises(ValueError, match="prompts must be None for prompt_init='random', got Prototypes"):
        build(vit, recipe.replace(prompt_init="random"), prototypes, class_names=("a", "b"))
    tuned = build(vit, recipe, prototypes.prompts, class_names=("a", "b"))
    torch.testing.assert_close(tuned.prompts, prototypes.prompts)


def test_the_recipe_reaches_the_model(make_vit: Callable[..., nn.Module]) -> None:
    recipe = Recipe(method="vpt-deep", freeze_prompts=True, prompt_dropout=0.25, weight_dtype="bf16")
    tuned = build(make_vit(), recipe, class_names=("a", "b", "c"))
    assert not tuned.prompts.requires_grad
    assert (tuned.prompt_dropout.p, tuned.weight_dtype) == (0.25, torch.bfloat16)


def test_the_seed_decides_prompts_and_head(make_vit: Callable[..., nn.Module]) -> None:
    first, same, other = (
        build(make_vit(), Recipe(method="vpt-deep", seed=seed), class_names=NAMES) for seed in (4, 4, 5)
    )
    assert torch.equal(first.prompts, same.prompts)
    assert torch.equal(first.head.weight, same.head.weight)
    assert not torch.equal(first.prompts, other.prompts)
    assert not torch.equal(first.head.weight, other.head.weight)


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({}, None, "prompts must be Prototypes or a tensor for method 'spt-deep', got None"),
        ({"method": "linear"}, 1, "prompts must be None for method 'linear', which has none, got"),
        ({"method": "vpt-deep"}, 1, "prompts must be a number for method 'vpt-deep', which draws them, got"),
        ({"num_prompts": 5}, 1, "num_prompts of the recipe is 5, but prompts are 2 per block"),
        ({"method": "spt-shallow"}, 1, "prompts must have shape [1, N_p, 32] for depth='shallow', got [3, 2"),
    ],
)
def test_prompts_that_do_not_fit_the_recipe_are_refused(
    fields: dict[str, Any], given: object, message: str, vit: nn.Module, prototypes: Prototypes
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build(
            vit, Recipe(**fields), None if given is None else prototypes.prompts, class_names=("a", "b", "c")
        )
    assert vit.head.out_features == 5


def test_prompts_of_another_kind_or_backbone_are_refused(
    make_vit: Callable[..., nn.Module], prototypes: Prototypes, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="prompts must be Prototypes, a file of them or a tensor, got int"):
        build(make_vit(), Recipe(), 4, class_names=("a", "b", "c"))  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        build(make_vit(), Recipe(), tmp_path / "none.safetensors", class_names=("a", "b", "c"))
    prototypes.save(tmp_path / "prompts.safetensors")
    other = make_vit()
    nn.init.zeros_(other.blocks[0].attn.qkv.weight)
    with pytest.raises(ValueError, match="allow_other_backbone"):
        build(other, Recipe(), tmp_path / "prompts.safetensors", class_names=("a", "b", "c"))
    file = tmp_path / "prompts.safetensors"
    tuned = build(other, Recipe(), file, class_names=("a", "b", "c"), allow_other_backbone=True)
    assert torch.equal(tuned.prompts, prototypes.prompts)


@pytest.mark.parametrize(("fields", "std"), [({}, 0.02), ({"head_std": 0.01}, 0.01)])
def test_a_head_of_the_released_code(fields: dict[str, float], std: float, vit: nn.Module) -> None:
    """timm's `trunc_normal_` written out: normal values, drawn by inversion between -2 and 2; zero bias."""
    recipe = Recipe(method="linear", seed=4, head_init="trunc_normal", **fields)
    tuned = build(vit, recipe, class_names=NAMES)
    weight, bias = tuned.head.weight.detach(), tuned.head.bias.detach()
    assert torch.equal(bias, torch.zeros(400))
    assert float(weight.double().std()) == pytest.approx(std, rel=0.03)
    # Inversion of the normal distribution; the bounds of -2 and 2 are absolute, 100 deviations away.
    uniform = torch.special.ndtr(weight.double().flatten() / std).sort().values
    expected = (torch.arange(uniform.numel()) + 0.5) / uniform.numel()
    assert float((uniform - expected).abs().max()) < 1.95 / uniform.numel() ** 0.5


def test_a_head_of_vpt(vit: nn.Module) -> None:
    """Normal with variance 2 / classes, and a bias for which the sigmoid is 0.01."""
    tuned = build(vit, Recipe(method="linear", head_init="kaiming"), class_names=NAMES)
    weight, bias = tuned.head.weight.detach().double(), tuned.head.bias.detach()
    torch.testing.assert_close(bias.sigmoid(), torch.full((400,), 0.01))
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / 400), rel=0.03)
    uniform = torch.special.ndtr(weight.flatten() / math.sqrt(2 / 400)).sort().values
    expected = (torch.arange(uniform.numel()) + 0.5) / uniform.numel()
    assert float((uniform - expected).abs().max()) < 1.95 / uniform.numel() ** 0.5


def test_the_head_is_timms_unless_asked(vit: nn.Module) -> None:
    weight = build(vit, Recipe(method="linear"), class_names=NAMES).head.weight.detach()
    # PyTorch's linear layer: uniform between -1 / sqrt(D) and 1 / sqrt(D).
    bound = 32**-0.5
    assert 0.99 * bound < float(weight.abs().max()) <= bound


def test_a_head_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="head_init='trunc_normal' needs a linear head, got Identity"):
        start_head(nn.Identity())


def test_a_batch_norm_before_the_head(
    make_vit: Callable[..., nn.Module], make_images: Callable[..., Tensor], tmp_path: Path
) -> None:
    """MAE's linear probe: features of a batch have mean 0 and variance 1 while training; it is saved."""
    recipe = Recipe(method="linear", head_norm="batch", head_init="trunc_normal", head_std=0.1)
    tuned = build(make_vit(), recipe, class_names=("a", "b", "c"))
    assert sum(each.numel() for each in tuned.trainable_parameters()) == 33 * 3
    images = make_images(6)
    with torch.no_grad():
        features = tuned.model.forward_head(tuned.model.forward_features(images), pre_logits=True)
        tuned.train()
        norm = (features - features.mean(0)) / (features.var(0, unbiased=False) + 1e-6).sqrt()
        expected = norm @ tuned.head[-1].weight.T + tuned.head[-1].bias
        torch.testing.assert_close(tuned(images), expected, rtol=1e-4, atol=1e-5)
        tuned.eval()
        learned = 0.1 * features.mean(0) / (0.9 + 0.1 * features.var(0) + 1e-6).sqrt()
        torch.testing.assert_close(
            (tuned.head[0].running_mean / (tuned.head[0].running_var + 1e-6).sqrt()), learned
        )
        logits = tuned(images)
    tuned.save(tmp_path / "tuned.safetensors")
    for own_head in (0, 3, 5):
        model = make_vit()
        model.reset_classifier(own_head)
        again = load_tuned(tmp_path / "tuned.safetensors", model)
        assert torch.equal(again.eval()(images), logits)
    model = tuned.release()
    assert isinstance(model.head, nn.Linear)
    plain = tune(model, "linear", num_classes=3)
    with pytest.raises(ValueError, match=r"head\.0\.running_mean"):
        plain.load(tmp_path / "tuned.safetensors")


def test_a_batch_norm_wants_a_linear_head(make_vit: Callable[..., nn.Module]) -> None:
    model = make_vit()
    with pytest.raises(ValueError, match="head_norm='batch' needs a linear head, got Identity"):
        PromptedViT(model, 2, num_classes=0, head_norm="batch")
    assert isinstance(model.head, nn.Linear)
    with pytest.raises(ValueError, match="head_norm must be one of 'none', 'batch', got 'layer'"):
        PromptedViT(model, 2, head_norm="layer")  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["avg", "avg-with-prompts"])
def test_the_pooling_of_the_recipe(pool: Any, make_vit: Callable[..., nn.Module]) -> None:
    tuned = build(
        make_vit(global_pool="avg"), Recipe(method="vpt-deep", pool=pool), class_names=("a", "b", "c")
    )
    assert tuned.pool_prompts is (pool == "avg-with-prompts")


def test_a_model_in_another_form_is_refused(make_vit: Callable[..., nn.Module]) -> None:
    def built(model: nn.Module, **fields: Any) -> TunedViT:
        return build(model, Recipe(method="vpt-deep", **fields), class_names=("a", "b", "c"))

    with pytest.raises(
        ValueError, match=r"^pool='avg' of the recipe needs a model that was opened so, .*'token'$"
    ):
        built(make_vit(), pool="avg")
    with pytest.raises(ValueError, match=r"^pool='token' of the recipe .* got 'avg'$"):
        built(make_vit(global_pool="avg"), pool="token")
    with pytest.raises(ValueError, match=r"^norm='new' of the recipe .* got 'own'$"):
        built(make_vit(), norm="new")
    new = make_vit()
    set_pooling(new, Pooling("token", "new"))
    with pytest.raises(ValueError, match=r"^norm='own' of the recipe .* got 'new'$"):
        built(new, norm="own")
    assert built(new, norm="new", pool="token").pool_prompts is False


def test_models_that_are_opened_as_the_recipe_says_fit() -> None:
    recipe = Recipe(method="vpt-deep", pool="avg", norm="new")
    model = open_model("shipped", pool=recipe.pool, norm=recipe.norm)
    assert build(model, recipe, class_names=("a", "b", "c")).pool_prompts is False


@pytest.mark.parametrize("names", ["ab", [], [1, 2]])
def test_names_of_classes_are_checked(make_vit, names):
    with pytest.raises(ValueError, match="class_names must"):
        build(make_vit(), Recipe(method="linear"), class_names=names)


def test_a_recipe_that_is_a_name_is_refused(make_vit):
    with pytest.raises(TypeError, match=r"recipe must be a Recipe, as .* got 'paper'"):
        build(make_vit(), "paper", class_names=("a", "b"))


@pytest.mark.parametrize("start", ["prototypes", "vipamin"])
def test_prompts_of_low_rank_are_tried_with_as_many_as_there_will_be(
    start: Any, make_vit: Callable[..., nn.Module]
) -> None:
    recipe = Recipe(method="bpt", prompt_init=start, num_prompts=20, method_options={"rank": 8})
    check_buildable(make_vit(), recipe, ("a", "b"))
    with pytest.raises(ValueError, match="rank must be at most 20"):
        check_buildable(make_vit(), recipe.replace(method_options={"rank": 21}), ("a", "b"))


def test_the_head_is_drawn_with_the_generator_of_the_models_device(
    make_vit: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head that timm draws on a GPU is decided by the seed, too."""
    devices: list[Any] = []

    def noted(seed: int, device: torch.device) -> Any:
        devices.append((seed, device))
        return seeded(seed)

    monkeypatch.setattr(sys.modules[build.__module__], "seeded", noted)
    model = make_vit()
    build(model, Recipe(method="linear", seed=3), class_names=("a", "b"))
    assert devices == [(3, next(model.parameters()).device)]
