"""Prompts drawn from the tokens of all images, or from windows of them, as the paper's released code does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from spt_fast.clustering.reservoir import PriorityReservoir, merged_over_ranks
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.prototypes.pooling import windows_of_images
from spt_fast.support.distributed import Processes

# Tokens per layer from which counts and inertia are estimated.
SAMPLE_TOKENS = 4_096


class DrawnFromAll:
    """N_p tokens, or means or maxima of windows, of one layer: each of all images' has the same chance.

    One look at each batch, and memory for N_p candidates and a sample of tokens.

    Args:
        strategy: "random", "mean" or "max".
        num_prompts: N_p.
        device: where the tokens will be.
        seeds: of what is drawn; different on every rank and for every layer.
    """

    def __init__(self, strategy: str, num_prompts: int, device: torch.device, seeds: list[int]) -> None:
        self._strategy, self._num_prompts, self._device = strategy, num_prompts, device
        self._generator = torch.Generator().manual_seed(int(np.random.default_rng(seeds).integers(2**62)))
        self._candidates: PriorityReservoir | None = None
        self._sample: PriorityReservoir | None = None

    def take_in(self, tokens: Tensor) -> None:
        """Show it the tokens [B, N_e, D] of a batch of images."""
        tokens = tokens.float()
        candidates = tokens
        if self._strategy != "random":
            candidates = windows_of_images(self._strategy, tokens, self._num_prompts)
        self._candidates = self._offer(self._candidates, candidates, self._num_prompts)
        self._sample = self._offer(self._sample, tokens, SAMPLE_TOKENS)

    def result(self, processes: Processes, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Prompts [N_p, D], counts [N_p] and inertia, as `pool` gives them; the same on every rank.

        Counts and inertia are estimates from the sample, made to stand for `num_tokens`, those of all ranks.

        Raises:
            ValueError: fewer candidates than prompts.
        """
        prompts = self._merged(self._candidates, self._num_prompts, processes).tokens
        if len(prompts) < self._num_prompts:
            raise ValueError(
                f"num_prompts must be at most the number of windows of all images, {len(prompts)}, "
                f"got {self._num_prompts}"
            )
        sample = self._merged(self._sample, SAMPLE_TOKENS, processes)
        # Of a uniform sample every token stands for as many.
        assigned = WeightedTokens(sample.tokens, None, sample.mean).assign(prompts)
        share = len(sample) / num_tokens
        return prompts.cpu(), assigned.counts[0].cpu() / share, assigned.inertia[0].cpu() / share

    def _offer(self, reservoir: PriorityReservoir | None, rows: Tensor, capacity: int) -> PriorityReservoir:
        if reservoir is None:
            reservoir = PriorityReservoir(capacity, rows.shape[-1], rows.dtype, rows.device, self._generator)
        reservoir.offer(rows, torch.ones(rows.shape[:-1].numel(), device=rows.device), None)
        return reservoir

    def _merged(
        self, reservoir: PriorityReservoir | None, capacity: int, processes: Processes
    ) -> WeightedTokens:
        merged = merged_over_ranks(reservoir, capacity, self._device, processes)
        # A pass without images has been refused before.
        assert merged is not None
        return merged
