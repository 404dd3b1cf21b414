"""`prompt_attention` where no Triton kernel serves: keys and values with the prompts joined to them.

Limits: `prompt_attention_forward` and `_backward` call PyTorch's flash kernel for the CPU, and take tensors
whose last dimension is contiguous; on other devices they hold all scores in float32 at once.
`joined_prompt_attention` runs on every device and is differentiated by autograd. The caller has checked
everything else.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def join_prompts(
    images: Tensor,  # [B, H, N, d]
    prompts: Tensor,  # [H, N_p, d] or [B, H, N_p, d]
) -> Tensor:
    """Keys, or values, [B, H, N + N_p, d]: those of the images, then those of the prompts."""
    if prompts.shape[-2] == 0:
        return images
    return torch.cat((images, prompts.expand(images.shape[0], -1, -1, -1)), dim=2)


def joined_prompt_attention(
    q: Tensor,  # [B, H, N, d]
    k: Tensor,  # [B, H, N, d]
    v: Tensor,  # [B, H, N, d]
    prompt_k: Tensor,  # [H, N_p, d]; [T, H, N_p, d] with a task
    prompt_v: Tensor,  # as prompt_k
    task: Tensor | None,  # [B] int64
    scale: float,
) -> Tensor:
    """The output [B, H, N, d] by PyTorch's own attention."""
    keys, values = (_join(*pair, task) for pair in ((k, prompt_k), (v, prompt_v)))
    out = F.scaled_dot_product_attention(q, keys, values, scale=scale)
    return out if task is None else _mark_unknown(out, task, len(prompt_k))


def prompt_attention_forward(
    q: Tensor,  # [B, H, N, d]
    k: Tensor,  # [B, H, N, d]
    v: Tensor,  # [B, H, N, d]
    prompt_k: Tensor,  # [H, N_p, d]; [T, H, N_p, d] with a task
    prompt_v: Tensor,  # as prompt_k
    task: Tensor | None,  # [B] int64
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output [B, N, H, d], contiguous, and the logarithm of each softmax sum [B, H, N]."""
    attend = _flash if q.device.type == "cpu" else attend_plainly
    out, lse = attend(q, _join(k, prompt_k, task), _join(v, prompt_v, task), scale=scale)
    if task is not None:
        out = _mark_unknown(out, task, len(prompt_k))
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def prompt_attention_backward(
    grad: Tensor,  # [B, N, H, d]
    q: Tensor,  # [B, H, N, d]
    k: Tensor,  # [B, H, N, d]
    v: Tensor,  # [B, H, N, d]
    prompt_k: Tensor,  # [H, N_p, d]
    prompt_v: Tensor,  # [H, N_p, d]
    out: Tensor,  # [B, N, H, d]
    lse: Tensor,  # [B, H, N]
    scale: float,
    images: bool,
    prompts: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v [B, N, 3, H, d], of `prompt_k` and of `prompt_v`; [0] where not asked for."""
    nothing = grad.new_empty(0)
    on_cpu = q.device.type == "cpu"
    if not images and on_cpu:
        return nothing, *_prompt_gradients(grad, q, prompt_k, prompt_v, out, lse, scale)
    tokens = q.shape[2]
    differentiate = _differentiate_on_cpu if on_cpu else differentiate_plainly
    dq, dk, dv = differentiate(
        grad.transpose(1, 2), q, join_prompts(k, prompt_k), join_prompts(v, prompt_v), out.transpose(1, 2),
        lse, 0.0, False, scale=scale,
    )  # fmt: skip
    packed = nothing
    if images:
        of_images = (dq, dk[:, :, :tokens], dv[:, :, :tokens])
        packed = torch.stack([part.transpose(1, 2) for part in of_images], dim=2)
    if not prompts:
        return packed, nothing, nothing.clone()
    return packed, _sum_images(dk[:, :, tokens:]), _sum_images(dv[:, :, tokens:])


def _prompt_gradients(
    grad: Tensor, q: Tensor, prompt_k: Tensor, prompt_v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The prompts' gradients alone.

    Given the sums of the whole softmax, the weights of the prompts need no other key. All queries of the
    batch are then one long sequence over the same few keys, and nothing is copied.
    """
    if prompt_k.shape[1] == 0:
        return prompt_k.new_zeros(prompt_k.shape), prompt_v.new_zeros(prompt_v.shape)
    sequences = (_one_image(tensor) for tensor in (grad, q.transpose(1, 2), out))
    grad, q, out = (sequence.transpose(1, 2) for sequence in sequences)
    sums = lse.transpose(0, 1).flatten(1)[None]
    _, dk, dv = _differentiate_on_cpu(
        grad, q, prompt_k[None], prompt_v[None], out, sums, 0.0, False, scale=scale
    )
    return dk[0].contiguous(), dv[0].contiguous()


def _differentiate_on_cpu(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dropout: float, causal: bool, *, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """PyTorch's flash kernel in float32 at least: narrow, it takes longer, in float16 several times."""
    (grad, _), (q, dtype), (k, _), (v, _), (out, _) = map(_widened, (grad, q, k, v, out))
    dq, dk, dv = _flash_backward(grad, q, k, v, out, lse, dropout, causal, scale=scale)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """What PyTorch's flash kernel for the CPU returns, in float32 at least, on any device.

    The operators need it where code was compiled for them and then their kernels were refused.
    """
    (q, dtype), (k, _), (v, _) = map(_widened, (q, k, v))
    scores = scale * (q @ k.mT)
    lse = scores.logsumexp(dim=-1)
    return ((scores - lse[..., None]).exp() @ v).to(dtype), lse


def differentiate_plainly(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    _dropout: float, _causal: bool, *, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v; with P the softmax, dS = P (dP - sum(dO O)), as flash attention has it."""
    (grad, _), (q, dtype), (k, _), (v, _), (out, _) = map(_widened, (grad, q, k, v, out))
    weights = (scale * (q @ k.mT) - lse[..., None]).exp()
    of_scores = scale * weights * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    gradients = of_scores @ k, of_scores.mT @ q, weights.mT @ grad
    dq, dk, dv = (gradient.to(dtype) for gradient in gradients)
    return dq, dk, dv


def _widened(tensor: Tensor) -> tuple[Tensor, torch.dtype]:
    """The tensor in float32 at least, and its dtype."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)), tensor.dtype


def _join(images: Tensor, prompts: Tensor, task: Tensor | None) -> Tensor:
    """`join_prompts` with the prompts of each image's task; with those of another where it has none."""
    if task is not None:
        prompts = prompts[task.clamp(0, len(prompts) - 1)]
    return join_prompts(images, prompts)


def _mark_unknown(out: Tensor, task: Tensor, tasks: int) -> Tensor:
    """NaN in the images whose task is out of range, found without waiting for a device."""
    unknown = (task < 0) | (task >= tasks)
    # On the CPU a look is free, and spares a copy of a tenth of the time.
    if task.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(unknown.any()):
        return out
    return out.masked_fill(unknown[:, None, None, None], math.nan)


def _one_image(tensor: Tensor) -> Tensor:
    """[B, N, H, d] to [1, B * N, H, d]."""
    return tensor.flatten(0, 1)[None]


def _sum_images(tensor: Tensor) -> Tensor:
    """Sums over the batch, in float32 at least."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.sum(0, dtype=wide).to(tensor.dtype)
