"""The optimiser of a recipe, in groups by rate and decay, and the rates of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from spt_fast.methods.parameter_groups import parameter_groups
from spt_fast.support.arguments import check_int
from spt_fast.support.errors import one_line
from spt_fast.training.recipe import Recipe

# Of the recipe's default, and of `warmup_cosine`.
FINAL_LR = 1e-8


def create_optimizer(tuned: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimiser over the parameters that require a gradient, in the groups of `parameter_groups`.

    Each group keeps its highest rate as "initial_lr", which `state_dict` of the optimiser holds too: on
    resuming, the default rate of prompts is that of the first start.

    Raises:
        ValueError: no parameter requires a gradient, one that does is float16, `head_weight_decay` is given
            for a module without `head`, or the optimiser needs a package or a GPU that is missing.
    """
    from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]

    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ValueError(
                f"tuned must learn parameters of float32 or bfloat16, but {name} is float16, in which "
                "AdamW divides by zero; keep the model in float32 and give weight_dtype='bf16' instead"
            )
    groups = parameter_groups(
        tuned,
        recipe.peak_lr,
        recipe.peak_prompt_lr,
        weight_decay=recipe.weight_decay,
        head_weight_decay=recipe.head_weight_decay,
    )
    if not groups:
        raise ValueError("tuned must have a parameter that requires a gradient, got none to train")
    groups = [{**group, "initial_lr": group["lr"]} for group in groups]
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups,
            opt=recipe.optimizer,
            lr=recipe.peak_lr,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
        )
    # timm lists optimisers of other packages too, and asserts that there is a GPU for them.
    except (AssertionError, ImportError, NameError) as error:
        raise ValueError(f"optimizer={recipe.optimizer!r} cannot be had here: {one_line(error)}") from error
    return optimizer


def check_groups(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """ValueError where `state`, of `state_dict`, is of an optimiser with other groups.

    torch compares their sizes alone, and would give the moments of one parameter to another.
    """
    then, now = (
        [f"{group.get('name')} ({len(group['params'])})" for group in groups]
        for groups in (state["param_groups"], optimizer.param_groups)
    )
    if then != now:
        raise ValueError(
            "optimizer must have the groups of the state, with as many parameters: "
            f"{', '.join(then)}; got {', '.join(now)}. A run of another version of spt_fast starts anew"
        )


class LearningRates:
    """The rates of each step: a linear warm-up, then a cosine to `min_lr` at the last step, or the highest.

    They depend on the number of the step alone, so that a checkpoint needs none of this. timm's schedulers
    start the warm-up of all groups at one rate; here prompts and head start at one share of theirs.

    Args:
        optimizer: of `create_optimizer`.
        steps_per_epoch: of the optimiser: batches of an epoch by `accumulate`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> None:
        steps = check_int("steps_per_epoch", steps_per_epoch, 1)
        self._optimizer, self._recipe = optimizer, recipe
        self._warmup = round(recipe.warmup * steps)
        self._total = recipe.epochs * steps

    def set(self, step: int) -> None:
        """Set every group's rate for a step of the run, counted from 0."""
        check_int("step", step, 0)
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(group["initial_lr"], step)

    def rates(self) -> tuple[float, float | None]:
        """The rates as they were set: of everything but prompts, and of prompts, if they learn.

        Where only prompts learn, both are theirs. Of prompts that have several, it is the first.
        """
        rates = [(group["name"] == "prompts", group["lr"]) for group in self._optimizer.param_groups]
        prompts = next((rate for of_prompts, rate in rates if of_prompts), None)
        others = (rate for of_prompts, rate in rates if not of_prompts)
        return next(others, prompts), prompts  # type: ignore[return-value]

    def _rate(self, peak: float, step: int) -> float:
        if self._recipe.schedule == "constant":
            return peak * min(1.0, (step + 1) / (self._warmup + 1))
        return peak * cosine_factor(step, self._warmup, self._total, floor=self._recipe.min_lr / peak)


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LRScheduler:
    """Each group's rate from peak / (warmup_steps + 1) linearly to its peak, then as a cosine to 1e-8.

    For your own loop: the peak is the rate that the group has now; 1e-8 is reached at the last step. Call
    `scheduler.step()` after every optimiser step.
    """

    def factor(peak: float, step: int) -> float:
        return cosine_factor(step, warmup_steps, total_steps, floor=FINAL_LR / peak)

    factors: list[Callable[[int], float]] = [partial(factor, group["lr"]) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def cosine_factor(step: int, warmup_steps: int, total_steps: int, floor: float) -> float:
    """The share of its peak that a rate has at `step`: from 1 / (warmup_steps + 1) to 1, then to `floor`.

    The floor is reached at the last step, `total_steps - 1`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    floor = min(1.0, floor)
    share = min(1.0, (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))
