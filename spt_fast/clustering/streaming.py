"""One-pass k-means: every token is seen once, and prototypes for any K are solved afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.estimator import Clustering, ClusteringEstimator, not_fitted
from spt_fast.clustering.inputs import (
    ArrayLike,
    as_groups,
    as_tokens,
    as_weights,
    check_int,
    raise_non_finite,
)
from spt_fast.clustering.lloyd import LloydResult, lloyd
from spt_fast.clustering.reservoir import PriorityReservoir, take_rows
from spt_fast.clustering.seeding import kmeans_plus_plus
from spt_fast.clustering.solver import solve
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import Assigned, assign_accumulate

DEFAULT_CAPACITY = 20_000
CAPACITY_PER_CLUSTER = 500
ROUGH_CENTERS = 16
ROUGH_TOKENS = 2_048  # of the first batch, from which the rough centres start
ROUGH_ITERATIONS = 5


def default_capacity(n_clusters: int) -> int:
    """Tokens kept per group unless the caller says otherwise."""
    return max(DEFAULT_CAPACITY, CAPACITY_PER_CLUSTER * n_clusters)


@dataclass(frozen=True)
class Summary:
    """A bounded, weighted sample of a stream, from which centres for any K are solved."""

    groups: tuple[WeightedTokens, ...]
    totals: tuple[float, ...]  # tokens seen by each group, or their weight
    seed: int

    @property
    def n_groups(self) -> int:
        return len(self.groups)

    @property
    def n_features(self) -> int:
        return self.groups[0].tokens.shape[-1]

    @property
    def max_clusters(self) -> int:
        """The largest K that `solve` accepts: tokens kept by the smallest group."""
        return min(len(group) for group in self.groups)

    def solve(self, n_clusters: int, *, on_group: Callable[[], object] | None = None) -> Clustering:
        """Solve every group for `n_clusters` centres. The same K gives the same centres every time.

        `on_group` is called after each group, for a progress bar.

        Raises:
            ValueError: a group holds fewer tokens than `n_clusters`.
        """
        n_clusters = check_int("n_clusters", n_clusters, 1)
        if n_clusters > self.max_clusters:
            raise ValueError(
                f"n_clusters must be at most the number of tokens kept, {self.max_clusters}, got {n_clusters}"
            )
        results = []
        for g, group in enumerate(self.groups):
            results.append(solve(group, n_clusters, np.random.default_rng([self.seed, g, n_clusters])))
            if on_group is not None:
                on_group()
        return self._collect(results)

    def _collect(self, results: Sequence[LloydResult]) -> Clustering:
        """Estimates from the sample, scaled so that the counts add up to what was really seen."""
        counts = torch.stack([result.counts.cpu() for result in results])
        sampled = counts.sum(dim=1)
        totals = torch.tensor(self.totals, dtype=torch.float64)
        inertia = torch.tensor([result.inertia for result in results], dtype=torch.float64)
        return Clustering(
            centers=torch.stack([result.centers.cpu() for result in results]),
            counts=counts * (totals / sampled)[:, None],
            inertia=inertia / sampled,
            n_iter=tuple(result.n_iter for result in results),
        )


class StreamingKMeans(ClusteringEstimator):
    """k-means over a stream in one pass and bounded memory.

    Per group it carries a few rough centres, moved by mini-batch updates (Sculley, 2010), and a
    weighted reservoir (`PriorityReservoir`) that prefers tokens far from them, so that rare and
    outlying tokens are not missed. Reading a result solves k-means on the reservoir. As long as no
    more tokens than `capacity` were seen, nothing is dropped and the result is that of k-means on all.

    Args:
        n_clusters: K.
        n_groups: G independent problems, one per layer, that share K.
        capacity: tokens kept per group; None = max(20_000, 500 * n_clusters). Memory: G * capacity * D.
        seed: the same seed and the same batches give the same result, on any number of threads.
        backend: "auto", "native" (compiled) or "reference" (plain PyTorch).

    Attributes:
        cluster_centers_, counts_, inertia_, n_iter_: the solution for `n_clusters`; counts and
            inertia are estimates from the reservoir, exact while nothing was dropped.
        n_seen_: tokens seen by each group, int64 [G].
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        n_groups: int = 1,
        capacity: int | None = None,
        seed: int = 0,
        backend: str = "auto",
    ) -> None:
        super().__init__(n_clusters, n_groups, seed, backend)
        self.capacity = check_int(
            "capacity", default_capacity(self.n_clusters) if capacity is None else capacity, 1
        )
        if self.capacity < self.n_clusters:
            raise ValueError(f"capacity must be at least n_clusters = {n_clusters}, got {capacity}")
        self._streams: list[_TokenStream | None] = [None] * self.n_groups
        self._solved: Clustering | None = None

    def partial_fit(
        self, X: ArrayLike, sample_weight: ArrayLike | None = None, *, group: int | None = None
    ) -> StreamingKMeans:
        """Take in a batch of tokens; call it as often as there are batches.

        Args:
            X: [M, D] (one group) or [G, M, D]; with `group`, [..., D] for that group alone, read in
                place also when its leading dimensions are strided. float32, float16 or bfloat16, the
                same in every batch; other real dtypes are converted to float32.
            sample_weight: a weight >= 0 for each token, or None: one.
            group: the one group to update; None updates all.

        Raises:
            NonFiniteError: a token is NaN or infinite; nothing was taken in.
            ValueError, TypeError: a shape, dtype or argument does not fit; nothing was taken in.
        """
        groups, batches = self._batches(X, group)
        weights = as_weights(sample_weight, (len(groups), batches[0].shape[:-1].numel()), batches[0].device)
        updates = [
            self._prepare(g, batch, None if weights is None else weights[i])
            for i, (g, batch) in enumerate(zip(groups, batches, strict=True))
        ]
        for g, update in zip(groups, updates, strict=True):
            self._streams[g] = update.stream
            update.commit()
        self._solved = None
        return self

    def fit(self, X: ArrayLike, sample_weight: ArrayLike | None = None) -> StreamingKMeans:
        """Forget what was seen and take X in as one batch."""
        fresh = StreamingKMeans(
            self.n_clusters,
            n_groups=self.n_groups,
            capacity=self.capacity,
            seed=self.seed,
            backend=self.backend,
        ).partial_fit(X, sample_weight)
        self._streams, self._solved = fresh._streams, None
        return self

    def solve(self, n_clusters: int | None = None) -> Clustering:
        """Centres for `n_clusters` (None: the estimator's own) from what was seen so far."""
        if n_clusters is not None and n_clusters != self.n_clusters:
            return self.summary().solve(n_clusters)
        if self._solved is None:
            self._solved = self.summary().solve(self.n_clusters)
        return self._solved

    def summary(self) -> Summary:
        """The reservoirs as they are now; later batches may change the tokens that it shows.

        Raises:
            NotFittedError: a group has not seen any data.
        """
        streams = [stream for stream in self._streams if stream is not None]
        if len(streams) < self.n_groups:
            raise not_fitted(self, "partial_fit")
        return Summary(
            groups=tuple(stream.reservoir.summary(self.backend) for stream in streams),
            totals=tuple(stream.total for stream in streams),
            seed=self.seed,
        )

    @property
    def n_seen_(self) -> Tensor:
        """Tokens seen by each group, int64 [G]."""
        return torch.tensor([0 if stream is None else stream.n_seen for stream in self._streams])

    def _result(self) -> Clustering:
        return self.solve()

    def _batches(self, X: ArrayLike, group: int | None) -> tuple[list[int], list[Tensor]]:
        if group is None:
            tokens = as_groups(X, self.n_groups)
            return list(range(self.n_groups)), [batch[None] for batch in tokens]
        group = check_int("group", group, 0)
        if group >= self.n_groups:
            raise ValueError(f"group must be below n_groups = {self.n_groups}, got {group}")
        tokens = as_tokens(X)
        if tokens.ndim < 2 or tokens.numel() == 0:
            raise ValueError(f"X must be a non-empty [..., D], got {list(tokens.shape)}")
        return [group], [tokens.reshape(-1, *tokens.shape[-2:])]

    def _prepare(self, g: int, batch: Tensor, weights: Tensor | None) -> _Update:
        stream = self._streams[g]
        if stream is None:
            stream = _TokenStream.start(batch, weights, self.capacity, [self.seed, g], self.backend)
        return stream.prepare(batch, weights)


