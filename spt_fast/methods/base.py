"""What it means that a method takes a model of timm over: loan, head, modes, files, and giving it back."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from spt_fast.backbones.anatomy import get_blocks, image_dtype, num_prefix_tokens
from spt_fast.backbones.identity import check_backbone, describe, describe_norm
from spt_fast.backbones.snapshot import (
    HEAD_NORMS,
    ModelSnapshot,
    check_free,
    classifiers,
    fold_norm_into_head,
    placement,
    replace_head,
)
from spt_fast.methods.file_format import TunedState, check_finite, check_shapes
from spt_fast.methods.parameter_groups import parameter_groups as groups_of
from spt_fast.prompting.checks import (
    check_all_saved,
    check_class_names,
    check_images,
    check_not_wrapped,
    check_num_classes,
    check_weight_dtype,
)
from spt_fast.prompting.timm_methods import TimmMethods
from spt_fast.support.arguments import check_choice
from spt_fast.support.randomness import seeded

if TYPE_CHECKING:
    from typing_extensions import Self

    from spt_fast.data.transforms import Preprocessing

Blocks = nn.ModuleList | nn.Sequential


class Common(TypedDict, total=False):
    """Arguments that every method has; see `TunedViT`."""

    num_classes: int | None
    head_norm: Literal["none", "batch"]
    weight_dtype: torch.dtype | Literal["bf16", "fp16"] | None


class TunedViT(TimmMethods):
    """A timm model that a method tunes: taken over, without a copy, until `release()` gives it back.

    Until then the model is frozen, but for what the method learns, and stays in evaluation mode. Its head is
    a new one, or a copy of its own. Everything else is the model's own forward. `release()`,
    `spt_fast.release(model)` and the end of the last reference to this object restore the model.

    A method is a subclass with a name. Its constructor adds what it learns to this module, and ends with
    `_take_over()`. Its `_install` replaces forwards of parts of the model by
    `self._snapshot.replace_forward`, or opens weights of the model by `self._snapshot.open_weights`. Such a
    forward must hold no reference to this object, which would then never end.

    Args:
        model: a timm Vision Transformer, or a module whose `.blocks` map [B, N, D] to [B, N, D]. It must not
            be wrapped: compile or distribute the object of this class instead.
        options: of the method, as its file keeps them: numbers, strings, None.
        num_classes: size of a new head; None trains a copy of the model's head, which it must have; 0 is no
            head: the outputs are features [B, D], as in timm.
        head_norm: "batch" puts a batch norm without weights before the head, as in MAE's linear probe.
        weight_dtype: torch.bfloat16 ("bf16") or torch.float16 ("fp16"): run in this dtype by autocast, with
            the frozen weights cast once instead of in every step. Results are bitwise those of autocast.
            The original weights are kept until `release()`: half as much memory again, as autocast takes too.

    Attributes:
        method: its name.
        options: as given.
        model: the model taken over.
        class_names: the names of the logits, in their order, or None; set by you, saved with the head.
        preprocessing: what was done to the images (`data.transforms`), or None; set and saved likewise.

    Raises:
        TypeError: `model` has no blocks or is wrapped, or an argument is of the wrong type.
        ValueError: an option that this model cannot honour; no `num_classes` for a model without a head.
    """

    method: str
    # Whether `merge` gives a plain model of timm.
    merges: ClassVar[bool] = False
    model: nn.Module
    class_names: Sequence[str] | None
    preprocessing: Preprocessing | None

    def __init__(
        self,
        model: nn.Module,
        options: Mapping[str, Any],
        *,
        num_classes: int | None = None,
        head_norm: Literal["none", "batch"] = "none",
        weight_dtype: torch.dtype | Literal["bf16", "fp16"] | None = None,
    ) -> None:
        super().__init__()
        check_takeable(model)
        self._num_blocks = len(get_blocks(model))
        self._head_norm = check_choice("head_norm", head_norm, HEAD_NORMS)
        self.weight_dtype = check_weight_dtype(weight_dtype, model)
        self._new_classes = check_num_classes(model, num_classes)
        self._num_prefix_tokens = num_prefix_tokens(model)
        self.options = dict(options)
        self.class_names = self.preprocessing = None
        self.model = model

    def _take_over(self) -> None:
        """Freeze the model, give it its head and `_install` the method; where that fails, it is restored."""
        model, was_training = self.model, self.model.training
        self._snapshot = ModelSnapshot(model)
        try:
            model.requires_grad_(False)
            replace_head(model, self._new_classes, self._head_norm)
            self._install(get_blocks(model))
            if self.weight_dtype is not None:
                self._snapshot.cast_frozen_weights(model, self.weight_dtype)
            self.train(was_training)
        except BaseException:
            self._snapshot.restore(model)
            raise
        # Nothing else refers to this object: without it the model is given back.
        weakref.finalize(self, self._snapshot.restore, model).atexit = False

    def _install(self, blocks: Blocks) -> None:
        """Let the model run with what the method learns; the model is frozen then, with its new head.

        Raises:
            TypeError, ValueError: the model lacks what the method needs.
        """
        raise NotImplementedError

    def _folded(self) -> dict[str, Tensor]:
        """Weights and biases of the model, by their names, with which it computes the same by itself."""
        raise NotImplementedError

    @classmethod
    def from_state(
        cls,
        state: TunedState,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        allow_other_backbone: bool = False,
        **use: Any,
    ) -> Self:
        """`model` tuned as a file says that has been read: `state` is what it held, `path` its name.

        Args:
            allow_other_backbone: as in `load`.
            use: `weight_dtype`, and what else only says how the model runs.

        Raises:
            TypeError, ValueError: as the constructor and `load`; the model is then left as it was.
        """
        if not cls._opens(state):
            raise ValueError(
                f"{os.fspath(path)} was tuned by {state.tuned_by}, which is no {cls.__name__}; "
                "spt_fast.load_tuned takes the method from the file"
            )
        check_takeable(model)
        # Before anything else: on another backbone every other difference would only confuse.
        check_backbone(path, state.facts, model, allow_other_backbone=allow_other_backbone)
        state.check_pooling(path, model)
        # The file replaces all values; drawing them must leave the caller's random state alone.
        with seeded(0, placement(model)[0]):
            tuned = cls._built_as(
                state, model, num_classes=state.size_of_new_head(model), head_norm=state.head_norm, **use
            )
        try:
            tuned._take_state(path, state, allow_other_backbone=allow_other_backbone)
        except BaseException:
            tuned.release()
            raise
        return tuned

    @classmethod
    def _opens(cls, state: TunedState) -> bool:
        """Whether this class is what tuned a file."""
        return state.method == cls.method

    @classmethod
    def _built_as(cls, state: TunedState, model: nn.Module, **common: Any) -> Self:
        return cls(model, **state.options, **common)

    @property
    def head(self) -> nn.Module:
        """The trainable classifier; a ModuleList of both where the model has two (distilled DeiT)."""
        self._check_not_released()
        found = classifiers(self.model)
        return found[0] if len(found) == 1 else nn.ModuleList(found)

    @property
    def head_norm(self) -> Literal["none", "batch"]:
        """As given."""
        return "batch" if self._head_norm == "batch" else "none"

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters for an optimiser: what the method learns, and the head."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def num_trainable(self, head: bool = True) -> int:
        """How many numbers are learned, with those of the head or without them."""
        of_head = {id(parameter) for parameter in self.head.parameters()}
        return sum(each.numel() for each in self.trainable_parameters() if head or id(each) not in of_head)

    parameter_groups = groups_of

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the method's own parts, of the head and of the dropout before it.

        The model stays in evaluation mode.
        """
        if self._snapshot.is_restored:
            # Of a model that was given back by itself, whoever has it sets the mode.
            self.training = mode
            for name, part in self.named_children():
                if name != "model":
                    part.train(mode)
            return self
        super().train(mode)
        self.model.eval()
        for module in (*classifiers(self.model), getattr(self.model, "head_drop", None)):
            if module is not None:
                module.train(mode)
        return self

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write what was learned, without the rest of the model, to a safetensors file; see `load_tuned`.

        Raises:
            ValueError: `class_names` is set, but not one name for each logit; a parameter learns that the
                file would not hold; NaN or infinity is found.
            FileExistsError: there is such a file, and not `overwrite`.
            FileNotFoundError: the folder does not exist.
        """
        self._check_not_released()
        check_class_names(self.class_names, getattr(self.model, "num_classes", None))
        state = self._state()
        check_all_saved(self, state.tensors.values())
        state.write(path, overwrite=overwrite)

    def load(self, path: str | os.PathLike[str], *, allow_other_backbone: bool = False) -> None:
        """Read what `save` wrote; the model must have been built the same way. Errors leave it as it was.

        Args:
            allow_other_backbone: also with other weights, known by a few of them, or another image size.

        Raises:
            ValueError: another method, backbone, pooling or shape; a truncated file or one of another kind.
            FileNotFoundError: there is no such file.
        """
        self._check_not_released()
        self._take_state(path, TunedState.read(path), allow_other_backbone=allow_other_backbone)

    def learned_state_dict(self) -> dict[str, Tensor]:
        """What is learned, by the names that it has in the file of `save`; no copies, detached.

        What `state_dict()` holds beside it is the frozen backbone. For trainers that keep checkpoints of
        whatever a module's `state_dict()` returns: docs/own-loop.md.

        Raises:
            ValueError: a parameter learns that is none of the method's or the head's.
        """
        tensors = self.saved_tensors()
        check_all_saved(self, tensors.values())
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def saved_tensors(self) -> dict[str, Tensor]:
        """What the file of `save` holds, by its names: parameters and buffers themselves, frozen or not."""
        self._check_not_released()
        return dict(self._state().tensors)

    def load_learned_state_dict(self, state: Mapping[str, Tensor]) -> _IncompatibleKeys:
        """Take the values that `learned_state_dict` gave; errors leave everything as it was.

        Returns:
            What `load_state_dict` returns: no missing and no unexpected keys.

        Raises:
            TypeError: no mapping, or a value is no tensor.
            ValueError: names or shapes are not those of this module.
            NonFiniteError: a value is NaN or infinite, which `load` refuses too.
        """
        self._check_not_released()
        own = self._state().tensors
        if not isinstance(state, Mapping):
            raise TypeError(
                f"state must be a dict of tensors, as learned_state_dict gives, got {type(state).__name__}"
            )
        check_shapes("state", state, own)
        for name, tensor in state.items():
            check_finite(name, tensor)
        _copy(state, own)
        return _IncompatibleKeys([], [])

    def release(self) -> nn.Module:
        """Give the model back as it was: head, grad flags, training modes, weights, forward of each block.

        The trained head is gone then, and this object cannot run any more: `save` first.

        Raises:
            RuntimeError: the model has been released before.
        """
        self._check_not_released()
        model = self.model
        del self.model
        self._snapshot.restore(model)
        return model

    @torch.no_grad()
    def merge(self) -> nn.Module:
        """Give the model back with what was learned in its own weights: a plain model of timm, at no cost.

        Unlike after `release`, the model is another one than it was before; save it as any model of timm.

        Raises:
            RuntimeError: the model has been released before.
            ValueError: the method is none that weights can express, or the model runs in `weight_dtype`.
        """
        self._check_not_released()
        if not self.merges:
            raise ValueError(
                f"merge is for methods that end in plain weights, which {self.method!r} does not"
            )
        if self.weight_dtype is not None:
            raise ValueError("merge needs the model in its own dtype: build it without weight_dtype")
        folded = {name: tensor.detach().clone() for name, tensor in self._folded().items()}
        model = self.model
        del self.model
        self._snapshot.restore(model, keep_head=True)
        if self._head_norm == "batch":
            fold_norm_into_head(model)
        for name, tensor in folded.items():
            parent, _, attribute = name.rpartition(".")
            module = model.get_submodule(parent)
            setattr(module, attribute, nn.Parameter(tensor))
        return model

    def extra_repr(self) -> str:
        return ", ".join([f"method={self.method!r}", *(f"{k}={v!r}" for k, v in self.options.items())])

    def _learned(self) -> dict[str, Tensor]:
        """What the file holds beside the head: the method's own tensors, and weights that it opened."""
        own = self.state_dict(keep_vars=True)
        return {
            **{name: tensor for name, tensor in own.items() if not name.startswith("model.")},
            **{f"model.{name}": tensor for name, tensor in self._snapshot.opened(self.model)},
        }

    def _method_facts(self) -> dict[str, str]:
        """Facts of the file beside those of the backbone."""
        return {"method": self.method}

    def _state(self) -> TunedState:
        with self._snapshot.closed():
            backbone = {**describe(self.model), **describe_norm(self.model)}
        return TunedState.of(
            self.model,
            self._learned(),
            self.head,
            facts={**backbone, **self._method_facts()},
            options=self.options,
            head_norm=self._head_norm,
            class_names=self.class_names,
            preprocessing=self.preprocessing,
        )

    def _take_state(
        self, path: str | os.PathLike[str], state: TunedState, *, allow_other_backbone: bool
    ) -> None:
        """Copy the state that a file holds; nothing changes where it does not fit."""
        own = self._state()
        state.check_method(path, own)
        state.check_place_of_norm(path, self.model)
        state.check_fits(path, own, allow_other_backbone=allow_other_backbone)
        _copy(state.tensors, own.tensors)
        self.class_names, self.preprocessing = state.class_names, state.preprocessing

    def _run(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        if self.weight_dtype is None:
            return function(inputs)
        with torch.autocast(inputs.device.type, dtype=self.weight_dtype):
            return function(inputs)

    def _check_not_released(self) -> None:
        if self._snapshot.is_restored:
            raise RuntimeError(
                f"this {type(self).__name__} has released its model; build a new one to use it again"
            )

    def _fitting(self, images: Tensor) -> Tensor:
        """`images`, checked, in the dtype that the model takes, or from which autocast starts."""
        self._check_not_released()
        check_images(images, self.model)
        return images.to(image_dtype(self.model) if self.weight_dtype is None else torch.float32)


def check_takeable(model: nn.Module) -> None:
    """TypeError where `model` has no blocks or is wrapped, ValueError where it is taken over already."""
    check_not_wrapped(model)
    get_blocks(model)
    check_free(model)


def _copy(values: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in to.items():
            tensor.copy_(values[name])
