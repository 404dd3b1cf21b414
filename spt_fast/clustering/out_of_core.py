"""Exact k-means over tokens that are read in chunks, again and again, by one process or by many.

Limits: tokens without weights. The same chunks give the same bits, wherever they are kept.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.chunks import ChunkedTokens
from spt_fast.clustering.estimator import check_enough
from spt_fast.clustering.kmeans import seeding_size
from spt_fast.clustering.lloyd import MAX_ITER, N_INIT, TOL, Lloyd, LloydResult, Until
from spt_fast.clustering.moments import moments
from spt_fast.clustering.passes import TokenPasses
from spt_fast.clustering.seeding import equal_bounds, kmeans_plus_plus
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.support.distributed import ALONE, Processes


class OutOfCoreKMeans:
    """Exact k-means of one group: each read of the tokens serves every restart that has not settled.

    On the CPU tokens whose centre cannot have changed are left out, and a chunk of such tokens is not read.
    That changes no label, and holds what `PrunedPasses` holds for each restart.

    `run` stops at a tolerance; a later `run` with a smaller one goes on from there and ends exactly where a
    single run with the smaller one would have (on CUDA, with several starts, to the rounding of the sums).

    With several processes each holds a share of the tokens. Sums, counts and inertia are added up over all of
    them in every iteration; the result is the same on each. Starting centres are drawn by position, rank
    after rank, so one process that has the same tokens in that order starts, and ends, at the same centres
    (to rounding: the sums are cut into other chunks).

    Args:
        tokens: this rank's share, which may be empty.
        n_clusters: K.
        rng: draws the starts; in the same state on every rank.
        init: where it starts: "k-means++", "random" or "uniform", as in `KMeans`.
        n_init: restarts; the one with the lowest inertia is the result. One with "uniform".
        starts: starting centres [n_init, K, D] instead of `init`.
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
        init: str = "k-means++",
        n_init: int = N_INIT,
        starts: Tensor | None = None,
        processes: Processes = ALONE,
        backend: str = "auto",
        prune: bool = True,
    ) -> None:
        self._tokens, self._processes, self._backend = tokens, processes, backend
        self._rows_of_ranks = processes.gather(len(tokens))
        self.n_tokens = sum(self._rows_of_ranks)
        check_enough(self.n_tokens, n_clusters)
        self._width, self._dtype = self._agreed_layout()
        found = moments(tokens, processes=processes, backend=backend)
        self._mean, self._variance = found.mean, found.variance
        if starts is None:
            starts = self._make_starts(init, n_clusters, n_init, rng)
        self._passes = TokenPasses(tokens, self._mean, processes=processes, backend=backend, prune=prune)
        self._runs = Lloyd(self._passes, starts.to(tokens.device))

    def run(self, tol: float = TOL, max_iter: int = MAX_ITER) -> LloydResult:
        """Lloyd until the centres move by at most `tol` times the mean variance, squared and summed."""
        self._runs.run(Until(max_iter, tol * self._variance))
        return self._runs.best(self._passes.totals)

    def _agreed_layout(self) -> tuple[int, torch.dtype]:
        """D and dtype, also on a rank without tokens."""
        mine = (self._tokens.width, self._tokens.dtype) if len(self._tokens) else None
        layouts = self._processes.gather(mine)
        known = [layout for layout in layouts if layout is not None]
        if any(layout != known[0] for layout in known):
            raise ValueError(f"tokens must have one width and dtype on all ranks, got {known}")
        return known[0]

    def _make_starts(self, init: str, n_clusters: int, n_init: int, rng: np.random.Generator) -> Tensor:
        """Starts [n_init, K, D]; the same on every rank."""
        if init == "uniform":
            return self._equal_parts(n_clusters)[None]
        if init == "random":
            return torch.stack([self._sample(n_clusters, rng).float() for _ in range(n_init)])
        return self._greedy_starts(n_clusters, n_init, rng)

    def _greedy_starts(self, n_clusters: int, n_init: int, rng: np.random.Generator) -> Tensor:
        """By k-means++ on a uniform sample of all tokens."""
        sample = WeightedTokens(self._sample(seeding_size(n_clusters), rng), None, self._mean, self._backend)
        starts = torch.empty(0, n_clusters, self._width, dtype=torch.float32, device=self._tokens.device)
        if self._processes.rank == 0:
            starts = torch.stack([kmeans_plus_plus(sample, n_clusters, rng) for _ in range(n_init)])
        return self._processes.concatenate(starts)

    def _equal_parts(self, n_clusters: int) -> Tensor:
        """Means [K, D] of K consecutive stretches of the tokens of all ranks, equal in length."""
        bounds = equal_bounds(self.n_tokens, n_clusters)
        sums = torch.zeros(n_clusters, self._width, dtype=torch.float64, device=self._tokens.device)
        first = self._first_row()
        for chunk in self._tokens.chunks():
            for k, (start, stop) in enumerate(itertools.pairwise(bounds)):
                rows = chunk[max(start - first, 0) : max(stop - first, 0)]
                if len(rows):
                    sums[k] += rows.sum(0, dtype=torch.float64)
            first += len(chunk)
        lengths = torch.tensor(bounds, device=sums.device).diff()
        return (self._processes.sum(sums) / lengths[:, None]).float()

    def _first_row(self) -> int:
        """The position of this rank's first token among those of all ranks."""
        return sum(self._rows_of_ranks[: self._processes.rank])

    def _sample(self, size: int, rng: np.random.Generator) -> Tensor:
        index = np.arange(self.n_tokens)
        if size < self.n_tokens:
            index = np.sort(rng.choice(self.n_tokens, size, replace=False))
        first = self._first_row()
        mine = index[np.searchsorted(index, first) : np.searchsorted(index, first + len(self._tokens))]
        if len(self._tokens):
            rows = self._tokens.rows(mine - first)
        else:
            rows = torch.empty(0, self._width, dtype=self._dtype, device=self._tokens.device)
        return self._processes.concatenate(rows)
