"""What an optimiser needs to know: which parameters learn, at which rate, with which weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from spt_fast.backbones.anatomy import unwrap
from spt_fast.support.arguments import check_number

# Measured: docs/train.md, examples/prompt_rates.py.
PROMPT_LR_FACTOR = 30.0


def parameter_groups(
    module: nn.Module,
    lr: float,
    prompt_lr: float | None = None,
    *,
    weight_decay: float = 1e-4,
    head_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """The parameters of `module` that require a gradient, in groups for an optimiser of torch.

    Args:
        module: a `PromptedViT`, or any module; also inside DistributedDataParallel, FSDP2, `torch.compile`.
        lr: of everything but prompts.
        prompt_lr: of what prompts are made of: parameters named `prompts`, and those of two or more
            dimensions in `PromptedViT.prompt_parameters`, such as factors of prompts. None is for each of
            these tensors its own `default_prompt_lr`.
        weight_decay: of prompts, and of other tensors of two or more dimensions; biases and norms have none.
        head_weight_decay: the same for the part `head` of `module`; None is `weight_decay`.

    Returns:
        Groups with the keys "name", "params", "lr", "weight_decay": "head", "others" (what else learns),
        "no_decay" (biases, norms and other single vectors), and "prompts": one for `prompt_lr`, or one for
        each tensor. A group without parameters is left out.

    Raises:
        TypeError: a number is of another type.
        ValueError: a rate is not above 0, a decay is below 0, or `head_weight_decay` is given for a module
            without `head`.
    """
    check_number("lr", lr, above=0)
    check_number("prompt_lr", lr if prompt_lr is None else prompt_lr, above=0)
    check_number("weight_decay", weight_decay, 0)
    of_head = _parameters_of_head(module)
    if head_weight_decay is None:
        head_weight_decay = weight_decay
    elif check_number("head_weight_decay", head_weight_decay, 0) != weight_decay and not of_head:
        raise ValueError(f"head_weight_decay needs a part `head`, which {type(module).__name__} has not")
    of_prompts = _parameters_of_prompts(module)
    learning: dict[str, list[nn.Parameter]] = {"head": [], "others": [], "no_decay": [], "prompts": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            learning[_group_of(name, parameter, of_head, of_prompts)].append(parameter)
    groups = (
        ("head", learning["head"], lr, head_weight_decay),
        ("others", learning["others"], lr, weight_decay),
        ("no_decay", learning["no_decay"], lr, 0.0),
        *(("prompts", *group, weight_decay) for group in _with_rates(learning["prompts"], lr, prompt_lr)),
    )
    return [
        {"name": name, "params": parameters, "lr": rate, "weight_decay": decay}
        for name, parameters, rate, decay in groups
        if parameters
    ]


def default_prompt_lr(lr: float, prompts: Iterable[Tensor]) -> float:
    """`PROMPT_LR_FACTOR * lr * rms`, with the root mean square of all elements of `prompts`.

    A block normalises what enters it, so only the direction of a prompt matters. AdamW's steps have about the
    length of the rate, so that a prompt is turned by an angle of about rate / rms. Where the prompts are
    zero, or there are none, it is `lr`. The same holds for each of two factors whose product they are: a step
    of one factor turns the product by about the angle by which it turns that factor.
    """
    squares, count = 0.0, 0
    for tensor in prompts:
        # Of a parameter that FSDP2 has divided, each rank must know the whole.
        whole = getattr(tensor, "full_tensor", lambda of=tensor: of)().detach()
        squares += whole.double().square().sum().item()
        count += whole.numel()
    return PROMPT_LR_FACTOR * lr * math.sqrt(squares / count) if squares else lr


def _with_rates(
    prompts: list[nn.Parameter], lr: float, prompt_lr: float | None
) -> list[tuple[list[nn.Parameter], float]]:
    if prompt_lr is not None:
        return [(prompts, prompt_lr)]
    # One by one also where rates are equal: on resuming, groups must not depend on values.
    return [([each], default_prompt_lr(lr, [each])) for each in prompts]


def _parameters_of_head(module: nn.Module) -> set[int]:
    head = getattr(unwrap(module), "head", None)
    return {id(parameter) for parameter in head.parameters()} if isinstance(head, nn.Module) else set()


def _parameters_of_prompts(module: nn.Module) -> set[int]:
    """What methods inside `module` say that their prompts are made of."""
    said = (getattr(each, "prompt_parameters", None) for each in module.modules())
    return {id(parameter) for each in said if callable(each) for parameter in each()}


def _group_of(name: str, parameter: nn.Parameter, of_head: set[int], of_prompts: set[int]) -> str:
    if name.rpartition(".")[2] == "prompts":
        return "prompts"
    if parameter.ndim < 2:
        return "no_decay"
    if id(parameter) in of_prompts:
        return "prompts"
    return "head" if id(parameter) in of_head else "others"
