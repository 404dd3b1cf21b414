"""One-pass k-means: every token is seen once, and prototypes for any K are solved afterwards."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.columns import check_feature_names, feature_names
from spt_fast.clustering.estimator import (
    Clustering,
    ClusteringEstimator,
    check_enough,
    not_fitted,
    outside_inference_mode,
    warn_of_empty_clusters,
)
from spt_fast.clustering.frame import Frame, in_frames
from spt_fast.clustering.inputs import (
    ArrayLike,
    as_groups,
    as_tokens,
    as_weights,
    check_filled,
    check_width,
    raise_non_finite,
)
from spt_fast.clustering.reservoir import merged_over_ranks
from spt_fast.clustering.summary import Summary
from spt_fast.clustering.token_stream import TokenStream
from spt_fast.ops.kmeans import TOKEN_DTYPES
from spt_fast.support.arguments import check_int
from spt_fast.support.distributed import Processes
from spt_fast.support.user_warnings import warn_user

DEFAULT_CAPACITY = 20_000
CAPACITY_PER_CLUSTER = 500
_IGNORED = ("batch_size", "max_iter", "n_init", "verbose")  # of scikit-learn's MiniBatchKMeans


class StreamingKMeans(ClusteringEstimator):
    """k-means over a stream in one pass and bounded memory.

    Per group it carries a few rough centres, moved by mini-batch updates (Sculley, 2010), and a
    weighted reservoir (`PriorityReservoir`) that prefers tokens far from them, so that rare and
    outlying tokens are not missed. Reading a result solves k-means on the reservoir. As long as no
    more tokens than `capacity` were seen, nothing is dropped and the result is that of k-means on all.
    Arguments are checked by `fit` and `partial_fit`. Results are torch tensors where the last X was one,
    else NumPy arrays.

    Args:
        n_clusters: K.
        n_groups: G independent problems, one per layer, that share K.
        capacity: tokens kept per group; None = max(20_000, 500 * n_clusters). Memory: up to G * capacity * D.
        seed: the same seed and the same batches give the same result, on any number of threads; None: 0.
        random_state: scikit-learn's name for `seed`; also a NumPy RandomState or Generator, from which each
            stream draws a seed.
        batch_size, max_iter, n_init, verbose: of scikit-learn's MiniBatchKMeans; taken, and ignored with a
            warning: `fit` takes X in once, and the solve needs no restarts.
        backend: "auto", "native" (compiled) or "reference" (plain PyTorch).

    Attributes:
        cluster_centers_, counts_, inertia_, n_iter_: the solution for `n_clusters`; counts and
            inertia are estimates from the reservoir, exact while nothing was dropped.
        feature_names_in_: see the base class.
        labels_: after `fit` only, of its X and the `n_clusters` of then.
        n_seen_: tokens seen by each group, int64 [G], a torch tensor always.
    """

    _streams: list[TokenStream | None] | None = None
    _solved: Clustering | None = None

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        n_groups: int = 1,
        capacity: int | None = None,
        seed: int | None = None,
        random_state: int | np.random.RandomState | np.random.Generator | None = None,
        batch_size: int | None = None,
        max_iter: int | None = None,
        n_init: int | str | None = None,
        verbose: int = 0,
        backend: str = "auto",
    ) -> None:
        self.n_clusters = n_clusters
        self.n_groups = n_groups
        self.capacity = capacity
        self.seed = seed
        self.random_state = random_state
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.n_init = n_init
        self.verbose = verbose
        self.backend = backend

    @outside_inference_mode
    def partial_fit(
        self,
        X: ArrayLike,
        y: object = None,
        sample_weight: ArrayLike | None = None,
        *,
        group: int | None = None,
    ) -> StreamingKMeans:
        """Take in a batch of tokens; call it as often as there are batches.

        Args:
            X: [M, D] (one group) or [G, M, D]; with `group`, [..., D] for that group alone, read in
                place also when its leading dimensions are strided. float32, float16 or bfloat16, the
                same in every batch; other real dtypes are converted to float32. Where float32 cannot tell
                the tokens of the first batch apart, or cannot square their distances, those of all batches
                are moved and scaled like them; float32 and narrower with `group` are read as they are.
            y: ignored; pipelines pass it.
            sample_weight: a weight >= 0 for each token, [M], [G, M] or, with `group`, [...]; None: one.
            group: the one group to update; None updates all.

        Raises:
            NonFiniteError: a token is NaN or infinite; nothing was taken in.
            ValueError, TypeError: a shape, dtype or argument does not fit; nothing was taken in.
        """
        settings = self._settings()
        capacity = resolve_capacity(self.capacity, settings.n_clusters)
        names = self._check_names(X)
        streams = self._streams or _no_streams(settings.n_groups)
        if len(streams) != settings.n_groups:
            raise ValueError(f"n_groups must be {len(streams)} like before, got {settings.n_groups}")
        groups, batches = _batches(X, group, settings.n_groups)
        for stream in streams:
            if stream is not None:
                check_width(batches[0], stream.width, type(self).__name__)
        weights = as_weights(
            sample_weight,
            (len(groups), batches[0].shape[:-1].numel()),
            batches[0].device,
            leading=None if group is None else tuple(np.shape(X)[:-1]),
        )
        updates = []
        for i, (g, batch) in enumerate(zip(groups, batches, strict=True)):
            weight = None if weights is None else weights[i]
            seeds = [self._seed(), g]
            in_place = group is not None and batch.dtype in TOKEN_DTYPES
            first_row = i * batch.shape[:-1].numel()  # in X
            stream = streams[g] or TokenStream.start(
                batch, capacity, seeds, self.backend, in_place, first_row
            )
            update = stream.prepare(batch, weight)
            # Waits for the device: nothing may be taken in where a token is bad.
            if int(update.bad_row) >= 0:
                raise_non_finite(batch, first_row, update.scaled)
            updates.append(update)
        for g, update in zip(groups, updates, strict=True):
            streams[g] = update.stream
            update.commit()
        self._streams, self._feature_names = streams, names
        self._from_tensor = isinstance(X, Tensor)
        self._solved = self._labels = self._unlabelled = None
        return self

    @outside_inference_mode
    def partial_fit_unchecked(self, tokens: Tensor, group: int) -> Tensor:
        """`partial_fit` of one group that does not wait for a device, but for the group's first tokens.

        Returns:
            The number of the first row that `partial_fit` would refuse, or -1: int64, where `tokens` is. The
            estimator is spoiled where it is a row.

        Raises:
            As `partial_fit`, but NonFiniteError for the first tokens only.
        """
        settings = self._settings()
        streams = self._streams or _no_streams(settings.n_groups)
        (group,), (batch,) = _batches(tokens, group, settings.n_groups)
        stream = streams[group]
        if stream is None:
            capacity = resolve_capacity(self.capacity, settings.n_clusters)
            in_place = batch.dtype in TOKEN_DTYPES
            stream = TokenStream.start(batch, capacity, [self._seed(), group], self.backend, in_place)
        check_width(batch, stream.width, type(self).__name__)
        update = stream.prepare(batch, None)
        update.commit()
        streams[group] = stream
        self._streams, self._from_tensor = streams, True
        self._solved = self._labels = self._unlabelled = None
        return update.bad_row

    @outside_inference_mode
    def fit(self, X: ArrayLike, y: object = None, sample_weight: ArrayLike | None = None) -> StreamingKMeans:
        """Forget what was seen, take X in as one batch and solve; `y` is ignored.

        Raises:
            NonFiniteError: a token is NaN or infinite; nothing was forgotten.
            ValueError, TypeError: an argument, also of the constructor, is not what it must be.
        """
        tokens, names = as_groups(X, self._settings().n_groups), feature_names(X)
        check_enough(tokens.shape[1], self.n_clusters)
        self._warn_of_ignored()
        fresh = type(self)(**self.get_params()).partial_fit(tokens, sample_weight=sample_weight)
        self._streams, self._solved, self._drawn_seed = fresh._streams, fresh.solve(), fresh._drawn_seed
        self._remember(X, names, in_frames(tokens, self._frames()))
        return self

    @outside_inference_mode
    def solve(self, n_clusters: int | None = None) -> Clustering:
        """Centres for `n_clusters` (None: the estimator's own) from what was seen so far.

        Warns where centres end without tokens, because there are fewer distinct ones.
        """
        own = self._settings().n_clusters
        wanted = own if n_clusters is None else n_clusters
        # `n_clusters` may have been set anew since.
        if wanted == own and self._solved is not None and self._solved.centers.shape[1] == own:
            return self._solved
        solved = self.summary().solve(wanted)
        warn_of_empty_clusters(solved)
        if wanted == own:
            self._solved = solved
        return solved

    def summary(self) -> Summary:
        """The reservoirs as they are now; later batches may change the tokens that it shows.

        Raises:
            NotFittedError: a group has not seen any data.
        """
        settings = self._settings()
        streams = [stream for stream in self._streams or [] if stream is not None]
        if len(streams) < settings.n_groups:
            raise not_fitted(self, "partial_fit")
        return Summary(
            groups=tuple(stream.reservoir.summary(self.backend) for stream in streams),
            totals=tuple(float(stream.total) for stream in streams),
            seed=self._seed(),
            frames=tuple(stream.frame for stream in streams),
        )

    def merged_summary(self, processes: Processes, device: torch.device) -> Summary:
        """The summary of what all ranks have seen, the same on each (see `PriorityReservoir.merged_summary`).

        `device` is where a rank without data puts it. The ranks should differ in `seed`: it draws their
        samples, which have to be independent.

        Raises:
            NotFittedError: no rank has seen data.
            ValueError: a rank has moved or scaled its tokens, for which ranks have no common frame.
        """
        settings = self._settings()
        capacity = resolve_capacity(self.capacity, settings.n_clusters)
        streams = self._streams or _no_streams(settings.n_groups)
        if any(frame is not None for rank in processes.gather(self._frames()) for frame in rank):
            raise ValueError("tokens must be such that float32 can square their distances on every rank")
        groups, totals = [], []
        for stream in streams:
            reservoir = None if stream is None else stream.reservoir
            merged = merged_over_ranks(reservoir, capacity, device, processes, self.backend)
            if merged is None:
                raise not_fitted(self, "partial_fit")
            groups.append(merged)
            totals.append(sum(processes.gather(0.0 if stream is None else float(stream.total))))
        return Summary(groups=tuple(groups), totals=tuple(totals), seed=self._seed())

    @property
    def n_seen_(self) -> Tensor:
        """Tokens seen by each group, int64 [G]."""
        streams = self._streams or _no_streams(self._settings().n_groups)
        return torch.tensor([0 if stream is None else stream.n_seen for stream in streams], device="cpu")

    @property
    def n_features_in_(self) -> int:
        """Width D of the tokens."""
        for stream in self._streams or []:
            if stream is not None:
                return stream.width
        raise not_fitted(self, "partial_fit")

    def _result(self) -> Clustering:
        return self.solve()

    def _check_names(self, X: ArrayLike) -> np.ndarray | None:
        """The names of the columns of all batches, that of X included."""
        if self._streams is None:
            return feature_names(X)
        check_feature_names(X, self._feature_names, type(self).__name__)
        return self._feature_names

    def _warn_of_ignored(self) -> None:
        given = [name for name in _IGNORED if getattr(self, name) not in (None, 0, "auto")]
        if given:
            warn_user(
                f"StreamingKMeans ignores {', '.join(given)}: it takes X in once, in memory that `capacity` "
                "bounds, and its solve needs no restarts"
            )

    def _frames(self) -> tuple[Frame | None, ...]:
        return tuple(None if stream is None else stream.frame for stream in self._streams or [])


def _no_streams(n_groups: int) -> list[TokenStream | None]:
    return [None] * n_groups


def resolve_capacity(capacity: int | None, n_clusters: int, name: str = "n_clusters") -> int:
    """Tokens to keep per group: `capacity`, checked, or the default; `name` is what errors call `n_clusters`.

    Raises:
        TypeError: not an integer or None.
        ValueError: fewer than clusters.
    """
    if capacity is None:
        return max(DEFAULT_CAPACITY, CAPACITY_PER_CLUSTER * n_clusters)
    if check_int("capacity", capacity, 1, "or None") < n_clusters:
        raise ValueError(f"capacity must be at least {name} = {n_clusters}, got {capacity}")
    return int(capacity)


def _batches(X: ArrayLike, group: int | None, n_groups: int) -> tuple[list[int], list[Tensor]]:
    """The groups that X holds tokens of, and those tokens, each [B, N, D]."""
    if group is None:
        return list(range(n_groups)), [batch[None] for batch in as_groups(X, n_groups)]
    group = check_int("group", group, 0)
    if group >= n_groups:
        raise ValueError(f"group must be below n_groups = {n_groups}, got {group}")
    tokens = as_tokens(X)
    if tokens.ndim < 2:
        raise ValueError(f"X must be [..., M, D], got {list(tokens.shape)}. Reshape your data")
    check_filled(tokens)
    return [group], [tokens.reshape(-1, *tokens.shape[-2:])]
