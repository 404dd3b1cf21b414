"""How the blocks of a model run while prompts belong to it: each block's forward, with its prompts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spt_fast.backbones.snapshot import ModelSnapshot
from spt_fast.prompting.checks import check_block_call
from spt_fast.prompting.engines import (
    KeysValues,
    KeysValuesCache,
    append_prompts,
    attend,
    concat_extras,
    drop_prompts,
    fit_extras,
    kv_attentions,
    kv_extras,
    prompt_keys_values,
)


class PromptedBlocks:
    """Runs the blocks of one model with the prompts of one `PromptedViT`, to which it holds no reference.

    Args:
        parameters: the dict in which the `PromptedViT` keeps its parameters, among them "prompts"
            [L or 1, N_p, D]. What replaces a parameter, such as FSDP2, writes to this dict.
        engine, depth, pool_prompts: as in `PromptedViT`.
        drop: the dropout of the prompts of each image [B, N_p, D].
        source: a module that computes the prompts from parameters of its own; None where they are one.

    Attributes:
        layers: views of the prompts, layer by layer, while a forward pass runs; else None.
        cache: keys and values that are kept, or None.
    """

    def __init__(
        self,
        parameters: dict[str, Any],
        *,
        engine: Literal["kv", "concat"],
        depth: Literal["deep", "shallow"],
        pool_prompts: bool,
        drop: nn.Module,
        source: nn.Module | None = None,
    ) -> None:
        self._parameters = parameters
        self._source = source
        self._engine = engine
        self._depth = depth
        self._pool_prompts = pool_prompts
        self._drop = drop
        self.layers: tuple[Tensor, ...] | None = None
        self.cache: KeysValuesCache | None = None

    def take_over(self, blocks: Iterable[nn.Module], snapshot: ModelSnapshot) -> None:
        """Let each block run with prompts until the snapshot is restored.

        Shadowing `forward` on the instances leaves the module tree, its names and its hooks alone.
        """
        last = len(blocks := list(blocks)) - 1
        for index, block in enumerate(blocks):
            original = block.forward
            if self._has_tokens(index, last + 1):
                run = functools.partial(self._run_with_tokens, index, index == last, block, original)
                snapshot.replace_forward(block, run)
                continue
            snapshot.replace_forward(block, functools.partial(self._run_with_kv, block, original))
            for number, (norm, attention) in enumerate(kv_attentions(block)):
                attend_here = functools.partial(self._attend, index, number, norm, attention)
                snapshot.replace_forward(attention, attend_here)

    def _has_tokens(self, index: int, depth: int) -> bool:
        """Whether a block, of `depth`, takes prompts as tokens."""
        # Pooling needs outputs at the positions of prompts, so the last block then takes them as tokens.
        return self._engine == "concat" or (self._pool_prompts and index == depth - 1)

    def _run_with_kv(
        self, block: nn.Module, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        check_block_call(block, x, args, kwargs, kv_extras(block))
        return original(x, **kwargs)

    def _attend(
        self,
        index: int,
        number: int,
        norm: nn.Module | None,
        attention: nn.Module,
        x: Tensor,
        rope: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """The forward of the attention `number` of a block; other arguments are None or False."""
        prompts = self._keys_values(index, number, norm, attention, x.dtype)
        return attend(attention, x, prompts, shared_rel_pos_bias if rope is None else rope)

    def _run_with_tokens(
        self,
        index: int,
        is_last: bool,
        block: nn.Module,
        original: Callable[..., Tensor],
        x: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        check_block_call(block, x, args, kwargs, concat_extras(block))
        num_prompts = len(self._layer(0))
        if self._depth == "deep" or index == 0:
            prompts = self._layer(index).to(x.dtype).expand(len(x), -1, -1)
            x = append_prompts(x, self._drop(prompts))
        x = self._leave(index, is_last, x, original(x, **fit_extras(kwargs, num_prompts)))
        keep = self._pool_prompts if is_last else self._depth == "shallow"
        return x if keep else drop_prompts(x, num_prompts)

    def _leave(self, index: int, is_last: bool, entered: Tensor, left: Tensor) -> Tensor:
        """What a block hands on of what `entered` and `left` it, tokens and prompts [B, N + N_p, D]."""
        return left

    def _layer(self, index: int) -> Tensor:
        """Prompts [N_p, D] of a block, also after the forward pass, when checkpointing runs it again."""
        layers = self.layers
        if layers is not None:
            return layers[index]
        if self._source is None:
            prompts: Tensor = self._parameters["prompts"]
            return prompts[index]
        # Checkpointing counts what is saved in a block, where the first pass has saved nothing for this.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            prompts = self._source()
        return prompts[index]

    def _learned(self) -> list[Tensor]:
        """All tensors that keys and values of prompts depend on, beside the frozen model."""
        source = self._source
        return [
            *self._parameters.values(),
            *(() if source is None else (*source.parameters(), *source.buffers())),
        ]

    def _keys_values(
        self, index: int, number: int, norm: nn.Module | None, attention: nn.Module, dtype: torch.dtype
    ) -> KeysValues:
        def compute() -> KeysValues:
            return prompt_keys_values(norm, attention, self._layer(index).to(dtype))

        if self.cache is None or torch.compiler.is_compiling():
            return compute()
        learned = self._learned()
        if torch.is_grad_enabled() and any(each.requires_grad for each in learned):
            return compute()
        return self.cache.get((index, number), learned, dtype, compute)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
