"""CVPT: prompts stay out of self-attention; the tokens look at them in a cross-attention of their own.

In each block, between self-attention and MLP,

    x = x + ls1(attn(norm1(x)))
    x = x + ls1(cross(norm1(x), norm1(P)))
    x = x + ls2(mlp(norm2(x))),

where `cross` is the attention of the block itself, with its frozen weights: queries are the tokens x, keys
and values the prompts P [N_p, D], which all images share.

Source: Huang et al., "CVPT: Cross Visual Prompt Tuning", ICCV 2025. That the cross-attention shares the
weights of the self-attention, and stands behind it, is the paper's. That its inputs go through norm1, and its
output through the layer scale, is our reading: the model is not among the released code that we could read.
20 prompts are our default. Learned numbers: N_p D L; 184,320 for ViT-B with 20.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from timm.models.vision_transformer import Attention, Block  # type: ignore[attr-defined]
from torch import Tensor, nn

from spt_fast.methods.base import Blocks
from spt_fast.methods.prompt_variant import PromptUse, PromptVariant
from spt_fast.methods.prompted_vit import EngineWishes
from spt_fast.prompting.checks import check_block_call
from spt_fast.prompting.engines import cross_attend, kv_blocker
from spt_fast.prompting.prompted_blocks import PromptedBlocks

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from spt_fast.backbones.snapshot import ModelSnapshot
    from spt_fast.prototypes.result import Prototypes


class CVPT(PromptVariant):
    """`model`, in blocks of timm's plain ViT, with a cross-attention to prompts in each.

    Args:
        prompts: what the prompts [L, N_p, D] start from, as in `PromptedViT`; at least one in a block.
        use: options of `PromptedViT`. The engine is "kv": keys and values of the prompts are computed once
            for a batch.

    Raises:
        TypeError: as `PromptedViT`; a block is no plain one of timm's ViT.
        ValueError: as `PromptedViT`; no prompts, or an option for prompts that are tokens: `pool_prompts`,
            `prompt_dropout`, engine "concat".
    """

    method = "cvpt"

    def __init__(
        self, model: nn.Module, prompts: Prototypes | Tensor | int, **use: Unpack[PromptUse]
    ) -> None:
        super().__init__(model, prompts, depth="deep", **use)

    @staticmethod
    def _blocker(block: nn.Module) -> str | None:
        plain = type(block) is Block and type(block.attn) is Attention
        return kv_blocker(block) if plain else f"{type(block).__name__} is no plain block of timm's ViT"

    @classmethod
    def _choose_engine(
        cls, model: nn.Module, blocks: Blocks, wanted: EngineWishes
    ) -> tuple[Literal["kv", "concat"], str]:
        cls._check_blocks(blocks)
        for name, given, needed in (
            ("engine", wanted.engine if wanted.engine == "concat" else None, "'auto' or 'kv'"),
            ("prompt_dropout", wanted.prompt_dropout or None, "0"),
            ("pool_prompts", wanted.pool_prompts or None, "False"),
        ):
            if given is not None:
                raise ValueError(
                    f"{name} must be {needed} for 'cvpt', whose prompts are no tokens, got {given!r}"
                )
        return "kv", "prompts are keys and values of a cross-attention, and nothing else"

    def _learn(self, values: Tensor, *, frozen: bool) -> None:
        if values.shape[1] == 0:
            raise ValueError(
                "prompts must be at least one for 'cvpt', whose tokens look at nothing else, got 0"
            )
        super()._learn(values, frozen=frozen)

    def _make_blocks(self, **how: Any) -> PromptedBlocks:
        return _CrossedBlocks(self._parameters, **how)

    def attention_maps(self, images: Tensor, layers: Iterable[int] | None = None) -> list[Tensor]:
        """Not for this method: its tokens and prompts share no softmax."""
        raise TypeError("attention_maps needs prompts in self-attention, which 'cvpt' does not have")


class _CrossedBlocks(PromptedBlocks):
    def take_over(self, blocks: Iterable[nn.Module], snapshot: ModelSnapshot) -> None:
        for index, block in enumerate(blocks):
            snapshot.replace_forward(block, functools.partial(self._run_crossed, index, block))

    def _run_crossed(self, index: int, block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_block_call(block, x, args, kwargs, ())
        prompts = self._keys_values(index, 0, block.norm1, block.attn, x.dtype)
        x = x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))
        x = x + block.drop_path1(block.ls1(cross_attend(block.attn, block.norm1(x), prompts)))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]
