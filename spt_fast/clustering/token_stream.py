"""What a stream of tokens leaves of one group: rough centres, totals and a reservoir; batch by batch.

Limits: `TokenStream.start` waits for a device, and nothing else does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.frame import Frame, find_frame, in_frame
from spt_fast.clustering.inputs import raise_non_finite
from spt_fast.clustering.lloyd import lloyd
from spt_fast.clustering.reservoir import ROUGH_CENTERS, PriorityReservoir, importance, take_rows
from spt_fast.clustering.seeding import kmeans_plus_plus
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import TOKEN_DTYPES, PassResult, assign_accumulate
from spt_fast.support.waiting import first_true

ROUGH_TOKENS = 2_048  # of the first batch, from which the rough centres start
ROUGH_ITERATIONS = 5


class TokenStream:
    """What one group remembers: rough centres, totals and the reservoir."""

    def __init__(
        self,
        rough: Tensor,
        reservoir: PriorityReservoir,
        backend: str,
        frame: Frame | None,
        given_dtype: torch.dtype,
    ) -> None:
        self.reservoir = reservoir
        self.frame = frame  # that everything here is in
        self._given_dtype = given_dtype  # of the batches
        self.n_seen = 0
        # Weight of the tokens seen, and their summed squared distances to the rough centres, as they were.
        self.total, self._squared = torch.zeros(2, dtype=torch.float64, device=rough.device)
        self._rough = rough  # [R, D] float32
        self._rough_counts = torch.zeros(len(rough), dtype=torch.float64, device=rough.device)
        self._backend = backend

    @classmethod
    def start(
        cls,
        batch: Tensor,
        capacity: int,
        seeds: list[int],
        backend: str,
        in_place: bool,
        first_row: int = 0,
    ) -> TokenStream:
        """A stream whose rough centres come from a sample of its first batch [B, N, D].

        With `in_place` it has no frame. Errors give the first token the number `first_row`. This waits for a
        device, once for each group.
        """
        rng = np.random.default_rng([*seeds, 0])
        rows = batch.shape[:-1].numel()
        index = np.sort(rng.choice(rows, min(rows, ROUGH_TOKENS), replace=False))
        part = take_rows(batch, torch.from_numpy(index).to(batch.device))
        if not bool(torch.isfinite(part).all()):
            raise_non_finite(batch, first_row)
        frame = None if in_place else find_frame(batch, first_row)
        part = in_frame(part, frame)
        problem = WeightedTokens(part, None, part.double().mean(0).float(), backend)
        centers = kmeans_plus_plus(problem, min(ROUGH_CENTERS, len(part)), rng)
        rough = lloyd(problem, centers, max_iter=ROUGH_ITERATIONS).centers
        generator = torch.Generator().manual_seed(int(np.random.default_rng([*seeds, 1]).integers(2**62)))
        is_kept = frame is None and batch.dtype in TOKEN_DTYPES
        dtype = batch.dtype if is_kept else torch.float32
        reservoir = PriorityReservoir(capacity, batch.shape[-1], dtype, batch.device, generator)
        return cls(rough, reservoir, backend, frame, batch.dtype)

    def prepare(self, batch: Tensor, weights: Tensor | None) -> Update:
        """Measure a batch [B, N, D] against the rough centres without changing anything."""
        self._check_like_before(batch)
        batch = in_frame(batch, self.frame)
        assigned = assign_accumulate(
            batch[None],
            self._rough[None],
            shift=self._mean()[None],
            weights=None if weights is None else weights[None],
            with_distances=True,
            backend=self._backend,
        )
        return Update(self, batch, weights, assigned)

    @property
    def width(self) -> int:
        return self._rough.shape[-1]

    def take_in(self, batch: Tensor, weights: Tensor | None, assigned: PassResult) -> None:
        """Mini-batch update of the rough centres; the tokens go to the reservoir by importance."""
        assert assigned.distances is not None
        counts, sums = assigned.counts[0], assigned.sums[0]
        self.n_seen += batch.shape[:-1].numel()
        self.total = self.total + counts.sum()
        self._squared = self._squared + assigned.inertia[0]
        self._rough_counts += counts
        gains = (sums - counts[:, None] * self._rough) / self._rough_counts.clamp_min(1e-300)[:, None]
        self._rough = (self._rough + gains).float()
        preference = importance(assigned.distances[0], self._squared, self.total)
        self.reservoir.offer(batch, preference, weights)

    def _mean(self) -> Tensor:
        """Mean [D] of all tokens so far; of the rough centres before there are any."""
        weights = self._rough_counts if self.n_seen > 0 else torch.ones_like(self._rough_counts)
        return (weights @ self._rough.double() / weights.sum()).float()

    def _check_like_before(self, batch: Tensor) -> None:
        if batch.dtype != self._given_dtype:
            raise ValueError(f"X must be {self._given_dtype} like before, got {batch.dtype}")
        if batch.device != self._rough.device:
            raise ValueError(f"X must be on {self._rough.device} like before, got {batch.device}")


@dataclass(frozen=True)
class Update:
    """A batch that was measured, to be taken in by its stream; in the stream's frame."""

    stream: TokenStream
    batch: Tensor
    weights: Tensor | None
    assigned: PassResult

    @property
    def bad_row(self) -> Tensor:
        """The first row that is not finite or too far off, int64 on the device; -1 where there is none."""
        assert self.assigned.distances is not None
        # The inertia decides: what is not finite makes it so, in every kernel.
        row = first_true(~torch.isfinite(self.assigned.distances)).clamp_min(0)
        return torch.where(torch.isfinite(self.assigned.inertia[0]), -1, row)

    @property
    def scaled(self) -> Tensor | None:
        """The batch in the frame of its stream; None where there is none."""
        return None if self.stream.frame is None else self.batch

    def commit(self) -> None:
        self.stream.take_in(self.batch, self.weights, self.assigned)
