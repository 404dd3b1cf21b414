"""Tile sizes of the kernels in `nmi_triton.py`: a pure rule, no device is asked.

Limits: the rule was derived from registers and spills as compiled; no GPU has timed it.
"""

from __future__ import annotations

import torch

# The largest tiles of the fused kernel that leave no register to memory on sm_80, sm_90 and sm_100.
FUSED_PROMPTS, FUSED_TOKENS, FUSED_SCORES = 64, 256, 8192
# Of the kernel that fills the buffer of scores, and of the one that sweeps it.
SCORES_PROMPTS, SCORES_TOKENS = 32, 64
SWEEP_PROMPTS, SWEEP_TOKENS = 16, 64
# 2 ** 23 float32 scores are 32 MiB.
BUFFERED_SCORES = 2**23
# Within so many channels a dot product is summed plainly, between them with the rounding errors kept.
CHANNELS = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}
WARPS, STAGES = 8, 2
# Registers of a thread of the sweep, for two programs a multiprocessor. Triton 3.8 aims at three, and spills.
SWEEP_REGISTERS = 128


def padded(count: int) -> int:
    """Prompts or tokens as a tile holds them: a power of two, at least 16, which a matrix product needs."""
    return max(16, 1 << max(count - 1, 0).bit_length())


def is_fused(prompts: int, tokens: int) -> bool:
    """Whether the scores of one image, both sides padded, stay in the registers of one program."""
    return prompts <= FUSED_PROMPTS and tokens <= FUSED_TOKENS and prompts * tokens <= FUSED_SCORES


def fused_warps(prompts: int, tokens: int) -> int:
    """Warps of the fused kernel for a tile of that size: 16 scores a thread, where 2 to 16 warps give it."""
    return min(16, max(2, prompts * tokens // 512))


def images_per_chunk(prompts: int, tokens: int) -> int:
    """Images whose scores fit into the buffer together; 1 where not even one image's do."""
    return max(1, BUFFERED_SCORES // (prompts * tokens))
