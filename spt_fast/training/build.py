"""A model of timm as a recipe tunes it: with its prompts, and with a new head for named classes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import embed_dim, get_blocks
from spt_fast.backbones.identity import check_backbone
from spt_fast.backbones.pooling import stated_pooling
from spt_fast.backbones.snapshot import placement
from spt_fast.methods import registry
from spt_fast.methods.base import TunedViT
from spt_fast.prompting.checks import check_class_names
from spt_fast.prototypes.result import Prototypes
from spt_fast.support.randomness import seeded
from spt_fast.training.recipe import Recipe, given_or_default

_MOST_MADE_UP = 1024
# VPT's: the classes start with this probability each.
_PRIOR = 0.01
# Options of methods that have a place of their own.
_SAID_ELSEWHERE = {
    **{
        name: f"the recipe's {name}"
        for name in ("freeze_prompts", "prompt_dropout", "head_norm", "weight_dtype")
    },
    "pool_prompts": "the recipe's pool",
    "allow_other_backbone": "allow_other_backbone (--allow-other-backbone)",
}


def build(
    model: nn.Module,
    recipe: Recipe,
    prompts: Prototypes | Tensor | str | os.PathLike[str] | None = None,
    *,
    class_names: Sequence[str],
    allow_other_backbone: bool = False,
) -> TunedViT:
    """`model` with the prompts of `recipe.method` and a new head for `class_names`, drawn by `recipe.seed`.

    The caller's random state is not touched.

    Args:
        model: taken over, as `PromptedViT` does; opened with the pooling and norm of the recipe, where it
            states them.
        prompts: what prompts start from: `Prototypes`, a file of `Prototypes.save`, or a tensor, as the
            recipe's `prompts_from` says; None where they are random, or the method has none.
        class_names: of the labels 0, 1, ... in this order.
        allow_other_backbone: as in `PromptedViT`.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: `prompts` are missing, or given to a method that takes none, or are not as
            many as the recipe says; the model was opened in another form; or as `PromptedViT`.
    """
    recipe = given_or_default(recipe)
    check_class_names(class_names, None)
    if not class_names:
        raise ValueError("class_names must hold a name for each class, got none")
    start = _start(model, recipe, prompts, allow_other_backbone)
    given = method_options(recipe)
    pools = registry.find(recipe.method_name).pools
    for name, value in (
        ("pool_prompts", _pool_prompts(model, recipe) if pools else None),
        ("allow_other_backbone", allow_other_backbone),
    ):
        if name in registry.options(recipe.method_name):
            given[name] = value
    # Heads are drawn where the model is.
    with seeded(recipe.seed, placement(model)[0]):
        tuned = registry.tune(
            model,
            recipe.method_name,
            prompts=start,
            num_classes=len(class_names),
            head_norm=recipe.head_norm,
            weight_dtype=recipe.weight_dtype,
            **given,
        )
        try:
            start_head(tuned.head, recipe.head_init, recipe.head_std)
        except BaseException:
            tuned.release()
            raise
    tuned.class_names = tuple(class_names)
    return tuned


def check_buildable(model: nn.Module, recipe: Recipe, class_names: Sequence[str]) -> None:
    """Find what `build` would refuse before prompts to start from are made, which takes a pass over images.

    A tuned model is built of made-up prompts and undone.

    Raises:
        TypeError, ValueError: as `build`.
    """
    start = None
    if recipe.prompts_from in ("prototypes", "vipamin"):
        layers = len(get_blocks(model)) if recipe.depth == "deep" else 1
        # More than there are patch tokens are found with these, and would take their memory.
        recipe = recipe.replace(num_prompts=min(recipe.prompts_per_block or 1, _MOST_MADE_UP))
        start = torch.ones(layers, recipe.num_prompts or 1, embed_dim(model), device="cpu")
    build(model, recipe, start, class_names=class_names).release()


def method_options(recipe: Recipe) -> dict[str, Any]:
    """The options of the method that a recipe states, checked by their names.

    Raises:
        ValueError: one is none of the method, or has a place of its own.
    """
    name = recipe.method_name
    given = dict(recipe.method_options)
    for option in given:
        if option in _SAID_ELSEWHERE and option in (*registry.options(name), "head_norm", "weight_dtype"):
            raise ValueError(
                f"method_options must not hold {option!r}, which is said by {_SAID_ELSEWHERE[option]}"
            )
    # Fields of their own, because all methods of this kind have them.
    for field, default in (("freeze_prompts", False), ("prompt_dropout", 0.0)):
        if (value := getattr(recipe, field)) != default:
            given[field] = value
    registry.check_options(name, given)
    return given


def start_head(
    head: nn.Module,
    init: Literal["timm", "trunc_normal", "kaiming"] = "trunc_normal",
    std: float | None = None,
) -> None:
    """Draw the weights of a new head, from torch's global generator.

    Args:
        head: a linear layer, or a module that holds some.
        init: "timm" leaves them as timm's new head has them; "trunc_normal" draws from a truncated normal
            distribution, with zero bias, as the paper's released code does; "kaiming" from a normal one of
            deviation sqrt(2 / classes), with bias -log(99), as VPT does.
        std: of "trunc_normal"; None is 0.02, as in the released code, which has 0.01 for MoCo-v3.

    Raises:
        ValueError: no such start, `std` is not above 0 or without effect, or no layer to draw.
    """
    Recipe(head_init=init, head_std=std)
    if init == "timm":
        return
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(f"head_init={init!r} needs a linear head, got {type(head).__name__}")
    for layer in layers:
        if init == "trunc_normal":
            nn.init.trunc_normal_(layer.weight, std=0.02 if std is None else std)
        else:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        if layer.bias is not None:
            nn.init.constant_(layer.bias, 0.0 if init == "trunc_normal" else -math.log(1 / _PRIOR - 1))


def _start(
    model: nn.Module,
    recipe: Recipe,
    prompts: Prototypes | Tensor | str | os.PathLike[str] | None,
    allow_other_backbone: bool,
) -> Prototypes | Tensor | int | None:
    if prompts is None:
        _check_may_be_random(recipe)
        return recipe.num_prompts
    if recipe.prompt_init == "random":
        raise ValueError(f"prompts must be None for prompt_init='random', got {type(prompts).__name__}")
    if isinstance(prompts, str | os.PathLike):
        path = Path(prompts)
        prompts = Prototypes.load(path)
        check_backbone(path, prompts.metadata, model, allow_other_backbone=allow_other_backbone)
    values = getattr(prompts, "prompts", prompts)
    if not isinstance(values, Tensor):
        raise TypeError(
            f"prompts must be Prototypes, a file of them or a tensor, got {type(prompts).__name__}"
        )
    if recipe.num_prompts is not None and values.ndim == 3 and values.shape[1] != recipe.num_prompts:
        raise ValueError(
            f"num_prompts of the recipe is {recipe.num_prompts}, but prompts are {values.shape[1]} per block"
        )
    return prompts


def _check_may_be_random(recipe: Recipe) -> None:
    """ValueError where a recipe states another start; SPT's own error says what it needs by itself."""
    gives = {"prototypes": "spt_fast.build_prototypes", "vipamin": "spt_fast.methods.vipamin.vipamin_prompts"}
    if recipe.prompt_init in gives:
        raise ValueError(
            f"prompts must be given for prompt_init={recipe.prompt_init!r}: "
            f"{gives[recipe.prompt_init]}(model, loader) gives them"
        )


def _pool_prompts(model: nn.Module, recipe: Recipe) -> bool | None:
    """As `PromptedViT` takes it; ValueError where `model` was opened in another form than the recipe's."""
    stated = stated_pooling(model)
    found = {"pool": getattr(model, "global_pool", None), "norm": "own" if stated is None else stated.norm}
    wanted = {"pool": recipe.pool and ("token" if recipe.pool == "token" else "avg"), "norm": recipe.norm}
    for name, want in wanted.items():
        if want is not None and want != found[name]:
            raise ValueError(
                f"{name}={getattr(recipe, name)!r} of the recipe needs a model that was opened so, as "
                f"open_model(..., {name}={getattr(recipe, name)!r}) does, got {found[name]!r}"
            )
    return None if recipe.pool is None else recipe.pool == "avg-with-prompts"
