"""A model or a loader that is not what a recipe states is refused: run.yaml would say what was not done."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spt_fast
from spt_fast import Recipe
from spt_fast.data.images import LabelledImages, open_labelled_images
from spt_fast.training import Trainer, fit, train
from spt_fast.training.agreement import batch_size_of, check_agreement
from spt_fast.training.build import build
from spt_fast.training.loop import shuffled_loader

IMAGES = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 4


@pytest.fixture
def tune(make_vit: Callable[..., nn.Module]) -> Callable[..., Any]:
    def make(method: str = "vpt-deep", **options: Any) -> Any:
        return spt_fast.tune(make_vit(), method, num_classes=4, **options)

    return make


@pytest.fixture
def loader() -> Any:
    return shuffled_loader(IMAGES, LABELS, batch_size=4, seed=0)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Three images of each of two classes."""
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(3):
            colour = (number, 40 * len(name), ord(name[0]))
            Image.new("RGB", (40, 36), colour).save(tmp_path / "images" / name / f"{number}.png")
    return str(tmp_path / "images")


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"method": "linear"}, "'vpt-deep'"),
        ({"num_prompts": 99}, "2"),
        ({"freeze_prompts": True}, "False"),
        ({"prompt_dropout": 0.5}, "0.0"),
        ({"head_norm": "batch"}, "'none'"),
        ({"weight_dtype": "bf16"}, "'torch.float32'"),
        ({"pool": "avg"}, "'token'"),
        ({"norm": "new"}, "'own'"),
        ({"method_options": {"project": 8}}, "None"),
        ({"method_options": {"engine": "concat"}}, "'kv'"),
    ],
    ids=str,
)
def test_a_model_of_another_recipe_is_refused(
    tune: Any, loader: Any, tmp_path: Path, fields: dict[str, Any], found: str
) -> None:
    ((name, value),) = next((v.items() for v in fields.values() if isinstance(v, dict)), fields.items())
    message = f"^{name}={value!r} .*of the recipe is not that of tuned, which has {found}; training.build"
    tuned = tune(prompts=2)
    with pytest.raises(ValueError, match=message):
        fit(tuned, loader, epochs=1, progress=False, **fields)
    with pytest.raises(ValueError, match=message):
        train(tuned, loader, recipe=Recipe(epochs=1, **fields), out=tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "found"),
    [({"batch_size": 8}, 4), ({"drop_last": True}, False), ({"augment": "crop"}, "none")],
    ids=str,
)
def test_images_of_another_recipe_are_refused(
    tune: Any, loader: Any, tmp_path: Path, fields: dict[str, Any], found: Any
) -> None:
    ((name, value),) = fields.items()
    message = f"^{name}={value!r} of the recipe is not that of %s, which has {found!r}; open the images so"
    with pytest.raises(ValueError, match=message % "train_loader") as raised:
        fit(tune(prompts=2), loader, epochs=1, progress=False, **fields)
    assert f"recipe.replace({name}={found!r})" in str(raised.value)
    options: dict[str, Any] = {"recipe": Recipe(epochs=1, **fields), "progress": False}
    with pytest.raises(ValueError, match=message % "train_data"):
        train(tune(prompts=2), loader, out=tmp_path / "out", **options)


def test_what_is_given_by_keyword_is_stated_where_it_is_the_default_too(tune: Any, loader: Any) -> None:
    frozen = tune(prompts=2, freeze_prompts=True)
    fit(frozen, loader, recipe=Recipe(freeze_prompts=True), epochs=1, progress=False)
    fit(frozen, loader, epochs=1, progress=False)
    with pytest.raises(ValueError, match=r"freeze_prompts=False .* which has True"):
        fit(frozen, loader, epochs=1, progress=False, freeze_prompts=False)
    with pytest.raises(ValueError, match=r"batch_size=32 .* which has 4"):
        fit(frozen, loader, epochs=1, progress=False, batch_size=32)


