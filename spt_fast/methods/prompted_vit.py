"""A frozen Vision Transformer with learnable prompts in its blocks and a new head (Sec. 3.1, 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import get_blocks
from spt_fast.methods.base import Blocks, TunedViT, check_takeable
from spt_fast.methods.file_format import TunedState
from spt_fast.prompting.checks import check_pool_prompts, check_prompt_dropout
from spt_fast.prompting.engines import KeysValuesCache, choose_engine
from spt_fast.prompting.initial_prompts import initial_prompts
from spt_fast.prompting.measures import Measures
from spt_fast.prompting.prompted_blocks import PromptedBlocks
from spt_fast.support.arguments import check_bool, check_choice

if TYPE_CHECKING:
    import os

    from typing_extensions import Self

    from spt_fast.prototypes.result import Prototypes


class EngineWishes(NamedTuple):
    """What an engine is chosen for: arguments of `PromptedViT`."""

    depth: str
    engine: Literal["auto", "kv", "concat"]
    prompt_dropout: float
    pool_prompts: bool


class PromptedViT(Measures, TunedViT):
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
        freeze_prompts: train the head only (Table 4a), and nothing else that a method of prompts adds.
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
    # Of a method that is a subclass, set before the constructor of this class.
    _own_options: Mapping[str, Any] = {}

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
        check_choice("depth", depth, ("deep", "shallow"))
        check_choice("engine", engine, ("auto", "kv", "concat"))
        check_bool("freeze_prompts", freeze_prompts)
        check_takeable(model)
        blocks = get_blocks(model)
        pool_prompts = check_pool_prompts(model, blocks, pool_prompts)
        dropout = check_prompt_dropout(prompt_dropout)
        wanted = EngineWishes(depth, engine, dropout, pool_prompts)
        engine, reason = self._choose_engine(model, blocks, wanted)
        super().__init__(
            model,
            self._own_options,
            num_classes=num_classes,
            head_norm=head_norm,
            weight_dtype=weight_dtype,
        )
        values = initial_prompts(model, prompts, depth, allow_other_backbone=allow_other_backbone)
        self.method = getattr(type(self), "method", None) or _method_of(prompts, depth)
        self.depth, self.pool_prompts = depth, pool_prompts
        self.engine, self.engine_reason = engine, reason
        self.prompt_dropout = nn.Dropout(dropout)
        self._learn(values)
        if freeze_prompts:
            self._freeze_own()
        self._blocks = self._make_blocks(
            engine=self.engine,
            depth=depth,
            pool_prompts=self.pool_prompts,
            drop=self.prompt_dropout,
        )
        self._take_over()

    @classmethod
    def _choose_engine(
        cls, model: nn.Module, blocks: Blocks, wanted: EngineWishes
    ) -> tuple[Literal["kv", "concat"], str]:
        """The engine, and in one sentence why; errors as `choose_engine`."""
        return choose_engine(model, blocks, wanted.depth, wanted.engine, wanted.prompt_dropout)

    def _learn(self, values: Tensor) -> None:
        """Add what the method learns beside the head; its prompts start from `values` [L or 1, N_p, D]."""
        # Without prompts there is nothing to learn; DDP would wait for a gradient that never comes.
        self.prompts = nn.Parameter(values, requires_grad=values.numel() > 0)

    def _freeze_own(self) -> None:
        """Let nothing learn of what `_learn` added."""
        for name, parameter in self.named_parameters():
            if not name.startswith("model."):
                parameter.requires_grad_(False)

    def _make_blocks(self, **how: Any) -> PromptedBlocks:
        """What runs the blocks, without a reference to this object; `how` are options of `PromptedBlocks`."""
        return PromptedBlocks(self._parameters, **how)

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

    def prompt_parameters(self) -> list[nn.Parameter]:
        """What the prompts are made of, frozen or not: those that get `prompt_lr` (`parameter_groups`)."""
        return [self.prompts]

    def extra_repr(self) -> str:
        layers, num_prompts, width = self.prompts.shape
        return f"prompts=[{layers}, {num_prompts}, {width}], depth={self.depth!r}, engine={self.engine!r}"

    @classmethod
    def _opens(cls, state: TunedState) -> bool:
        return "prompt_depth" in state.facts

    @classmethod
    def _built_as(cls, state: TunedState, model: nn.Module, **common: Any) -> Self:
        tuned = cls(
            model,
            state.tensors["prompts"],
            depth=state.depth,
            pool_prompts=state.pool_prompts,
            **common,
        )
        tuned.method = state.method
        return tuned

    def _install(self, blocks: Blocks) -> None:
        self._blocks.take_over(blocks, self._snapshot)

    def _method_facts(self) -> dict[str, str]:
        facts = {"prompt_depth": self.depth, "pool_prompts": str(self.pool_prompts)}
        return {**super()._method_facts(), **facts}

    def _run(self, function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        # Unbound once, so that backward writes the gradient of all layers once, not once per layer.
        self._blocks.layers = self.prompts.unbind(0)
        try:
            return super()._run(function, inputs)
        finally:
            self._blocks.layers = None


def _method_of(prompts: object, depth: str) -> str:
    """SPT starts from given prompts, VPT draws them."""
    return f"{'vpt' if isinstance(prompts, Integral) else 'spt'}-{depth}"
