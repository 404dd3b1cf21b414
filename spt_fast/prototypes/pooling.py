"""The strategies that need no clustering: prompts from the tokens of one batch (Sec. 3.4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spt_fast.ops.kmeans import assign_accumulate

_Pool = Callable[[Tensor, int, torch.Generator], Tensor]


def pool(
    strategy: str, tokens: Tensor, num_prompts: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts from tokens [M, D] of one layer, M >= N_p, and how well they stand for these tokens.

    Returns:
        prompts [N_p, D]; the number of tokens nearest to each [N_p], float64; the sum of the squared
        distances of the tokens to their nearest prompts, a float64 scalar. All on the device of `tokens`.
    """
    prompts = POOLS[strategy](tokens, num_prompts, generator)
    assigned = assign_accumulate(tokens[None], prompts[None], shift=tokens.mean(0, keepdim=True))
    return prompts, assigned.counts[0], assigned.inertia[0]


def windows_of_images(strategy: str, tokens: Tensor, num_prompts: int) -> Tensor:
    """Means or maxima of windows of each image's tokens, as in the released code: [B, N_e, D] to [B, N_p, D].

    The windows are of floor(N_e / (N_p - 1)) tokens, and a last one of what they leave over; where they leave
    nothing, there are N_p - 1.

    Raises:
        ValueError: there are fewer tokens than N_p - 1.
    """
    count = max(num_prompts - 1, 1)
    window = tokens.shape[1] // count
    if window == 0:
        raise ValueError(
            f"num_prompts must be at most {tokens.shape[1] + 1} for windows of single images, which have "
            f"{tokens.shape[1]} patch tokens, got {num_prompts}"
        )
    whole = tokens[:, : count * window].reshape(len(tokens), count, window, -1)
    rest = tokens[:, None, count * window :]
    parts = [whole, rest] if rest.shape[2] else [whole]
    return torch.cat([part.mean(2) if strategy == "mean" else part.amax(2) for part in parts], dim=1)


def _windows(tokens: Tensor, num_prompts: int) -> Tensor:
    """N_p windows of floor(M / N_p) tokens, [M, D] to [N_p, window, D]; the tokens left over are dropped."""
    window = len(tokens) // num_prompts
    return tokens[: num_prompts * window].reshape(num_prompts, window, -1)


def _mean(tokens: Tensor, num_prompts: int, _: torch.Generator) -> Tensor:
    return _windows(tokens, num_prompts).mean(1)


def _max(tokens: Tensor, num_prompts: int, _: torch.Generator) -> Tensor:
    return _windows(tokens, num_prompts).amax(1)


def _random(tokens: Tensor, num_prompts: int, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that the choice does not depend on the device.
    rows = torch.randperm(len(tokens), generator=generator, device="cpu")[:num_prompts]
    return tokens[rows.to(tokens.device)]


POOLS: dict[str, _Pool] = {"mean": _mean, "max": _max, "random": _random}
