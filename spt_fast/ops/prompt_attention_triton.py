"""`prompt_attention` as Triton kernels, forward and backward, which never join prompts and images in memory.

Limits: float32, float16 and bfloat16 with float32 sums; head widths up to 128; the last dimension of every
tensor contiguous; the caller has checked everything else. These kernels have never run on a GPU.

Keys are counted as if the prompts stood in front of the image's tokens: a tile of keys may hold some of both,
so that the two are padded together. A row's number tells which tensor it comes from. Rows beyond an end are
masked. Offsets of rows are 64-bit. `x_image`, `x_head`, `x_row` and `x_task` are the elements between two
images, heads, rows and tasks of a tensor x.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spt_fast.ops import prompt_attention_tiles as tiles
from spt_fast.ops.prompt_attention_shapes import empty_gradients, empty_output
from spt_fast.ops.triton_support import architecture, interpreting, on_device

# exp(x) is exp2(x log2(e)): the hardware has exp2.
_LOG2_E = tl.constexpr(1.4426950408889634)
# Three products of TensorFloat-32 give float32's precision, except for the last two bits or so.
FLOAT32_PRODUCT = "tf32x3"
# The interpreter multiplies the bits of bfloat16 as if they were integers; float32 holds the same numbers.
INTERPRETED = tl.constexpr("interpreted")
# Elements that a program of the last kernel sums, few enough for many programs; splits that it reads per
# step; and stages, with which each of its 128 threads has eight copies of 16 bytes under way.
SUM_COLUMNS, SUM_ROWS, SUM_STAGES = 128, 8, 5
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
    """Pointers [ROWS, BLOCK_D] and their mask, from pointers [ROWS] to the start of each row.

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
    """Store `values` [ROWS, BLOCK_D] up to WIDTH, where valid."""
    places, mask = _places(pointers, valid, WIDTH, BLOCK_D)
    tl.store(places, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _key_rows(index, prompts, prompt_base, prompt_stride, image_base, image_stride):
    """Pointers [ROWS] to keys (or values) `index` [ROWS], counted with the prompts in front."""
    row = index.to(tl.int64)
    from_prompt, from_image = prompt_base + row * prompt_stride, image_base + (row - prompts) * image_stride
    return tl.where(index < prompts, from_prompt, from_image)


@triton.jit
def _after_all_reads(pointers, PRECISION: tl.constexpr):
    """`pointers`, once every thread of the program has read what it will read before.

    `tl.debug_barrier` in a loop makes Triton issue no copy ahead of its step.
    """
    if PRECISION != INTERPRETED:
        pointers += tl.inline_asm_elementwise(
            "bar.sync 0; mov.b32 $0, 0;", "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1
        )
    return pointers


@triton.jit
def _tile_head_image(tiles, heads):
    """Tile, head and image of this program; the tiles of a head lie side by side."""
    program = tl.program_id(0)
    head = ((program // tiles) % heads).to(tl.int64)
    return program % tiles, head, (program // tiles // heads).to(tl.int64)


@triton.jit(do_not_specialize=_COUNTS)
def prompt_attention_forward_kernel(
    q,  # IN [B, H, N, d]
    k,  # IN [B, H, N, d]
    v,  # IN [B, H, N, d]
    prompt_k,  # IN [H, N_p, d]; with HAS_TASK [T, H, N_p, d]
    prompt_v,  # IN like prompt_k
    task,  # IN [B] int64 contiguous; not read without HAS_TASK
    out,  # OUT [B, N, H, d] contiguous
    lse,  # OUT [B, H, N] float32 contiguous
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    pk_task, pk_head, pk_row, pv_task, pv_head, pv_row,
    tokens, prompts, heads, tasks, scale_log2,
    HAS_TASK: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """O = softmax(s Q K^T) V with K = [prompt_k; k], V = [prompt_v; v] (eq. 6, 13); L = log sum exp(s Q K^T).

    A program makes ROWS queries of one head of one image, STEP keys at a time, with an online softmax: sums
    and output are kept relative to the largest score so far, and shrunk where a larger one turns up.
    `scale_log2` is s log2(e). An image whose task is out of range gets NaN.
    """
    tile, head, image = _tile_head_image(tl.cdiv(tokens, ROWS), heads)
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
    sums = (highest + tl.log2(total)) / _LOG2_E
    tl.store(lse + (image * heads + head) * tokens + row, sums, mask=row_valid)


@triton.jit(do_not_specialize=_COUNTS)
def prompt_attention_backward_kernel(
    grad,  # IN [B, H, N, d]: dL/dO
    q,  # IN [B, H, N, d]
    k,  # IN [B, H, N, d]
    v,  # IN [B, H, N, d]
    prompt_k,  # IN [H, N_p, d]
    prompt_v,  # IN [H, N_p, d]
    out,  # IN [B, H, N, d]: O
    lse,  # IN [B, H, N] float32 contiguous: L
    running,  # INOUT [B, H, N, d] float32 contiguous: dL/dQ up to now; unused with one tile of keys
    packed,  # OUT [B, N, 3, H, d] contiguous: dL/dQ, dL/dK, dL/dV of the images; unused without IMAGES
    partial,  # OUT [2, splits, H, N_p, d] float32 contiguous: dL/dK, dL/dV of the prompts, if PROMPTS
    grad_image, grad_head, grad_row, q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    pk_head, pk_row, pv_head, pv_row, out_image, out_head, out_row,
    images, tokens, prompts, heads, splits, per_split, scale,
    IMAGES: tl.constexpr, PROMPTS: tl.constexpr, TRANSPOSED: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of O = P V, P = exp(s Q K^T - L), from dO = dL/dO, with K, V, L as in the forward kernel:

        dV = P^T dO,   dS = P * (dO V^T - rowsum(dO * O)),   dQ = s dS K,   dK = s dS^T Q

    A program owns all keys and all queries of one head of one image, so that it adds up dQ by itself: ROWS
    keys after ROWS keys, in `running`, the last ones into `packed`. Without IMAGES it owns the prompts of
    one head and the queries of `per_split` images. dK and dV of the prompts go to `partial`, to be summed.
    """
    _tile, head, split = _tile_head_image(1, heads)
    first_image = split * per_split
    queries_end = tl.minimum(per_split, images - first_image).to(tl.int32) * tokens
    prompt_k += head * pk_head
    prompt_v += head * pv_head
    k += split * k_image + head * k_head
    v += split * v_image + head * v_head
    keys_end = prompts
    if IMAGES:
        keys_end += tokens
    for first in range(0, keys_end, ROWS):
        index = first + tl.arange(0, ROWS)
        key_valid = index < keys_end
        # Vectors, because the interpreter takes no Python number for a part of a mask.
        not_first = tl.full([STEP], first, tl.int32) > 0
        keys = _load_rows(_key_rows(index, prompts, prompt_k, pk_row, k, k_row), key_valid, WIDTH, BLOCK_D)
        values = _load_rows(_key_rows(index, prompts, prompt_v, pv_row, v, v_row), key_valid, WIDTH, BLOCK_D)
        grad_keys = tl.zeros([ROWS, BLOCK_D], tl.float32)
        grad_values = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for start in range(0, queries_end, STEP):
            query = start + tl.arange(0, STEP)
            valid = query < queries_end
            image, token = first_image, query.to(tl.int64)
            if not IMAGES:
                image, token = first_image + query // tokens, token % tokens
            queries = _load_rows(q + image * q_image + head * q_head + token * q_row, valid, WIDTH, BLOCK_D)
            grads = _load_rows(
                grad + image * grad_image + head * grad_head + token * grad_row, valid, WIDTH, BLOCK_D
            )
            outs = _load_rows(
                out + image * out_image + head * out_head + token * out_row, valid, WIDTH, BLOCK_D
            )
            dots = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), 1)
            statistic = (image * heads + head) * tokens + token
            sums = tl.load(lse + statistic, mask=valid, other=float("inf")) * _LOG2_E
            if IMAGES:
                so_far = running + statistic * WIDTH
                # Asked for before the products, so that it arrives beside them.
                carried = _load_rows(so_far, valid & not_first, WIDTH, BLOCK_D)
            # Transposed: keys down, queries across.
            scores = _product(keys, queries.T, None, PRECISION) * (scale * _LOG2_E)
            # A key beyond the end is zero, but its weight may be infinite.
            exponents = tl.where(key_valid[:, None], scores - sums[None, :], float("-inf"))
            weights = tl.exp2(exponents)
            grad_values = _product(weights.to(grads.dtype), grads, grad_values, PRECISION)
            grad_weights = _product(values, grads.T, None, PRECISION)
            grad_scores = (weights * (grad_weights - dots[None, :])).to(queries.dtype)
            grad_keys = _product(grad_scores, queries, grad_keys, PRECISION)
            if IMAGES:
                if TRANSPOSED:
                    grad_queries = _product(keys.T, grad_scores, None, PRECISION).T
                else:
                    grad_queries = _product(grad_scores.T, keys, None, PRECISION)
                grad_queries += carried
                if first + ROWS >= keys_end:
                    line = packed + (image * tokens * 3 * heads + head) * WIDTH
                    _store_rows(
                        line + token * (3 * heads * WIDTH), valid, grad_queries * scale, WIDTH, BLOCK_D
                    )
                else:
                    so_far = _after_all_reads(so_far, PRECISION)
                    _store_rows(so_far, valid, grad_queries, WIDTH, BLOCK_D)
        grad_keys *= scale
        if PROMPTS:
            of_prompts = index < prompts
            line = (split * heads + head) * prompts + index
            _store_rows(partial + line * WIDTH, of_prompts, grad_keys, WIDTH, BLOCK_D)
            line += splits * heads * prompts
            _store_rows(partial + line * WIDTH, of_prompts, grad_values, WIDTH, BLOCK_D)
        if IMAGES:
            of_image = key_valid & (index >= prompts)
            line = ((split * tokens + index - prompts) * 3 + 1) * heads + head
            _store_rows(packed + line * WIDTH, of_image, grad_keys, WIDTH, BLOCK_D)
            _store_rows(packed + (line + heads) * WIDTH, of_image, grad_values, WIDTH, BLOCK_D)
            # Another thread may read what this one has added up; a barrier orders global memory in a block.
            tl.debug_barrier()


# Reads are of 16 bytes where `size` is a multiple of 16, which Triton has to be told.
@triton.jit(do_not_specialize=["splits"])
def prompt_attention_sum_kernel(
    partial,  # IN [2, splits, size] float32, with size = H N_p d
    grad_k,  # OUT [size]
    grad_v,  # OUT [size]
    splits, size, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr, SUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Sum partial results over the splits, in a fixed order, into the gradients of the prompts."""
    index = tl.program_id(0) * SUM_COLUMNS + tl.arange(0, SUM_COLUMNS)
    valid = index < size
    partial += tl.program_id(1).to(tl.int64) * splits * size
    total = tl.zeros([SUM_ROWS, SUM_COLUMNS], tl.float32)
    for first in tl.range(0, splits, SUM_ROWS, num_stages=SUM_STAGES):
        row = first + tl.arange(0, SUM_ROWS)
        places = partial + row.to(tl.int64)[:, None] * size + index[None, :]
        total += tl.load(places, mask=(row < splits)[:, None] & valid[None, :], other=0.0)
    result = tl.sum(total, 0)
    if tl.program_id(1) == 0:
        tl.store(grad_k + index, result.to(grad_k.dtype.element_ty), mask=valid)
    else:
        tl.store(grad_v + index, result.to(grad_v.dtype.element_ty), mask=valid)


def launch_prompt_attention_forward(
    q: Tensor,  # [B, H, N, d]
    k: Tensor,  # [B, H, N, d]
    v: Tensor,  # [B, H, N, d]
    prompt_k: Tensor,  # [H, N_p, d]; [T, H, N_p, d] with a task
    prompt_v: Tensor,  # as prompt_k
    task: Tensor | None,  # [B] int64
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output [B, N, H, d], contiguous, and the logarithm of each softmax sum [B, H, N]."""
    q, k, v, prompt_k, prompt_v = (_aligned(tensor) for tensor in (q, k, v, prompt_k, prompt_v))
    batch, heads, tokens, width = q.shape
    out, lse = empty_output(q)
    prompts = prompt_k.shape[-2]
    per_task = [
        tensor.stride()[:-1] if task is not None else (0, *tensor.stride()[:-1])
        for tensor in (prompt_k, prompt_v)
    ]
    arguments = [
        q, k, v, prompt_k, prompt_v, q if task is None else task.contiguous(), out, lse,
        *_strides(q, k, v), *per_task[0], *per_task[1],
        tokens, prompts, heads, prompt_k.shape[0], scale * _LOG2_E.value, task is not None,
    ]  # fmt: skip
    tile = tiles.forward_tiles(architecture(q.device), width, q.element_size(), tokens, tokens + prompts)
    programs = batch * heads * -(-tokens // tile.rows)
    _launch(prompt_attention_forward_kernel, programs, tile, q, arguments)
    return out, lse


def launch_prompt_attention_backward(
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
    results = empty_gradients(q, prompt_k, images, prompts)
    # Batch, head and row in this order, whatever the order in memory.
    grad, out = grad.transpose(1, 2), out.transpose(1, 2)
    tensors = [_aligned(tensor) for tensor in (grad, q, k, v, prompt_k, prompt_v, out)]
    batch, heads, tokens, width = q.shape
    count = prompt_k.shape[1]
    keys = count + tokens if images else count
    arch = architecture(q.device)
    tile = tiles.backward_tiles(arch, width, q.element_size(), tokens, keys)
    per_split = 1 if images else tiles.images_per_split(arch, batch, heads)
    splits = -(-batch // per_split)
    partial = q.new_empty((2, splits, heads * count * width) if prompts else (0,), dtype=torch.float32)
    # Where all keys are one tile, no sum is carried on.
    running = q.new_empty(q.shape if images and keys > tile.rows else (0,), dtype=torch.float32)
    arguments = [
        *tensors, lse, running, results[0], partial, *_strides(*tensors),
        batch, tokens, count, heads, splits, per_split, scale, images, prompts, tile.transposed,
    ]  # fmt: skip
    if keys:
        _launch(prompt_attention_backward_kernel, splits * heads, tile, q, arguments)
    if prompts and count:
        _launch_sum(partial, results[1], results[2])
    return results


def _launch_sum(partial: Tensor, grad_k: Tensor, grad_v: Tensor) -> None:
    _, splits, size = partial.shape
    with on_device(partial):
        prompt_attention_sum_kernel[(-(-size // SUM_COLUMNS), 2)](
            partial, grad_k, grad_v, splits, size,
            SUM_ROWS=SUM_ROWS, SUM_COLUMNS=SUM_COLUMNS, SUM_STAGES=SUM_STAGES, num_warps=4,
        )  # fmt: skip


def _launch(kernel: Any, programs: int, tile: tiles.Tiles, q: Tensor, arguments: Sequence[Any]) -> None:
    width = q.shape[-1]
    precision = INTERPRETED if interpreting() else FLOAT32_PRODUCT
    with on_device(q):
        kernel[(programs,)](
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
