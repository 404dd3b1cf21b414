"""Prompts as extra keys and values of a block, exact where the block's outputs at prompts are discarded.

It serves the blocks of timm in `_RULES`, but no subclass of them; `kv_blocker` says why it cannot serve one.
A block keeps its own forward: prompts enter in its attention, whose forward becomes `attend`. So they are no
queries and pass through no MLP, and their outputs, which eq. 6 and 13 discard, are not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from timm.models import beit, eva
from timm.models.vision_transformer import Block, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

from spt_fast.prompting.engines.attention import (
    KNOWN_ATTENTIONS,
    KeysValues,
    attention_keys_values,
    has_hooks,
)

# An attention of a block, and the norm that its input and the prompts go through before it.
NormAndAttention = tuple[nn.Module | None, nn.Module]
# Parts that prompts pass through as well as tokens.
_PROJECTIONS = ("qkv", "k_proj", "v_proj", "k_norm")


def known_blocks() -> list[str]:
    """The classes of blocks that this engine can run."""
    return [_name(cls) for cls in _RULES]


def kv_blocker(block: nn.Module) -> str | None:
    """Why prompts as keys and values would not be exact in `block`, or None where they are.

    Classes are compared exactly: a subclass may compute something else.
    """
    reason = unknown_attention(block)
    if reason is not None:
        return reason
    if "forward" in vars(block):
        return f"the forward of this {type(block).__name__} has been replaced"
    for norm, attention in kv_attentions(block):
        if "forward" in vars(attention):
            return "the forward of its attention has been replaced"
        passed = [getattr(attention, name, None) for name in _PROJECTIONS]
        for part in (norm, *passed):
            if part is not None and has_hooks(part):
                return f"its {type(part).__name__} before the keys has hooks, which prompts would not call"
    return None


def unknown_attention(block: nn.Module) -> str | None:
    """Which part of `block` is of a class that this engine does not know, or None."""
    if type(block) not in _RULES:
        return f"{_name(type(block))} is none of the blocks it knows ({', '.join(known_blocks())})"
    for _, attention in kv_attentions(block):
        if type(attention) not in KNOWN_ATTENTIONS:
            return f"its attention is {type(attention).__name__}, not timm's Attention"
    return None


def kv_attentions(block: nn.Module) -> list[NormAndAttention]:
    """The attentions of a block for which `unknown_attention` is None."""
    return _rule_of(block).attentions(block)


def kv_extras(block: nn.Module) -> tuple[str, ...]:
    """Names of the arguments beside tokens that such a block may be given."""
    position = _rule_of(block).position
    return () if position is None else (position,)


def prompt_keys_values(norm: nn.Module | None, attention: nn.Module, prompts: Tensor) -> KeysValues:
    """Of prompts [N_p, D], or [B, N_p, D] of B images, in one attention of a block (eq. 6)."""
    # `forward`, because hooks are for the tokens of the image.
    return attention_keys_values(attention, prompts if norm is None else norm.forward(prompts))


class _Rule(NamedTuple):
    """What is known of one class of blocks."""

    attentions: Callable[[Any], list[NormAndAttention]]
    # The argument by which the block hands positions to its attention.
    position: str | None = None


def _rule_of(block: nn.Module) -> _Rule:
    # FSDP2 makes a subclass of each module that it shards.
    return next(rule for cls, rule in _RULES.items() if isinstance(block, cls))


def _name(cls: type[nn.Module]) -> str:
    """Class name with its file's: timm has several classes named Block."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def _pre_norm(b: Any) -> list[NormAndAttention]:
    return [(b.norm1, b.attn)]


def _post_norm(b: Any) -> list[NormAndAttention]:
    return [(None, b.attn)]


def _parallel(b: Any) -> list[NormAndAttention]:
    return [(path.norm, path.attn) for path in b.attns]


_RULES: dict[type[nn.Module], _Rule] = {
    Block: _Rule(_pre_norm),
    ResPostBlock: _Rule(_post_norm),
    ParallelThingsBlock: _Rule(_parallel),
    eva.EvaBlock: _Rule(_pre_norm, position="rope"),
    eva.EvaBlockPostNorm: _Rule(_post_norm, position="rope"),
    beit.Block: _Rule(_pre_norm, position="shared_rel_pos_bias"),
}
