"""`sigmoid_nmi` and its gradient as Triton kernels; the scores of an image that fits stay in registers.

Limits: float32, float16 and bfloat16, all arithmetic in float32; the caller has checked shapes, dtypes and
devices. Where the largest score of an image leads all others by more than 80, the result is 0. These kernels
have never run on a GPU.

An image of up to 64 prompts, 256 tokens and 8,192 scores, padded, is one program that reads prompts and
tokens once and writes only the results. Larger ones go through a buffer of scores of bounded size, small
enough for a GPU's second-level cache, which a second kernel sweeps. How precision is kept: docs/nmi.md.
`p_image` and `p_row` are the elements between two images, 0 where they share prompts, and two rows of the
prompts, `e_image` and `e_row` those of the tokens.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from spt_fast.ops import nmi_tiles as tiles
from spt_fast.ops.float32_products import full_product
from spt_fast.ops.nmi_cpu import Parts, add_prompt_gradients, prompts_of
from spt_fast.ops.triton_math import LEAST, SERIES_LIMIT, divergence_series, expm1, log1p
from spt_fast.ops.triton_support import interpreting, on_device

# A new batch size or number of prompts must not compile the kernels anew.
COUNTS = ["num_prompts", "num_tokens", "images"]
# Deviations below this share of 1 + their mean: their differences keep more digits than the ratio pi / (r c).
_NEARLY_EQUAL = tl.constexpr(0.25)
# A few roundings of a ratio near 1 in float32; less than this is no information.
_ROUNDING = tl.constexpr(1e-6)
# A smaller share has no reciprocal in float32.
_LEAST_SHARE = tl.constexpr(1e-37)


@triton.jit
def _score_tile(
    prompts,  # IN [N_p, D], of one image
    tokens,  # IN [N_e, D], of one image
    p_row, e_row, rows, columns, row_valid, column_valid, width,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores x_kj = p_k . e_j of `rows` k and `columns` j, [BLOCK_P, BLOCK_E].

    Products over BLOCK_D channels, added up with the rounding error of every sum (Knuth's two-sum).
    """
    high = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    low = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    prompt_lines = prompts + rows.to(tl.int64) * p_row
    token_lines = tokens + columns.to(tl.int64) * e_row
    for start in range(0, width, BLOCK_D):
        channels = start + tl.arange(0, BLOCK_D)
        in_width = channels < width
        p = tl.load(
            prompt_lines[:, None] + channels[None, :], mask=row_valid[:, None] & in_width[None, :], other=0.0
        )
        e = tl.load(
            token_lines[None, :] + channels[:, None],
            mask=column_valid[None, :] & in_width[:, None],
            other=0.0,
        )
        product = tl.dot(p, e, input_precision="ieee")
        total = high + product
        added = total - high
        low += (high - (total - added)) + (product - added)
        high = total
    return high + low


@triton.jit
def _mass(scores, top, valid):
    """m = sigmoid(x) / sigmoid(top) and its deviation m - 1, each to float32's relative precision.

    With b = x - top: m = sigmoid(x) + exp(b) (1 - sigmoid(x)) and m - 1 = (exp(b) - 1) (1 - sigmoid(x)).
    """
    below = tl.where(valid, scores - top, 0.0)
    rest = 1.0 / (1.0 + tl.exp(scores))  # 1 - sigmoid
    mass = 1.0 / (1.0 + tl.exp(-scores)) + tl.exp(below) * rest
    return tl.where(valid, mass, 0.0), tl.where(valid, expm1(below) * rest, 0.0)


@triton.jit
def _inverse(shares):
    """1 / shares, 0 where a share is too small to have one."""
    return tl.where(shares > _LEAST_SHARE, 1.0 / tl.where(shares > _LEAST_SHARE, shares, 1.0), 0.0)


