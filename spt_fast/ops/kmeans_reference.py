"""The k-means primitives in plain PyTorch: oracle of the tests and fallback at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from spt_fast.ops.float32_products import full_product


def distances_reference(
    tokens: Tensor,  # [G, M, D]
    centers: Tensor,  # [G, K, D]
    shift: Tensor | None = None,  # [G, D]
) -> Tensor:
    """Squared distances [G, M, K], in the dtype of `centers`."""
    x, c = tokens.to(centers.dtype), centers
    if shift is not None:
        x, c = x - shift.to(c.dtype)[:, None], c - shift.to(c.dtype)[:, None]
    products = full_product(x, c.mT)
    squared = x.square().sum(-1)[:, :, None] - 2 * products + c.square().sum(-1)[:, None, :]
    return squared.clamp_min(0)


def assign_accumulate_reference(
    tokens: Tensor,  # [G, M, D]
    centers: Tensor,  # [G, K, D]
    shift: Tensor | None = None,  # [G, D]
    weights: Tensor | None = None,  # [G, M]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sums [G, K, D], counts [G, K] and inertia [G] in float64; labels [G, M]; squared distances [G, M]."""
    nearest, labels = distances_reference(tokens, centers, shift).min(dim=-1)
    weight = torch.ones_like(nearest) if weights is None else weights
    weight = weight.double()
    weighted = tokens.double() * weight[:, :, None]
    sums = torch.zeros(centers.shape, dtype=torch.float64, device=centers.device)
    sums.scatter_add_(1, labels[:, :, None].expand_as(weighted), weighted)
    counts = torch.zeros(centers.shape[:2], dtype=torch.float64, device=centers.device)
    counts.scatter_add_(1, labels, weight)
    inertia = (weight * nearest.double()).sum(-1)
    return sums, counts, inertia, labels.int(), nearest