def test_transforms_of_another_recipe_are_refused(make_vit: Any, folder: str) -> None:
    model = make_vit()
    model.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    tuned = spt_fast.PromptedViT(model, 2, num_classes=2)
    data = open_labelled_images(folder, model, training=True, workers=0, batch_size=2)
    check_agreement(Recipe(batch_size=2, augment="resized-crop", resize="model"), tuned, data)
    for name, value, found in (
        ("augment", "none", "resized-crop"),
        ("resize", "vtab", "model"),
        ("mean_std", "imagenet", "model"),
    ):
        for images in (data, data.loader):
            with pytest.raises(ValueError, match=f"{name}='{value}' .* which has '{found}'"):
                check_agreement(Recipe(**{name: value}), tuned, images)
    # The same numbers under another word.
    model.pretrained_cfg |= {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    check_agreement(Recipe(mean_std="imagenet"), tuned, data)


def test_images_without_a_transform_have_none(make_vit: Any, loader: Any) -> None:
    tuned = spt_fast.PromptedViT(make_vit(), 2, num_classes=4)
    recipe = Recipe(resize="fgvc")
    # Tensors of a user's own may be resized already.
    check_agreement(recipe, tuned, loader)
    with pytest.raises(ValueError, match=r"resize='fgvc' .* which has None"):
        check_agreement(recipe, tuned, LabelledImages(loader, 10, tuple("abcd")))


def test_users_own_loaders_are_known_by_the_size_of_a_batch(tune: Any) -> None:
    tuned, dataset = tune(prompts=2), TensorDataset(IMAGES, LABELS)
    recipe = Recipe(batch_size=8, augment="crop", resize="fgvc", mean_std="imagenet", drop_last=True)
    check_agreement(recipe, tuned, DataLoader(dataset, batch_size=8))
    check_agreement(recipe, tuned, [(IMAGES, LABELS)])
    check_agreement(Recipe(), tuned, DataLoader(dataset, batch_size=8))
    with pytest.raises(ValueError, match=r"batch_size=8 .* which has 5"):
        check_agreement(recipe, tuned, DataLoader(dataset, batch_size=5))
    sampler = torch.utils.data.BatchSampler(range(10), 3, False)
    assert batch_size_of(DataLoader(dataset, batch_sampler=sampler)) == 3
    assert batch_size_of(DataLoader(dataset, batch_size=None)) is None


def test_of_a_module_that_no_method_tunes_nothing_is_known(loader: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    fit(net, loader, epochs=1, progress=False, recipe=Recipe.named("paper", batch_size=4, augment=None))


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "vpt-deep", "num_prompts": 3, "prompt_dropout": 0.1, "head_norm": "batch"},
        {"method": "vpt-shallow", "method_options": {"project": 8}},
        {"method": "vpt-deep", "method_options": {"engine": "concat"}, "freeze_prompts": True},
        {"method": "gate-vpt", "method_options": {"gate": 5}},
        {"method": "cvpt", "pool": "avg-with-prompts"},
        {"method": "linear", "pool": "avg-with-prompts", "weight_dtype": "bf16"},
        {"method": "vpt-deep", "pool": "avg-with-prompts"},
        {"method": "vpt-deep", "pool": "avg", "norm": "own"},
        {"method": "bpt", "method_options": {"depth": "shallow", "rank": None}},
        {"method": "lora", "method_options": {"rank": 2, "target": "qkv, proj"}},
        {"method": "peft", "method_options": {"type": "ia3", "config": '{"feedforward_modules": []}'}},
    ],
    ids=str,
)
def test_what_build_makes_of_a_recipe_agrees_with_it(
    make_vit: Any, loader: Any, fields: dict[str, Any]
) -> None:
    if fields["method"] in ("lora", "peft"):
        pytest.importorskip("peft")
    model = make_vit(global_pool="avg" if "pool" in fields else "token")
    recipe = Recipe(epochs=1, batch_size=4, **fields)
    check_agreement(recipe, build(model, recipe, class_names=tuple("abcd")), loader, given=fields)


def test_images_that_come_in_one_order_are_warned_of(tune: Any, make_vit: Any) -> None:
    model = make_vit()
    ordered = open_labelled_images("digits", model, workers=0).loader
    tuned = spt_fast.PromptedViT(model, 2, num_classes=10)
    with pytest.warns(UserWarning, match="train_loader gives its images in the same order in every epoch"):
        Trainer(tuned, ordered, recipe=Recipe())
    shuffled = open_labelled_images("digits", model, training=True, workers=0).loader
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Trainer(tuned, shuffled, recipe=Recipe())
        Trainer(tuned, ordered)
