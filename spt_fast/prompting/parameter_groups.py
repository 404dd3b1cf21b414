"""What an optimiser needs to know: which parameters learn, at which rate, with which weight decay."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from spt_fast.support.arguments import check_number

# Measured: docs/train.md, examples/prompt_rates.py.
PROMPT_LR_FACTOR = 30.0


def parameter_groups(
    module: nn.Module, lr: float, prompt_lr: float | None = None, *, weight_decay: float = 1e-4
) -> list[dict[str, Any]]:
    """The parameters of `module` that require a gradient, in groups for an optimiser of torch.

    Args:
        module: a `PromptedViT`, or any module; also inside DistributedDataParallel, FSDP2, `torch.compile`.
        lr: of everything but prompts.
        prompt_lr: of the parameters named `prompts`; None is `default_prompt_lr`.
        weight_decay: of prompts, and of other tensors of two or more dimensions; biases and norms have none.

    Returns:
        Up to three groups with the keys "name", "params", "lr", "weight_decay": "head" (all but prompts),
        "head_no_decay" (its biases and norms), "prompts". A group without parameters is left out.

    Raises:
        TypeError: a number is of another type.
        ValueError: a rate is not above 0, or `weight_decay` is below 0.
    """
    check_number("lr", lr, above=0)
    check_number("prompt_lr", lr if prompt_lr is None else prompt_lr, above=0)
    check_number("weight_decay", weight_decay, 0)
    learning: dict[str, list[nn.Parameter]] = {"head": [], "head_no_decay": [], "prompts": []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            learning[_group_of(name, parameter)].append(parameter)
    prompts = learning["prompts"]
    if prompt_lr is None:
        prompt_lr = default_prompt_lr(lr, prompts)
    groups = (("head", lr, weight_decay), ("head_no_decay", lr, 0.0), ("prompts", prompt_lr, weight_decay))
    return [
        {"name": name, "params": learning[name], "lr": rate, "weight_decay": decay}
        for name, rate, decay in groups
        if learning[name]
    ]


def default_prompt_lr(lr: float, prompts: Iterable[Tensor]) -> float:
    """`PROMPT_LR_FACTOR * lr * rms`, with the root mean square of all elements of `prompts`.

    A block normalises what enters it, so only the direction of a prompt matters. AdamW's steps have about the
    length of the rate, so that a prompt is turned by an angle of about rate / rms. Where the prompts are
    zero, or there are none, it is `lr`.
    """
    squares, count = 0.0, 0
    for tensor in prompts:
        # Of a parameter that FSDP2 has divided, each rank must know the whole.
        whole = getattr(tensor, "full_tensor", lambda of=tensor: of)().detach()
        squares += whole.double().square().sum().item()
        count += whole.numel()
    return PROMPT_LR_FACTOR * lr * math.sqrt(squares / count) if squares else lr


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if name.rpartition(".")[2] == "prompts":
        return "prompts"
    return "head" if parameter.ndim >= 2 else "head_no_decay"
