"""`prompt_attention` as Triton kernels, forward and backward, which never join prompts and images in memory.

Limits: float32, float16 and bfloat16 with float32 sums; head widths up to 128; the last dimension of every
tensor contiguous; the caller has checked everything else. These kernels have never run on a GPU.

Keys are counted as if the prompts stood in front of the image's tokens: a tile of keys may hold some of both,
so that the two are padded together, and each row knows which tensor it comes from. Rows beyond an end are
masked. Offsets of rows are 64-bit.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spt_fast.ops import prompt_attention_tiles as tiles
from spt_fast.ops.prompt_attention_ops import empty_gradients
from spt_fast.ops.triton_support import architecture, interpreting, on_device

_LOG2_E = 1.4426950408889634
# Three products of TensorFloat-32 give float32's precision but for the last two bits or so.
FLOAT32_PRODUCT = "tf32x3"
# The interpreter multiplies the bits of bfloat16 as if they were integers; float32 holds the same numbers.
INTERPRETED = tl.constexpr("interpreted")
SUM_BLOCK = 512
# A new batch size or number of prompts must not compile the kernels anew.
_COUNTS = ["images", "tokens", "prompts", "tasks", "splits", "per_split"]


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr):
    """Matrix product with float32 sums, on top of `total` unless that is None."""
    if PRECISION == INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
        return tl.dot(a, b, total)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _places(pointers, valid, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers [ROWS, BLOCK_D] and their mask, from a pointer to the start of each row.

    The compiler does not see that rows are aligned, which `_aligned` ensures; it would load single elements.
    """
    columns = tl.arange(0, BLOCK_D)
    mask = valid[:, None]
    if WIDTH != BLOCK_D:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.multiple_of(pointers[:, None] + columns[None, :], (1, 16)), mask


