"""All tokens of a pass, for clustering that needs more than one look: in host memory first, then on disk.

Limits: the tokens of a layer come back as one array, so they are either all in memory or all on disk.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from types import TracebackType
from typing import IO

import numpy as np
import torch
from torch import Tensor

_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate("KMGT", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}


def parse_bytes(argument: str, value: object) -> int:
    """A number of bytes from an integer, or from text such as "4GiB", "1.5 GB" or "800 MB".

    Raises:
        TypeError: neither an integer nor a string.
        ValueError: negative, or no number with a unit of B, kB, MB, GB, TB, KiB, MiB, GiB or TiB.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f'{argument} must be a number of bytes or text such as "4GiB", got {value!r}')
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([A-Za-z]*)\s*", value)
        unit = match[2].replace("k", "K") if match else "?"
        if match is None or unit not in _UNITS:
            raise ValueError(
                f"{argument} must be a number with a unit (B, kB, MB, GB, TB, KiB, MiB, GiB, TiB), "
                f"got {value!r}"
            )
        return int(float(match[1]) * _UNITS[unit])
    if value < 0:
        raise ValueError(f"{argument} must be a number of bytes >= 0, got {value}")
    return value


class TokenStore:
    """Collects the tokens of each layer; those beyond `memory_budget` bytes go to unlinked temporary files.

    The files are in the folder that `tempfile` chooses (environment variable TMPDIR) and vanish with the
    store, or with the process, however that ends. The budget includes the copy that `take` makes of a layer.
    """

    def __init__(self, n_layers: int, memory_budget: int) -> None:
        self._budget = memory_budget
        self._chunks: list[list[Tensor]] = [[] for _ in range(n_layers)]
        self._files: list[IO[bytes] | None] = [None] * n_layers
        self._dtypes: list[torch.dtype | None] = [None] * n_layers
        self._widths = [0] * n_layers
        self._in_memory = [0] * n_layers

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in self._files:
            if file is not None:
                file.close()

    @property
    def bytes_in_memory(self) -> int:
        """What is held in host memory now."""
        return sum(self._in_memory)

    def append(self, layer: int, tokens: Tensor) -> None:
        """Copy tokens [..., D], on any device, to the end of `layer`; all of a layer have one dtype and D.

        Raises:
            OSError: there is no room on the disk.
        """
        copy = torch.empty(tokens.shape, dtype=tokens.dtype, device="cpu").copy_(tokens)
        rows = copy.view(-1, tokens.shape[-1])
        self._dtypes[layer], self._widths[layer] = rows.dtype, rows.shape[1]
        if self._files[layer] is None and not self._fits(layer, rows.nbytes):
            self._spill(layer)
        if self._files[layer] is None:
            self._chunks[layer].append(rows)
            self._in_memory[layer] += rows.nbytes
        else:
            self._write(layer, rows)

    def take(self, layer: int) -> Tensor:
        """All tokens [M, D] of `layer`, on the CPU; only once from memory, memory-mapped from disk."""
        file = self._files[layer]
        if file is None:
            chunks, self._chunks[layer] = self._chunks[layer], []
            self._in_memory[layer] = 0
            return torch.cat(chunks)
        file.flush()
        # Copy-on-write: torch warns about arrays that cannot be written to.
        mapped = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c"))
        dtype = self._dtypes[layer]
        assert dtype is not None
        return mapped.view(dtype).view(-1, self._widths[layer])

    def _fits(self, layer: int, nbytes: int) -> bool:
        largest = max(*self._in_memory, self._in_memory[layer] + nbytes)
        return self.bytes_in_memory + nbytes + largest <= self._budget

    def _spill(self, layer: int) -> None:
        # Closed by __exit__: it outlives this call.
        self._files[layer] = tempfile.TemporaryFile(prefix="spt_fast-tokens-")  # noqa: SIM115
        for chunk in self._chunks[layer]:
            self._write(layer, chunk)
        self._chunks[layer] = []
        self._in_memory[layer] = 0

    def _write(self, layer: int, rows: Tensor) -> None:
        file = self._files[layer]
        assert file is not None
        try:
            # Written, not mapped: where the disk is full, a write fails and a mapped page kills the process.
            file.write(rows.view(torch.uint8).numpy().data)
        except OSError as error:
            raise _explained(error) from error


def _explained(error: OSError) -> OSError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else os.strerror(error.errno or 0)
    return OSError(
        error.errno,
        f"cannot keep the tokens in a temporary file in {tempfile.gettempdir()}: {reason}; set TMPDIR to a "
        "folder with room, raise memory_budget, lower max_images, or use mode='stream', which needs no file",
    )
