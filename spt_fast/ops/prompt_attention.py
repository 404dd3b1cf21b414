"""Attention of each image's tokens over themselves and over prompts that the whole batch shares."""

from __future__ import annotations

import warnings
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast.ops import prompt_attention_ops, triton_support
from spt_fast.ops.modes import autocast_dtype, refuse_tangents

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Widths of a head that Triton's kernels take; they pad to a power of two.
MAX_KERNEL_WIDTH, KERNEL_WIDTH_STEP = 128, 8


def prompt_attention(
    q: Tensor,  # [B, H, N, d]
    k: Tensor,  # [B, H, N, d]
    v: Tensor,  # [B, H, N, d]
    prompt_k: Tensor,  # [H, N_p, d]
    prompt_v: Tensor,  # [H, N_p, d]
    *,
    scale: float | None = None,
    task: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q [k; prompt_k]^T) [v; prompt_v], the attention of eq. 6 and 13 without prompt queries.

    Equivalent to attention over keys and values with the prompts concatenated for every image; the result has
    no rows for prompts, because eq. 6 and 13 throw those away. Differentiable in all five tensors, once, by
    `torch.autograd` and not by the transforms of `torch.func`; the gradients of `prompt_k` and `prompt_v` are
    sums over the batch. Under autocast all are cast to its dtype.

    Args:
        q, k, v: queries, keys and values of the images, [B, H, N, d], any strides; B may be 0.
        prompt_k, prompt_v: keys and values of the prompts, [H, N_p, d]; N_p may be 0.
        scale: factor on the scores; None is d ** -0.5.
        task: which prompts each image gets, int64 [B]; `prompt_k` and `prompt_v` are then [T, H, N_p, d].
            For inference only. Checked on the CPU; on CUDA, where a check would have to wait for the device,
            an image whose index is out of range comes out as NaN.

    Returns:
        [B, H, N, d] in the dtype of `q` (under autocast, in autocast's); in memory [B, N, H, d].

    Raises:
        TypeError: an argument is no floating-point tensor, or dtypes differ outside autocast.
        ValueError: shapes or devices do not fit together, there is nothing to attend to, a gradient would be
            needed with `task`, or a tensor carries a tangent of forward-mode differentiation.
    """
    tensors = {"q": q, "k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v}
    _check_images({name: tensors[name] for name in ("q", "k", "v")}, _HEADS_FIRST)
    _check_prompts(q.shape[1], q.shape[3], prompt_k, prompt_v, task)
    _check_together(tensors, task)
    refuse_tangents("prompt_attention", tensors)
    q, k, v, prompt_k, prompt_v = _autocast(tensors)
    if _joins(q):
        return _join_and_attend(q, k, v, prompt_k, prompt_v, scale, task)
    out, _ = torch.ops.spt_fast.prompt_attention(q, k, v, prompt_k, prompt_v, task, _scale(scale, q.shape[3]))
    return out.transpose(1, 2)  # type: ignore[no-any-return]


def packed_prompt_attention(
    qkv: Tensor,  # [B, N, 3, H, d]
    prompt_k: Tensor,  # [H, N_p, d]
    prompt_v: Tensor,  # [H, N_p, d]
    *,
    scale: float | None = None,
    task: Tensor | None = None,
) -> Tensor:
    """`prompt_attention` from one projection to the next: [B, N, 3, H, d] in, [B, N, H * d] out, no copies.

    The gradient of `qkv` is one tensor of its shape. Other arguments and errors are `prompt_attention`'s.
    """
    tensors = {"qkv": qkv, "prompt_k": prompt_k, "prompt_v": prompt_v}
    _check_images({"qkv": qkv}, _PACKED)
    if qkv.shape[2] != 3:
        raise ValueError(f"qkv must be {_PACKED}, got shape {tuple(qkv.shape)}")
    _check_prompts(qkv.shape[3], qkv.shape[4], prompt_k, prompt_v, task)
    _check_together(tensors, task)
    refuse_tangents("prompt_attention", tensors)
    qkv, prompt_k, prompt_v = _autocast(tensors)
    if _joins(qkv):
        parts = prompt_attention_ops.split_packed(qkv)
        out = _join_and_attend(*parts, prompt_k, prompt_v, scale, task).transpose(1, 2)
    else:
        out, _ = torch.ops.spt_fast.packed_prompt_attention(
            qkv, prompt_k, prompt_v, task, _scale(scale, qkv.shape[4])
        )
    return out.flatten(2)


def explain_backend(device: torch.device, dtype: torch.dtype, width: int) -> tuple[str, str]:
    """Name of the code that serves heads of `width` on `device`, and why."""
    if device.type == "cpu":
        return "cpu", "PyTorch's flash kernel over one joined copy of keys and values"
    if device.type == "meta":
        return "meta", "shapes and dtypes only"
    reason = triton_support.why_not(device)
    if not reason and dtype == torch.float64:
        reason = "Triton's kernels have no float64"
    if not reason and (width > MAX_KERNEL_WIDTH or width % KERNEL_WIDTH_STEP):
        reason = f"head width {width} is no multiple of {KERNEL_WIDTH_STEP} up to {MAX_KERNEL_WIDTH}"
    if reason:
        return "joined", reason
    return "triton", "Triton kernels, prompts never joined to the images' keys"


def _joins(tensor: Tensor) -> bool:
    """Whether keys and values have to be joined for PyTorch's attention; warns once for each reason."""
    name, reason = explain_backend(tensor.device, tensor.dtype, tensor.shape[-1])
    if name == "joined" and not torch.compiler.is_compiling():
        _warn_once(reason)
    return name == "joined"


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"prompt_attention joins prompts and images, which is slower: {reason}", stacklevel=4)


