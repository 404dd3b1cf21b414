"""A weighted reservoir: a bounded sample of a stream of tokens, drawn by importance, that is unbiased."""

from __future__ import annotations

import torch
from torch import Tensor

from spt_fast.clustering.moments import mean_of
from spt_fast.clustering.ordered import on_host
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.support.distributed import Processes
from spt_fast.support.waiting import send

FIRST_ROWS = 32_768  # Room from the start; more is made as tokens come, for they may be few.
ROUGH_CENTERS = 16  # from which importance is measured
# Where the largest weight is between these, float32 holds what tokens stand for; else it becomes the latter,
# which leaves room below it for the others.
_LEAST_WEIGHT, _MOST_WEIGHT = 2.0**-60, 2.0**100


class PriorityReservoir:
    """Priority sampling (Duffield, Lund and Thorup, 2007) of up to `capacity` tokens.

    A token of importance p gets the key u / p, u uniform in (0, 1]; the smallest keys stay. With tau
    the smallest key that did not stay, a kept token stands for 1 / min(1, p tau) tokens, which makes
    every weighted sum over the sample an unbiased estimate of the sum over the stream. The order of
    arrival plays no part. Tokens are stored in their own dtype, so nothing is lost. Weights that float32
    could not hold then are all scaled by one power of two, which the totals of a `Summary` undo. Where the
    tokens are on a device and without weights, no call but `merged_summary` waits for it.
    """

    def __init__(
        self, capacity: int, width: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
    ) -> None:
        self.capacity = capacity
        self._generator = generator
        self._threshold = torch.full((), torch.inf, dtype=torch.float64, device=device)  # tau
        self._size = 0
        # A full reservoir has one row more, for the tokens that do not stay.
        rows = min(capacity + 1, FIRST_ROWS)
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
        uniform = 1 - torch.rand(
            len(importance), dtype=torch.float64, generator=self._generator, device="cpu"
        )
        importance = importance.double()
        if weights is not None:
            importance = importance * weights
        keys = send(uniform, importance.device) / importance
        rows = self._candidates(keys, sure=weights is None)
        if len(rows) == 0:
            return
        weights = torch.ones_like(keys) if weights is None else weights.double()
        self._write(self._make_room(keys[rows]), tokens, rows, keys, importance, weights)

    def summary(self, backend: str = "auto") -> WeightedTokens:
        """The kept tokens with the weights that make them stand for the whole stream."""
        size = self._size
        inclusion = (self._importance[:size] * self._threshold).clamp_max(1.0)
        weights = _in_float32(self._weights[:size] / inclusion)
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
        weights = _in_float32(processes.concatenate(self._weights[kept] / inclusion))
        tokens = processes.concatenate(self._tokens[kept])
        return WeightedTokens(tokens, weights, mean_of(tokens, weights, backend), backend)

    def _merged_threshold(self, processes: Processes) -> float:
        """The smallest key on any rank that does not belong to the `capacity` smallest of all."""
        mine = self._keys[: self._size]
        if self._threshold < torch.inf:
            mine = torch.cat([mine, self._threshold[None]])
        keys = processes.concatenate(mine)
        if len(keys) <= self.capacity:
            return torch.inf
        return float(keys.kthvalue(self.capacity + 1).values)

    def _candidates(self, keys: Tensor, *, sure: bool) -> Tensor:
        """Rows of new tokens, all those below the threshold among them.

        On the CPU, where looking is free, no others. On a device all rows if they are `sure` to have finite
        keys: their number is known, and moving a batch of tokens takes less time than waiting. A weight of
        zero makes a key infinite, and its token may not take a place while there is room.
        """
        if on_host(keys) or not sure:
            return (keys < self._threshold).nonzero()[:, 0]
        return torch.arange(len(keys), device=keys.device)

    def _make_room(self, new_keys: Tensor) -> Tensor:
        """The row for each of the new keys, `capacity` for those that do not stay; lowers the threshold."""
        size, fresh, capacity = self._size, len(new_keys), self.capacity
        device = new_keys.device
        if size + fresh <= capacity:
            self._grow_to(size + fresh)
            self._size += fresh
            return torch.arange(size, size + fresh, device=device)
        self._grow_to(capacity + 1)
        keys = torch.cat([self._keys[:size], new_keys])
        self._threshold = torch.minimum(self._threshold, keys.kthvalue(capacity + 1).values)
        free = torch.ones(capacity, dtype=torch.bool, device=device)
        free[:size] = self._keys[:size] >= self._threshold
        # The first key that stays gets the first free row, and so on; no size depends on the keys.
        rows = torch.full((capacity + 1,), capacity, device=device)
        ranks = torch.where(free, free.cumsum(0) - 1, capacity)
        rows.scatter_(0, ranks, torch.arange(capacity, device=device))
        stays = new_keys < self._threshold
        self._size = capacity
        return torch.where(stays, rows[(stays.cumsum(0) - 1).clamp(0, capacity)], capacity)

    def _grow_to(self, rows: int) -> None:
        """Room for so many tokens. Doubled at least, so that each is copied once on average."""
        held = len(self._keys)
        if rows > held:
            rows = min(self.capacity + 1, max(rows, 2 * held))
            for name in ("_tokens", "_keys", "_importance", "_weights"):
                old = getattr(self, name)
                new = old.new_empty(rows, *old.shape[1:])
                new[: self._size] = old[: self._size]
                setattr(self, name, new)

    def _write(
        self, slots: Tensor, tokens: Tensor, rows: Tensor, keys: Tensor, importance: Tensor, weights: Tensor
    ) -> None:
        if on_host(slots):
            # The row for what does not stay need not be written, and most of a large batch goes there.
            stays = slots < self.capacity
            slots, rows = slots[stays], rows[stays]
        self._tokens[slots] = take_rows(tokens, rows)
        self._keys[slots] = keys[rows]
        self._importance[slots] = importance[rows]
        self._weights[slots] = weights[rows]


