"""Passes over the tokens of all ranks, chunk by chunk, for several runs of Lloyd's algorithm at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.chunks import ChunkedTokens
from spt_fast.clustering.ordered import squared_differences
from spt_fast.ops.kmeans import PassResult, PrunedPasses, assign_accumulate, can_correct, can_prune
from spt_fast.support.distributed import ALONE, Processes

# Of so many passes all but one may correct the sums of the one before. It bounds what float32 adds up to.
CORRECTED_PASSES = 16
# A coordinate of a mean is off by 2**-24 of two numbers at most: squared, and doubled for each of two sums.
_CENTER_ROUNDING = 2.0**-46


class Step(NamedTuple):
    """Where an iteration of Lloyd's algorithm takes the centres of r runs, and what it found on the way."""

    centers: Tensor  # [r, K, D] float32
    inertia: list[float]  # of each run, before the step
    relocated: list[bool]  # whether a centre without tokens has jumped to one
    movement: list[float]  # squared distance that the centres of each run have moved by, summed


class TokenPasses:
    """Assignments of the tokens to the centres of several runs; a read of the tokens serves all runs.

    On the CPU, tokens whose centre cannot have changed are left out (`PrunedPasses`, for each run one), and
    a chunk of such tokens is not read. On CUDA, sums of tokens without weights that are a single chunk are
    corrected by those that change to another centre. That changes no label. With several processes each
    holds a share of the tokens; sums, counts and inertia are added up over all of them and are the same on
    each.

    Args:
        tokens: this rank's share, which may be empty.
        mean: [D], a point near the data that distances are computed around.
        weights: [n] float32; None: one each.
        prune: False makes plain passes over all tokens.
    """

    def __init__(
        self,
        tokens: ChunkedTokens,
        mean: Tensor,
        weights: Tensor | None = None,
        *,
        processes: Processes = ALONE,
        backend: str = "auto",
        prune: bool = True,
    ) -> None:
        self._tokens, self._processes, self._backend = tokens, processes, backend
        self._mean = mean[None]
        self._chunk_rows = tokens.chunk_rows
        self._weights = None if weights is None else torch.split(weights, self._chunk_rows)
        self._prunes = prune and can_prune(tokens.device, backend)
        self._pruned: list[PrunedPasses] = []  # one for each run
        is_alone = processes.size == 1 and len(self._chunk_rows) == 1 and weights is None
        self._corrects = prune and is_alone and can_correct(tokens.device, tokens.dtype, backend)
        self._num_passes = 0
        self._totals: PassResult | None = None

    @property
    def totals(self) -> PassResult:
        """Sums, counts and inertia of all runs, as of their last passes; labels where the next needs them."""
        assert self._totals is not None
        return self._totals

    def assign(self, runs: Sequence[int], centers: Tensor) -> None:
        """One pass for these runs, whose centres [len(runs), K, D] have moved. The first is for all runs."""
        mine = self._assign_pruned(runs, centers) if self._prunes else self._assign_all(runs, centers)
        found = self._sum_over_ranks(mine)
        if self._totals is None or len(runs) == len(self._totals.counts):
            self._totals = found
            return
        index = torch.tensor(runs, device=centers.device)
        for kept, new in zip(self._totals[:3], found[:3], strict=True):
            kept[index] = new
        if self._totals.labels is not None and found.labels is not None:
            self._totals.labels[index] = found.labels

    def step(self, runs: Sequence[int], centers: Tensor) -> Step:
        """Means of the tokens of each centre (eq. 10); centres without tokens go to the farthest tokens.

        Reads from the device once, but for centres without tokens.
        """
        sums, counts, inertia = (take_runs(values, runs) for values in self.totals[:3])
        means = center_means(centers, sums, counts)
        facts = torch.stack([inertia, counts.amin(1), squared_movement(centers, means)])
        inertias, least_counts, movement = facts.tolist()
        relocated = [least <= 0 for least in least_counts]
        if any(relocated):
            means = center_means(centers, *self._relocate(centers, sums, counts, relocated))
            movement = squared_movement(centers, means).tolist()
        return Step(means, inertias, relocated, movement)

    def labels(self, centers: Tensor) -> Tensor:
        """Labels [n] of this rank's tokens in the last pass of a single run, to centres [1, K, D]."""
        if self._pruned:
            return self._pruned[0].labels()[0]
        found = []
        for chunk, weights in self._chunks():
            assigned = self._assign_chunk(chunk, weights, centers, with_labels=True)
            assert assigned.labels is not None
            found.append(assigned.labels[0])
        return torch.cat(found)

    def restore(self, totals: PassResult, undone: int) -> None:
        """Take back the last `undone` passes, before which the totals were these."""
        self._totals = totals
        self._num_passes -= undone

    def _assign_all(self, runs: Sequence[int], centers: Tensor) -> PassResult:
        """What this rank has, by reading all of its tokens."""
        total: PassResult | None = None
        last = self._last(runs)
        for chunk, weights in self._chunks():
            found = self._assign_chunk(chunk, weights, centers, with_labels=self._corrects, last=last)
            total = found if total is None else _add(total, found)
        if total is None:
            zeros = centers.new_zeros(centers.shape, dtype=torch.float64)
            total = PassResult(zeros, zeros[..., 0].clone(), zeros[:, 0, 0].clone())
        return total

    def _last(self, runs: Sequence[int]) -> PassResult | None:
        """What the next pass of these runs corrects; None: nothing."""
        is_due = self._num_passes % CORRECTED_PASSES == 0
        self._num_passes += 1
        if self._totals is None or self._totals.labels is None or is_due:
            return None
        sums, counts, inertia = (take_runs(values, runs) for values in self._totals[:3])
        return PassResult(sums, counts, inertia, take_runs(self._totals.labels, runs))

    def _assign_pruned(self, runs: Sequence[int], centers: Tensor) -> PassResult:
        """The same, by reading the chunks of which a run has to see a token."""
        if not self._pruned:
            shape = (centers.shape[1], centers.shape[2])
            self._pruned = [PrunedPasses(self._chunk_rows, *shape, shift=self._mean) for _ in runs]
        passes = [self._pruned[run] for run in runs]
        wanted = [set(one.begin(its[None])) for one, its in zip(passes, centers, strict=True)]
        read = sorted(set().union(*wanted))
        for index, (chunk, weights) in zip(read, self._chunks(read), strict=True):
            for one, chunks in zip(passes, wanted, strict=True):
                if index in chunks:
                    one.add(index, chunk[None], weights)
        found = [one.end() for one in passes]
        return found[0] if len(found) == 1 else _side_by_side(found)

    def _chunks(self, wanted: Sequence[int] | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The chunks [m, D], each with its weights [1, m]."""
        indices = range(len(self._chunk_rows)) if wanted is None else wanted
        for index, chunk in zip(indices, self._tokens.chunks(wanted), strict=True):
            yield chunk, None if self._weights is None else self._weights[index][None]

    def _assign_chunk(
        self,
        chunk: Tensor,
        weights: Tensor | None,
        centers: Tensor,
        *,
        with_labels: bool = False,
        with_distances: bool = False,
        last: PassResult | None = None,
    ) -> PassResult:
        runs = len(centers)
        return assign_accumulate(
            chunk.expand(runs, *chunk.shape),
            centers,
            shift=self._mean.expand(runs, -1),
            weights=None if weights is None else weights.expand(runs, -1),
            with_labels=with_labels,
            with_distances=with_distances,
            last=last,
            backend=self._backend,
        )

    def _sum_over_ranks(self, mine: PassResult) -> PassResult:
        if self._processes.size == 1:
            return mine
        runs, n_clusters, width = mine.sums.shape
        flat = torch.cat([mine.sums.flatten(1), mine.counts, mine.inertia[:, None]], dim=1)
        sums, counts, inertia = torch.split(
            self._processes.sum(flat), [n_clusters * width, n_clusters, 1], dim=1
        )
        return PassResult(
            sums.reshape(runs, n_clusters, width).clone(), counts.clone(), inertia[:, 0].clone()
        )

    def _relocate(
        self, centers: Tensor, sums: Tensor, counts: Tensor, relocated: list[bool]
    ) -> tuple[Tensor, Tensor]:
        """Give each empty centre the token farthest from its own centre, as scikit-learn does.

        Tokens that lie on their centre are left there: moving them would gain nothing and never end.
        """
        sums, counts = sums.clone(), counts.clone()
        runs = [run for run, has_empty in enumerate(relocated) if has_empty]
        empty = [(counts[run] <= 0).nonzero()[:, 0].tolist() for run in runs]
        farthest = self._farthest(centers[runs], [len(slots) for slots in empty])
        for run, slots, tokens in zip(runs, empty, farthest, strict=True):
            for slot, (_, owner, weight, token) in zip(slots, tokens, strict=False):
                row = token.to(sums.device) * weight
                sums[run, owner] -= row
                counts[run, owner] -= weight
                sums[run, slot], counts[run, slot] = row, weight
        return sums, counts

    def _farthest(self, centers: Tensor, numbers: list[int]) -> list[list[_FarToken]]:
        """For each run, so many of the tokens of all ranks that are farthest from their centres."""
        found: list[list[_FarToken]] = [[] for _ in numbers]
        for chunk, weights in self._chunks():
            assigned = self._assign_chunk(chunk, weights, centers, with_labels=True, with_distances=True)
            assert assigned.labels is not None
            assert assigned.distances is not None
            for run, number in enumerate(numbers):
                distances, labels = assigned.distances[run].double(), assigned.labels[run]
                if weights is not None:
                    distances = torch.where(weights[0] > 0, distances, 0)
                measured = partial(self._measured, chunk, labels, centers[run])
                far = _largest(distances, number, measured)
                facts = zip(
                    distances[far].tolist(),
                    labels[far].tolist(),
                    [1.0] * len(far) if weights is None else weights[0, far].tolist(),
                    chunk[far].double().cpu(),
                    strict=True,
                )
                found[run] = _first(found[run] + [_FarToken(*fact) for fact in facts], number)
        everyone = self._processes.gather(found)
        return [
            _first([token for rank in everyone for token in rank[run]], number)
            for run, number in enumerate(numbers)
        ]

    def _measured(self, chunk: Tensor, labels: Tensor, centers: Tensor, rows: Tensor) -> Tensor:
        """Squared distances of these rows to their centres by their differences; 0 if only by rounding.

        A centre of equal tokens is off by the rounding of their differences to the mean, and by its own.
        """
        tokens, own = chunk[rows], labels[rows]
        squared = squared_differences(tokens, centers, own)
        first = torch.zeros_like(own)
        norms = squared_differences(tokens, self._mean, first) + squared_differences(
            centers[own], torch.zeros_like(self._mean), first
        )
        return torch.where(squared > _CENTER_ROUNDING * norms, squared, 0)


class _FarToken(NamedTuple):
    distance: float  # squared, to the nearest centre
    owner: int  # that centre
    weight: float
    token: Tensor  # [D] float64, on the host


def take_runs(values: Tensor, runs: Sequence[int]) -> Tensor:
    """`values` [R, ...] of the ascending `runs`; no copy where these are all."""
    return values if len(runs) == values.shape[0] else values[torch.tensor(runs, device=values.device)]


def center_means(centers: Tensor, sums: Tensor, counts: Tensor) -> Tensor:
    """Means [..., K, D] of the tokens of each centre; centres without tokens stay."""
    # Divided in float64 and rounded in one launch.
    means = torch.div(sums, counts[..., None], out=torch.empty_like(centers))
    return torch.where((counts > 0)[..., None], means, centers)


def squared_movement(before: Tensor, after: Tensor) -> Tensor:
    """Squared distances between centres [R, K, D], summed over each run's: [R] float64."""
    if before.device.type == "cpu":
        # Summed by NumPy, in one thread: when to stop must not depend on the number of threads.
        moved = np.square((after - before).double().numpy())
        return torch.from_numpy(moved.sum((-2, -1)))
    steps = torch.sub(after, before, out=torch.empty_like(before, dtype=torch.float64))
    return steps.square().sum((-2, -1))


def _side_by_side(results: list[PassResult]) -> PassResult:
    """Sums, counts and inertia of single runs as those of all of them."""
    return PassResult(
        torch.cat([result.sums for result in results]),
        torch.cat([result.counts for result in results]),
        torch.cat([result.inertia for result in results]),
    )


def _add(one: PassResult, other: PassResult) -> PassResult:
    return PassResult(one.sums + other.sums, one.counts + other.counts, one.inertia + other.inertia)


def _largest(distances: Tensor, number: int, measured: Callable[[Tensor], Tensor]) -> Tensor:
    """Positions of the largest distances above 0, the largest first; of equal ones the first.

    The largest of a pass may be a far token's rounding. So those that may be among them are `measured`, which
    changes `distances`, until all of them are.
    """
    is_known = torch.zeros_like(distances, dtype=torch.bool)
    asked = number
    while not bool(is_known[far := _top(distances, number)].all()):
        asked *= 2
        rows = _top(distances, asked)
        rows = rows[~is_known[rows]]
        distances[rows] = measured(rows)
        is_known[rows] = True
    return far


def _top(distances: Tensor, number: int) -> Tensor:
    """Positions of the largest distances above 0, the largest first; of equal ones the first."""
    least = distances.topk(min(number, len(distances))).values[-1]
    candidates = ((distances >= least) & (distances > 0)).nonzero()[:, 0]
    order = distances[candidates].sort(descending=True, stable=True).indices[:number]
    return candidates[order]


def _first(tokens: list[_FarToken], number: int) -> list[_FarToken]:
    """The farthest `number` of the tokens, the farthest first; of equally far ones the first."""
    return sorted(tokens, key=lambda token: -token.distance)[:number]
