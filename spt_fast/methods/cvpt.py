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
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

from timm.models.vision_transformer import Attention, Block  # type: ignore[attr-defined]
from torch import Tensor, nn

from spt_fast.backbones.anatomy import block_input_hooks
from spt_fast.methods.base import Blocks
from spt_fast.methods.prompt_variant import PromptUse, PromptVariant
from spt_fast.methods.prompted_vit import EngineWishes
from spt_fast.prompting.checks import check_block_call
from spt_fast.prompting.engines import cross_attend, cross_weights, kv_blocker, prompt_keys_values
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
            for a batch. Of a model opened to average prompts too, the patches are averaged.

    Raises:
        TypeError: as `PromptedViT`; a block is no plain one of timm's ViT.
        ValueError: as `PromptedViT`; no prompts, or an option for prompts that are tokens: `pool_prompts`,
            `prompt_dropout`, engine "concat".
    """

    method = "cvpt"

    def __init__(
        self, model: nn.Module, prompts: Prototypes | Tensor | int, **use: Unpack[PromptUse]
    ) -> None:
        # A model that was opened to average prompts too averages what there is.
        use["pool_prompts"] = use.get("pool_prompts") or False
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

    def _method_facts(self) -> dict[str, str]:
        return {"method": self.method}

    def _learn(self, values: Tensor) -> None:
        if values.shape[1] == 0:
            raise ValueError(
                "prompts must be at least one for 'cvpt', whose tokens look at nothing else, got 0"
            )
        super()._learn(values)

    def _make_blocks(self, **how: Any) -> PromptedBlocks:
        return _CrossedBlocks(self._parameters, **how)

    def attention_maps(self, images: Tensor, layers: Iterable[int] | None = None) -> list[Tensor]:
        """How much each token attends to each prompt in the cross-attention of a block, [B, H, N, N_p].

        Tokens have a softmax of their own, that of the model, and so no columns here. Otherwise as of
        `PromptedViT`.
        """
        return super().attention_maps(images, layers)

    def _maps_of(self, wanted: list[int], run: Callable[[], object]) -> list[Tensor]:
        found: dict[int, Tensor] = {}

        def measure(index: int, x: Tensor) -> None:
            if index in wanted:
                found[index] = _cross_weights(self.prompted_blocks[index], x, self.prompts[index])

        with block_input_hooks(self.prompted_blocks, measure):
            run()
        return [found[index] for index in wanted]


class _CrossedBlocks(PromptedBlocks):
    def take_over(self, blocks: Iterable[nn.Module], snapshot: ModelSnapshot) -> None:
        for index, block in enumerate(blocks):
            snapshot.replace_forward(block, functools.partial(self._run_crossed, index, block))

    def _run_crossed(self, index: int, block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_block_call(block, x, args, kwargs, ())
        prompts = self._keys_values(index, 0, block.norm1, block.attn, x.dtype)
        x = _behind_attention(block, x)
        x = x + block.drop_path1(block.ls1(cross_attend(block.attn, block.norm1(x), prompts)))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))  # type: ignore[no-any-return]


def _behind_attention(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x))))  # type: ignore[no-any-return]


def _cross_weights(block: Any, x: Tensor, prompts: Tensor) -> Tensor:
    """The softmax weights [B, H, N, N_p] of the cross-attention, of what enters the block."""
    prompts = prompts.to(x.dtype)
    keys_values = prompt_keys_values(block.norm1, block.attn, prompts)
    return cross_weights(block.attn, block.norm1(_behind_attention(block, x)), keys_values)
