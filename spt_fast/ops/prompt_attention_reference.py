"""`prompt_attention` written out in plain PyTorch, in the precision of its inputs; never optimised."""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_attention_reference(
    q: Tensor,  # [B, H, N, d]
    k: Tensor,  # [B, H, N, d]
    v: Tensor,  # [B, H, N, d]
    prompt_k: Tensor,  # [H, N_p, d]; [T, H, N_p, d] with a task
    prompt_v: Tensor,  # as prompt_k
    *,
    scale: float | None = None,
    task: Tensor | None = None,  # [B] int64, each from 0 to T - 1
) -> Tensor:
    """Concatenate the prompts to every image's keys and values, then attend (eq. 6, 13); [B, H, N, d]."""
    batch, _, _, width = q.shape
    if task is None:
        prompt_k, prompt_v = torch.stack([prompt_k] * batch), torch.stack([prompt_v] * batch)
    else:
        prompt_k, prompt_v = prompt_k[task], prompt_v[task]
    keys = torch.cat([k, prompt_k], dim=2)
    values = torch.cat([v, prompt_v], dim=2)
    scores = q @ keys.transpose(-2, -1) * (width**-0.5 if scale is None else scale)
    return torch.softmax(scores, dim=-1) @ values
