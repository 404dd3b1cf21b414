"""`prompt_attention` written out in plain PyTorch, in the precision of its inputs; never optimised."""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_attention_reference(
    q: Tensor,  # [B, H, N, d]
    k: Tensor,  # [B, H, N, d]
    v: Tensor,  # [B, H, N, d]
    prompt_k: Tensor,  # [H, N_p, d]
    prompt_v: Tensor,  # [H, N_p, d]
    *,
    scale: float | None = None,
) -> Tensor:
    """Concatenate the prompts to every image's keys and values, then attend (eq. 6, 13); [B, H, N, d]."""
    batch, _, _, width = q.shape
    keys = torch.cat([k, torch.stack([prompt_k] * batch)], dim=2)
    values = torch.cat([v, torch.stack([prompt_v] * batch)], dim=2)
    scores = q @ keys.transpose(-2, -1) * (width**-0.5 if scale is None else scale)
    return torch.softmax(scores, dim=-1) @ values
