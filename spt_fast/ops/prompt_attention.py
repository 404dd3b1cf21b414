"""Attention of each image's tokens over themselves and over prompts that the whole batch shares.

Limits: differentiable once. Triton's kernels serve CUDA tensors that `explain_backend` names; elsewhere
PyTorch attends to one joined copy of keys and values.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from spt_fast.ops import triton_support, trust
from spt_fast.ops.autocast import autocast_dtype
from spt_fast.ops.autograd_guards import refuse_second_derivative, refuse_tangents
from spt_fast.ops.prompt_attention_cpu import (
    joined_prompt_attention,
    prompt_attention_backward,
    prompt_attention_forward,
)
from spt_fast.ops.prompt_attention_shapes import empty_gradients, empty_output
from spt_fast.support.arguments import check_number, check_tensor

KERNEL = trust.Kernel(
    "prompt_attention",
    "spt_fast.ops.cases:prove_prompt_attention",
    ("ops/prompt_attention*.py", "ops/triton_*.py"),
)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Widths of a head that Triton's kernels take; they pad to a power of two.
MAX_KERNEL_WIDTH, KERNEL_WIDTH_STEP = 128, 8
_HEADS_FIRST, _PACKED = "[B, H, N, d]", "[B, N, 3, H, d]"


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
            For inference only. An index that is not from 0 to T - 1 is a ValueError on the CPU. On a GPU and
            in compiled code, where looking at it would wait for the device, the result of its image is NaN.

    Returns:
        [B, H, N, d] in the dtype of `q` (under autocast, in autocast's); in memory [B, N, H, d].

    Raises:
        TypeError: an argument is no floating-point tensor, `scale` is no number, or dtypes differ outside
            autocast.
        ValueError: shapes or devices do not fit together, there is nothing to attend to, `scale` is NaN or
            infinite (not looked at in compiled code), a gradient would be needed with `task`, or a tensor
            carries a tangent of forward-mode differentiation.
    """
    tensors = {"q": q, "k": k, "v": v, "prompt_k": prompt_k, "prompt_v": prompt_v}
    _check_images({name: tensors[name] for name in ("q", "k", "v")}, _HEADS_FIRST)
    _check_prompts(q.shape[1], q.shape[3], prompt_k, prompt_v, task)
    _check_together(tensors, task)
    refuse_tangents("prompt_attention", tensors)
    q, k, v, prompt_k, prompt_v = _autocast(tensors)
    scale = _scale(scale, q.shape[3])
    if _joins(q):
        return joined_prompt_attention(q, k, v, prompt_k, prompt_v, task, scale)
    out, _ = torch.ops.spt_fast.prompt_attention(q, k, v, prompt_k, prompt_v, task, scale)
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
    scale = _scale(scale, qkv.shape[4])
    if _joins(qkv):
        out = joined_prompt_attention(*_split_packed(qkv), prompt_k, prompt_v, task, scale).transpose(1, 2)
    else:
        out, _ = torch.ops.spt_fast.packed_prompt_attention(qkv, prompt_k, prompt_v, task, scale)
    return out.flatten(2)


def explain_backend(device: torch.device, dtype: torch.dtype, width: int) -> tuple[str, str]:
    """Name of the code that serves heads of `width` on `device`, and why; all dispatch goes by it."""
    if device.type == "cpu":
        return "cpu", "PyTorch's flash kernel over one joined copy of keys and values"
    if device.type == "meta":
        return "meta", "shapes and dtypes only"
    reason = triton_support.why_not(device)
    if not reason and dtype == torch.float64:
        reason = "Triton's kernels have no float64"
    if not reason and (width > MAX_KERNEL_WIDTH or width % KERNEL_WIDTH_STEP):
        reason = f"head width {width} is no multiple of {KERNEL_WIDTH_STEP} up to {MAX_KERNEL_WIDTH}"
    # In code that is being compiled the operator asks, when it runs.
    if not reason and not torch.compiler.is_compiling():
        reason = trust.why_not(KERNEL, device, dtype)
    if reason:
        return "joined", reason
    return "triton", "Triton kernels, prompts never joined to the images' keys"


def _joins(tensor: Tensor) -> bool:
    """Whether PyTorch's attention has to do it, differentiated by autograd; warns once for each reason."""
    name, reason = explain_backend(tensor.device, tensor.dtype, tensor.shape[-1])
    if name == "joined" and not torch.compiler.is_compiling():
        _warn_once(reason)
    return name == "joined"


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"prompt_attention joins prompts and images, which is slower: {reason}", stacklevel=4)


def _has_kernel(tensor: Tensor) -> bool:
    """Whether kernels serve inside the operators, which code compiled before a refusal calls all the same."""
    name, reason = explain_backend(tensor.device, tensor.dtype, tensor.shape[-1])
    if name == "joined":
        _warn_once(reason)
    return name == "triton"