@triton.jit
def _excess(share, own, per_row, row, per_column, column, scale):
    """The excess e = pi / (r c) - 1, from the share pi, 1 / r and 1 / c, and from deviations less their mean.

    With the mean deviation g, and d, a and b of the pair, its row and its column less g:

        e = ((1 + g) (d - a - b) - a b) / ((1 + g + a) (1 + g + b))

    which is used where all deviations are small; elsewhere the ratio. `scale` is 1 + g.
    """
    interaction = scale * (own - row - column) - row * column
    near = interaction / ((scale + row) * (scale + column))
    far = share * per_row * per_column - 1.0
    far = tl.where(tl.abs(far) < _ROUNDING, 0.0, far)
    largest = tl.maximum(tl.abs(own), tl.maximum(tl.abs(row), tl.abs(column)))
    return tl.where(largest < scale * _NEARLY_EQUAL, near, far)


@triton.jit
def _information_terms(share, excess, independent):
    """r c [(1 + e) log(1 + e) - e], whose sum is I: no term is negative. `independent` is r c."""
    near = independent * excess * excess * divergence_series(excess)
    far = share * (log1p(excess) - 1.0) + independent
    return tl.where(tl.abs(excess) < SERIES_LIMIT, near, far)


@triton.jit
def _entropy(shares, index):
    """-sum p log p; the logarithm of the largest, which may round to 1, comes from the sum of the others."""
    # The interpreter has no argmax of NaN alone.
    is_top = index == tl.argmax(tl.where(shares >= 0, shares, 0.0), 0)
    others = tl.where(is_top, 0.0, shares)
    rest = tl.sum(others, 0)
    logs = tl.log(tl.where(others > 0, others, 1.0))
    return -tl.sum(others * logs, 0) - (1.0 - rest) * log1p(-rest)


@triton.jit
def _store_parts(parts, image, images, information, prompt_entropy, token_entropy, poison):
    """NMI, I, H(P), H(E) of one image in the rows of [4, images]."""
    information = tl.maximum(information, 0.0) + poison
    entropies = prompt_entropy + token_entropy
    safe = tl.where(entropies == 0.0, 1.0, entropies)
    tl.store(parts + image, tl.where(entropies == 0.0, 0.0, 2.0 * information / safe) + poison)
    tl.store(parts + images + image, information)
    tl.store(parts + 2 * images + image, prompt_entropy + poison)
    tl.store(parts + 3 * images + image, token_entropy + poison)


