"""Lloyd's algorithm over tokens that are read in chunks, again and again, by one process or by many.

Limits: tokens without weights. The same chunks give the same bits, wherever they are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.kmeans import SEEDING_TOKENS, SEEDING_TOKENS_PER_CLUSTER
from spt_fast.clustering.lloyd import LloydResult, center_means, squared_movement
from spt_fast.clustering.seeding import kmeans_plus_plus
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import Assigned, PrunedParts, assign_accumulate, can_prune
from spt_fast.support.distributed import ALONE, Processes

# scikit-learn's defaults for k-means++ starts, and those of `KMeans`.
N_INIT = 1
TOL = 1e-4
MAX_ITER = 300


class ChunkedTokens(Protocol):
    """Tokens of one group on one rank, such as `spt_fast.prototypes.token_store.StoredLayer`."""

    def __len__(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def chunk_rows(self) -> list[int]:
        """The number of tokens in each chunk."""
        ...

    def chunks(self, wanted: Sequence[int] | None = None) -> Iterator[Tensor]:
        """The chunks [m, D], or those at the positions `wanted`, each good until the next is asked for."""
        ...

    def rows(self, index: np.ndarray) -> Tensor:
        """The tokens at ascending positions."""
        ...


class OutOfCoreKMeans:
    """Exact k-means of one group: each read of the tokens serves every restart that has not settled.

    On the CPU tokens whose centre cannot have changed are left out, and a chunk of such tokens is not read.
    That changes no label, and holds what `PrunedParts` holds for each restart.

    `run` stops at a tolerance; a later `run` with a smaller one goes on from there and ends exactly where a
    single run with the smaller one would have.

    With several processes each holds a part of the tokens. Sums, counts and inertia are added up over all of
    them in every iteration; the result is the same on each. Starting centres are drawn by position, rank
    after rank, so one process that has the same tokens in that order starts, and ends, at the same centres
    (to rounding: the sums are cut into other chunks).

    Args:
        tokens: this rank's part, which may be empty.
        n_clusters: K.
        rng: draws the starts; in the same state on every rank.
        n_init: restarts; the one with the lowest inertia is the result.
        starts: starting centres [n_init, K, D] instead of k-means++.
        prune: False makes plain passes over all tokens.

    Raises:
        ValueError: fewer tokens than clusters.
    """

    def __init__(
        self,
        tokens: ChunkedTokens,
        n_clusters: int,
        rng: np.random.Generator,
        *,
        n_init: int = N_INIT,
        starts: Tensor | None = None,
        processes: Processes = ALONE,
        backend: str = "auto",
        prune: bool = True,
    ) -> None:
        self._tokens = tokens
        self._processes = processes
        self._backend = backend
        self._counts = processes.gather(len(tokens))
        self.n_tokens = sum(self._counts)
        if self.n_tokens < n_clusters:
            raise ValueError(
                f"n_clusters must be at most the number of tokens, {self.n_tokens}, got {n_clusters}"
            )
        self._width, self._dtype = self._agreed_layout()
        self._mean, self._variance = self._moments()
        centers = self._draw_starts(n_clusters, n_init, rng) if starts is None else starts
        self._centers = centers.to(tokens.device, copy=True)
        self._shift = np.full(len(centers), np.inf)  # squared movement in the last iteration
        self._n_iter = np.zeros(len(centers), dtype=int)
        self._pruned: list[PrunedParts] = []  # one for each restart, or none
        if prune and can_prune(tokens.device, backend):
            self._pruned = [
                PrunedParts(tokens.chunk_rows, n_clusters, self._width, shift=self._mean[None])
                for _ in centers
            ]
        self._assigned = self._assign(self._centers, torch.arange(len(centers)))

    def run(self, tol: float = TOL, max_iter: int = MAX_ITER) -> LloydResult:
        """Lloyd until the centres move by at most `tol` times the mean variance, squared and summed."""
        while True:
            moving = (self._shift > tol * self._variance) & (self._n_iter < max_iter)
            if not moving.any():
                return self._best()
            self._iterate(torch.from_numpy(moving.nonzero()[0]).to(self._centers.device))

    def _iterate(self, runs: Tensor) -> None:
        """One iteration of some of the restarts."""
        before = self._centers[runs]
        moved = self._move(before, runs)
        shift = squared_movement(before, moved)
        self._shift[runs.cpu().numpy()] = shift
        self._n_iter[runs.cpu().numpy()] += 1
        changed = torch.from_numpy(shift > 0).to(runs.device)
        runs, moved = runs[changed], moved[changed]
        if len(runs) == 0:
            return
        self._centers[runs] = moved
        fresh = self._assign(moved, runs)
        for kept, new in zip(self._totals(), (fresh.sums, fresh.counts, fresh.inertia), strict=True):
            kept[runs] = new

    def _totals(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._assigned.sums, self._assigned.counts, self._assigned.inertia

    def _best(self) -> LloydResult:
        inertia = self._assigned.inertia.cpu().numpy()
        best = int(inertia.argmin())
        return LloydResult(
            self._centers[best].clone(),
            self._assigned.counts[best].clone(),
            float(inertia[best]),
            int(self._n_iter[best]),
        )

    def _move(self, before: Tensor, runs: Tensor) -> Tensor:
        """Means [R, K, D] of the tokens of each centre; centres without tokens go to the farthest ones."""
        sums, counts, _ = (values[runs] for values in self._totals())
        if bool((counts <= 0).any()):
            sums, counts = self._relocate(before, sums, counts)
        return center_means(before, sums, counts)

    def _assign(self, centers: Tensor, runs: Tensor) -> Assigned:
        """Sums, counts and inertia over the tokens of all ranks for some restarts, with centres [R, K, D]."""
        n_clusters, width = centers.shape[1:]
        mine = self._assign_pruned(centers, runs) if self._pruned else self._assign_all(centers)
        totals = self._processes.sum(mine)
        sums = totals[:, : n_clusters * width].reshape(centers.shape)
        counts = totals[:, n_clusters * width : -1].clone()
        return Assigned(sums.clone(), counts, totals[:, -1].clone(), None, None)

    def _assign_all(self, centers: Tensor) -> Tensor:
        """Sums, counts and inertia of this rank side by side, by reading all of its tokens."""
        runs, n_clusters, width = centers.shape
        totals = torch.zeros(runs, n_clusters * (width + 1) + 1, dtype=torch.float64, device=centers.device)
        for chunk in self._tokens.chunks():
            totals += _side_by_side(self._assign_chunk(chunk, centers))
        return totals

    def _assign_pruned(self, centers: Tensor, runs: Tensor) -> Tensor:
        """The same by reading the chunks of which a restart has to see a token."""
        passes = [self._pruned[run] for run in runs.tolist()]
        wanted = [set(one.begin(its_centers[None])) for one, its_centers in zip(passes, centers, strict=True)]
        read = sorted(set().union(*wanted))
        for index, chunk in zip(read, self._tokens.chunks(read), strict=True):
            for one, chunks in zip(passes, wanted, strict=True):
                if index in chunks:
                    one.add(index, chunk[None])
        return torch.cat([_side_by_side(one.end()) for one in passes])

    def _assign_chunk(self, chunk: Tensor, centers: Tensor, *, with_tokens: bool = False) -> Assigned:
        runs = len(centers)
        return assign_accumulate(
            chunk.expand(runs, *chunk.shape),
            centers,
            shift=self._mean.expand(runs, -1),
            with_labels=with_tokens,
            with_distances=with_tokens,
            backend=self._backend,
        )

    def _relocate(self, centers: Tensor, sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Give each empty centre the token farthest from its own centre, as `lloyd` does."""
        empty = counts <= 0
        for run, farthest in enumerate(self._farthest(centers, empty.sum(1).tolist())):
            slots = empty[run].nonzero()[:, 0]
            for slot, (_, owner, token) in zip(slots.tolist(), farthest, strict=False):
                row = token.to(sums.device)
                sums[run, owner] -= row
                counts[run, owner] -= 1
                sums[run, slot], counts[run, slot] = row, 1
        return sums, counts

    def _farthest(self, centers: Tensor, wanted: list[int]) -> list[list[_Candidate]]:
        """For each restart, the `wanted` tokens farthest from their centres, none of them on its centre."""
        found: list[list[_Candidate]] = [[] for _ in wanted]
        for chunk in self._tokens.chunks():
            assigned = self._assign_chunk(chunk, centers, with_tokens=True)
            assert assigned.labels is not None
            assert assigned.distances is not None
            for run, number in enumerate(wanted):
                distances, labels = assigned.distances[run], assigned.labels[run]
                far = distances.sort(descending=True, stable=True).indices[:number].tolist()
                fresh = [(float(distances[i]), int(labels[i]), chunk[i].double().cpu()) for i in far]
                found[run] = _largest(found[run] + fresh, number)
        everyone = self._processes.gather(found)
        return [
            _largest([candidate for rank in everyone for candidate in rank[run]], number)
            for run, number in enumerate(wanted)
        ]

    def _agreed_layout(self) -> tuple[int, torch.dtype]:
        """D and dtype, also on a rank without tokens."""
        mine = (self._tokens.width, self._tokens.dtype) if len(self._tokens) else None
        layouts = self._processes.gather(mine)
        known = [layout for layout in layouts if layout is not None]
        if any(layout != known[0] for layout in known):
            raise ValueError(f"tokens must have one width and dtype on all ranks, got {known}")
        return known[0]

    def _moments(self) -> tuple[Tensor, float]:
        """The mean [D] of all tokens and the mean variance of their features."""
        count, mean, squares = 0, torch.zeros(self._width, dtype=torch.float64), 0.0
        for part in self._processes.gather(self._local_moments()):
            if part is None:
                continue
            more, its_mean, its_squares = part
            gap = its_mean - mean
            squares += its_squares + float(gap.square().sum()) * count * more / (count + more)
            mean, count = mean + gap * (more / (count + more)), count + more
        return mean.float().to(self._tokens.device), max(squares, 0.0) / count / self._width

    def _local_moments(self) -> tuple[int, Tensor, float] | None:
        """Number, mean and summed squared distance to the mean of this rank's tokens."""
        anchor: Tensor | None = None
        total, squares = torch.zeros(self._width, dtype=torch.float64), 0.0
        for chunk in self._tokens.chunks():
            anchor = chunk[:1].float().clone() if anchor is None else anchor
            part = assign_accumulate(chunk[None], anchor[None], shift=anchor, backend=self._backend)
            total += part.sums[0, 0].cpu()
            squares += float(part.inertia[0])
        if anchor is None:
            return None
        count = len(self._tokens)
        mean = total / count
        return count, mean, squares - count * float((mean - anchor[0].double().cpu()).square().sum())

    def _draw_starts(self, n_clusters: int, n_init: int, rng: np.random.Generator) -> Tensor:
        """Starts [n_init, K, D] by k-means++ on a uniform sample of all tokens; the same on every rank."""
        sample = WeightedTokens(
            self._sample(max(SEEDING_TOKENS, SEEDING_TOKENS_PER_CLUSTER * n_clusters), rng),
            None,
            self._mean,
            self._backend,
        )
        starts = torch.empty(0, n_clusters, self._width, device=self._tokens.device)
        if self._processes.rank == 0:
            starts = torch.stack([kmeans_plus_plus(sample, n_clusters, rng) for _ in range(n_init)])
        return self._processes.concatenate(starts)

    def _sample(self, size: int, rng: np.random.Generator) -> Tensor:
        index = np.arange(self.n_tokens)
        if size < self.n_tokens:
            index = np.sort(rng.choice(self.n_tokens, size, replace=False))
        first = sum(self._counts[: self._processes.rank])
        mine = index[np.searchsorted(index, first) : np.searchsorted(index, first + len(self._tokens))]
        if len(self._tokens):
            rows = self._tokens.rows(mine - first)
        else:
            rows = torch.empty(0, self._width, dtype=self._dtype, device=self._tokens.device)
        return self._processes.concatenate(rows)


def _side_by_side(assigned: Assigned) -> Tensor:
    """Sums, counts and inertia of R restarts as [R, K * D + K + 1]."""
    return torch.cat([assigned.sums.flatten(1), assigned.counts, assigned.inertia[:, None]], dim=1)


_Candidate = tuple[float, int, Tensor]  # squared distance, its centre, the token


def _largest(candidates: list[_Candidate], number: int) -> list[_Candidate]:
    """The farthest, in order; of equals the first. Tokens on their centre are left there."""
    ordered = sorted(candidates, key=lambda candidate: -candidate[0])
    return [candidate for candidate in ordered[:number] if candidate[0] > 0]
