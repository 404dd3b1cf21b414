"""One clustering problem, tokens with weights, and the passes over it that every algorithm is made of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.ordered import squared_differences, weighted_sum
from spt_fast.ops.kmeans import PassResult, assign_accumulate, squared_distances
from spt_fast.support.waiting import send


@dataclass(frozen=True)
class WeightedTokens:
    """n tokens of one group. The mean serves as the point that distances are computed around."""

    tokens: Tensor  # [n, D] float32, float16 or bfloat16
    weights: Tensor | None  # [n] float32, or None: one each
    mean: Tensor  # [D] float32
    backend: str = "auto"

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def assign(
        self, centers: Tensor, *, with_labels: bool = False, with_distances: bool = False
    ) -> PassResult:
        """One pass for centres [K, D]; every result keeps its leading group dimension of 1."""
        return assign_accumulate(
            self.tokens[None],
            centers[None],
            shift=self.mean[None],
            weights=None if self.weights is None else self.weights[None],
            with_labels=with_labels,
            with_distances=with_distances,
            backend=self.backend,
        )

    def distances_to(self, points: Tensor) -> Tensor:
        """Squared distances [n, K] to K points [K, D]; float32."""
        return squared_distances(
            self.tokens[None], points[None], shift=self.mean[None], backend=self.backend
        )[0]

    def inertia(self, centers: Tensor, labels: Tensor) -> float:
        """Weighted sum of squared distances to centres [K, D] by labels [n], from the differences."""
        return float(weighted_sum(self.unit_weights(), squared_differences(self.tokens, centers, labels)))

    def rows(self, index: Tensor) -> Tensor:
        """Chosen tokens [len(index), D] in float32."""
        return self.tokens[index].float()

    def unit_weights(self) -> Tensor:
        """Weights [n] in float64; ones where there are none."""
        if self.weights is None:
            return torch.ones(len(self), dtype=torch.float64, device=self.tokens.device)
        return self.weights.double()

    def uniform(self, sizes: list[int], rng: np.random.Generator) -> tuple[Tensor, ...]:
        """Random numbers in [0, 1), float64, split into these sizes; one copy from the host."""
        numbers = send(torch.from_numpy(rng.random(sum(sizes))), self.tokens.device)
        return torch.split_with_sizes(numbers, sizes)

    def sample(self, size: int, rng: np.random.Generator) -> WeightedTokens:
        """A uniform sample of `size` tokens without replacement; all of them if there are no more."""
        if size >= len(self):
            return self
        index = torch.from_numpy(np.sort(rng.choice(len(self), size, replace=False))).to(self.tokens.device)
        weights = None if self.weights is None else self.weights[index]
        return WeightedTokens(self.tokens[index], weights, self.mean, self.backend)
