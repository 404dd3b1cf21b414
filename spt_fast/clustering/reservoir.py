"""A weighted reservoir: a bounded sample of a stream of tokens, drawn by importance, that is unbiased."""

from __future__ import annotations

import torch
from torch import Tensor

from spt_fast.clustering.moments import mean_of
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.support.distributed import Processes

FIRST_ROWS = 32_768  # Room from the start; more is made as tokens come, for they may be few.


class PriorityReservoir:
    """Priority sampling (Duffield, Lund and Thorup, 2007) of up to `capacity` tokens.

    A token of importance p gets the key u / p, u uniform in (0, 1]; the smallest keys stay. With tau
    the smallest key that did not stay, a kept token stands for 1 / min(1, p tau) tokens, which makes
    every weighted sum over the sample an unbiased estimate of the sum over the stream. The order of
    arrival plays no part. Tokens are stored in their own dtype, so nothing is lost.
    """

    def __init__(
        self, capacity: int, width: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        self.capacity = capacity
        self._generator = generator
        self._threshold = torch.inf  # tau
        self._size = 0
        rows = min(capacity, FIRST_ROWS)
        self._tokens = torch.empty(rows, width, dtype=dtype, device=device)
        self._keys = torch.empty(rows, dtype=torch.float64, device=device)
        self._importance = torch.empty(rows, dtype=torch.float64, device=device)
        self._weights = torch.empty(rows, dtype=torch.float64, device=device)  # that the tokens came with

    @property
    def dtype(self) -> torch.dtype:
        return self._tokens.dtype

    @property
    def width(self) -> int:
        return self._tokens.shape[1]

    def __len__(self) -> int:
        return self._size

    def offer(self, tokens: Tensor, importance: Tensor, weights: Tensor | None) -> None:
        """Show the reservoir M new tokens [..., D] of importance [M] > 0 and, optionally, weights [M]."""
        uniform = 1 - torch.rand(len(importance), dtype=torch.float64, generator=self._generator)
        importance = importance.double()
        if weights is not None:
            importance = importance * weights
        keys = uniform.to(importance.device) / importance
        entering = (keys < self._threshold).nonzero()[:, 0]
        if len(entering) == 0:
            return
        weights = torch.ones_like(keys) if weights is None else weights.double()
        kept, slots = self._make_room(keys[entering])
        self._write(slots, tokens, entering[kept], keys, importance, weights)

    def summary(self, backend: str = "auto") -> WeightedTokens:
        """The kept tokens with the weights that make them stand for the whole stream."""
        size = self._size
        inclusion = (self._importance[:size] * self._threshold).clamp_max(1.0)
        weights = (self._weights[:size] / inclusion).float()
        tokens = self._tokens[:size]
        return WeightedTokens(tokens, weights, mean_of(tokens, weights, backend), backend)

    def merged_summary(self, processes: Processes, backend: str = "auto") -> WeightedTokens:
        """The summary of one reservoir that had seen what the reservoirs of all ranks have seen.

        Not an approximation of it: the smallest keys of all tokens are among the smallest of each rank, and
        the smallest key that did not stay is either among those or the threshold of a rank. So the merged
        sample has the law of priority sampling on all tokens with these importances, whatever they are, and
        every weighted sum over it stays unbiased. Each rank measures importance by its own rough centres, in
        units of its own mean squared distance: on each it averages 2 and is at least 1, so a rank is sampled
        in proportion to its tokens and no weight exceeds twice the plain one, as in a single reservoir.

        Only the tokens that stay are exchanged: `capacity` of them, however many ranks there are. All ranks
        get the same sample; a rank that saw nothing brings an empty reservoir of the same width and dtype.
        """
        size = self._size
        threshold = self._merged_threshold(processes)
        kept = (self._keys[:size] < threshold).nonzero()[:, 0]
        inclusion = (self._importance[kept] * threshold).clamp_max(1.0)
        weights = processes.concatenate((self._weights[kept] / inclusion).float())
        tokens = processes.concatenate(self._tokens[kept])
        return WeightedTokens(tokens, weights, mean_of(tokens, weights, backend), backend)

    def _merged_threshold(self, processes: Processes) -> float:
        """The smallest key on any rank that does not belong to the `capacity` smallest of all."""
        mine = self._keys[: self._size]
        if self._threshold < torch.inf:
            mine = torch.cat([mine, mine.new_tensor([self._threshold])])
        keys = processes.concatenate(mine)
        if len(keys) <= self.capacity:
            return torch.inf
        return float(keys.kthvalue(self.capacity + 1).values)

    def _make_room(self, new_keys: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the new keys stay (indices), and the slots that they take; lowers the threshold."""
        size, fresh = self._size, len(new_keys)
        self._grow_to(min(size + fresh, self.capacity))
        free = self.capacity - size
        if fresh <= free:
            self._size += fresh
            everything = torch.arange(fresh, device=new_keys.device)
            return everything, everything + size
        keys = torch.cat([self._keys[:size], new_keys])
        self._threshold = float(keys.kthvalue(self.capacity + 1).values)
        kept = (new_keys < self._threshold).nonzero()[:, 0]
        vacated = (self._keys[:size] >= self._threshold).nonzero()[:, 0]
        slots = torch.cat([vacated, torch.arange(size, self.capacity, device=keys.device)])
        self._size = self.capacity
        return kept, slots[: len(kept)]

    def _grow_to(self, rows: int) -> None:
        """Room for so many tokens. Doubled at least, so that each is copied once on average."""
        held = len(self._keys)
        if rows > held:
            rows = min(self.capacity, max(rows, 2 * held))
            for name in ("_tokens", "_keys", "_importance", "_weights"):
                old = getattr(self, name)
                new = old.new_empty(rows, *old.shape[1:])
                new[: self._size] = old[: self._size]
                setattr(self, name, new)

    def _write(
        self, slots: Tensor, tokens: Tensor, rows: Tensor, keys: Tensor, importance: Tensor, weights: Tensor
    ) -> None:
        self._tokens[slots] = take_rows(tokens, rows)
        self._keys[slots] = keys[rows]
        self._importance[slots] = importance[rows]
        self._weights[slots] = weights[rows]


def importance(squared: Tensor, sum_of_squared: float, total: float) -> Tensor:
    """1 + d^2 / mean d^2, float64, of tokens at squared distances d^2 [M]; the mean is sum over total.

    The uniform share, the 1, keeps every weight below twice the plain one.
    """
    if sum_of_squared <= 0:
        return torch.ones_like(squared, dtype=torch.float64)
    return 1 + squared.double() / (sum_of_squared / total)


def take_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows of [..., D] by their flat index over the leading dimensions, without flattening a strided view."""
    leading = tokens.shape[:-1]
    index = []
    for size in reversed(leading):
        index.append(rows % size)
        rows = rows // size
    return tokens[tuple(reversed(index))]
