"""A frozen Vision Transformer with learnable prompts in its blocks and a new head (Sec. 3.1, 3.3)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import block_input_hooks, get_blocks, num_prefix_tokens
from spt_fast.backbones.snapshot import ModelSnapshot, classifiers, replace_head
from spt_fast.prompting.checks import (
    check_block_call,
    check_block_input,
    check_class_names,
    check_images,
    check_not_taken_over,
    check_not_wrapped,
    check_num_classes,
    check_pools_patches,
    check_weight_dtype,
)
from spt_fast.prompting.engines import (
    KeysValues,
    KeysValuesCache,
    append_prompts,
    choose_engine,
    concat_extras,
    drop_prompts,
    fit_extras,
    kv_extras,
    kv_forward,
    prompt_keys_values,
)
from spt_fast.prompting.file_format import TunedState
from spt_fast.prompting.initial_prompts import initial_prompts
from spt_fast.prompting.nmi import check_finite_nmi, nmi_per_image
from spt_fast.support.arguments import check_bool, check_choice, check_int
from spt_fast.support.randomness import seeded

if TYPE_CHECKING:
    import os

    from spt_fast.prototypes.result import Prototypes


class PromptedViT(nn.Module):
    """`PromptedViT(model, prompts)` takes `model` over, without a copy, until `release()` gives it back.

    Until then the model is frozen, stays in evaluation mode, and each of its blocks attends to learnable
    prompts; only the prompts and the head are trained. The head is a new one, or a copy of the model's own.
    Everything else is the model's own forward, so hooks, gradient checkpointing
    (`tuned.model.set_grad_checkpointing()`), dynamic image sizes and any pooling work as they do in timm.
    `release()` restores head, grad flags, training modes, weights and the forward of each block.

    Deep (eq. 6, 13): block i attends to its own prompts P_{i-1}, and their outputs are discarded.
    Shallow (eq. 4-5, 11-12): block 1 takes P_0 as tokens, and each later block takes their outputs.

    >>> tuned = spt_fast.PromptedViT(model, protos, num_classes=200)
    >>> optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2)

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
            models with `global_pool="avg"`.
        weight_dtype: torch.bfloat16 ("bf16") or torch.float16 ("fp16"): run in this dtype by autocast, with
            the frozen weights cast once instead of in every step. Results are bitwise those of autocast.
            The original weights are kept until `release()`: half as much memory again for the weights, which
            autocast takes too, from forward to backward.
        allow_other_backbone: take `Prototypes` that were built with other weights or for another image size.

    Attributes:
        prompts: Parameter [L or 1, N_p, D], at least float32 also where the model is narrower.
        engine: "kv" or "concat", as chosen.
        engine_reason: one sentence, why that engine.
        depth: "deep" or "shallow".
        model: the model taken over.
        class_names: the names of the logits, in their order, or None; set by you, saved with the head.

    Raises:
        TypeError: `model` has no blocks to prompt or is wrapped, or an argument is of the wrong type.
        ValueError: prompts of another depth or width or from another backbone; an unknown option, or one
            this model cannot honour; no `num_classes` for a model without a head.
    """

    prompts: nn.Parameter
    model: nn.Module
    class_names: Sequence[str] | None

    def __init__(
        self,
        model: nn.Module,
        prompts: Prototypes | Tensor | int,
        *,
        depth: Literal["deep", "shallow"] = "deep",
        num_classes: int | None = None,
        freeze_prompts: bool = False,
        engine: Literal["auto", "kv", "concat"] = "auto",
        pool_prompts: bool = False,
        weight_dtype: torch.dtype | Literal["bf16", "fp16"] | None = None,
        allow_other_backbone: bool = False,
    ) -> None:
        super().__init__()
        check_choice("depth", depth, ("deep", "shallow"))
        check_choice("engine", engine, ("auto", "kv", "concat"))
        check_not_wrapped(model)
        blocks = get_blocks(model)
        check_not_taken_over(blocks, PromptedViT)
        check_bool("freeze_prompts", freeze_prompts)
        self.pool_prompts = check_bool("pool_prompts", pool_prompts)
        if self.pool_prompts:
            check_pools_patches(model, blocks)
        self.weight_dtype = check_weight_dtype(weight_dtype)
        self.engine, self.engine_reason = choose_engine(model, blocks, depth, engine)
        num_classes = check_num_classes(model, num_classes)
        values = initial_prompts(model, prompts, depth, allow_other_backbone=allow_other_backbone)

        self.depth = depth
        self.class_names = None
        self._num_blocks = len(blocks)
        self._num_prefix_tokens = num_prefix_tokens(model)
        was_training = model.training
        # Views of the prompts, layer by layer, while a forward pass runs.
        self._layers: tuple[Tensor, ...] | None = None
        self._cache: KeysValuesCache | None = None
        # None once the model is released.
        self._snapshot: ModelSnapshot | None = ModelSnapshot(model)
        self.model = model
        try:
            self._take_over(blocks, num_classes)
        except BaseException:
            self._snapshot.restore(model)
            raise
        # Without prompts there is nothing to learn; DDP would wait for a gradient that never comes.
        self.prompts = nn.Parameter(values, requires_grad=not freeze_prompts and values.numel() > 0)
        self.train(was_training)

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
        state = TunedState.read(path)
        # The values of a new head are replaced by those of the file; drawing them must not advance the
        # caller's random generators.
        with seeded(0):
            tuned = cls(
                model,
                state.tensors["prompts"],
                depth=state.depth,
                num_classes=state.size_of_new_head(model),
                engine=engine,
                pool_prompts=state.pool_prompts,
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

    @property
    def num_prompts(self) -> int:
        """N_p, the number of prompts per layer."""
        return self.prompts.shape[1]

    @property
    def num_classes(self) -> int:
        """Number of logits, where the model states it; 0 where it returns features."""
        return self.model.num_classes  # type: ignore[return-value]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The model's own, in which `timm.data.resolve_model_data_config` finds image size and mean."""
        return self.model.pretrained_cfg  # type: ignore[return-value]

    @property
    def prompted_blocks(self) -> nn.ModuleList | nn.Sequential:
        """The model's blocks in their order, which run with prompts.

        Raises:
            RuntimeError: the model has been released.
        """
        self._check_not_released()
        return get_blocks(self.model)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes], or features [B, D] without a head, of images [B, C, height, width]."""
        self._check_images(images)
        return self._run(self.model, images)

    def forward_features(self, images: Tensor) -> Tensor:
        """Tokens [B, N, D] after the last block and the final norm; with `pool_prompts`, [B, N + N_p, D]."""
        self._check_images(images)
        return self._run(self.model.forward_features, images)  # type: ignore[arg-type]

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what `forward_features` returned; with `pre_logits`, the classifier's inputs."""
        self._check_not_released()
        model: Any = self.model
        return self._run(functools.partial(model.forward_head, pre_logits=pre_logits), tokens)

    @contextmanager
    def fixed_prompts(self) -> Iterator[None]:
        """Within `with tuned.fixed_prompts():`, keys and values of the prompts are computed once and kept.

        For inference: it has an effect only where the prompts need no gradient, and none in compiled code.
        Prompts and backbone must not change meanwhile. If the prompts do, their keys and values are computed
        again, except after a write through `.data`, which leaves no trace.
        """
        outer = self._cache
        self._cache = KeysValuesCache() if outer is None else outer
        try:
            yield
        finally:
            self._cache = outer

    @torch.no_grad()
    def layer_nmi(self, images: Tensor) -> Tensor:
        """Sigmoid NMI (eq. 7, 8) of each block's prompts and the patch tokens entering it; [L, B].

        Shallow: from block 2 on, the prompts are outputs of the block before, others for each image. Runs
        without gradients.

        Raises:
            NonFiniteError: a prompt or a token of some block is NaN or infinite; names block and image.
        """
        per_layer: list[Tensor] = []

        def measure(layer: int, x: Tensor) -> None:
            per_layer.append(nmi_per_image(*self.prompts_and_tokens(layer, x)))

        with block_input_hooks(self.prompted_blocks, measure):
            self.forward(images)
        values = torch.stack(per_layer)
        check_finite_nmi(values)
        return values

    def prompts_and_tokens(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The prompts that a block attends to, and the patch tokens that enter it.

        Args:
            layer: number of the block, from 0.
            x: [B, N, D], what enters the block: prefix tokens, patch tokens and, in a shallow model from the
                second block on, prompts.

        Returns:
            Prompts [1, N_p, D], in their own dtype and the same for each image; or, where x holds them,
            [B, N_p, D]. Patch tokens [B, N_e, D]. All are views, through which gradients flow.

        Raises:
            TypeError, ValueError: there is no such block, or `x` is no such tensor.
        """
        if check_int("layer", layer, 0) >= self._num_blocks:
            raise ValueError(f"layer must be below {self._num_blocks}, the number of blocks, got {layer}")
        num_prompts = self.num_prompts if self.depth == "shallow" and layer > 0 else 0
        num_patches = check_block_input(x, self.prompts.shape[2], self._num_prefix_tokens, num_prompts)
        tokens = x[:, self._num_prefix_tokens :]
        if self.depth == "deep" or layer == 0:
            return self.prompts[layer : layer + 1], tokens
        return tokens[:, num_patches:], tokens[:, :num_patches]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters for an optimiser: the prompts, unless they are frozen, and the head."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def train(self, mode: bool = True) -> PromptedViT:
        """Set the mode of the head and of the dropout before it; the backbone stays in evaluation mode."""
        super().train(mode)
        if self._snapshot is not None:
            self.model.eval()
            for module in (*classifiers(self.model), getattr(self.model, "head_drop", None)):
                if module is not None:
                    module.train(mode)
        return self

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write prompts and head, without the rest of the model, to a safetensors file; see `from_file`.

        Raises:
            ValueError: `class_names` is set, but not one name for each logit; NaN or infinity is found.
            FileExistsError: there is such a file, and not `overwrite`.
            FileNotFoundError: the folder does not exist.
        """
        self._check_not_released()
        check_class_names(self.class_names, getattr(self.model, "num_classes", None))
        self._state().write(path, overwrite=overwrite)

    def load(self, path: str | os.PathLike[str], *, allow_other_backbone: bool = False) -> None:
        """Read prompts, head and names from a file of `save`; the model must have been built the same way.

        Args:
            allow_other_backbone: also where the file was saved with other weights of the backbone or for
                another image size. The weights are known by a few of them, in whatever dtype and device.

        Raises:
            ValueError: another backbone, depth or pooling; prompts or head of another shape (both shapes are
                named); or a file that is truncated or of another kind. Nothing has changed then.
            FileNotFoundError: there is no such file.
        """
        self._check_not_released()
        self._take_state(path, TunedState.read(path), allow_other_backbone=allow_other_backbone)

    def release(self) -> nn.Module:
        """Give the model back as it was: head, grad flags, training modes, weights, forward of each block.

        The trained head is gone then, and this object cannot run any more: `save` first.

        Raises:
            RuntimeError: the model has been released before.
        """
        self._check_not_released()
        assert self._snapshot is not None
        model = self.model
        del self.model
        self._snapshot.restore(model)
        self._snapshot = None
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
            class_names=self.class_names,
        )

    def _take_state(
        self, path: str | os.PathLike[str], state: TunedState, *, allow_other_backbone: bool
    ) -> None:
        """Copy the state that a file holds; nothing changes where it does not fit."""
        own = self._state()
        state.check_fits(path, own, allow_other_backbone=allow_other_backbone)
        with torch.no_grad():
            for name, tensor in own.tensors.items():
                tensor.copy_(state.tensors[name])
        self.class_names = state.class_names

    def _take_over(self, blocks: nn.ModuleList | nn.Sequential, num_classes: int | None) -> None:
        self.model.requires_grad_(False)
        replace_head(self.model, num_classes)
        if self.weight_dtype is not None:
            assert self._snapshot is not None
            self._snapshot.cast_frozen_weights(self.model, self.weight_dtype)
        for index, block in enumerate(blocks):
            # Shadowing `forward` on the instance leaves the module tree, its names and its hooks alone.
            setattr(block, "forward", self._prompted_forward(index, block))  # noqa: B010

    def _prompted_forward(self, index: int, block: nn.Module) -> Callable[..., Tensor]:
        # Pooling needs outputs at the positions of prompts, so the last block then takes them as tokens.
        pools_here = self.pool_prompts and index == self._num_blocks - 1
        if self.engine == "kv" and not pools_here:
            return functools.partial(self._run_with_kv, index, block)
        return functools.partial(self._run_with_tokens, index, block, block.forward)

    def _run(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        # Unbound once, so that backward writes the gradient of all layers once, not once per layer.
        self._layers = self.prompts.unbind(0)
        try:
            if self.weight_dtype is None:
                return function(inputs)
            with torch.autocast(inputs.device.type, dtype=self.weight_dtype):
                return function(inputs)
        finally:
            self._layers = None

    def _run_with_kv(self, index: int, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_block_call(block, x, args, kwargs, kv_extras(block))
        return kv_forward(block, x, self._keys_values(index, block, x.dtype), **kwargs)

    def _run_with_tokens(
        self,
        index: int,
        block: nn.Module,
        original: Callable[..., Tensor],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        check_block_call(block, x, args, kwargs, concat_extras(block))
        if self.depth == "deep" or index == 0:
            x = append_prompts(x, self._layer(index).to(x.dtype))
        x = original(x, **fit_extras(kwargs, self.num_prompts))
        keep = self.pool_prompts if index == self._num_blocks - 1 else self.depth == "shallow"
        return x if keep else drop_prompts(x, self.num_prompts)

    def _layer(self, index: int) -> Tensor:
        """Prompts [N_p, D] of a block, also outside `_run`, where gradient checkpointing runs it again."""
        return self.prompts[index] if self._layers is None else self._layers[index]

    def _keys_values(self, index: int, block: nn.Module, dtype: torch.dtype) -> tuple[KeysValues, ...]:
        def compute() -> tuple[KeysValues, ...]:
            return prompt_keys_values(block, self._layer(index).to(dtype))

        learning = torch.is_grad_enabled() and self.prompts.requires_grad
        if self._cache is None or learning or torch.compiler.is_compiling():
            return compute()
        return self._cache.get(index, self.prompts, dtype, compute)

    def _check_not_released(self) -> None:
        if self._snapshot is None:
            raise RuntimeError(
                "this PromptedViT has released its model; build a new one to use prompts again"
            )

    def _check_images(self, images: Tensor) -> None:
        self._check_not_released()
        check_images(images, self.model)
