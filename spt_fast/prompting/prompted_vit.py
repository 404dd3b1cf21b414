"""A frozen Vision Transformer with learnable prompts in its blocks and a new head (Sec. 3.1, 3.3)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from spt_fast.backbones.anatomy import get_blocks, image_dtype, num_prefix_tokens
from spt_fast.backbones.snapshot import HEAD_NORMS, ModelSnapshot, check_free, classifiers, replace_head
from spt_fast.prompting.checks import (
    check_all_saved,
    check_class_names,
    check_images,
    check_not_wrapped,
    check_num_classes,
    check_pool_prompts,
    check_prompt_dropout,
    check_weight_dtype,
)
from spt_fast.prompting.engines import KeysValuesCache, choose_engine
from spt_fast.prompting.file_format import TunedState, check_finite, check_shapes
from spt_fast.prompting.initial_prompts import initial_prompts
from spt_fast.prompting.measures import Measures
from spt_fast.prompting.parameter_groups import parameter_groups as groups_of
from spt_fast.prompting.prompted_blocks import PromptedBlocks
from spt_fast.support.arguments import check_bool, check_choice
from spt_fast.support.randomness import seeded

if TYPE_CHECKING:
    import os

    from spt_fast.data.transforms import Preprocessing
    from spt_fast.prototypes.result import Prototypes


class PromptedViT(Measures):
    """`PromptedViT(model, prompts)` takes `model` over, without a copy, until `release()` gives it back.

    Until then the model is frozen, stays in evaluation mode, and each of its blocks attends to learnable
    prompts; only the prompts and the head are trained. The head is a new one, or a copy of the model's own.
    Everything else is the model's own forward, so gradient checkpointing
    (`tuned.model.set_grad_checkpointing()`), dynamic image sizes and any pooling work as they do in timm. So
    do hooks, on blocks and on their parts: with "kv" they see the tokens of the image; with "concat", hooks
    on parts see prompts behind them, [B, N + N_p, ...]. Prompts pass the parts of "kv" without calling hooks,
    so that what a hook changes in `norm1` or `attn.qkv` is changed for the tokens of the image only.
    `release()` restores head, grad flags, training modes, weights and the forward of each block. So does
    `spt_fast.release(model)`, and the end of the last reference to this object.

    Deep (eq. 6, 13): block i attends to its own prompts P_{i-1}, and their outputs are discarded.
    Shallow (eq. 4-5, 11-12): block 1 takes P_0 as tokens, and each later block takes their outputs.

    >>> tuned = spt_fast.PromptedViT(model, protos, num_classes=200)
    >>> optimizer = torch.optim.AdamW(tuned.parameter_groups(lr=1e-2))

    Args:
        model: a timm Vision Transformer, or a module whose `.blocks` map [B, N, D] to [B, N, D]. It must not
            be wrapped: compile or distribute the `PromptedViT` instead.
        prompts: `Prototypes`; a floating-point tensor [L, N_p, D] (deep) or [1, N_p, D] (shallow), which is
            copied; or an int N_p, for VPT's uniform initialisation by torch's global random generator.
            N_p = 0 is the model without prompts.
        depth: "deep" or "shallow".
        num_classes: size of a new head; None trains a copy of the model's head, which it must have; 0 is no
            head: the outputs are features [B, D], as in timm.
        freeze_prompts: train the head only (Table 4a).
        engine: "kv" adds the prompts to keys and values, computed once per step for the whole batch (deep
            only, in the blocks of docs/backbones.md); "concat" is the textbook form; "auto" takes "kv" where
            it is exact. Outputs and gradients are equal up to rounding.
        pool_prompts: average the last block's outputs of prompts and patches, not of patches alone; for
            models with `global_pool="avg"`. None is False, unless `open_model` opened the model for that.
        prompt_dropout: share of the prompts' elements that training drops, others for each image (VPT: 0.1).
            It needs "concat", and is no part of the file.
        head_norm: "batch" puts a batch norm without weights before the head, as MAE's linear probe has.
        weight_dtype: torch.bfloat16 ("bf16") or torch.float16 ("fp16"): run in this dtype by autocast, with
            the frozen weights cast once instead of in every step. Results are bitwise those of autocast.
            The original weights are kept until `release()`: half as much memory again, as autocast takes too.
        allow_other_backbone: take `Prototypes` that were built with other weights or for another image size.

    Attributes:
        prompts: Parameter [L or 1, N_p, D], at least float32 also where the model is narrower.
        engine: "kv" or "concat", as chosen.
        engine_reason: one sentence, why that engine.
        depth: "deep" or "shallow".
        model: the model taken over.
        class_names: the names of the logits, in their order, or None; set by you, saved with the head.
        preprocessing: what was done to the images (`data.transforms`), or None; set and saved likewise.

    Raises:
        TypeError: `model` has no blocks to prompt or is wrapped, or an argument is of the wrong type.
        ValueError: prompts of another depth or width or from another backbone; an unknown option, or one
            this model cannot honour; no `num_classes` for a model without a head.
    """

    prompts: nn.Parameter
    model: nn.Module
    class_names: Sequence[str] | None
    preprocessing: Preprocessing | None

    def __init__(
        self,
        model: nn.Module,
        prompts: Prototypes | Tensor | int,
        *,
        depth: Literal["deep", "shallow"] = "deep",
        num_classes: int | None = None,
        freeze_prompts: bool = False,
        engine: Literal["auto", "kv", "concat"] = "auto",
        pool_prompts: bool | None = None,
        prompt_dropout: float = 0.0,
        head_norm: Literal["none", "batch"] = "none",
        weight_dtype: torch.dtype | Literal["bf16", "fp16"] | None = None,
        allow_other_backbone: bool = False,
    ) -> None:
        super().__init__()
        check_choice("depth", depth, ("deep", "shallow"))
        check_choice("engine", engine, ("auto", "kv", "concat"))
        check_not_wrapped(model)
        blocks = get_blocks(model)
        check_free(model)
        check_bool("freeze_prompts", freeze_prompts)
        self._head_norm = check_choice("head_norm", head_norm, HEAD_NORMS)
        self.pool_prompts = check_pool_prompts(model, blocks, pool_prompts)
        self.weight_dtype = check_weight_dtype(weight_dtype, model)
        self.prompt_dropout = nn.Dropout(check_prompt_dropout(prompt_dropout))
        self.engine, self.engine_reason = choose_engine(model, blocks, depth, engine, prompt_dropout)
        num_classes = check_num_classes(model, num_classes)
        values = initial_prompts(model, prompts, depth, allow_other_backbone=allow_other_backbone)

        self.depth = depth
        self.class_names = self.preprocessing = None
        self._num_blocks = len(blocks)
        self._num_prefix_tokens = num_prefix_tokens(model)
        was_training = model.training
        self._blocks = PromptedBlocks(
            self._parameters,
            engine=self.engine,
            depth=depth,
            pool_prompts=self.pool_prompts,
            drop=self.prompt_dropout,
        )
        self._snapshot = ModelSnapshot(model)
        self.model = model
        try:
            self._take_over(blocks, num_classes, head_norm)
        except BaseException:
            self._snapshot.restore(model)
            raise
        # Without prompts there is nothing to learn; DDP would wait for a gradient that never comes.
        self.prompts = nn.Parameter(values, requires_grad=not freeze_prompts and values.numel() > 0)
        self.train(was_training)
        # Nothing else refers to this object: without it the model is given back.
        weakref.finalize(self, self._snapshot.restore, model).atexit = False

    @classmethod
    def from_file(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        engine: Literal["auto", "kv", "concat"] = "auto",
        weight_dtype: torch.dtype | Literal["bf16", "fp16"] | None = None,
        allow_other_backbone: bool = False,
    ) -> PromptedViT:
        """`model` with the prompts and the head of a file that `save` wrote, built as they were.

        Args:
            engine, weight_dtype: as in the constructor; allow_other_backbone: as in `load`.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError: as the constructor and `load`; the model is then left as it was.
        """
        return cls.from_state(
            TunedState.read(path),
            path,
            model,
            engine=engine,
            weight_dtype=weight_dtype,
            allow_other_backbone=allow_other_backbone,
        )

    @classmethod
    def from_state(
        cls,
        state: TunedState,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        engine: Literal["auto", "kv", "concat"] = "auto",
        weight_dtype: torch.dtype | Literal["bf16", "fp16"] | None = None,
        allow_other_backbone: bool = False,
    ) -> PromptedViT:
        """`from_file` of a file that has been read: `state` is what it held, `path` its name for errors."""
        state.check_pooling(path, model)
        # The file replaces the new head's values; drawing them must leave the caller's random state alone.
        with seeded(0):
            tuned = cls(
                model,
                state.tensors["prompts"],
                depth=state.depth,
                num_classes=state.size_of_new_head(model),
                engine=engine,
                pool_prompts=state.pool_prompts,
                head_norm=state.head_norm,
                weight_dtype=weight_dtype,
            )
        try:
            tuned._take_state(path, state, allow_other_backbone=allow_other_backbone)
        except BaseException:
            tuned.release()
            raise
        return tuned

    @property
    def head(self) -> nn.Module:
        """The trainable classifier; a ModuleList of both where the model has two (distilled DeiT)."""
        self._check_not_released()
        found = classifiers(self.model)
        return found[0] if len(found) == 1 else nn.ModuleList(found)

    @contextmanager
    def fixed_prompts(self) -> Iterator[None]:
        """Within `with tuned.fixed_prompts():`, keys and values of the prompts are computed once and kept.

        For inference: it has an effect only where the prompts need no gradient, and none in compiled code.
        Prompts and backbone must not change meanwhile. If the prompts do, their keys and values are computed
        again, except after a write through `.data`, which leaves no trace.
        """
        outer = self._blocks.cache
        self._blocks.cache = KeysValuesCache() if outer is None else outer
        try:
            yield
        finally:
            self._blocks.cache = outer

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters for an optimiser: the prompts, unless they are frozen, and the head."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    parameter_groups = groups_of

    def train(self, mode: bool = True) -> PromptedViT:
        """Set the mode of the head and of the dropout before it; the backbone stays in evaluation mode."""
        super().train(mode)
        if not self._snapshot.is_restored:
            self.model.eval()
            for module in (*classifiers(self.model), getattr(self.model, "head_drop", None)):
                if module is not None:
                    module.train(mode)
        return self

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write prompts and head, without the rest of the model, to a safetensors file; see `from_file`.

        Raises:
            ValueError: `class_names` is set, but not one name for each logit; a parameter beside prompts and
                head learns, which the file would not hold; NaN or infinity is found.
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
            ValueError: another backbone, depth, pooling or shape; a truncated file or one of another kind.
            FileNotFoundError: there is no such file.
        """
        self._check_not_released()
        self._take_state(path, TunedState.read(path), allow_other_backbone=allow_other_backbone)

    def learned_state_dict(self) -> dict[str, Tensor]:
        """Prompts and head, by the names that they have in the file of `save`; no copies, detached.

        What `state_dict()` holds beside them is the frozen backbone. For trainers that keep checkpoints of
        whatever a module's `state_dict()` returns: docs/own-loop.md.

        Raises:
            ValueError: a parameter beside prompts and head learns.
        """
        self._check_not_released()
        tensors = self._state().tensors
        check_all_saved(self, tensors.values())
        return {name: tensor.detach() for name, tensor in tensors.items()}

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

    def extra_repr(self) -> str:
        layers, num_prompts, width = self.prompts.shape
        return f"prompts=[{layers}, {num_prompts}, {width}], depth={self.depth!r}, engine={self.engine!r}"

    def _state(self) -> TunedState:
        return TunedState.of(
            self.model,
            self.prompts,
            self.head,
            depth=self.depth,
            pool_prompts=self.pool_prompts,
            head_norm=self._head_norm,
            class_names=self.class_names,
            preprocessing=self.preprocessing,
        )

    def _take_state(
        self, path: str | os.PathLike[str], state: TunedState, *, allow_other_backbone: bool
    ) -> None:
        """Copy the state that a file holds; nothing changes where it does not fit."""
        own = self._state()
        state.check_place_of_norm(path, self.model)
        state.check_fits(path, own, allow_other_backbone=allow_other_backbone)
        _copy(state.tensors, own.tensors)
        self.class_names, self.preprocessing = state.class_names, state.preprocessing

    def _take_over(
        self, blocks: nn.ModuleList | nn.Sequential, num_classes: int | None, head_norm: str
    ) -> None:
        self.model.requires_grad_(False)
        replace_head(self.model, num_classes, head_norm)
        if self.weight_dtype is not None:
            self._snapshot.cast_frozen_weights(self.model, self.weight_dtype)
        self._blocks.take_over(blocks, self._snapshot)

    def _run(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        # Unbound once, so that backward writes the gradient of all layers once, not once per layer.
        self._blocks.layers = self.prompts.unbind(0)
        try:
            if self.weight_dtype is None:
                return function(inputs)
            with torch.autocast(inputs.device.type, dtype=self.weight_dtype):
                return function(inputs)
        finally:
            self._blocks.layers = None

    def _check_not_released(self) -> None:
        if self._snapshot.is_restored:
            raise RuntimeError(
                "this PromptedViT has released its model; build a new one to use prompts again"
            )

    def _fitting(self, images: Tensor) -> Tensor:
        """`images`, checked, in the dtype that the model takes, or from which autocast starts."""
        self._check_not_released()
        check_images(images, self.model)
        return images.to(image_dtype(self.model) if self.weight_dtype is None else torch.float32)


def _copy(values: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in to.items():
            tensor.copy_(values[name])