class _TokenStream:
    """What one group remembers: rough centres, totals and the reservoir."""

    def __init__(self, rough: Tensor, reservoir: PriorityReservoir, backend: str) -> None:
        self.reservoir = reservoir
        self.n_seen = 0
        self.total = 0.0  # weight of the tokens seen
        self._squared = 0.0  # sum of squared distances to the rough centres, as they were
        self._rough = rough  # [R, D] float32
        self._rough_counts = torch.zeros(len(rough), dtype=torch.float64, device=rough.device)
        self._backend = backend

    @classmethod
    def start(
        cls, batch: Tensor, weights: Tensor | None, capacity: int, seeds: list[int], backend: str
    ) -> _TokenStream:
        """A stream whose rough centres come from a sample of its first batch [B, N, D]."""
        rng = np.random.default_rng([*seeds, 0])
        rows = batch.shape[:-1].numel()
        index = np.sort(rng.choice(rows, min(rows, ROUGH_TOKENS), replace=False))
        part = take_rows(batch, torch.from_numpy(index).to(batch.device))
        if not bool(torch.isfinite(part).all()):
            raise_non_finite(batch)
        problem = WeightedTokens(part, None, part.double().mean(0).float(), backend)
        centers = kmeans_plus_plus(problem, min(ROUGH_CENTERS, len(part)), rng)
        rough = lloyd(problem, centers, max_iter=ROUGH_ITERATIONS).centers
        generator = torch.Generator().manual_seed(int(np.random.default_rng([*seeds, 1]).integers(2**62)))
        reservoir = PriorityReservoir(capacity, batch.shape[-1], batch.dtype, batch.device, generator)
        return cls(rough, reservoir, backend)

    def prepare(self, batch: Tensor, weights: Tensor | None) -> _Update:
        """Measure a batch [B, N, D] against the rough centres without changing anything."""
        self._check_like_before(batch)
        assigned = assign_accumulate(
            batch[None],
            self._rough[None],
            shift=self._mean()[None],
            weights=None if weights is None else weights[None],
            with_distances=True,
            backend=self._backend,
        )
        if not bool(torch.isfinite(assigned.inertia).all()):
            raise_non_finite(batch)
        return _Update(self, batch, weights, assigned)

    def take_in(self, batch: Tensor, weights: Tensor | None, assigned: Assigned) -> None:
        """Mini-batch update of the rough centres; the tokens go to the reservoir by importance."""
        assert assigned.distances is not None
        counts, sums = assigned.counts[0], assigned.sums[0]
        self.n_seen += batch.shape[:-1].numel()
        self.total += float(counts.sum())
        self._squared += float(assigned.inertia[0])
        self._rough_counts += counts
        gains = (sums - counts[:, None] * self._rough) / self._rough_counts.clamp_min(1e-300)[:, None]
        self._rough = (self._rough + gains).float()
        self.reservoir.offer(batch, self._importance(assigned.distances[0]), weights)

    def _importance(self, squared: Tensor) -> Tensor:
        """1 + d^2 / mean d^2: the uniform share keeps every weight below twice the plain one."""
        mean = self._squared / self.total
        if mean <= 0:
            return torch.ones_like(squared, dtype=torch.float64)
        return 1 + squared.double() / mean

    def _mean(self) -> Tensor:
        """Mean [D] of all tokens so far; of the rough centres before there are any."""
        weights = self._rough_counts if self.total > 0 else torch.ones_like(self._rough_counts)
        return (weights @ self._rough.double() / weights.sum()).float()

    def _check_like_before(self, batch: Tensor) -> None:
        if batch.shape[-1] != self._rough.shape[-1]:
            raise ValueError(
                f"X must have {self._rough.shape[-1]} features like before, got {batch.shape[-1]}"
            )
        if batch.dtype != self.reservoir.dtype:
            raise ValueError(f"X must be {self.reservoir.dtype} like before, got {batch.dtype}")
        if batch.device != self._rough.device:
            raise ValueError(f"X must be on {self._rough.device} like before, got {batch.device}")


@dataclass(frozen=True)
class _Update:
    """A batch that was measured and found good, to be taken in by its stream."""

    stream: _TokenStream
    batch: Tensor
    weights: Tensor | None
    assigned: Assigned

    def commit(self) -> None:
        self.stream.take_in(self.batch, self.weights, self.assigned)
