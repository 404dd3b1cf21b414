"""The engine that runs a model's blocks with prompts, and the reason why it is that one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from spt_fast.prompting.engines.concat import concat_blocker
from spt_fast.prompting.engines.kv import kv_blocker


def choose_engine(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    depth: str,
    wanted: Literal["auto", "kv", "concat"],
    prompt_dropout: float = 0.0,
) -> tuple[Literal["kv", "concat"], str]:
    """The engine for `blocks` of `model`, and in one sentence why.

    Raises:
        ValueError: "kv" is wanted, but not exact for this depth, with dropout or in one of the blocks.
        TypeError: "concat" is wanted or all that is left, but the blocks cannot take prompts as tokens.
    """
    blocks = list(blocks)
    blocker = _why_not_kv(blocks, depth, prompt_dropout)
    if wanted == "kv" and blocker is not None:
        raise ValueError(f"engine='kv' is not exact here: {blocker}; use 'auto' or 'concat'")
    if wanted != "concat" and blocker is None:
        return "kv", "outputs at the prompts are discarded, so keys and values are all that prompts need"
    reason = concat_blocker(blocks, model)
    if reason is not None:
        raise TypeError(f"model cannot take prompts: {reason}")
    return "concat", "asked for" if wanted == "concat" else f"'kv' is not exact here: {blocker}"


def _why_not_kv(blocks: Iterable[nn.Module], depth: str, prompt_dropout: float) -> str | None:
    if prompt_dropout > 0:
        return "prompt_dropout gives each image prompts of its own"
    if depth == "shallow":
        return "in depth='shallow' each block needs what the one before made of the prompts"
    for number, block in enumerate(blocks, start=1):
        reason = kv_blocker(block)
        if reason is not None:
            return f"block {number}: {reason}"
    return None
