"""Remember a model before it is taken over, and restore it: head, grad flags, modes, forwards, weights.

Knows nothing of what the model is taken over for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from spt_fast.backbones.anatomy import get_blocks

HEAD_NORMS = ("none", "batch")
_CAST_MODULES = (nn.Linear, nn.Conv2d)
# Where a model that is taken over holds its snapshot, so that copies of it hold copies.
_MARK = "_taken_over"
# Modules with the children that they have.
_Trees = list[tuple[nn.Module, dict[str, nn.Module | None]]]


class ModelSnapshot:
    """What is needed to restore a model: head, grad flags, training modes, forwards, weights.

    Attributes:
        is_restored: whether `restore` has been called; it does nothing the second time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.is_restored = False
        self._grad_flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._training = {name: module.training for name, module in model.named_modules()}
        self._children = dict(model._modules)
        self._attributes = dict(vars(model))
        self._forwards: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        self._placement = placement(model)
        self._originals: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._opened: list[str] = []
        self._trees: _Trees = []
        setattr(model, _MARK, self)

    def open_weights(self, model: nn.Module, names: Iterable[str]) -> None:
        """Replace these weights by copies that learn; the originals are kept."""
        for name in names:
            parent, _, attribute = name.rpartition(".")
            module = model.get_submodule(parent)
            original = module._parameters[attribute]
            assert original is not None
            self._originals.append((module, attribute, original))
            module._parameters[attribute] = nn.Parameter(original.detach().clone())
            self._opened.append(name)

    def keep_tree(self, model: nn.Module) -> None:
        """From now on anything may put other modules into the places of those of `model`."""
        self._trees = _trees_of(model.modules())

    def opened(self, model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that `open_weights` replaced, by their names in the model."""
        return ((name, model.get_parameter(name)) for name in self._opened)

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Within the context, weights and modules are the original ones; for looking at these only."""
        trees = _trees_of(module for module, _ in self._trees)
        _plant(self._trees)
        learning = [(module, name, module._parameters[name]) for module, name, _ in self._originals]
        for module, name, original in self._originals:
            module._parameters[name] = original
        try:
            yield
        finally:
            for module, name, parameter in learning:
                module._parameters[name] = parameter
            _plant(trees)

    def cast_frozen_weights(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Replace the frozen weights that autocast would cast in every step by copies in `dtype`.

        These are weights of linear layers and convolutions; norms stay as they are. The originals are kept.
        """
        for module in model.modules():
            if isinstance(module, _CAST_MODULES):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    if not parameter.requires_grad and parameter.dtype == torch.float32:
                        self._originals.append((module, name, parameter))
                        module._parameters[name] = nn.Parameter(parameter.to(dtype), requires_grad=False)
        self._placement = placement(model)

    def replace_forward(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        """Let `module` run `forward`, with its hooks around it."""
        self._forwards.append((module, vars(module).get("forward")))
        setattr(module, "forward", forward)  # noqa: B010

    def restore(self, model: nn.Module, *, keep_head: bool = False) -> None:
        """Make `model` what it was, on the device and in the dtype that it has now.

        Args:
            keep_head: leave it the head that it has now.
        """
        if self.is_restored:
            return
        self.is_restored = True
        _plant(self._trees)
        now = placement(model)
        vars(model).pop(_MARK, None)
        for module, forward in reversed(self._forwards):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                setattr(module, "forward", forward)  # noqa: B010
        for module, name, parameter in self._originals:
            module._parameters[name] = parameter
        if not keep_head:
            model._modules.clear()
            model._modules.update(self._children)
            vars(model).update(self._attributes)
        self._follow_move(model, now)
        for name, parameter in model.named_parameters():
            # Not `requires_grad_`, which a transform of torch.func refuses: garbage may be collected in one.
            parameter.requires_grad = self._grad_flags.get(name, True)
        for name, module in model.named_modules():
            module.training = self._training.get(name, model.training)

    def _follow_move(self, model: nn.Module, now: tuple[torch.device, torch.dtype]) -> None:
        """Move the original head and weights to the device and dtype that the model has got meanwhile."""
        if now == self._placement:
            return
        device = now[0]
        dtype = None if now[1] == self._placement[1] else now[1]
        for classifier in classifiers(model):
            classifier.to(device, dtype)
        for _, _, parameter in self._originals:
            parameter.data = parameter.data.to(device, dtype)


def _trees_of(modules: Iterable[nn.Module]) -> _Trees:
    return [(module, dict(module._modules)) for module in modules]


def _plant(trees: _Trees) -> None:
    """Give modules these children."""
    for module, children in trees:
        module._modules.clear()
        module._modules.update(children)


def find_snapshot(model: nn.Module) -> ModelSnapshot | None:
    """That of a model that is taken over, or None where it is free."""
    found = vars(model).get(_MARK)
    return found if isinstance(found, ModelSnapshot) else None


def check_free(model: nn.Module) -> None:
    """ValueError where `model` is taken over: its tokens then depend on what is learned."""
    if find_snapshot(model) is not None:
        raise ValueError(
            "model already belongs to a tuned model, so that its tokens depend on what that has learned; "
            "call its release(), or spt_fast.release(model), first"
        )


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


def has_head(model: nn.Module) -> bool:
    """Whether the outputs of `model` are logits: of a classifier with weights, or as its `num_classes` says.

    True for a model that says nothing of a classifier.
    """
    found = classifiers(model)
    if found:
        return any(True for classifier in found for _ in classifier.parameters())
    return getattr(model, "num_classes", None) != 0


def replace_head(model: nn.Module, num_classes: int | None, norm: str = "none") -> None:
    """Give `model` a trainable head, a new one of timm's or a copy of its own; its own is never trained.

    With `num_classes=0` timm takes the head away. With `norm="batch"` a batch norm without weights comes
    before it, as in MAE's linear probe.

    Raises:
        TypeError: a child of the model holds head and blocks, so that a copy would run blocks of its own.
        ValueError: a batch norm for a head that is no linear layer.
    """
    _copy_head(model)
    if num_classes is not None:
        model.reset_classifier(num_classes)  # type: ignore[operator]
    for classifier in classifiers(model):
        if num_classes is not None:
            # Older timm makes the new head in float32 on the CPU.
            classifier.to(*placement(model))
        classifier.requires_grad_(True)
    if norm == "batch":
        _put_batch_norm_before_head(model)


def _put_batch_norm_before_head(model: nn.Module) -> None:
    for classifier in classifiers(model):
        if not isinstance(classifier, nn.Linear):
            raise ValueError(f"head_norm='batch' needs a linear head, got {type(classifier).__name__}")
        # The epsilon of MAE's code. Running means need more digits than bfloat16 has.
        dtype = torch.promote_types(classifier.weight.dtype, torch.float32)
        norm = nn.BatchNorm1d(classifier.in_features, affine=False, eps=1e-6)
        norm.to(classifier.weight.device, dtype)
        _put(model, classifier, nn.Sequential(norm, classifier))


def fold_norm_into_head(model: nn.Module) -> None:
    """Let the linear layer do what the batch norm of `replace_head` before it does in evaluation mode."""
    for classifier in classifiers(model):
        norm, linear = cast(nn.Sequential, classifier)
        assert isinstance(norm, nn.BatchNorm1d)
        assert isinstance(linear, nn.Linear)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt()
        weight = linear.weight * scale
        bias = -(weight @ norm.running_mean) + (0 if linear.bias is None else linear.bias)
        folded = nn.Linear(linear.in_features, linear.out_features).to(linear.weight)
        folded.weight.data.copy_(weight)
        folded.bias.data.copy_(bias)
        _put(model, classifier, folded)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    path = next(path for path, module in model.named_modules() if module is old)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _copy_head(model: nn.Module) -> None:
    """Put a copy in the place of each child that holds a classifier."""
    blocks = get_blocks(model)
    for classifier in classifiers(model):
        for name, child in list(model.named_children()):
            modules = list(child.modules())
            if not any(module is classifier for module in modules):
                continue
            if any(module is blocks for module in modules):
                raise TypeError(
                    "model must hold its blocks and its head in children of its own, got "
                    f"{type(model).__name__} with both in `{name}`; give that child instead"
                )
            setattr(model, name, copy.deepcopy(child))
