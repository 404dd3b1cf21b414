"""What a pass leaves behind: a bounded, weighted sample of a stream, from which any K is solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.estimator import Clustering
from spt_fast.clustering.frame import Frame, out_of_frames, scales
from spt_fast.clustering.lloyd import LloydResult
from spt_fast.clustering.solver import solve
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops.kmeans import TOKEN_DTYPES
from spt_fast.support.arguments import check_int, check_tensor
from spt_fast.support.distributed import ALONE, Processes
from spt_fast.support.threads import side_by_side


@dataclass(frozen=True)
class Summary:
    """A bounded, weighted sample of a stream, from which centres for any K are solved."""

    groups: tuple[WeightedTokens, ...]
    totals: tuple[float, ...]  # tokens seen by each group, or their weight
    seed: int
    frames: tuple[Frame | None, ...] | None = None  # that the tokens of each group are in; None: no frames

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

    def solve(
        self,
        n_clusters: int,
        *,
        on_group: Callable[[], object] | None = None,
        processes: Processes = ALONE,
    ) -> Clustering:
        """Solve every group for `n_clusters` centres. The same K gives the same centres every time.

        `on_group` is called after each group, for a progress bar. All `processes` hold the same summary; they
        share out the groups, and each gets all the results.

        Raises:
            ValueError: a group holds fewer tokens than `n_clusters`.
        """
        n_clusters = check_int("n_clusters", n_clusters, 1)
        if n_clusters > self.max_clusters:
            raise ValueError(
                f"n_clusters must be at most the number of tokens kept, {self.max_clusters}, got {n_clusters}"
            )

        def solve_group(g: int) -> LloydResult:
            solved = solve(self.groups[g], n_clusters, np.random.default_rng([self.seed, g, n_clusters]))
            return replace(solved, centers=solved.centers.cpu(), counts=solved.counts.cpu())

        mine = processes.work_of(self.n_groups)
        on_cpu = self.groups[0].tokens.device.type == "cpu"
        with side_by_side(solve_group, mine if on_cpu else ()) as solved_group:

            def next_group(g: int) -> LloydResult:
                result = solved_group(g)
                if on_group is not None:
                    on_group()
                return result

            return self._collect(processes.split_work(self.n_groups, next_group))

    def tensors(self) -> dict[str, Tensor]:
        """All of it as tensors by name, for a file; `from_tensors` takes them. Without frames only."""
        assert not self.frames or all(frame is None for frame in self.frames)
        facts = {
            "totals": torch.tensor(self.totals, dtype=torch.float64, device="cpu"),
            "seed": torch.tensor(self.seed, device="cpu"),
        }
        for g, group in enumerate(self.groups):
            facts |= {f"{g}.tokens": group.tokens, f"{g}.mean": group.mean}
            if group.weights is not None:
                facts[f"{g}.weights"] = group.weights
        return facts

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Summary:
        """What `tensors` gave.

        Raises:
            KeyError, TypeError, ValueError: tensors are missing, or of another shape or dtype.
        """
        totals = check_tensor("totals", tensors["totals"], ("G",), dtype=torch.float64)
        groups = []
        for g in range(len(totals)):
            tokens = check_tensor(f"{g}.tokens", tensors[f"{g}.tokens"], ("n", "D"))
            if tokens.dtype not in TOKEN_DTYPES:
                raise TypeError(f"{g}.tokens must be float32, float16 or bfloat16, got {tokens.dtype}")
            mean = check_tensor(f"{g}.mean", tensors[f"{g}.mean"], (tokens.shape[1],), dtype=torch.float32)
            weights = tensors.get(f"{g}.weights")
            if weights is not None:
                check_tensor(f"{g}.weights", weights, (len(tokens),), dtype=torch.float32)
            groups.append(WeightedTokens(tokens, weights, mean))
        return cls(tuple(groups), tuple(totals.tolist()), int(tensors["seed"]))

    def _collect(self, results: Sequence[LloydResult]) -> Clustering:
        """Estimates from the sample, scaled so that the counts add up to what was really seen."""
        counts = torch.stack([result.counts for result in results])
        shares = torch.tensor(self.totals, dtype=torch.float64, device="cpu") / counts.sum(dim=1)
        frames = self.frames or (None,) * self.n_groups
        inertia = torch.tensor([result.inertia for result in results], dtype=torch.float64, device="cpu")
        return Clustering(
            centers=out_of_frames(torch.stack([result.centers for result in results]), frames),
            counts=counts * shares[:, None],
            inertia=inertia * shares * scales(frames).square(),
            n_iter=tuple(result.n_iter for result in results),
        )
