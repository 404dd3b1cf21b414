"""Attention of each image's tokens over themselves and over prompts that the whole batch shares."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def prompt_attention(
    q: Tensor,  # [B, H, N, d]
    k: Tensor,  # [B, H, N, d]
    v: Tensor,  # [B, H, N, d]
    prompt_k: Tensor,  # [H, N_p, d]
    prompt_v: Tensor,  # [H, N_p, d]
    *,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale * q [k; prompt_k]^T) [v; prompt_v], the attention of eq. 6 and 13 without prompt queries.

    Equivalent to attention over keys and values with the prompts concatenated for every image; the result has
    no rows for prompts, because eq. 6 and 13 throw those away. Differentiable in all five tensors; the
    gradients of `prompt_k` and `prompt_v` are sums over the batch.

    Args:
        q, k, v: queries, keys and values of the images, [B, H, N, d], any strides.
        prompt_k, prompt_v: keys and values of the prompts, [H, N_p, d]; N_p may be 0.
        scale: factor on the scores; None is d ** -0.5.

    Returns:
        [B, H, N, d] in the dtype of `q` (under autocast, in autocast's).

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit together.
    """
    _check(q, k, v, prompt_k, prompt_v)
    if prompt_k.shape[1] == 0:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    batch = q.shape[0]
    keys = torch.cat((k, prompt_k.expand(batch, -1, -1, -1)), dim=2)
    values = torch.cat((v, prompt_v.expand(batch, -1, -1, -1)), dim=2)
    return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def packed_prompt_attention(
    qkv: Tensor,  # [B, N, 3, H, d]
    prompt_k: Tensor,  # [H, N_p, d]
    prompt_v: Tensor,  # [H, N_p, d]
    *,
    scale: float | None = None,
) -> Tensor:
    """`prompt_attention` of one projection's output; [B, N, H * d], as the next projection reads it."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return prompt_attention(q, k, v, prompt_k, prompt_v, scale=scale).transpose(1, 2).flatten(2)


def _check(q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> None:
    tensors = {"q": q, "k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v}
    for name, tensor in tensors.items():
        _check_one(name, tensor, rank=3 if name.startswith("prompt") else 4)
    for name in ("k", "v"):
        if tensors[name].shape != q.shape:
            raise ValueError(
                f"{name} must have the shape of q, {tuple(q.shape)}, got {tuple(tensors[name].shape)}"
            )
    _check_prompts(q, prompt_k, prompt_v)
    _check_placement(tensors)


def _check_one(name: str, tensor: Tensor, rank: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.ndim != rank:
        layout = "[H, N_p, d]" if rank == 3 else "[B, H, N, d]"
        raise ValueError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(tensor.shape)}")


def _check_prompts(q: Tensor, prompt_k: Tensor, prompt_v: Tensor) -> None:
    heads, width = q.shape[1], q.shape[3]
    for name, tensor in (("prompt_k", prompt_k), ("prompt_v", prompt_v)):
        if tensor.shape[0] != heads:
            raise ValueError(f"{name} must have the {heads} heads of q, got {tensor.shape[0]}")
        if tensor.shape[2] != width:
            raise ValueError(f"{name} must have the head width of q, {width}, got {tensor.shape[2]}")
    if prompt_k.shape[1] != prompt_v.shape[1]:
        raise ValueError(
            "prompt_k and prompt_v must hold equally many prompts, "
            f"got {prompt_k.shape[1]} and {prompt_v.shape[1]}"
        )


def _check_placement(tensors: dict[str, Tensor]) -> None:
    q = tensors["q"]
    # Autocast casts what it is given to one dtype; a norm on q and k legitimately leaves them wider than v.
    autocast = torch.is_autocast_enabled(q.device.type)
    for name, tensor in tensors.items():
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
        if tensor.dtype != q.dtype and not autocast:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
