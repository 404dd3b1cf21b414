"""E2VPT: deep prompts, and further keys and values behind the projections of each block's attention.

The attention of a block is softmax(scale Q [K; K_P; S]^T) [V; V_P; T], where K_P and V_P are the keys and
values that the block makes of its prompts P [N_p, D], and S and T [H, M, d] are learned as they stand: behind
projection and norm of the keys. S = T is one tensor, unless `share` is False.

Source: Han et al., "E2VPT: An Effective and Efficient Approach for Visual Prompt Tuning", ICCV 2023. Its
released code has 5 to 32 prompts, M = 5, and S = T, drawn uniformly from +-sqrt(6 / (M d)); 10 prompts are
our default. Learned numbers: L D (N_p + M), or L D (N_p + 2 M) where S and T are apart; 138,240 for ViT-B.
Its second stage, pruning, is `spt_fast/methods/e2vpt_pruning.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import get_blocks
from spt_fast.methods.prompt_variant import ComputedPrompts, PromptUse
from spt_fast.prompting.engines import KeysValues, kv_attentions, kv_blocker
from spt_fast.prompting.prompted_blocks import PromptedBlocks
from spt_fast.support.arguments import check_bool, check_int

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from spt_fast.backbones.snapshot import ModelSnapshot
    from spt_fast.prototypes.result import Prototypes


class E2VPT(ComputedPrompts):
    """`model` with deep prompts and prompts behind the projections of keys and values.

    Args:
        prompts: what the prompts [L, N_p, D] start from, as in `PromptedViT`.
        num_kv: M, how many keys and values each block gets.
        share: whether keys and values are the same numbers.
        use: options of `PromptedViT`. With the engine "concat" the prompts are tokens; S and T never are.

    Attributes:
        prompts: [L, N_p, D], with pruned pieces zero.
        kv_prompts: Parameter [L, 1 or 2, H, M, d]: S, and T where it is apart.
        source: has the Parameter `prompts` [L, N_p, D] and the buffer `mask` [N_p, D], 0 in pruned pieces.

    Raises:
        TypeError: as `PromptedViT`; a block is none whose attention the engine "kv" knows, or has several.
        ValueError: as `PromptedViT`; an option is out of range.
    """

    method = "e2vpt"
    kv_prompts: nn.Parameter

    def __init__(
        self,
        model: nn.Module,
        prompts: Prototypes | Tensor | int,
        *,
        num_kv: int = 5,
        share: bool = True,
        **use: Unpack[PromptUse],
    ) -> None:
        self._own_options = {"num_kv": check_int("num_kv", num_kv, 1), "share": check_bool("share", share)}
        super().__init__(model, prompts, depth="deep", **use)

    @staticmethod
    def _blocker(block: nn.Module) -> str | None:
        reason = kv_blocker(block)
        if reason is None and len(kv_attentions(block)) > 1:
            reason = f"{type(block).__name__} has several attentions"
        return reason

    def _learn(self, values: Tensor) -> None:
        super()._learn(values)
        attentions: list[Any] = [kv_attentions(block)[0][1] for block in get_blocks(self.model)]
        sizes = {(each.num_heads, each.proj.in_features // each.num_heads) for each in attentions}
        if len(sizes) > 1:
            raise TypeError(f"model cannot be tuned by 'e2vpt': its blocks differ in (heads, width): {sizes}")
        ((heads, width),), num_kv = sizes, self.options["num_kv"]
        bound = math.sqrt(6 / (num_kv * width))
        shape = (len(values), 1 if self.options["share"] else 2, heads, num_kv, width)
        drawn = torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound)
        self.kv_prompts = nn.Parameter(drawn.to(values))

    def prompt_parameters(self) -> list[nn.Parameter]:
        return [*super().prompt_parameters(), self.kv_prompts]

    def num_trainable(self, head: bool = True) -> int:
        """As of every method; of pruned prompts, what is left."""
        mask: Any = self.source.mask
        # Tensors without numbers have nothing pruned.
        pruned = 0 if mask.is_meta else int((mask == 0).sum()) * len(self.prompts)
        return super().num_trainable(head) - pruned * self.prompt_parameters()[0].requires_grad

    def _make_source(self, values: Tensor) -> nn.Module:
        return MaskedPrompts(values)

    def _make_blocks(self, **how: Any) -> PromptedBlocks:
        return _E2Blocks(self._parameters, source=self.source, **how)

    def attention_maps(self, images: Tensor, layers: Iterable[int] | None = None) -> list[Tensor]:
        """As of `PromptedViT`, [B, H, N, N + N_p + M]: the keys that are no prompts come last."""
        return super().attention_maps(images, layers)

    def _more_keys(self, layer: int, of_prompts: KeysValues) -> KeysValues:
        return with_more(of_prompts, self.kv_prompts[layer])


class MaskedPrompts(nn.Module):
    """Prompts [L, N_p, D] times a mask [N_p, D] of zeros and ones."""

    mask: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.prompts = nn.Parameter(values, requires_grad=values.numel() > 0)
        self.register_buffer("mask", torch.ones_like(values[0]))

    def forward(self) -> Tensor:
        return self.prompts * self.mask


class _E2Blocks(PromptedBlocks):
    def take_over(self, blocks: Iterable[nn.Module], snapshot: ModelSnapshot) -> None:
        super().take_over(blocks := list(blocks), snapshot)
        for index, block in enumerate(blocks):
            if self._has_tokens(index, len(blocks)):
                ((_, attention),) = kv_attentions(block)
                attend = functools.partial(self._attend, index, 0, None, attention)
                snapshot.replace_forward(attention, attend)

    def _keys_values(
        self, index: int, number: int, norm: nn.Module | None, attention: nn.Module, dtype: torch.dtype
    ) -> KeysValues:
        more: Tensor = self._parameters["kv_prompts"]
        if self._has_tokens(index, len(more)):
            return KeysValues(more[index, 0].to(dtype), more[index, -1].to(dtype))
        return with_more(super()._keys_values(index, number, norm, attention, dtype), more[index])


def with_more(of_prompts: KeysValues, more: Tensor) -> KeysValues:
    """Keys and values [H, N_p, d], and behind them those of `more` [1 or 2, H, M, d], in their dtype."""
    return KeysValues(
        torch.cat((of_prompts.keys, more[0].to(of_prompts.keys.dtype)), dim=-2),
        torch.cat((of_prompts.values, more[-1].to(of_prompts.values.dtype)), dim=-2),
    )