def _join_and_attend(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, scale: float | None,
    task: Tensor | None,
) -> Tensor:  # fmt: skip
    if task is not None:
        prompt_k, prompt_v = prompt_k[task], prompt_v[task]
    batch = q.shape[0]
    keys = torch.cat((prompt_k.expand(batch, -1, -1, -1), k), dim=2)
    values = torch.cat((prompt_v.expand(batch, -1, -1, -1), v), dim=2)
    return F.scaled_dot_product_attention(q, keys, values, scale=scale)


def _scale(scale: float | None, width: int) -> float:
    return width**-0.5 if scale is None else float(scale)


def _autocast(tensors: dict[str, Tensor]) -> list[Tensor]:
    """What autocast does to the arguments of PyTorch's own attention: everything narrow in one dtype."""
    given = list(tensors.values())
    dtype = autocast_dtype(given[0].device.type)
    if dtype is None:
        return given
    return [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in given]


_HEADS_FIRST, _PACKED = "[B, H, N, d]", "[B, N, 3, H, d]"


def _check_images(images: dict[str, Tensor], layout: str) -> None:
    first = next(iter(images))
    for name, tensor in images.items():
        _check_one(name, tensor, layout)
        if tensor.shape != images[first].shape:
            raise ValueError(
                f"{name} must have the shape of {first}, {tuple(images[first].shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    if 0 in images[first].shape[1:]:
        shape = tuple(images[first].shape)
        raise ValueError(f"{first} must hold at least one token of each image {layout}, got shape {shape}")


def _check_one(name: str, tensor: Tensor, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    if tensor.ndim != layout.count(",") + 1:
        rank = layout.count(",") + 1
        raise ValueError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(tensor.shape)}")


def _check_prompts(heads: int, width: int, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None) -> None:
    for name, tensor in (("prompt_k", prompt_k), ("prompt_v", prompt_v)):
        _check_one(name, tensor, "[H, N_p, d]" if task is None else "[T, H, N_p, d]")
        if tensor.shape[-3] != heads:
            raise ValueError(f"{name} must have the {heads} heads of q, got {tensor.shape[-3]}")
        if tensor.shape[-1] != width:
            raise ValueError(f"{name} must have the head width of q, {width}, got {tensor.shape[-1]}")
    if prompt_k.shape[-2] != prompt_v.shape[-2]:
        raise ValueError(
            "prompt_k and prompt_v must hold equally many prompts, "
            f"got {prompt_k.shape[-2]} and {prompt_v.shape[-2]}"
        )
    if task is not None and prompt_k.shape[0] != prompt_v.shape[0]:
        raise ValueError(
            "prompt_k and prompt_v must hold equally many tasks, "
            f"got {prompt_k.shape[0]} and {prompt_v.shape[0]}"
        )


def _check_together(tensors: dict[str, Tensor], task: Tensor | None) -> None:
    first, leader = next(iter(tensors.items()))
    # Autocast casts what it is given to one dtype; a norm on q and k legitimately leaves them wider than v.
    autocast = autocast_dtype(leader.device.type) is not None
    for name, tensor in tensors.items():
        if tensor.device != leader.device:
            raise ValueError(f"{name} must be on the device of {first}, {leader.device}, got {tensor.device}")
        if tensor.dtype != leader.dtype and not autocast:
            raise TypeError(f"{name} must have the dtype of {first}, {leader.dtype}, got {tensor.dtype}")
    if task is not None:
        _check_task(task, leader, tensors["prompt_k"].shape[0])
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
            raise ValueError("task must be None where gradients are needed: it is for inference only")


def _check_task(task: Tensor, leader: Tensor, tasks: int) -> None:
    if not isinstance(task, Tensor) or task.dtype != torch.int64:
        raise TypeError(f"task must be an int64 tensor, got {getattr(task, 'dtype', type(task).__name__)}")
    if tuple(task.shape) != (leader.shape[0],):
        raise ValueError(f"task must have shape ({leader.shape[0]},), one per image, got {tuple(task.shape)}")
    if task.device != leader.device:
        raise ValueError(f"task must be on {leader.device} like the images, got {task.device}")
    # Under the compiler there is no value to look at; indexing then checks the range on the CPU.
    if task.device.type == "cpu" and not torch.compiler.is_compiling() and len(task) > 0:
        low, high = int(task.min()), int(task.max())
        if low < 0 or high >= tasks:
            raise ValueError(f"task must be from 0 to {tasks - 1}, got {low if low < 0 else high}")
