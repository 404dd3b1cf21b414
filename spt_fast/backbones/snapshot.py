"""Take a model over and give it back as it was: head, grad flags, training modes, forwards, weights.

Knows nothing of prompts; `PromptedViT` is its only user.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from spt_fast.backbones.anatomy import get_blocks

_CAST_MODULES = (nn.Linear, nn.Conv2d)


class Loan:
    """What is needed to give a model back as it was taken over."""

    def __init__(self, model: nn.Module) -> None:
        self._grad_flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._training = {name: module.training for name, module in model.named_modules()}
        self._children = dict(model._modules)
        self._attributes = dict(vars(model))
        self._forwards = [vars(block).get("forward") for block in get_blocks(model)]
        self._placement = placement(model)
        self._originals: list[tuple[nn.Module, str, nn.Parameter]] = []

    def cast_frozen_weights(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Put copies in `dtype` in the place of what autocast would cast in every step, if it is frozen.

        That is the weights of linear layers and convolutions; norms stay as they are. The originals are kept.
        """
        for module in model.modules():
            if isinstance(module, _CAST_MODULES):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    if not parameter.requires_grad and parameter.dtype == torch.float32:
                        self._originals.append((module, name, parameter))
                        module._parameters[name] = nn.Parameter(parameter.to(dtype), requires_grad=False)
        self._placement = placement(model)

    def give_back(self, model: nn.Module) -> None:
        now = placement(model)
        for block, forward in zip(get_blocks(model), self._forwards, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                setattr(block, "forward", forward)  # noqa: B010
        for module, name, parameter in self._originals:
            module._parameters[name] = parameter
        model._modules.clear()
        model._modules.update(self._children)
        vars(model).update(self._attributes)
        self._follow_move(model, now)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._grad_flags[name])
        for name, module in model.named_modules():
            module.training = self._training[name]

    def _follow_move(self, model: nn.Module, now: tuple[torch.device, torch.dtype]) -> None:
        """Bring what was set aside to where the model has been moved meanwhile."""
        if now == self._placement:
            return
        device = now[0]
        dtype = None if now[1] == self._placement[1] else now[1]
        for classifier in classifiers(model):
            classifier.to(device, dtype)
        for _, _, parameter in self._originals:
            parameter.data = parameter.data.to(device, dtype)


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the blocks."""
    for parameter in get_blocks(model).parameters():
        return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The model's classifier or classifiers; empty where it has none."""
    get_classifier = getattr(model, "get_classifier", None)
    found = get_classifier() if callable(get_classifier) else getattr(model, "head", None)
    candidates = found if isinstance(found, (tuple, list)) else (found,)
    return [module for module in candidates if isinstance(module, nn.Module)]


def separate_head(model: nn.Module) -> None:
    """Put a copy in the place of each child that holds a classifier: the original is never trained.

    Raises:
        TypeError: a child holds the blocks too, so that the copy would run blocks of its own.
    """
    blocks = get_blocks(model)
    for classifier in classifiers(model):
        for name, child in list(model.named_children()):
            if any(module is classifier for module in child.modules()):
                if any(module is blocks for module in child.modules()):
                    raise TypeError(
                        "model must hold its blocks and its head in children of its own, got "
                        f"{type(model).__name__} with both in `{name}`; give that child instead"
                    )
                setattr(model, name, copy.deepcopy(child))
