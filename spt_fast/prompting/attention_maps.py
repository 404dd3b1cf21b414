"""Where the tokens of an image look: softmax weights of prompted blocks over tokens and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spt_fast.prompting.engines import (
    KeysValues,
    attention_weights,
    kv_attentions,
    kv_extras,
    prompt_keys_values,
    unknown_attention,
)

# Called with a layer, from 0, and the input x of its block; returns the prompts that it attends to,
# [N_p, D] or [B, N_p, D], and the tokens of the image, [B, N, D].
Split = Callable[[int, Tensor], tuple[Tensor, Tensor]]
# Called with a layer and the keys and values of its prompts; returns them with what a method adds.
Extend = Callable[[int, KeysValues], KeysValues]


def check_attention(blocks: Iterable[nn.Module]) -> None:
    """TypeError where the attention of a block is of a class whose weights are not known."""
    for block in blocks:
        reason = unknown_attention(block)
        if reason is not None:
            raise TypeError(f"attention_maps needs blocks that the engine 'kv' knows, but {reason}")


def attention_maps_of(
    blocks: nn.ModuleList | nn.Sequential,
    wanted: list[int],
    split: Split,
    run: Callable[[], object],
    extend: Extend,
) -> list[Tensor]:
    """The weights [B, H, N, N + M] of each of the `wanted` blocks in a forward pass that `run` makes.

    M are the prompts that `split` gives, and what `extend` adds.
    """
    found: dict[int, Tensor] = {}

    def measure(index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        prompts, tokens = split(index, args[0])
        position = next((kwargs[name] for name in kv_extras(block) if name in kwargs), None)
        found[index] = _weights(block, tokens, prompts.to(tokens.dtype), position, partial(extend, index))

    with ExitStack() as stack:
        for index in set(wanted):
            hook = partial(measure, index)
            stack.callback(blocks[index].register_forward_pre_hook(hook, with_kwargs=True).remove)
        run()
    return [found[index] for index in wanted]


def _weights(
    block: nn.Module,
    tokens: Tensor,
    prompts: Tensor,
    position: Tensor | None,
    extend: Callable[[KeysValues], KeysValues],
) -> Tensor:
    """Of all attentions in a block, as further heads."""
    weights = []
    for norm, attention in kv_attentions(block):
        normed = tokens if norm is None else norm.forward(tokens)
        keys_values = extend(prompt_keys_values(norm, attention, prompts))
        weights.append(attention_weights(attention, normed, keys_values, position))
    return torch.cat(weights, dim=1)
