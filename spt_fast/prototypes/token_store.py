"""All tokens of a pass, for clustering that reads them many times: on the device, in host memory, on disk.

Limits: POSIX; tokens only ever come back in order of arrival, a chunk at a time; the CUDA side has never run.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import IO

import numpy as np
import torch
from torch import Tensor

# Every sum over tokens is taken chunk by chunk, so this decides the last bits of a result, and no tier does.
CHUNK_BYTES = 16 * 2**20
# Of the device's free memory, the rest being for the model's batches and the clustering.
DEVICE_SHARE = 0.5


class TokenStore:
    """Keeps the tokens of each layer and reads them back, chunk by chunk, as often as asked.

    `memory_budget` counts bytes of tokens in memory, on the device and on the host together. On CUDA, up to
    half of the device's free memory is used first, then pinned host memory. What the budget does not hold
    goes to a temporary file without a name, which vanishes with the store or with the process, however that
    ends; its folder is the one that `tempfile` chooses (environment variable TMPDIR). Not in the budget: two
    chunks on the host, and on CUDA three on the device, through which the rest is read while the one before
    is used.

    Lower layers are kept in memory first. Those that come after them are read into the memory that
    `release` frees, as far as it goes, so a layer that fits is read from the file once.
    """

    def __init__(
        self,
        n_layers: int,
        memory_budget: int,
        device: torch.device | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.device = torch.device("cpu") if device is None else device
        self._room = {"cpu": memory_budget}
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            on_device = min(memory_budget, int(DEVICE_SHARE * free))
            self._room = {"cuda": on_device, "cpu": memory_budget - on_device}
        self._layers = [_Layer(chunk_bytes) for _ in range(n_layers)]
        self._file = _ChunkFile()

    def __enter__(self) -> TokenStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._layers.clear()
        self._file.close()

    @property
    def bytes_in_memory(self) -> int:
        """What is held in memory now, on the device and on the host."""
        return sum(
            chunk.memory.nbytes
            for layer in self._layers
            for chunk in layer.chunks
            if chunk.memory is not None
        )

    def append(self, layer: int, tokens: Tensor) -> None:
        """Copy tokens [..., D], on any device, to the end of `layer`; all of a layer have one dtype and D.

        Raises:
            OSError: there is no room on the disk.
        """
        here = self._layers[layer]
        rows = tokens.reshape(-1, tokens.shape[-1])
        here.fix(rows.dtype, rows.shape[1])
        while len(rows):
            if not here.chunks or here.chunks[-1].filled == here.chunk_rows:
                here.chunks.append(self._new_chunk(layer))
            chunk = here.chunks[-1]
            part, rows = rows.tensor_split([here.chunk_rows - chunk.filled])
            if chunk.memory is None:
                self._file.write(chunk.offset + chunk.filled * here.row_bytes, part)
            else:
                chunk.memory[chunk.filled : chunk.filled + len(part)].copy_(part)
            chunk.filled += len(part)

    def layer(self, layer: int) -> StoredLayer:
        """The tokens of one layer, for reading."""
        return StoredLayer(self, layer)

    def release(self, layer: int) -> None:
        """Forget the tokens of `layer`; their memory goes to layers that are in the file."""
        for chunk in self._layers[layer].chunks:
            self._free(chunk)
        self._layers[layer].chunks.clear()

    def load(self, layer: int) -> None:
        """Move the tokens of `layer` up into memory, as far as there is room."""
        here = self._layers[layer]
        for chunk in here.chunks:
            if chunk.memory is None and (memory := self._allocate(here)) is not None:
                rows = memory if memory.device.type == "cpu" else torch.empty_like(memory, device="cpu")
                self._file.read(chunk.offset, rows[: chunk.filled])
                chunk.memory = memory.copy_(rows)

    def chunks(self, layer: int, wanted: Sequence[int] | None = None) -> Iterator[Tensor]:
        """The chunks [m, D] of `layer` in order, on the device; each is good until the next is asked for.

        Only those at the ascending positions `wanted`, if given: the others are not read.
        """
        here = self._layers[layer]
        chunks = here.chunks if wanted is None else [here.chunks[index] for index in wanted]
        stored = self._sweep_stored(here, chunks)
        return self._on_device(stored) if self.device.type == "cuda" else stored

    def _sweep_stored(self, here: _Layer, chunks: list[_Chunk]) -> Iterator[Tensor]:
        """The chunks where they are kept; those in the file are read by a thread, one ahead."""
        buffers: list[Tensor] = []
        with ThreadPoolExecutor(1) as reader:

            def start(index: int) -> Future[Tensor] | None:
                if index >= len(chunks) or chunks[index].memory is not None:
                    return None
                if not buffers:
                    buffers.extend(self._empty_on_host(here) for _ in range(2))
                chunk = chunks[index]
                return reader.submit(self._file.read, chunk.offset, buffers[index % 2][: chunk.filled])

            ahead = start(0)
            for index, chunk in enumerate(chunks):
                current, ahead = ahead, start(index + 1)
                if current is not None:
                    yield current.result()
                elif chunk.memory is not None:
                    yield chunk.memory[: chunk.filled]

    def _on_device(self, stored: Iterator[Tensor]) -> Iterator[Tensor]:
        """Copies to the device on a stream of their own, while the chunk before is worked on."""
        copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        before: Tensor | None = None
        for rows in stored:
            with torch.cuda.stream(copies):
                moved = rows.to(self.device, non_blocking=True)
            if before is not None:
                yield before
            work = torch.cuda.current_stream(self.device)
            work.wait_stream(copies)
            moved.record_stream(work)
            # The next chunk may be read into the memory that this copy comes from.
            copies.synchronize()
            before = moved
        if before is not None:
            yield before

    def _new_chunk(self, layer: int) -> _Chunk:
        here = self._layers[layer]
        memory = self._allocate(here)
        if memory is None and self._spill_above(layer):
            memory = self._allocate(here)
        return _Chunk(memory) if memory is not None else _Chunk(None, self._file.reserve(here.chunk_bytes))

    def _allocate(self, here: _Layer) -> Tensor | None:
        """Memory for one chunk, on the device first; None where the budget holds no more."""
        for kind, room in self._room.items():
            if here.chunk_bytes <= room:
                self._room[kind] -= here.chunk_bytes
                return here.empty_chunk(self.device, False) if kind == "cuda" else self._empty_on_host(here)
        return None

    def _empty_on_host(self, here: _Layer) -> Tensor:
        return here.empty_chunk("cpu", pinned=self.device.type == "cuda")

    def _free(self, chunk: _Chunk) -> None:
        if chunk.memory is not None:
            self._room[chunk.memory.device.type] += chunk.memory.nbytes
            chunk.memory = None

    def _spill_above(self, layer: int) -> bool:
        """Write a chunk of a higher layer to the file, which frees its memory; False if there is none."""
        for here in reversed(self._layers[layer + 1 :]):
            for chunk in reversed(here.chunks):
                if chunk.memory is not None:
                    chunk.offset = self._file.reserve(here.chunk_bytes)
                    self._file.write(chunk.offset, chunk.memory[: chunk.filled])
                    self._free(chunk)
                    return True
        return False


@dataclass(frozen=True)
class StoredLayer:
    """One layer of a `TokenStore`."""

    store: TokenStore
    index: int

    def __len__(self) -> int:
        return sum(self.chunk_rows)

    @property
    def width(self) -> int:
        """D, or 0 before any token came."""
        return self.store._layers[self.index].width

    @property
    def dtype(self) -> torch.dtype:
        return self.store._layers[self.index].dtype

    @property
    def device(self) -> torch.device:
        return self.store.device

    @property
    def chunk_rows(self) -> list[int]:
        """The number of tokens in each chunk."""
        return [chunk.filled for chunk in self.store._layers[self.index].chunks]

    def chunks(self, wanted: Sequence[int] | None = None) -> Iterator[Tensor]:
        """See `TokenStore.chunks`."""
        return self.store.chunks(self.index, wanted)

    def rows(self, index: np.ndarray) -> Tensor:
        """The tokens at the ascending positions `index`, [n, D] on the device, by one sweep."""
        first, parts = 0, [torch.empty(0, self.width, dtype=self.dtype, device=self.device)]
        for chunk in self.chunks():
            here = index[np.searchsorted(index, first) : np.searchsorted(index, first + len(chunk))]
            parts.append(chunk[torch.from_numpy(here - first).to(chunk.device)])
            first += len(chunk)
        return torch.cat(parts)


@dataclass
class _Chunk:
    memory: Tensor | None  # [chunk_rows, D] on the device or the host; None: in the file
    offset: int = -1  # in the file
    filled: int = 0


class _Layer:
    """The chunks of a layer, all but the last of them full, and what the tokens look like."""

    def __init__(self, chunk_bytes: int) -> None:
        self.chunks: list[_Chunk] = []
        self.dtype = torch.float32
        self.width = 0
        self.row_bytes = 0
        self.chunk_rows = 0
        self.chunk_bytes = 0
        self._wanted_bytes = chunk_bytes

    def fix(self, dtype: torch.dtype, width: int) -> None:
        self.dtype, self.width = dtype, width
        self.row_bytes = dtype.itemsize * width
        self.chunk_rows = max(1, self._wanted_bytes // self.row_bytes)
        self.chunk_bytes = self.chunk_rows * self.row_bytes

    def empty_chunk(self, device: torch.device | str, pinned: bool) -> Tensor:
        return torch.empty(self.chunk_rows, self.width, dtype=self.dtype, device=device, pin_memory=pinned)


class _ChunkFile:
    """A temporary file without a name, made when the first chunk asks for room in it.

    Read, not mapped: pages that are mapped count as memory of the process, which the budget is to bound, and
    where the disk is full a write fails while a mapped page kills the process.
    """

    def __init__(self) -> None:
        self._end = 0
        self._file: IO[bytes] | None = None

    def reserve(self, nbytes: int) -> int:
        """Room for `nbytes`; returns its offset."""
        if self._file is None:
            try:
                # Closed by `close`: it outlives this call.
                self._file = tempfile.TemporaryFile(prefix="spt_fast-tokens-", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise _explained(error) from error
        offset, self._end = self._end, self._end + nbytes
        return offset

    def write(self, offset: int, rows: Tensor) -> None:
        assert self._file is not None
        data = _bytes_of(rows.to("cpu").contiguous())
        while data:
            try:
                written = os.pwrite(self._file.fileno(), data, offset)
            except OSError as error:
                raise _explained(error) from error
            data, offset = data[written:], offset + written

    def read(self, offset: int, rows: Tensor) -> Tensor:
        """Fill `rows`, which are contiguous and on the host, and return them."""
        assert self._file is not None
        data = _bytes_of(rows)
        while data:
            count = os.preadv(self._file.fileno(), [data], offset)
            if count == 0:
                raise OSError(
                    errno.EIO, "the temporary file of tokens is shorter than what was written to it"
                )
            data, offset = data[count:], offset + count
        return rows

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _bytes_of(rows: Tensor) -> memoryview:
    array: np.ndarray = rows.view(torch.uint8).numpy().reshape(-1)
    return array.data


def _explained(error: OSError) -> OSError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else os.strerror(error.errno or 0)
    return OSError(
        error.errno,
        f"cannot keep the tokens in a temporary file in {tempfile.gettempdir()}: {reason}; set TMPDIR to a "
        "folder with room, raise memory_budget, lower max_images, or use mode='stream', which needs no file",
    )
