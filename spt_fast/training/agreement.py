"""Whether a model and a loader are what a recipe states: run.yaml would else say what was not done."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader

from spt_fast.backbones.anatomy import unwrap
from spt_fast.backbones.pooling import stated_pooling
from spt_fast.backbones.snapshot import placement
from spt_fast.data.images import LabelledImages
from spt_fast.data.loading import ImageLoader
from spt_fast.methods.base import TunedViT
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.methods.registry import METHODS
from spt_fast.support.distributed import ALONE, Processes
from spt_fast.training.recipe import Recipe, options


def check_agreement(
    recipe: Recipe,
    tuned: nn.Module,
    data: Any,
    *,
    given: Collection[str] = (),
    argument: str = "train_loader",
    processes: Processes = ALONE,
) -> None:
    """Refuse a model or training images that can be seen not to be as the recipe states.

    A field is stated where its value is not the default. Nothing is known of modules that no method tunes,
    and of a user's own loader no more than the size of its batches.

    Args:
        data: `LabelledImages` or a loader, which the caller calls `argument`.
        given: fields that are stated even where their value is the default.
        processes: those that train together.

    Raises:
        ValueError: a field has another value there; the message has both.
    """
    stated = {
        option.name: value
        for option in options()
        if (value := getattr(recipe, option.name)) is not None
        and (value != option.default or option.name in given)
    }
    inner = unwrap(tuned)
    if isinstance(inner, TunedViT):
        for name, found in _of_model(inner, stated):
            if name in stated and stated[name] != found:
                raise ValueError(_of_another_model(f"{name}={stated[name]!r}", found))
        for name, value in stated.get("method_options", {}).items():
            found = getattr(inner, "engine", None) if name == "engine" else inner.options.get(name)
            if not _is_option(value, found) and (name, value) != ("engine", "auto"):
                raise ValueError(_of_another_model(f"{name}={value!r} in the method_options", found))
    for name, found in _of_images(data, stated, inner, processes):
        if name in stated and stated[name] != found:
            raise ValueError(
                f"{name}={stated[name]!r} of the recipe is not that of {argument}, which has {found!r}; "
                f"open the images so, as open_labelled_images(..., training=True, {name}={stated[name]!r}) "
                f"does, or give the recipe what they have: recipe.replace({name}={found!r})"
            )


def batch_size_of(loader: Any, processes: Processes = ALONE) -> int | None:
    """The images of a batch, over all processes together; None where the loader does not say it."""
    if isinstance(loader, ImageLoader):
        return loader.batch_size
    if not isinstance(loader, DataLoader):
        return None
    size = loader.batch_size
    if size is None and type(loader.batch_sampler) is BatchSampler:
        size = loader.batch_sampler.batch_size
    return None if size is None else size * processes.size


def _of_another_model(stated: str, found: Any) -> str:
    return (
        f"{stated} of the recipe is not that of tuned, which has {found!r}; "
        "training.build makes the model of a recipe"
    )


def _of_model(tuned: TunedViT, stated: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Fields of a recipe with the values that `tuned` has."""
    yield "method", tuned.method
    yield "num_prompts", getattr(tuned, "num_prompts", 0)
    prompted = tuned if isinstance(tuned, PromptedViT) else None
    learn = (
        [each.requires_grad for each in prompted.prompt_parameters() if each.numel()]
        if prompted is not None
        else []
    )
    # Of no prompts nothing tells.
    if learn or prompted is None:
        yield "freeze_prompts", prompted is not None and not any(learn)
    yield "prompt_dropout", 0.0 if prompted is None else prompted.prompt_dropout.p
    yield "head_norm", tuned.head_norm
    dtype = tuned.weight_dtype or placement(tuned.model)[1]
    yield "weight_dtype", "bf16" if dtype is torch.bfloat16 else str(dtype)
    if (pool := getattr(tuned.model, "global_pool", None)) is not None:
        known = METHODS.get(tuned.method)
        takes_prompts = prompted is not None and (known is None or known.pools)
        averages_all = pool == "avg" and stated.get("pool") == "avg-with-prompts" and not takes_prompts
        with_prompts = pool == "avg" and getattr(tuned, "pool_prompts", False)
        yield "pool", "avg-with-prompts" if averages_all or with_prompts else pool
    form = stated_pooling(tuned.model)
    yield "norm", "own" if form is None else form.norm


def _is_option(value: Any, found: Any) -> bool:
    """Whether a method keeps the option `value` of a recipe as `found`, which may be no word any more."""
    if isinstance(found, list) and isinstance(value, str):
        return [word.strip() for word in value.split(",")] == found
    if isinstance(found, dict):
        return (json.loads(value) if isinstance(value, str) else value or {}) == found
    return bool(value == found)


def _of_images(
    data: Any, stated: dict[str, Any], tuned: nn.Module, processes: Processes
) -> Iterator[tuple[str, Any]]:
    """Fields of a recipe with the values that training images have."""
    loader = data.loader if isinstance(data, LabelledImages) else data
    if (size := batch_size_of(loader, processes)) is not None:
        yield "batch_size", size
    if not isinstance(loader, ImageLoader):
        return
    for name, found in (("drop_last", loader.drops_last), ("augment", loader.augment)):
        if found is not None:
            yield name, found
    done = loader.preprocessing
    for name in ("resize", "mean_std"):
        # Of a loader by itself, without a transform that is known, the images may be prepared already.
        if name not in stated or (done is None and not isinstance(data, LabelledImages)):
            continue
        found = getattr(done, name, None)
        if done is not None and found != stated[name] and isinstance(tuned, TunedViT):
            # Two words may be one transform, for the model.
            wanted = replace(done, **{name: stated[name]})
            if str(wanted.transform(tuned.model)) == str(done.transform(tuned.model)):
                continue
        yield name, found
