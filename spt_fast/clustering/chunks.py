"""Tokens to be read again and again: in chunks that something else keeps, or in memory as one chunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class ChunkedTokens(Protocol):
    """Tokens of one group on one rank, such as `spt_fast.prototypes.token_store.StoredLayer`."""

    def __len__(self) -> int: ...

    @property
    def width(self) -> int:
        """D; unknown where there are no tokens."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def chunk_rows(self) -> list[int]:
        """The number of tokens in each chunk."""
        ...

    def chunks(self, wanted: Sequence[int] | None = None) -> Iterator[Tensor]:
        """The chunks [m, D], or those at the ascending positions `wanted`.

        Each is good until the next is asked for.
        """
        ...

    def rows(self, index: np.ndarray) -> Tensor:
        """The tokens at ascending positions."""
        ...


class OneChunk:
    """Tokens [n, D] in memory as a single chunk; copied only where their last dimension is not contiguous."""

    def __init__(self, tokens: Tensor) -> None:
        contiguous = tokens.stride(-1) == 1 or tokens.shape[-1] == 1
        self._tokens = tokens if contiguous else tokens.contiguous()
        self.width = tokens.shape[-1]
        self.dtype, self.device = tokens.dtype, tokens.device
        self.chunk_rows = [len(tokens)]

    def __len__(self) -> int:
        return len(self._tokens)

    def chunks(self, wanted: Sequence[int] | None = None) -> Iterator[Tensor]:
        """See `ChunkedTokens.chunks`."""
        if wanted is None or len(wanted):
            yield self._tokens

    def rows(self, index: np.ndarray) -> Tensor:
        """See `ChunkedTokens.rows`."""
        return self._tokens[torch.from_numpy(index).to(self.device)]
