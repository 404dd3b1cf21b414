"""Tokens as directions, for k-means by cosine: unit vectors, and what length their prototypes get.

Of a prompt, a block's attention sees little more than the direction: the norm before it divides by the
length. So tokens of the same direction are the same here, however long they are. Their prototypes get the
mean length of the tokens of their layer, so that rates and shallow prompts find the lengths that they are
used to.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from spt_fast.support.distributed import Processes

METRICS = ("euclidean", "cosine")
_FACT = "token_lengths"
_TINY = torch.finfo(torch.float32).tiny


class Directions:
    """Turns tokens into directions and adds up their lengths, layer by layer."""

    def __init__(self, n_layers: int, device: torch.device) -> None:
        self._sums = torch.zeros(n_layers, dtype=torch.float64, device=device)

    def of(self, layer: int, tokens: Tensor) -> Tensor:
        """Tokens [..., D] at length 1 in their own dtype; a token of zeros stays as it is."""
        wide = tokens.float()
        lengths: Tensor = wide.norm(dim=-1, keepdim=True)
        self._sums[layer] += lengths.sum(dtype=torch.float64)
        return (wide / lengths.clamp_min(_TINY)).to(tokens.dtype)

    def facts(self, processes: Processes, num_tokens: int) -> dict[str, str]:
        """For the metadata: the metric, and the mean length of the tokens of each layer, of all ranks."""
        sums = [sum(of_layer) for of_layer in zip(*processes.gather(self._sums.tolist()), strict=True)]
        return {"metric": "cosine", _FACT: _text([each / num_tokens for each in sums])}


def at_mean_length(prompts: Tensor, metadata: Mapping[str, str]) -> Tensor:
    """Centres [G, N_p, D] as prompts: as they are, or at the lengths that `metadata` of directions say."""
    if _FACT not in metadata:
        return prompts
    wanted = prompts.new_tensor(_lengths(metadata))[:, None, None]
    found: Tensor = prompts.norm(dim=-1, keepdim=True)
    # The centre of tokens of zeros has no direction, and stays as they do: 0 times an infinite ratio is NaN.
    return torch.where(found > 0, prompts * (wanted / found.clamp_min(_TINY)), prompts)


def merged_facts(sets: list[tuple[Mapping[str, str], int]]) -> dict[str, str]:
    """What the metadata of several passes, each with its number of tokens, say of all their tokens."""
    if not all(_FACT in metadata for metadata, _ in sets):
        return {}
    total = sum(count for _, count in sets)
    weighted = [[length * count for length in _lengths(metadata)] for metadata, count in sets]
    return {_FACT: _text([sum(of_layer) / total for of_layer in zip(*weighted, strict=True)])}


def _lengths(metadata: Mapping[str, str]) -> list[float]:
    return [float(each) for each in metadata[_FACT].split()]


def _text(lengths: list[float]) -> str:
    return " ".join(map(repr, lengths))
