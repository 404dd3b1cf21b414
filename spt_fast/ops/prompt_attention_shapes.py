"""Shapes of what `prompt_attention` and its gradient return, for the compiler and for who fills them."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_output(q: Tensor) -> tuple[Tensor, Tensor]:
    """The output [B, N, H, d] and the logarithm of each softmax sum [B, H, N], for q [B, H, N, d]."""
    batch, heads, tokens, width = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(batch, tokens, heads, width), q.new_empty(batch, heads, tokens, dtype=lse_dtype)


def empty_gradients(
    q: Tensor, prompt_k: Tensor, images: bool, prompts: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v [B, N, 3, H, d], of `prompt_k` and of `prompt_v` [H, N_p, d].

    Those that are not asked for, by `images` or by `prompts`, are [0].
    """
    batch, heads, tokens, width = q.shape
    packed = q.new_empty((batch, tokens, 3, heads, width) if images else (0,))
    shared = tuple(prompt_k.shape) if prompts else (0,)
    return packed, prompt_k.new_empty(shared), prompt_k.new_empty(shared)
