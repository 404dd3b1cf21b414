"""Mean and variance of tokens, over all chunks and all ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spt_fast.clustering.chunks import ChunkedTokens, OneChunk
from spt_fast.ops.kmeans import assign_accumulate
from spt_fast.support.distributed import ALONE, Processes


class Moments(NamedTuple):
    """What is known about all tokens together, the same on every rank."""

    total: float  # their number, or their weight
    mean: Tensor  # [D] float32
    variance: float  # of a feature, on average; NaN or infinite where a token is


def moments(
    tokens: ChunkedTokens,
    weights: Tensor | None = None,  # [n] float32
    *,
    processes: Processes = ALONE,
    backend: str = "auto",
) -> Moments:
    """Moments by one read of all tokens. A rank may have none of them, but not every rank."""
    # Ranks are joined pairwise: the deviations from two means, and the distance between the means.
    everyone = [local for local in processes.gather(_local_moments(tokens, weights, backend)) if local]
    total, mean, squares = everyone[0]
    for more, its_mean, its_squares in everyone[1:]:
        gap = its_mean - mean
        squares += its_squares + float(gap.square().sum()) * total * more / (total + more)
        mean, total = mean + gap * (more / (total + more)), total + more
    return Moments(total, mean.float().to(tokens.device), max(squares, 0.0) / total / len(mean))


def mean_of(tokens: Tensor, weights: Tensor | None, backend: str = "auto") -> Tensor:
    """Weighted mean [D] of tokens [n, D], float32, from sums in float64."""
    return moments(OneChunk(tokens), weights, backend=backend).mean


def _local_moments(
    tokens: ChunkedTokens, weights: Tensor | None, backend: str
) -> tuple[float, Tensor, float] | None:
    """This rank's total, mean [D] (float64, on the host) and summed squared distance to that mean."""
    anchor: Tensor | None = None  # any token: keeps the float32 sums small where the data lie far from zero
    total, sums, squares = 0.0, torch.zeros((), dtype=torch.float64, device="cpu"), 0.0
    first = 0
    for chunk in tokens.chunks():
        anchor = chunk[:1].float().clone() if anchor is None else anchor
        of_chunk = None if weights is None else weights[None, first : first + len(chunk)]
        found = assign_accumulate(chunk[None], anchor[None], shift=anchor, weights=of_chunk, backend=backend)
        # One copy from a device.
        facts = torch.cat([found.sums[0, 0], found.counts[0], found.inertia]).cpu()
        sums = sums + facts[:-2]
        total, squares = total + float(facts[-2]), squares + float(facts[-1])
        first += len(chunk)
    if anchor is None:
        return None
    mean = sums / total
    return total, mean, squares - total * float((mean - anchor[0].double().cpu()).square().sum())
