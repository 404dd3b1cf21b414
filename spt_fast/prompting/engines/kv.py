"""Prompts as extra keys and values of a block, exact where the block's outputs at prompts are discarded.

It runs the blocks of timm in `_RULES`, but no subclass of them; `kv_blocker` says why a block cannot run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from timm.models import beit, eva
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

from spt_fast.prompting.engines.attention import (
    KNOWN_ATTENTIONS,
    KeysValues,
    attend,
    attention_keys_values,
    has_hooks,
)


def known_blocks() -> list[str]:
    """The classes of blocks that this engine can run."""
    return [_name(cls) for cls in _RULES]


def kv_blocker(block: nn.Module) -> str | None:
    """Why prompts as keys and values would not be exact in `block`, or None where they are.

    Classes are compared exactly: a subclass may compute something else.
    """
    if type(block) not in _RULES:
        return f"{_name(type(block))} is none of the blocks it knows ({', '.join(known_blocks())})"
    if "forward" in vars(block):
        return f"the forward of this {type(block).__name__} has been replaced"
    for _, attention in _RULES[type(block)].attentions(block):
        if type(attention) not in KNOWN_ATTENTIONS:
            return f"its attention is {type(attention).__name__}, not timm's Attention"
        if "forward" in vars(attention):
            return "the forward of its attention has been replaced"
        if has_hooks(attention):
            return "its attention has hooks, which would not be called"
    return None


def kv_extras(block: nn.Module) -> tuple[str, ...]:
    """Names of the arguments beside tokens that `kv_forward` honours for `block`."""
    position = _rule_of(block).position
    return () if position is None else (position,)


def prompt_keys_values(block: nn.Module, prompts: Tensor) -> tuple[KeysValues, ...]:
    """Keys and values of prompts [N_p, D] in each attention of `block`; the same for every image (eq. 6)."""
    return tuple(
        attention_keys_values(attention, prompts if norm is None else norm(prompts[None]).squeeze(0))
        for norm, attention in _rule_of(block).attentions(block)
    )


def kv_forward(block: nn.Module, x: Tensor, prompts: Sequence[KeysValues], **extras: Any) -> Tensor:
    """`block` over tokens x [B, N, D] that also attend to prompts; [B, N, D] (eq. 6, 13).

    Outputs at the prompts, which eq. 6 and 13 discard, are not computed: prompts are no queries and pass
    through no MLP.

    Args:
        block: one for which `kv_blocker` returns None.
        prompts: from `prompt_keys_values`.
        extras: arguments named in `kv_extras(block)`.
    """
    rule = _rule_of(block)
    position = None if rule.position is None else extras.get(rule.position)
    return rule.forward(block, x, prompts, position)


class _Rule(NamedTuple):
    """How one class of blocks runs."""

    forward: Callable[[Any, Tensor, Sequence[KeysValues], Tensor | None], Tensor]
    # Each attention of a block, with the norm that its input and the prompts go through before it.
    attentions: Callable[[Any], list[tuple[nn.Module | None, nn.Module]]]
    # The argument by which the block hands positions to its attention.
    position: str | None = None


def _rule_of(block: nn.Module) -> _Rule:
    # FSDP2 makes a subclass of each module that it shards.
    return next(rule for cls, rule in _RULES.items() if isinstance(block, cls))


def _name(cls: type[nn.Module]) -> str:
    """Class name with its file's: timm has several classes named Block."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def _pre_norm(b: Any) -> list[tuple[nn.Module | None, nn.Module]]:
    return [(b.norm1, b.attn)]


def _post_norm(b: Any) -> list[tuple[nn.Module | None, nn.Module]]:
    return [(None, b.attn)]


def _parallel(b: Any) -> list[tuple[nn.Module | None, nn.Module]]:
    return [(path.norm, path.attn) for path in b.attns]


def _block(b: Any, x: Tensor, prompts: Sequence[KeysValues], _: Tensor | None) -> Tensor:
    x = x + b.drop_path1(b.ls1(attend(b.attn, b.norm1(x), prompts[0])))
    return x + b.drop_path2(b.ls2(b.mlp(b.norm2(x))))  # type: ignore[no-any-return]


def _post_norm_block(b: Any, x: Tensor, prompts: Sequence[KeysValues], position: Tensor | None) -> Tensor:
    x = x + b.drop_path1(b.norm1(attend(b.attn, x, prompts[0], position)))
    return x + b.drop_path2(b.norm2(b.mlp(x)))  # type: ignore[no-any-return]


def _gamma_block(b: Any, x: Tensor, prompts: Sequence[KeysValues], position: Tensor | None) -> Tensor:
    out = attend(b.attn, b.norm1(x), prompts[0], position)
    x = x + b.drop_path1(out if b.gamma_1 is None else b.gamma_1 * out)
    out = b.mlp(b.norm2(x))
    return x + b.drop_path2(out if b.gamma_2 is None else b.gamma_2 * out)  # type: ignore[no-any-return]


def _parallel_things_block(b: Any, x: Tensor, prompts: Sequence[KeysValues], _: Tensor | None) -> Tensor:
    branches = [
        path.drop_path(path.ls(attend(path.attn, path.norm(x), keys_values)))
        for path, keys_values in zip(b.attns, prompts, strict=True)
    ]
    x = x + torch.stack(branches).sum(dim=0)
    return x + torch.stack([ffn(x) for ffn in b.ffns]).sum(dim=0)


_RULES: dict[type[nn.Module], _Rule] = {
    Block: _Rule(_block, _pre_norm),
    ResPostBlock: _Rule(_post_norm_block, _post_norm),
    ParallelThingsBlock: _Rule(_parallel_things_block, _parallel),
    eva.EvaBlock: _Rule(_gamma_block, _pre_norm, position="rope"),
    eva.EvaBlockPostNorm: _Rule(_post_norm_block, _post_norm, position="rope"),
    beit.Block: _Rule(_gamma_block, _pre_norm, position="shared_rel_pos_bias"),
}
