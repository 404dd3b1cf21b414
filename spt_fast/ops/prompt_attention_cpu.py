"""`prompt_attention` on the CPU: PyTorch's flash kernel over one joined copy of keys and values.

Limits: tensors whose last dimension is contiguous; the caller has checked everything else.
"""

from __future__ import annotations

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, N, H, d], contiguous, and the logarithm of each softmax sum [B, H, N]."""
    if task is not None:
        prompt_k, prompt_v = prompt_k[task], prompt_v[task]
    out, lse = _forward(q, _join(prompt_k, k), _join(prompt_v, v), scale=scale)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, out: Tensor,
    lse: Tensor, scale: float, images: bool, prompts: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients [B, N, 3, H, d] of q, k and v in one buffer, and the sums over images of the prompts'."""
    nothing = grad.new_empty(0)
    if images:
        packed, *shared = _all_gradients(grad, q, k, v, prompt_k, prompt_v, out, lse, scale)
        if not prompts:
            shared = [nothing, nothing.clone()]
        return packed, shared[0], shared[1]
    return nothing, *_prompt_gradients(grad, q, prompt_k, prompt_v, out, lse, scale)


def _all_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, out: Tensor,
    lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    count = prompt_k.shape[1]
    keys, values = _join(prompt_k, k), _join(prompt_v, v)
    dq, dk, dv = _backward(
        grad.transpose(1, 2), q, keys, values, out.transpose(1, 2), lse, 0.0, False, scale=scale
    )
    packed = torch.stack([part.transpose(1, 2) for part in (dq, dk[:, :, count:], dv[:, :, count:])], dim=2)
    return packed, _sum_images(dk[:, :, :count]), _sum_images(dv[:, :, :count])


def _prompt_gradients(
    grad: Tensor, q: Tensor, prompt_k: Tensor, prompt_v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The prompts' gradients alone.

    Given the sums of the whole softmax, the weights of the prompts need no other key. All queries of the
    batch are then one long sequence over the same few keys, and nothing is copied.
    """
    if prompt_k.shape[1] == 0:
        return torch.zeros_like(prompt_k), torch.zeros_like(prompt_v)
    queries = (_one_image(part) for part in (grad, q.transpose(1, 2), out))
    grad, q, out = (part.transpose(1, 2) for part in queries)
    sums = lse.transpose(0, 1).flatten(1)[None]
    _, dk, dv = _backward(grad, q, prompt_k[None], prompt_v[None], out, sums, 0.0, False, scale=scale)
    return dk[0].contiguous(), dv[0].contiguous()


def _join(prompts: Tensor, images: Tensor) -> Tensor:
    """Prompts [H, N_p, d] or [B, H, N_p, d] in front of every image's rows [B, H, N, d]."""
    batch, heads, tokens, width = images.shape
    count = prompts.shape[-2]
    if count == 0:
        return images
    joined = images.new_empty(batch, heads, count + tokens, width)
    joined[:, :, :count] = prompts
    joined[:, :, count:] = images
    return joined


def _one_image(tensor: Tensor) -> Tensor:
    """[B, N, H, d] to [1, B * N, H, d]."""
    return tensor.flatten(0, 1)[None]


def _sum_images(tensor: Tensor) -> Tensor:
    """Sums over the batch, in float32 at least."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.sum(0, dtype=wide).to(tensor.dtype)