def merged_over_ranks(
    reservoir: PriorityReservoir | None,
    capacity: int,
    device: torch.device,
    processes: Processes,
    backend: str = "auto",
) -> WeightedTokens | None:
    """`merged_summary` where a rank has no reservoir (None) because it saw nothing; None where no rank did.

    Such a rank puts what it gets on `device`.
    """
    layouts = processes.gather(None if reservoir is None else (reservoir.width, reservoir.dtype))
    layout = next((layout for layout in layouts if layout is not None), None)
    if layout is None:
        return None
    if reservoir is None:
        reservoir = PriorityReservoir(capacity, *layout, device, torch.Generator())
    return reservoir.merged_summary(processes, backend)


def _in_float32(weights: Tensor) -> Tensor:
    """Weights [n] float64 times the power of two by which they fit: 1 but for extreme ones.

    Without a wait for a device.
    """
    if len(weights) == 0:
        return weights.float()
    largest = weights.max()
    fits = (largest >= _LEAST_WEIGHT) & (largest <= _MOST_WEIGHT)
    scale = torch.where(fits, 1.0, _MOST_WEIGHT * torch.exp2(-torch.frexp(largest).exponent.double()))
    return (weights * scale).float()


def importance(squared: Tensor, sum_of_squared: Tensor, total: Tensor) -> Tensor:
    """1 + d^2 / mean d^2, float64, of tokens at squared distances d^2 [M]; the mean is sum over total.

    The uniform share, the 1, keeps every weight below twice the plain one.
    """
    return 1 + torch.where(sum_of_squared > 0, squared.double() / (sum_of_squared / total), 0.0)


def take_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """Rows of [..., D] by their flat index over the leading dimensions, without flattening a strided view."""
    leading = tokens.shape[:-1]
    index = []
    for size in reversed(leading):
        index.append(rows % size)
        rows = rows // size
    return tokens[tuple(reversed(index))]
