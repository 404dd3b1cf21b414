"""`prompt_attention` as operators of PyTorch: schemas, shapes for the compiler, gradients, entries by device.

Limits: arguments are checked by the caller (`prompt_attention.py`); no gradient with a task index; no second
derivative.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spt_fast.ops import prompt_attention_cpu
from spt_fast.ops.modes import refuse_second_derivative

Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


def split_packed(qkv: Tensor) -> Triple:
    """Queries, keys and values [B, H, N, d] as views of one projection [B, N, 3, H, d]."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _attend(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None, scale: float
) -> Pair:
    """The output [B, N, H, d], contiguous, and the logarithm of each softmax sum [B, H, N]."""
    if len(q) == 0:
        return _attend_shapes(q, k, v, prompt_k, prompt_v, task, scale)
    tensors = (_contiguous_rows(part) for part in (q, k, v, prompt_k, prompt_v))
    return _kernels(q).attend(*tensors, task, scale)  # type: ignore[no-any-return]


def _attend_packed(
    qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None, scale: float
) -> Pair:
    return _attend(*split_packed(qkv), prompt_k, prompt_v, task, scale)


def _gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, out: Tensor,
    lse: Tensor, scale: float, images: bool, prompts: bool,
) -> Triple:  # fmt: skip
    """Gradients of q, k, v [B, N, 3, H, d] in one buffer and of the prompts; empty where not asked for."""
    if len(q) == 0:
        packed, *shared = empty_gradients(q, prompt_k, images, prompts)
        return packed, shared[0].zero_(), shared[1].zero_()
    tensors = (_contiguous_rows(part) for part in (grad, q, k, v, prompt_k, prompt_v, out, lse))
    return _kernels(q).gradients(*tensors, scale, images, prompts)  # type: ignore[no-any-return]


def _kernels(tensor: Tensor) -> Any:
    """The module that computes: Triton's kernels on CUDA, and in tests of them in its interpreter."""
    if tensor.device.type == "cuda" or os.environ.get("SPT_FAST_BACKEND") == "triton":
        from spt_fast.ops import prompt_attention_triton

        return prompt_attention_triton
    return prompt_attention_cpu


def _contiguous_rows(tensor: Tensor) -> Tensor:
    """Kernels step through all dimensions but the last."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _lse_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _attend_shapes(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None, scale: float
) -> Pair:
    batch, heads, tokens, width = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=_lse_dtype(q.dtype))
    return q.new_empty(batch, tokens, heads, width), lse


def _attend_packed_shapes(
    qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None, scale: float
) -> Pair:
    return _attend_shapes(*split_packed(qkv), prompt_k, prompt_v, task, scale)


def _gradient_shapes(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, out: Tensor,
    lse: Tensor, scale: float, images: bool, prompts: bool,
) -> Triple:  # fmt: skip
    return empty_gradients(q, prompt_k, images, prompts)


def empty_gradients(q: Tensor, prompt_k: Tensor, images: bool, prompts: bool) -> Triple:
    """What the backward operator returns, not yet filled."""
    batch, heads, tokens, width = q.shape
    packed = q.new_empty((batch, tokens, 3, heads, width) if images else (0,))
    shared = tuple(prompt_k.shape) if prompts else (0,)
    return packed, prompt_k.new_empty(shared), prompt_k.new_empty(shared)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    *tensors, task, ctx.scale = inputs
    ctx.has_task = task is not None
    ctx.save_for_backward(*tensors, *output)
    # Of the softmax sums nothing is derived, and no zeros are made for them on the way back.
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    q, k, v, prompt_k, prompt_v, out, lse = ctx.saved_tensors
    packed, *shared = _call_backward(ctx, grad, (q, k, v, prompt_k, prompt_v, out, lse), 3)
    images = (None,) * 3 if packed is None else split_packed(packed)
    return (*images, *shared, None, None)


def _packed_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    qkv, *rest = ctx.saved_tensors
    return (*_call_backward(ctx, grad, (*split_packed(qkv), *rest), 1), None, None)


def _call_backward(ctx: Any, grad: Tensor, saved: tuple[Tensor, ...], images: int) -> list[Tensor | None]:
    """The packed gradient and the prompts', None where not needed; prompts come after `images` arguments."""
    if ctx.has_task:
        raise RuntimeError("prompt_attention with a task index is for inference only")
    needs = ctx.needs_input_grad
    wanted = any(needs[:images]), any(needs[images : images + 2])
    packed, prompt_k, prompt_v = torch.ops.spt_fast.prompt_attention_backward(
        grad, *saved, ctx.scale, *wanted
    )
    return [packed if wanted[0] else None, *((prompt_k, prompt_v) if wanted[1] else (None, None))]


_SHARED, _PAIR = "Tensor prompt_k, Tensor prompt_v", "(Tensor, Tensor)"
_SCHEMAS = {
    "prompt_attention": (f"(Tensor q, Tensor k, Tensor v, {_SHARED}, Tensor? task, float scale) -> {_PAIR}"),
    "packed_prompt_attention": f"(Tensor qkv, {_SHARED}, Tensor? task, float scale) -> {_PAIR}",
    "prompt_attention_backward": (
        f"(Tensor grad, Tensor q, Tensor k, Tensor v, {_SHARED}, Tensor out, Tensor lse, float scale,"
        " bool images, bool prompts) -> (Tensor, Tensor, Tensor)"
    ),
}
_library: Any = torch.library.Library("spt_fast", "FRAGMENT")  # type: ignore[no-untyped-call]


def _register(
    name: str,
    compute: Callable[..., Any],
    shapes: Callable[..., Any],
    backward: Callable[..., Any],
    keep: Callable[..., None] | None,
) -> None:
    _library.define(name + _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _library.impl(name, compute, key)
    torch.library.register_fake(f"spt_fast::{name}", shapes, lib=_library)
    torch.library.register_autograd(f"spt_fast::{name}", backward, setup_context=keep, lib=_library)


_register("prompt_attention", _attend, _attend_shapes, _backward, _keep)
_register("packed_prompt_attention", _attend_packed, _attend_packed_shapes, _packed_backward, _keep)
_register(
    "prompt_attention_backward",
    _gradients,
    _gradient_shapes,
    refuse_second_derivative("prompt_attention"),
    None,
)