@triton.jit
def _load_rows(pointers, valid, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [ROWS, BLOCK_D], zero where not valid and beyond WIDTH."""
    places, mask = _places(pointers, valid, WIDTH, BLOCK_D)
    return tl.load(places, mask=mask, other=0.0)


@triton.jit
def _store_rows(pointers, valid, values, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    places, mask = _places(pointers, valid, WIDTH, BLOCK_D)
    tl.store(places, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _key_rows(index, prompts, prompt_base, prompt_stride, image_base, image_stride):
    """Pointers to keys (or values) `index`, counted with the prompts in front."""
    row = index.to(tl.int64)
    from_prompt, from_image = prompt_base + row * prompt_stride, image_base + (row - prompts) * image_stride
    return tl.where(index < prompts, from_prompt, from_image)


@triton.jit(do_not_specialize=_COUNTS)
def prompt_attention_forward_kernel(
    q, k, v, prompt_k, prompt_v, task, out, lse,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    pk_task, pk_head, pk_row, pv_task, pv_head, pv_row,
    tokens, prompts, heads, tasks, scale_log2,
    HAS_TASK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of ROWS queries of one head of one image, and the logarithm of their softmax sums."""
    row_tiles = tl.cdiv(tokens, ROWS)
    tile = tl.program_id(0) % row_tiles
    head = ((tl.program_id(0) // row_tiles) % heads).to(tl.int64)
    image = (tl.program_id(0) // row_tiles // heads).to(tl.int64)
    known = True
    if HAS_TASK:
        chosen = tl.load(task + image)
        known = (chosen >= 0) & (chosen < tasks)
        chosen = tl.where(known, chosen, 0)
        prompt_k += chosen * pk_task
        prompt_v += chosen * pv_task
    prompt_k += head * pk_head
    prompt_v += head * pv_head
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head

    row = tile * ROWS + tl.arange(0, ROWS)
    row_valid = row < tokens
    queries = _load_rows(
        q + image * q_image + head * q_head + row.to(tl.int64) * q_row, row_valid, WIDTH, BLOCK_D
    )
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    result = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, prompts + tokens, STEP):
        index = start + tl.arange(0, STEP)
        valid = index < prompts + tokens
        keys = _load_rows(_key_rows(index, prompts, prompt_k, pk_row, k, k_row), valid, WIDTH, BLOCK_D)
        scores = _product(queries, keys.T, None, PRECISION) * scale_log2
        scores = scores + tl.where(valid, 0.0, float("-inf"))[None, :]
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, 1)
        values = _load_rows(_key_rows(index, prompts, prompt_v, pv_row, v, v_row), valid, WIDTH, BLOCK_D)
        result = _product(weights.to(values.dtype), values, result * shrink[:, None], PRECISION)
        highest = new_highest
    result = result / total[:, None]
    if HAS_TASK:
        result = tl.where(known, result, float("nan"))
    line = (image * tokens + row) * heads + head
    _store_rows(out + line * WIDTH, row_valid, result, WIDTH, BLOCK_D)
    sums = (highest + tl.log2(total)) / 1.4426950408889634
    tl.store(lse + (image * heads + head) * tokens + row, sums, mask=row_valid)


@triton.jit(do_not_specialize=_COUNTS)
def prompt_attention_query_kernel(
    grad, q, k, v, prompt_k, prompt_v, out, lse, delta, grad_q,
    grad_image, grad_head, grad_row, q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    pk_head, pk_row, pv_head, pv_row, out_image, out_head, out_row,
    tokens, prompts, heads, scale,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of ROWS queries of one head of one image; and delta, their sums of output times gradient."""
    row_tiles = tl.cdiv(tokens, ROWS)
    tile = tl.program_id(0) % row_tiles
    head = ((tl.program_id(0) // row_tiles) % heads).to(tl.int64)
    image = (tl.program_id(0) // row_tiles // heads).to(tl.int64)
    prompt_k += head * pk_head
    prompt_v += head * pv_head
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head

    row = tile * ROWS + tl.arange(0, ROWS)
    wide_row = row.to(tl.int64)
    row_valid = row < tokens
    queries = _load_rows(q + image * q_image + head * q_head + wide_row * q_row, row_valid, WIDTH, BLOCK_D)
    grads = _load_rows(
        grad + image * grad_image + head * grad_head + wide_row * grad_row, row_valid, WIDTH, BLOCK_D
    )
    outs = _load_rows(
        out + image * out_image + head * out_head + wide_row * out_row, row_valid, WIDTH, BLOCK_D
    )
    dots = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
    statistic = (image * heads + head) * tokens + row
    tl.store(delta + statistic, dots, mask=row_valid)
    sums = tl.load(lse + statistic, mask=row_valid, other=float("inf")) * 1.4426950408889634
    result = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(0, prompts + tokens, STEP):
        index = start + tl.arange(0, STEP)
        valid = index < prompts + tokens
        keys = _load_rows(_key_rows(index, prompts, prompt_k, pk_row, k, k_row), valid, WIDTH, BLOCK_D)
        values = _load_rows(_key_rows(index, prompts, prompt_v, pv_row, v, v_row), valid, WIDTH, BLOCK_D)
        scores = _product(queries, keys.T, None, PRECISION) * (scale * 1.4426950408889634)
        scores = scores + tl.where(valid, 0.0, float("-inf"))[None, :]
        weights = tl.exp2(scores - sums[:, None])
        grad_weights = _product(grads, values.T, None, PRECISION)
        grad_scores = weights * (grad_weights - dots[:, None])
        result = _product(grad_scores.to(keys.dtype), keys, result, PRECISION)
    line = ((image * tokens + row) * 3) * heads + head
    _store_rows(grad_q + line * WIDTH, row_valid, result * scale, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=_COUNTS)
def prompt_attention_key_kernel(
    grad, q, k, v, prompt_k, prompt_v, out, lse, delta, packed, partial,
    grad_image, grad_head, grad_row, q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    pk_head, pk_row, pv_head, pv_row, out_image, out_head, out_row,
    images, tokens, prompts, heads, splits, per_split, scale,
    HAS_DELTA: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS keys and values of one head: of prompts, over some images, or of one image's tokens.

    Both go through the same queries one after the other, counted across the images that are summed; they
    differ in where keys come from and results go. Prompts come first: their programs are the long ones.
    """
    prompt_tiles = tl.cdiv(prompts, ROWS)
    prompt_programs = splits * heads * prompt_tiles
    if tl.program_id(0) < prompt_programs:
        tile = tl.program_id(0) % prompt_tiles
        head = ((tl.program_id(0) // prompt_tiles) % heads).to(tl.int64)
        split = (tl.program_id(0) // prompt_tiles // heads).to(tl.int64)
        first = (split * per_split).to(tl.int32)
        last = tl.minimum(first + per_split, images)
        row = tile * ROWS + tl.arange(0, ROWS)
        row_valid = row < prompts
        key_pointers = prompt_k + head * pk_head + row.to(tl.int64) * pk_row
        value_pointers = prompt_v + head * pv_head + row.to(tl.int64) * pv_row
    else:
        image_tiles = tl.cdiv(tokens, ROWS)
        program = tl.program_id(0) - prompt_programs
        tile = program % image_tiles
        head = ((program // image_tiles) % heads).to(tl.int64)
        split = (program // image_tiles // heads).to(tl.int64)
        first = split.to(tl.int32)
        last = first + 1
        row = tile * ROWS + tl.arange(0, ROWS)
        row_valid = row < tokens
        key_pointers = k + split * k_image + head * k_head + row.to(tl.int64) * k_row
        value_pointers = v + split * v_image + head * v_head + row.to(tl.int64) * v_row

    keys = _load_rows(key_pointers, row_valid, WIDTH, BLOCK_D)
    values = _load_rows(value_pointers, row_valid, WIDTH, BLOCK_D)
    grad_keys = tl.zeros([ROWS, BLOCK_D], tl.float32)
    grad_values = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(first * tokens, last * tokens, STEP):
        query = start + tl.arange(0, STEP)
        valid = query < last * tokens
        image = (query // tokens).to(tl.int64)
        token = (query % tokens).to(tl.int64)
        queries = _load_rows(q + image * q_image + head * q_head + token * q_row, valid, WIDTH, BLOCK_D)
        grads = _load_rows(
            grad + image * grad_image + head * grad_head + token * grad_row, valid, WIDTH, BLOCK_D
        )
        statistic = (image * heads + head) * tokens + token
        sums = tl.load(lse + statistic, mask=valid, other=float("inf")) * 1.4426950408889634
        if HAS_DELTA:
            dots = tl.load(delta + statistic, mask=valid, other=0.0)
        else:
            outs = _load_rows(
                out + image * out_image + head * out_head + token * out_row, valid, WIDTH, BLOCK_D
            )
            dots = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
        # Transposed: keys down, queries across.
        scores = _product(keys, queries.T, None, PRECISION) * (scale * 1.4426950408889634)
        weights = tl.exp2(scores - sums[None, :])
        grad_values = _product(weights.to(grads.dtype), grads, grad_values, PRECISION)
        grad_weights = _product(values, grads.T, None, PRECISION)
        grad_scores = weights * (grad_weights - dots[None, :])
        grad_keys = _product(grad_scores.to(queries.dtype), queries, grad_keys, PRECISION)
    grad_keys *= scale
    if tl.program_id(0) < prompt_programs:
        line = (split * heads + head) * prompts + row
        _store_rows(partial + line * WIDTH, row_valid, grad_keys, WIDTH, BLOCK_D)
        line += splits * heads * prompts
        _store_rows(partial + line * WIDTH, row_valid, grad_values, WIDTH, BLOCK_D)
    else:
        line = ((split * tokens + row) * 3 + 1) * heads + head
        _store_rows(packed + line * WIDTH, row_valid, grad_keys, WIDTH, BLOCK_D)
        _store_rows(packed + (line + heads) * WIDTH, row_valid, grad_values, WIDTH, BLOCK_D)


@triton.jit(do_not_specialize=["splits", "size"])
def prompt_attention_sum_kernel(partial, grad_k, grad_v, splits, size, BLOCK: tl.constexpr):
    """Sum partial results [2, splits, size] in a fixed order into the prompts' gradients."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = index < size
    partial += tl.program_id(1).to(tl.int64) * splits * size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partial + index, mask=valid, other=0.0)
        partial += size
    if tl.program_id(1) == 0:
        tl.store(grad_k + index, total.to(grad_k.dtype.element_ty), mask=valid)
    else:
        tl.store(grad_v + index, total.to(grad_v.dtype.element_ty), mask=valid)


def attend(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, task: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, N, H, d], contiguous, and the logarithm of each softmax sum [B, H, N]."""
    q, k, v, prompt_k, prompt_v = (_aligned(tensor) for tensor in (q, k, v, prompt_k, prompt_v))
    batch, heads, tokens, width = q.shape
    out = q.new_empty(batch, tokens, heads, width)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    prompts = prompt_k.shape[-2]
    per_task = [
        tensor.stride()[:-1] if task is not None else (0, *tensor.stride()[:-1])
        for tensor in (prompt_k, prompt_v)
    ]
    arguments = [
        q, k, v, prompt_k, prompt_v, q if task is None else task, out, lse,
        *_strides(q, k, v), *per_task[0], *per_task[1],
        tokens, prompts, heads, prompt_k.shape[0], scale * _LOG2_E, task is not None,
    ]  # fmt: skip
    tile = tiles.forward_tiles(architecture(q.device), width, q.element_size(), tokens, tokens + prompts)
    _launch(
        prompt_attention_forward_kernel, lambda rows: batch * heads * -(-tokens // rows), tile, q, arguments
    )
    return out, lse


def gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, out: Tensor,
    lse: Tensor, scale: float, images: bool, prompts: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients [B, N, 3, H, d] of q, k and v in one buffer, and the sums over images of the prompts'.

    Whatever is not asked for is empty and not computed.
    """
    results = empty_gradients(q, prompt_k, images, prompts)
    # Batch, head and row in this order, whatever the order in memory.
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    saved = [*(_aligned(tensor) for tensor in (grad, q, k, v, prompt_k, prompt_v, out)), lse]
    delta = torch.empty_like(lse) if images else lse
    if images:
        _query_gradients(saved, delta, results[0], scale)
    _key_gradients(saved, delta, results, scale, images, prompts)
    return results


def _query_gradients(saved: list[Tensor], delta: Tensor, packed: Tensor, scale: float) -> None:
    grad, q, k, v, prompt_k, prompt_v, out, _ = saved
    batch, heads, tokens, width = q.shape
    prompts = prompt_k.shape[1]
    arguments = [
        *saved, delta, packed,
        *_strides(grad, q, k, v), *_strides(prompt_k, prompt_v), *_strides(out),
        tokens, prompts, heads, scale,
    ]  # fmt: skip
    tile = tiles.query_tiles(architecture(q.device), width, q.element_size(), tokens, tokens + prompts)
    _launch(
        prompt_attention_query_kernel, lambda rows: batch * heads * -(-tokens // rows), tile, q, arguments
    )


def _key_gradients(
    saved: list[Tensor], delta: Tensor, results: tuple[Tensor, Tensor, Tensor], scale: float, images: bool,
    prompts: bool,
) -> None:  # fmt: skip
    grad, q, k, v, prompt_k, prompt_v, out, _ = saved
    batch, heads, tokens, width = q.shape
    count = prompt_k.shape[1] if prompts else 0
    arch = architecture(q.device)
    tile = tiles.key_tiles(arch, width, q.element_size(), tokens, tokens if images else count)
    per_split = tiles.images_per_split(arch, batch, heads, count, tile.rows)
    splits = -(-batch // per_split)
    partial = q.new_empty(2, splits, heads * count * width, dtype=torch.float32)
    arguments = [
        *saved, delta, results[0], partial,
        *_strides(grad, q, k, v), *_strides(prompt_k, prompt_v), *_strides(out),
        batch, tokens, count, heads, splits, per_split, scale, images,
    ]  # fmt: skip

    def programs(rows: int) -> int:
        of_prompts = splits * heads * -(-count // rows)
        return of_prompts + (batch * heads * -(-tokens // rows) if images else 0)

    _launch(prompt_attention_key_kernel, programs, tile, q, arguments)
    if count:
        _sum_splits(partial, results[1], results[2])


def _sum_splits(partial: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
    _, splits, size = partial.shape
    with on_device(partial):
        grid = (-(-size // SUM_BLOCK), 2)
        prompt_attention_sum_kernel[grid](partial, grad_k, grad_v, splits, size, BLOCK=SUM_BLOCK)


def _launch(
    kernel: Any, programs: Callable[[int], int], tile: tiles.Tiles, q: Tensor, arguments: Sequence[Any]
) -> None:
    """Run a kernel with a tile, unless it has nothing to do."""
    count = programs(tile.rows)
    if count == 0:
        return
    width = q.shape[-1]
    precision = INTERPRETED if interpreting() else FLOAT32_PRODUCT
    with on_device(q):
        kernel[(count,)](
            *arguments, WIDTH=width, BLOCK_D=tiles.padded_width(width), PRECISION=precision,
            ROWS=tile.rows, STEP=tile.step, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def _strides(*tensors: Tensor) -> list[int]:
    """Steps between images, heads and rows of each tensor, or heads and rows for prompts."""
    return [step for tensor in tensors for step in tensor.stride()[:-1]]


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor if all its rows start at multiples of 16 bytes, else a copy that does."""
    steps = [step * tensor.element_size() for step in tensor.stride()[:-1]]
    if tensor.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