@triton.jit(do_not_specialize=COUNTS)
def nmi_fused_kernel(
    prompts,  # IN [N_p, D] or [B, N_p, D]
    tokens,  # IN [B, N_e, D]
    parts,  # OUT [4, B] float32: NMI, I, H(P), H(E)
    r,  # OUT [B, N_p] float32
    c,  # OUT [B, N_e] float32
    p_image, p_row, e_image, e_row, num_prompts, num_tokens, images, width,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """NMI = 2 I / (H(P) + H(E)) (eq. 8) of one image, from its scores x in one tile:

        pi = sigmoid(x) / sum (eq. 7),   r, c = its marginals,   e = pi / (r c) - 1,
        I = sum r c [(1 + e) log(1 + e) - e],   H(P) = -sum r log r,   H(E) = -sum c log c

    docs/nmi.md says why I is not computed as sum pi log(pi / (r c)).
    """
    image = tl.program_id(0).to(tl.int64)
    rows, columns = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_E)
    row_valid, column_valid = rows < num_prompts, columns < num_tokens
    valid = row_valid[:, None] & column_valid[None, :]
    scores = _score_tile(
        prompts + image * p_image, tokens + image * e_image, p_row, e_row,
        rows, columns, row_valid, column_valid, width,
        BLOCK_P, BLOCK_E, BLOCK_D,
    )  # fmt: skip
    top = tl.max(tl.max(tl.where(valid, scores, float("-inf")), 1), 0)
    # NaN where a score is NaN or infinite.
    poison = tl.sum(tl.sum(tl.where(valid, scores - scores, 0.0), 1), 0)
    mass, deviation = _mass(scores, top, valid)
    row, column = tl.sum(mass, 1), tl.sum(mass, 0)
    row_deviation = tl.sum(deviation, 1)
    total = tl.sum(row, 0)
    mean = tl.sum(row_deviation, 0) / num_prompts / num_tokens
    row, column = row / total, column / total
    row_deviation = row_deviation / num_tokens - mean
    column_deviation = tl.sum(deviation, 0) / num_prompts - mean
    share = mass / total
    excess = _excess(
        share, deviation - mean, _inverse(row)[:, None], row_deviation[:, None],
        _inverse(column)[None, :], column_deviation[None, :], 1.0 + mean,
    )  # fmt: skip
    terms = _information_terms(share, excess, row[:, None] * column[None, :])
    information = tl.sum(tl.sum(tl.where(valid, terms, 0.0), 1), 0)
    information = tl.where((num_prompts == 1) | (num_tokens == 1), 0.0, information)
    tl.store(r + image * num_prompts + rows, row + poison, mask=row_valid)
    tl.store(c + image * num_tokens + columns, column + poison, mask=column_valid)
    _store_parts(
        parts, image, images, information,
        _entropy(row, rows), _entropy(column, columns), poison,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def nmi_scores_kernel(
    prompts,  # IN [N_p, D] or [B, N_p, D]
    tokens,  # IN [B, N_e, D]
    scores,  # OUT [B, N_p, N_e] float32
    p_image, p_row, e_image, e_row, num_prompts, num_tokens, width,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x_kj = p_k . e_j: one tile of the scores of one image."""
    image = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(2) * BLOCK_E + tl.arange(0, BLOCK_E)
    row_valid, column_valid = rows < num_prompts, columns < num_tokens
    tile = _score_tile(
        prompts + image * p_image, tokens + image * e_image, p_row, e_row,
        rows, columns, row_valid, column_valid, width,
        BLOCK_P, BLOCK_E, BLOCK_D,
    )  # fmt: skip
    places = scores + (image * num_prompts + rows[:, None]) * num_tokens + columns[None, :]
    tl.store(places, tile, mask=row_valid[:, None] & column_valid[None, :])


@triton.jit
def _load_tile(scores, first_row, first_column, num_prompts, num_tokens, BLOCK_P, BLOCK_E):
    """A tile of one image's scores [N_p, N_e], where it is valid, its rows, columns and pointers."""
    rows = first_row + tl.arange(0, BLOCK_P)
    columns = first_column + tl.arange(0, BLOCK_E)
    valid = (rows < num_prompts)[:, None] & (columns < num_tokens)[None, :]
    places = scores + rows[:, None] * num_tokens + columns[None, :]
    return tl.load(places, mask=valid, other=0.0), valid, rows, columns, places


@triton.jit(do_not_specialize=COUNTS)
def nmi_sweep_kernel(
    scores,  # IN [B, N_p, N_e] float32: x; OUT dL/dx with GRADIENT
    parts,  # OUT [4, B] float32: NMI, I, H(P), H(E); IN with GRADIENT
    r,  # OUT [B, N_p] float32; not written with GRADIENT
    c,  # OUT [B, N_e] float32; not written with GRADIENT
    of_rows,  # scratch [2, B, N_p] float32: sums and mean deviations
    of_columns,  # scratch [2, B, N_e] float32
    coefficients,  # IN [B, 3] float32: dL/dI, dL/dH(P), dL/dH(E); not read without GRADIENT
    num_prompts, num_tokens, images,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr, ALL_P: tl.constexpr, ALL_E: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """The formulas of `nmi_fused_kernel` for one image whose scores are in memory; with GRADIENT, instead,

        dL/dx = pi (1 - sigmoid(x)) (A u - B log r - C log c - (A I + B H(P) + C H(E))),  u = log(pi / (r c))

    in place of the scores, for A, B, C = dL/dI, dL/dH(P), dL/dH(E). The program sweeps four times over the
    tiles, which come from the cache: for the largest score, for sums of rows, for sums of columns, and for
    the information or the gradient. Nothing is overwritten that another thread may still read: sums and
    marginals lie apart, and a barrier stands before scores become gradients.
    """
    image = tl.program_id(0).to(tl.int64)
    scores += image * num_prompts * num_tokens
    row_sums, column_sums = of_rows + image * num_prompts, of_columns + image * num_tokens
    row_deviations = row_sums + images.to(tl.int64) * num_prompts
    column_deviations = column_sums + images.to(tl.int64) * num_tokens

    highest = tl.full([BLOCK_P], float("-inf"), tl.float32)
    poisons = tl.zeros([BLOCK_P], tl.float32)
    for first_row in range(0, num_prompts, BLOCK_P):
        for first_column in range(0, num_tokens, BLOCK_E):
            x, valid, rows, columns, places = _load_tile(
                scores, first_row, first_column, num_prompts, num_tokens, BLOCK_P, BLOCK_E
            )
            highest = tl.maximum(highest, tl.max(tl.where(valid, x, float("-inf")), 1))
            poisons += tl.sum(tl.where(valid, x - x, 0.0), 1)
    top = tl.max(highest, 0)
    poison = tl.sum(poisons, 0)

    totals = tl.zeros([BLOCK_P], tl.float32)
    total_deviations = tl.zeros([BLOCK_P], tl.float32)
    for first_row in range(0, num_prompts, BLOCK_P):
        row = tl.zeros([BLOCK_P], tl.float32)
        deviations = tl.zeros([BLOCK_P], tl.float32)
        rows = first_row + tl.arange(0, BLOCK_P)
        for first_column in range(0, num_tokens, BLOCK_E):
            x, valid, rows, columns, places = _load_tile(
                scores, first_row, first_column, num_prompts, num_tokens, BLOCK_P, BLOCK_E
            )
            mass, deviation = _mass(x, top, valid)
            row += tl.sum(mass, 1)
            deviations += tl.sum(deviation, 1)
        totals += row
        total_deviations += deviations
        tl.store(row_sums + rows, row, mask=rows < num_prompts)
        tl.store(row_deviations + rows, deviations / num_tokens, mask=rows < num_prompts)
    total = tl.sum(totals, 0)
    mean = tl.sum(total_deviations, 0) / num_prompts / num_tokens

    for first_column in range(0, num_tokens, BLOCK_E):
        column = tl.zeros([BLOCK_E], tl.float32)
        deviations = tl.zeros([BLOCK_E], tl.float32)
        columns = first_column + tl.arange(0, BLOCK_E)
        for first_row in range(0, num_prompts, BLOCK_P):
            x, valid, rows, columns, places = _load_tile(
                scores, first_row, first_column, num_prompts, num_tokens, BLOCK_P, BLOCK_E
            )
            mass, deviation = _mass(x, top, valid)
            column += tl.sum(mass, 0)
            deviations += tl.sum(deviation, 0)
        tl.store(column_sums + columns, column, mask=columns < num_tokens)
        tl.store(column_deviations + columns, deviations / num_prompts, mask=columns < num_tokens)
    # Other threads of the program read what these have written.
    tl.debug_barrier()

    if GRADIENT:
        of_information = tl.load(coefficients + image * 3)
        of_prompts = tl.load(coefficients + image * 3 + 1)
        of_tokens = tl.load(coefficients + image * 3 + 2)
        average = of_information * tl.load(parts + images + image)
        average += of_prompts * tl.load(parts + 2 * images + image)
        average += of_tokens * tl.load(parts + 3 * images + image)
    information = tl.zeros([BLOCK_P], tl.float32)
    for first_row in range(0, num_prompts, BLOCK_P):
        rows = first_row + tl.arange(0, BLOCK_P)
        row = tl.load(row_sums + rows, mask=rows < num_prompts, other=1.0) / total
        row_deviation = tl.load(row_deviations + rows, mask=rows < num_prompts, other=0.0) - mean
        for first_column in range(0, num_tokens, BLOCK_E):
            x, valid, rows, columns, places = _load_tile(
                scores, first_row, first_column, num_prompts, num_tokens, BLOCK_P, BLOCK_E
            )
            column = tl.load(column_sums + columns, mask=columns < num_tokens, other=1.0) / total
            column_deviation = tl.load(column_deviations + columns, mask=columns < num_tokens, other=0.0)
            mass, deviation = _mass(x, top, valid)
            share = mass / total
            excess = _excess(
                share, deviation - mean, _inverse(row)[:, None], row_deviation[:, None],
                _inverse(column)[None, :], (column_deviation - mean)[None, :], 1.0 + mean,
            )  # fmt: skip
            if GRADIENT:
                inner = of_information * log1p(excess) - average
                inner -= of_prompts * tl.log(tl.maximum(row, LEAST))[:, None]
                inner -= of_tokens * tl.log(tl.maximum(column, LEAST))[None, :]
                slope = share / (1.0 + tl.exp(x)) * inner + poison
                tl.debug_barrier()
                tl.store(places, slope, mask=valid)
            else:
                terms = _information_terms(share, excess, row[:, None] * column[None, :])
                information += tl.sum(tl.where(valid, terms, 0.0), 1)

    if not GRADIENT:
        index = tl.arange(0, ALL_P)
        shares = tl.load(row_sums + index, mask=index < num_prompts, other=0.0) / total
        prompt_entropy = _entropy(shares, index)
        tl.store(r + image * num_prompts + index, shares + poison, mask=index < num_prompts)
        index = tl.arange(0, ALL_E)
        shares = tl.load(column_sums + index, mask=index < num_tokens, other=0.0) / total
        token_entropy = _entropy(shares, index)
        tl.store(c + image * num_tokens + index, shares + poison, mask=index < num_tokens)
        one = (num_prompts == 1) | (num_tokens == 1)
        result = tl.where(one, 0.0, tl.sum(information, 0))
        _store_parts(parts, image, images, result, prompt_entropy, token_entropy, poison)


def launch_nmi_forward(
    prompts: Tensor,  # [N_p, D] or [B, N_p, D]
    tokens: Tensor,  # [B, N_e, D]
) -> Parts:
    """What `nmi_cpu.nmi_forward` returns, in float32."""
    prompts, tokens = _rows_contiguous(prompts), _rows_contiguous(tokens)
    num_prompts, (images, num_tokens, width) = prompts.shape[-2], tokens.shape
    parts = tokens.new_empty((4, images), dtype=torch.float32)
    r = tokens.new_empty((images, num_prompts), dtype=torch.float32)
    c = tokens.new_empty((images, num_tokens), dtype=torch.float32)
    block_p, block_e = tiles.padded(num_prompts), tiles.padded(num_tokens)
    with on_device(tokens):
        if tiles.is_fused(block_p, block_e):
            nmi_fused_kernel[(images,)](
                prompts, tokens, parts, r, c, *_steps(prompts), *_steps(tokens),
                num_prompts, num_tokens, images, width,
                BLOCK_P=block_p, BLOCK_E=block_e, BLOCK_D=tiles.CHANNELS[tokens.dtype],
                num_warps=tiles.fused_warps(block_p, block_e), num_stages=tiles.STAGES,
            )  # fmt: skip
        else:
            for first, last in _chunks(num_prompts, tokens):
                found = torch.empty_like(parts[:, first:last])
                scores = _launch_scores(prompts_of(prompts, first, last), tokens[first:last])
                _launch_sweep(scores, found, r[first:last], c[first:last], None)
                parts[:, first:last] = found
    nmi, information, prompt_entropy, token_entropy = (row.clone() for row in parts)
    return nmi, information, prompt_entropy, token_entropy, r, c


def launch_nmi_backward(
    prompts: Tensor,  # [N_p, D] or [B, N_p, D]
    tokens: Tensor,  # [B, N_e, D]
    coefficients: Tensor,  # [B, 3] float64: dL/dI, dL/dH(P), dL/dH(E)
    information: Tensor,  # [B]
    prompt_entropy: Tensor,  # [B]
    token_entropy: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:
    """What `nmi_cpu.nmi_backward` returns."""
    grad_tokens = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    rows, tokens = _rows_contiguous(prompts), _rows_contiguous(tokens)
    coefficients = coefficients.float().contiguous()
    parts = torch.stack((information, information, prompt_entropy, token_entropy))
    grad_prompts = prompts.new_zeros(prompts.shape, dtype=torch.float32)
    with on_device(tokens):
        for first, last in _chunks(prompts.shape[-2], tokens):
            own, chunk = prompts_of(rows, first, last), tokens[first:last]
            slopes = _launch_scores(own, chunk)
            own_parts = parts[:, first:last].contiguous()
            _launch_sweep(slopes, own_parts, own_parts, own_parts, coefficients[first:last])
            add_prompt_gradients(grad_prompts, first, full_product(slopes, chunk.float()))
            grad_tokens[first:last] = full_product(slopes.mT, own.float())
    return grad_prompts.to(prompts.dtype), grad_tokens


def _launch_scores(prompts: Tensor, tokens: Tensor) -> Tensor:
    """Scores [B, N_p, N_e] in float32."""
    num_prompts, (images, num_tokens, width) = prompts.shape[-2], tokens.shape
    scores = tokens.new_empty((images, num_prompts, num_tokens), dtype=torch.float32)
    block_p, block_e = tiles.SCORES_PROMPTS, tiles.SCORES_TOKENS
    nmi_scores_kernel[(images, triton.cdiv(num_prompts, block_p), triton.cdiv(num_tokens, block_e))](
        prompts, tokens, scores, *_steps(prompts), *_steps(tokens),
        num_prompts, num_tokens, width,
        BLOCK_P=block_p, BLOCK_E=block_e, BLOCK_D=tiles.CHANNELS[tokens.dtype],
        num_warps=tiles.WARPS, num_stages=tiles.STAGES,
    )  # fmt: skip
    return scores


def _launch_sweep(scores: Tensor, parts: Tensor, r: Tensor, c: Tensor, coefficients: Tensor | None) -> None:
    """Fill `parts`, `r` and `c` from scores; with coefficients turn only the scores into dL/dscores."""
    images, num_prompts, num_tokens = scores.shape
    of_rows, of_columns = (scores.new_empty(2, images, count) for count in scores.shape[1:])
    nmi_sweep_kernel[(images,)](
        scores, parts, r, c, of_rows, of_columns,
        parts if coefficients is None else coefficients, num_prompts, num_tokens, images,
        BLOCK_P=tiles.SWEEP_PROMPTS, BLOCK_E=tiles.SWEEP_TOKENS,
        ALL_P=tiles.padded(num_prompts), ALL_E=tiles.padded(num_tokens), GRADIENT=coefficients is not None,
        num_warps=tiles.WARPS, num_stages=tiles.STAGES, maxnreg=tiles.SWEEP_REGISTERS,
    )  # fmt: skip


def _chunks(num_prompts: int, tokens: Tensor) -> Iterator[tuple[int, int]]:
    """Images whose scores fit into the buffer: the first, and the one after the last."""
    images = tiles.images_per_chunk(num_prompts, tokens.shape[1])
    for first in range(0, len(tokens), images):
        yield first, min(first + images, len(tokens))


def _steps(rows: Tensor) -> tuple[int, int]:
    """Elements between two images and between two rows of [B, N, D]; all images share [N, D]."""
    return (0, rows.stride(0)) if rows.dim() == 2 else (rows.stride(0), rows.stride(1))


def _rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor if its last dimension is contiguous, else a copy."""
    if interpreting() and tensor.dtype == torch.bfloat16:
        # The interpreter multiplies the bits of bfloat16 as if they were integers; float32 holds the numbers.
        tensor = tensor.float()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
