"""The optimiser of a recipe: groups, decays and counts by the paper's formulas, and the rate of each step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import nn

from spt_fast import PromptedViT, Recipe
from spt_fast.training.build import build
from spt_fast.training.optimizer import LearningRates, check_groups, create_optimizer

# Width, depth and parameters without a head, of the shapes of their layers.
BACKBONES = {
    "vit_base_patch16_224": (768, 12, 85_798_656),
    "vit_large_patch16_224": (1024, 24, 303_301_632),
    "vit_huge_patch14_224": (1280, 32, 630_764_800),
}
# Mean numbers of classes of the benchmarks (Table S1), and millions of parameters in Tables 3 and S4.
FGVC_CLASSES, VTAB_CLASSES = (200 + 555 + 102 + 120 + 196) / 5, 940 / 19
PUBLISHED = [
    ("spt-deep", FGVC_CLASSES, 0.36),
    ("spt-deep", VTAB_CLASSES, 0.22),
    ("spt-shallow", FGVC_CLASSES, 0.25),
    ("spt-shallow", VTAB_CLASSES, 0.11),
    ("linear", FGVC_CLASSES, 0.18),
    ("linear", VTAB_CLASSES, 0.04),
]
NAMES = [str(number) for number in range(200)]


@pytest.fixture(scope="module", params=list(BACKBONES))
def backbone(request: pytest.FixtureRequest) -> tuple[nn.Module, int, int]:
    """A model of full size without memory, its width and its depth."""
    width, depth, count = BACKBONES[request.param]
    with torch.device("meta"):
        model = timm.create_model(request.param, num_classes=0)
    assert sum(each.numel() for each in model.parameters()) == count
    return model, width, depth


def tuned_on_meta(model: nn.Module, recipe: Recipe, width: int, depth: int) -> PromptedViT:
    layers, number = (depth, 20) if recipe.depth == "deep" else (1, 100)
    prompts = torch.empty(layers, number, width, device="meta") if recipe.needs_prototypes else None
    return build(model, recipe, prompts, class_names=NAMES)


@pytest.mark.parametrize("method", ["spt-deep", "spt-shallow", "vpt-deep", "vpt-shallow", "linear"])
def test_counts_and_decays_are_those_of_the_formulas(backbone: Any, method: str) -> None:
    """Sec. 4.1 and Table 3: N_p D L, N_p D or nothing, and a head of (D + 1) C; biases have no decay."""
    model, width, depth = backbone
    rate = {} if method == "linear" else {"prompt_lr": 0.5}
    recipe = Recipe(method=method, weight_decay=0.01, head_weight_decay=0.5, lr=0.1, **rate)
    tuned = tuned_on_meta(model, recipe, width, depth)
    try:
        groups = create_optimizer(tuned, recipe).param_groups
        trainable = sum(each.numel() for each in tuned.trainable_parameters())
    finally:
        tuned.release()
    found = {
        group["name"]: (sum(each.numel() for each in group["params"]), group["weight_decay"], group["lr"])
        for group in groups
    }
    prompts = {"deep": 20 * width * depth, "shallow": 100 * width}[recipe.depth] * recipe.has_prompts
    expected = {"head": (200 * width, 0.5, 0.1), "no_decay": (200, 0.0, 0.1)}
    if prompts:
        expected["prompts"] = (prompts, 0.01, 0.5)
    assert found == expected
    assert trainable == prompts + (width + 1) * 200


@pytest.mark.parametrize(("method", "classes", "millions"), PUBLISHED)
def test_counts_are_the_papers(method: str, classes: float, millions: float) -> None:
    """Of ViT-B/16 with its head; the tables round some cells and cut off others."""
    prompts = {"spt-deep": 20 * 768 * 12, "spt-shallow": 100 * 768, "linear": 0}[method]
    count = (prompts + 769 * classes) / 1e6
    assert millions in (round(count, 2), math.floor(100 * count) / 100)


def test_prompts_alone_need_no_head(vit: nn.Module) -> None:
    tuned = PromptedViT(vit, 3, num_classes=0)
    (group,) = create_optimizer(tuned, Recipe(prompt_lr=0.5)).param_groups
    assert (group["name"], group["lr"], group["initial_lr"]) == ("prompts", 0.5, 0.5)


def test_what_cannot_be_trained_is_refused(vit: nn.Module) -> None:
    tuned = PromptedViT(vit, 3, num_classes=5)
    tuned.head.half()
    with pytest.raises(
        ValueError, match=r"but model\.head\.weight is float16, in which AdamW divides by zero"
    ):
        create_optimizer(tuned, Recipe())
    tuned.requires_grad_(False)
    with pytest.raises(ValueError, match="tuned must have a parameter that requires a gradient, got none"):
        create_optimizer(tuned, Recipe())


@pytest.mark.skipif(torch.cuda.is_available(), reason="it may be there")
def test_an_optimizer_that_is_missing_is_named(vit: nn.Module) -> None:
    recipe = Recipe(optimizer="fusedadam")
    with pytest.raises(ValueError, match=r"^optimizer='fusedadam' cannot be had here: .*APEX"):
        create_optimizer(PromptedViT(vit, 3, num_classes=5), recipe)


def test_the_default_is_adamw_and_momentum_is_vpts_sgd(vit: nn.Module) -> None:
    tuned = PromptedViT(vit, 3, num_classes=5)
    assert type(create_optimizer(tuned, Recipe())) is torch.optim.AdamW
    optimizer = create_optimizer(tuned, Recipe.named("vpt"))
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, False)
    # One rate for prompts and head, times batch / 256.
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


def some_parameters(*rates: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "name": name, "lr": rate, "initial_lr": rate}
        for name, rate in zip(("head", "prompts"), rates, strict=False)
    ]
    return torch.optim.AdamW(groups)


def rates_of(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> list[tuple[float, float | None]]:
    rates = LearningRates(optimizer, recipe, steps)
    found = []
    for step in range(recipe.epochs * steps):
        rates.set(step)
        found.append(rates.rates())
    return found


@pytest.mark.parametrize("warmup", [0, 1.4, 2])
def test_rates_rise_linearly_and_fall_as_a_cosine_to_the_last_step(warmup: float) -> None:
    """Against the formula, written out; both groups have the same share of their peak until the floor."""
    recipe = Recipe(epochs=4, warmup_epochs=warmup, min_lr=1e-3)
    found = rates_of(some_parameters(0.1, 2.0), recipe, 5)
    start = round(5 * warmup)
    for step, (head, prompts) in enumerate(found):
        assert prompts is not None
        for peak, rate in ((0.1, head), (2.0, prompts)):
            if step < start:
                expected = peak * (step + 1) / (start + 1)
            else:
                turn = math.pi * (step - start) / (19 - start)
                expected = 1e-3 + (peak - 1e-3) * (1 + math.cos(turn)) / 2
            assert rate == pytest.approx(expected, rel=1e-12)
    assert found[start] == pytest.approx((0.1, 2.0))
    assert found[-1] == pytest.approx((1e-3, 1e-3))


def test_constant_rates_stay_after_the_rise() -> None:
    recipe = Recipe(epochs=3, warmup_epochs=1, schedule="constant")
    found = [head for head, _ in rates_of(some_parameters(0.3), recipe, 2)]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])


def test_a_rate_below_the_floor_does_not_rise_to_it() -> None:
    """Prompts by default may be that slow: theirs depends on their length."""
    found = rates_of(some_parameters(0.1, 1e-4), Recipe(epochs=2, warmup_epochs=0, min_lr=1e-3), 4)
    assert max(prompts or 0.0 for _, prompts in found) == pytest.approx(1e-4)


def test_rates_depend_on_the_step_alone() -> None:
    recipe = Recipe(epochs=3)
    optimizer = some_parameters(0.1, 0.2)
    expected = rates_of(optimizer, recipe, 7)
    rates = LearningRates(optimizer, recipe, 7)
    for step in (20, 3, 11, 3):
        rates.set(step)
        assert rates.rates() == expected[step]


def test_a_resumed_optimizer_has_the_peaks_of_its_start(vit: nn.Module) -> None:
    """The default rate of prompts depends on prompts that have been trained meanwhile."""
    recipe = Recipe(epochs=2, warmup_epochs=0)
    tuned = PromptedViT(vit, 3, num_classes=5)
    first = create_optimizer(tuned, recipe)
    expected = rates_of(first, recipe, 4)
    state = copy.deepcopy(first.state_dict())
    with torch.no_grad():
        tuned.prompts.mul_(100)
    again = create_optimizer(tuned, recipe)
    assert rates_of(again, recipe, 4) != expected
    again.load_state_dict(state)
    assert rates_of(again, recipe, 4) == expected


def test_rates_where_only_prompts_learn() -> None:
    optimizer = some_parameters(0.1)
    optimizer.param_groups[0]["name"] = "prompts"
    assert rates_of(optimizer, Recipe(epochs=1, warmup_epochs=0), 2)[0] == (0.1, 0.1)


def test_bad_steps_are_named() -> None:
    with pytest.raises(ValueError, match="steps_per_epoch must be an integer >= 1, got 0"):
        LearningRates(some_parameters(0.1), Recipe(), 0)
    with pytest.raises(ValueError, match="step must be an integer >= 0, got -1"):
        LearningRates(some_parameters(0.1), Recipe(), 1).set(-1)


def test_moments_go_to_the_parameters_that_they_are_of(make_vit: Any) -> None:
    """Groups of the same sizes in another order, as of a version that named them otherwise."""
    tuned = build(make_vit(), Recipe(method="e2vpt", num_prompts=2), class_names=("a", "b"))
    optimizer = create_optimizer(tuned, Recipe(method="e2vpt"))
    state = optimizer.state_dict()
    check_groups(optimizer, state)
    names = [group["name"] for group in state["param_groups"]]
    assert names == ["head", "no_decay", "prompts", "prompts"]
    state["param_groups"][1]["name"], state["param_groups"][2]["name"] = "others", "no_decay"
    with pytest.raises(ValueError, match=r"the groups of the state, .*: head \(1\), others \(1\), no_decay"):
        check_groups(optimizer, state)
    rates = LearningRates(optimizer, Recipe(method="e2vpt"), 3)
    assert rates.rates() == (0.01, optimizer.param_groups[2]["lr"])