@torch.library.custom_op("spt_fast::prompt_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, prompt_k, prompt_v, task, scale)


@torch.library.custom_op("spt_fast::packed_prompt_attention", mutates_args=())
def _attend_packed(
    qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return _forward(*_split_packed(qkv), prompt_k, prompt_v, task, scale)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, N, H, d], contiguous, and the logarithm of each softmax sum [B, H, N]."""
    if len(q) == 0:
        return empty_output(q)
    q, k, v, prompt_k, prompt_v = map(_contiguous_rows, (q, k, v, prompt_k, prompt_v))
    if _has_kernel(q):
        from spt_fast.ops.prompt_attention_triton import launch_prompt_attention_forward

        return launch_prompt_attention_forward(q, k, v, prompt_k, prompt_v, task, scale)
    return prompt_attention_forward(q, k, v, prompt_k, prompt_v, task, scale)


@torch.library.custom_op("spt_fast::prompt_attention_backward", mutates_args=())
def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, out: Tensor,
    lse: Tensor, scale: float, images: bool, prompts: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v [B, N, 3, H, d], of `prompt_k` and of `prompt_v`; [0] where not asked for."""
    if len(q) == 0:
        packed, *shared = empty_gradients(q, prompt_k, images, prompts)
        return packed, shared[0].zero_(), shared[1].zero_()
    grad, q, k, v, prompt_k, prompt_v, out, lse = map(
        _contiguous_rows, (grad, q, k, v, prompt_k, prompt_v, out, lse)
    )
    if _has_kernel(q):
        from spt_fast.ops.prompt_attention_triton import launch_prompt_attention_backward

        return launch_prompt_attention_backward(
            grad, q, k, v, prompt_k, prompt_v, out, lse, scale, images, prompts
        )
    return prompt_attention_backward(grad, q, k, v, prompt_k, prompt_v, out, lse, scale, images, prompts)


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return empty_output(q)


@_attend_packed.register_fake
def _(
    qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    return empty_output(_split_packed(qkv)[0])


@_gradients.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, out: Tensor,
    lse: Tensor, scale: float, images: bool, prompts: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return empty_gradients(q, prompt_k, images, prompts)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, task, ctx.scale = inputs
    ctx.has_task = task is not None
    ctx.save_for_backward(*tensors, *output)
    # The softmax sums have no gradient, and autograd makes no zeros in place of one.
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    q, k, v, *rest = ctx.saved_tensors
    packed, *shared = _needed_gradients(ctx, grad, (q, k, v), rest)
    images = (None,) * 3 if packed is None else _split_packed(packed)
    return (*images, *shared, None, None)


def _differentiate_packed(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    qkv, *rest = ctx.saved_tensors
    return (*_needed_gradients(ctx, grad, (qkv,), rest), None, None)


def _needed_gradients(
    ctx: Any, grad: Tensor, images: tuple[Tensor, ...], rest: list[Tensor]
) -> list[Tensor | None]:
    """Gradients of q, k and v in one tensor, of `prompt_k` and of `prompt_v`, None where not needed.

    `images` are the operator's first arguments: q, k and v, or qkv.
    """
    if ctx.has_task:
        raise RuntimeError("prompt_attention with a task index is for inference only")
    needs, count = ctx.needs_input_grad, len(images)
    wanted = any(needs[:count]), any(needs[count : count + 2])
    heads = images if count == 3 else _split_packed(*images)
    packed, prompt_k, prompt_v = torch.ops.spt_fast.prompt_attention_backward(
        grad, *heads, *rest, ctx.scale, *wanted
    )
    return [packed if wanted[0] else None, *((prompt_k, prompt_v) if wanted[1] else (None, None))]


_attend.register_autograd(_differentiate, setup_context=_save)
_attend_packed.register_autograd(_differentiate_packed, setup_context=_save)
_gradients.register_autograd(refuse_second_derivative("prompt_attention"))


def _split_packed(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, H, N, d] as views of one projection [B, N, 3, H, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """What computes steps through all dimensions but the last, which it takes to be contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _scale(scale: float | None, width: int) -> float:
    # The compiler may trace a scale whose value it leaves open, and then cannot branch on it.
    if scale is not None and not torch.compiler.is_compiling():
        scale = check_number("scale", scale)
    return width**-0.5 if scale is None else float(scale)


def _autocast(tensors: dict[str, Tensor]) -> list[Tensor]:
    """What autocast does to the arguments of PyTorch's own attention: everything narrow in one dtype."""
    given = list(tensors.values())
    dtype = autocast_dtype(given[0].device.type)
    if dtype is None:
        return given
    return [tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in given]


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
    check_tensor(name, tensor)
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")
    rank = layout.count(",") + 1
    if tensor.ndim != rank:
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
    if task is None:
        return
    if prompt_k.shape[0] != prompt_v.shape[0]:
        raise ValueError(
            "prompt_k and prompt_v must hold equally many tasks, "
            f"got {prompt_k.shape[0]} and {prompt_v.shape[0]}"
        )
    if prompt_k.shape[0] == 0:
        raise ValueError("prompt_k and prompt_v must hold at least one task, got none")


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


def _check_task(task: Tensor, images: Tensor, tasks: int) -> None:
    check_tensor("task", task, dtype=torch.int64)
    if tuple(task.shape) != (len(images),):
        raise ValueError(f"task must have shape ({len(images)},), one per image, got {tuple(task.shape)}")
    if task.device != images.device:
        raise ValueError(f"task must be on {images.device} like the images, got {task.device}")
    # On a GPU the values would have to be waited for, and the compiler has none.
    if task.device.type == "cpu" and not torch.compiler.is_compiling() and len(task) > 0:
        low, high = int(task.min()), int(task.max())
        if low < 0 or high >= tasks:
            raise ValueError(f"task must be from 0 to {tasks - 1}, got {low if low < 0 else high}")
