"""All tokens of a pass, for clustering that reads them many times: on the device, in host memory, on disk.

Limits: POSIX; tokens come back in order of arrival, a chunk at a time; has never run on a GPU.
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

# Sums over tokens are taken chunk by chunk: their last bits depend on this, and not on where chunks are kept.
CHUNK_BYTES = 16 * 2**20
# Of the device's free memory; the model's batches and the clustering need the rest.
DEVICE_SHARE = 0.5


class TokenStore:
    """Keeps the tokens of each layer and reads them back, chunk by chunk, as often as asked.

    Tokens that the budget does not hold go to a temporary file without a name, in the folder that `tempfile`
    chooses (environment variable TMPDIR). The file vanishes with the store or with the process, however that
    ends.

    Lower layers are kept in memory first. Take the layers in order: `load`, read chunks, `release`. Then the
    memory of one layer serves the next, and a layer that fits is read from the file once.

    Args:
        n_layers: how many layers there are, numbered from 0.
        memory_budget: bytes of tokens to keep in memory, on the device and on the host together. On CUDA, up
            to half of the device's free memory is used first, then pinned host memory. On top of the budget
            come two chunks on the host, and three on a CUDA device, through which chunks are read.
        device: where chunks are wanted; None is the CPU.
        chunk_bytes: the size of a chunk, which holds at least one token.
    """

    def __init__(
        self,
        n_layers: int,
        memory_budget: int,
        device: torch.device | None = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        self.device = torch.device("cpu") if device is None else device
        self._bytes_left = {"cpu": memory_budget}
        self._copy_stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            on_device = min(memory_budget, int(DEVICE_SHARE * free))
            self._bytes_left = {"cuda": on_device, "cpu": memory_budget - on_device}
            # One for all reads: the allocator keeps the memory of each stream apart.
            self._copy_stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
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
        """Bytes of tokens that are in memory now, on the device and on the host."""
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
        kept = self._layers[layer]
        rows = tokens.reshape(-1, tokens.shape[-1])
        kept.set_layout(rows.dtype, rows.shape[1])
        while len(rows):
            if not kept.chunks or kept.chunks[-1].filled == kept.chunk_rows:
                kept.chunks.append(self._new_chunk(layer))
            chunk = kept.chunks[-1]
            fitting, rows = rows.tensor_split([kept.chunk_rows - chunk.filled])
            if chunk.memory is None:
                self._file.write(chunk.offset + chunk.filled * kept.row_bytes, fitting)
            else:
                chunk.memory[chunk.filled : chunk.filled + len(fitting)].copy_(fitting)
            chunk.filled += len(fitting)

    def layer(self, layer: int) -> StoredLayer:
        """The tokens of one layer, for reading."""
        return StoredLayer(self, layer)

    def release(self, layer: int) -> None:
        """Forget the tokens of `layer`; their memory goes to layers that are in the file."""
        for chunk in self._layers[layer].chunks:
            self._release_memory(chunk)
        self._layers[layer].chunks.clear()

    def load(self, layer: int) -> None:
        """Read the tokens of `layer` that are in the file into memory, as far as the budget has room."""
        kept = self._layers[layer]
        for chunk in kept.chunks:
            if chunk.memory is None and (memory := self._allocate_chunk(kept)) is not None:
                rows = memory if memory.device.type == "cpu" else torch.empty_like(memory, device="cpu")
                self._file.read(chunk.offset, rows[: chunk.filled])
                chunk.memory = memory.copy_(rows)

    def chunks(self, layer: int, wanted: Sequence[int] | None = None) -> Iterator[Tensor]:
        """The chunks [m, D] of `layer` in order, on the device; each is good until the next is asked for.

        With `wanted`, only the chunks at these ascending positions; the others are not read.
        """
        kept = self._layers[layer]
        chunks = kept.chunks if wanted is None else [kept.chunks[index] for index in wanted]
        rows = self._read_ahead(kept, chunks)
        return rows if self._copy_stream is None else self._copy_ahead(rows, self._copy_stream)

    def _read_ahead(self, kept: _Layer, chunks: list[_Chunk]) -> Iterator[Tensor]:
        """The tokens of each chunk, on the device or on the host; a thread reads the file a chunk ahead."""
        buffers: list[Tensor] = []
        with ThreadPoolExecutor(1) as reader:

            def start(index: int) -> Future[Tensor] | None:
                if index >= len(chunks) or chunks[index].memory is not None:
                    return None
                if not buffers:
                    buffers.extend(self._host_chunk(kept) for _ in range(2))
                chunk = chunks[index]
                return reader.submit(self._file.read, chunk.offset, buffers[index % 2][: chunk.filled])

            ahead = start(0)
            for index, chunk in enumerate(chunks):
                current, ahead = ahead, start(index + 1)
                if current is not None:
                    yield current.result()
                elif chunk.memory is not None:
                    yield chunk.memory[: chunk.filled]

    def _copy_ahead(self, chunks: Iterator[Tensor], copy_stream: torch.cuda.Stream) -> Iterator[Tensor]:
        """The chunks on the device; each is copied while the caller works on the chunk before."""
        copied: Tensor | None = None
        for rows in chunks:
            with torch.cuda.stream(copy_stream):
                copy = rows.to(self.device, non_blocking=True)
            if copied is not None:
                yield copied
            work_stream = torch.cuda.current_stream(self.device)
            work_stream.wait_stream(copy_stream)
            copy.record_stream(work_stream)
            # The next chunk may be read into the memory that this copy comes from.
            copy_stream.synchronize()
            copied = copy
        if copied is not None:
            yield copied

    def _new_chunk(self, layer: int) -> _Chunk:
        kept = self._layers[layer]
        memory = self._allocate_chunk(kept)
        if memory is None and self._move_higher_chunk_to_file(layer):
            memory = self._allocate_chunk(kept)
        return _Chunk(memory) if memory is not None else _Chunk(None, self._file.reserve(kept.chunk_bytes))

    def _allocate_chunk(self, kept: _Layer) -> Tensor | None:
        """Memory for one chunk, on the device if there is room; None if the budget has no room at all."""
        for kind, left in self._bytes_left.items():
            if kept.chunk_bytes <= left:
                self._bytes_left[kind] -= kept.chunk_bytes
                return kept.empty_chunk(self.device, False) if kind == "cuda" else self._host_chunk(kept)
        return None

    def _host_chunk(self, kept: _Layer) -> Tensor:
        return kept.empty_chunk("cpu", pinned=self.device.type == "cuda")

    def _release_memory(self, chunk: _Chunk) -> None:
        if chunk.memory is not None:
            self._bytes_left[chunk.memory.device.type] += chunk.memory.nbytes
            chunk.memory = None

    def _move_higher_chunk_to_file(self, layer: int) -> bool:
        """Free the memory of a chunk of a layer higher than `layer`; False if there is no such chunk."""
        for kept in reversed(self._layers[layer + 1 :]):
            for chunk in reversed(kept.chunks):
                if chunk.memory is not None:
                    chunk.offset = self._file.reserve(kept.chunk_bytes)
                    self._file.write(chunk.offset, chunk.memory[: chunk.filled])
                    self._release_memory(chunk)
                    return True
        return False


@dataclass(frozen=True)
class StoredLayer:
    """The tokens of one layer of a `TokenStore`, for reading: `ChunkedTokens` of `OutOfCoreKMeans`."""

    store: TokenStore
    index: int

    def __len__(self) -> int:
        return sum(self.chunk_rows)

    @property
    def width(self) -> int:
        """D, or 0 while there are no tokens."""
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
        """The tokens at the ascending positions `index`, [n, D] on the device; reads all chunks once."""
        first, picked = 0, [torch.empty(0, self.width, dtype=self.dtype, device=self.device)]
        for chunk in self.chunks():
            inside = index[np.searchsorted(index, first) : np.searchsorted(index, first + len(chunk))]
            picked.append(chunk[torch.from_numpy(inside - first).to(chunk.device)])
            first += len(chunk)
        return torch.cat(picked)


@dataclass
class _Chunk:
    """Room for `chunk_rows` tokens, in memory or in the file."""

    memory: Tensor | None  # [chunk_rows, D] on the device or the host; None: in the file
    offset: int = -1  # in the file, in bytes
    filled: int = 0  # tokens that it holds


class _Layer:
    """The chunks of a layer, all but the last of them full, and their layout."""

    def __init__(self, chunk_bytes: int) -> None:
        self.chunks: list[_Chunk] = []
        self.dtype = torch.float32
        self.width = 0
        self.row_bytes = 0
        self.chunk_rows = 0
        self.chunk_bytes = 0
        self._most_bytes = chunk_bytes

    def set_layout(self, dtype: torch.dtype, width: int) -> None:
        """Chunks of as many tokens as fit into `chunk_bytes`, of one at least."""
        self.dtype, self.width = dtype, width
        self.row_bytes = dtype.itemsize * width
        self.chunk_rows = max(1, self._most_bytes // self.row_bytes)
        self.chunk_bytes = self.chunk_rows * self.row_bytes

    def empty_chunk(self, device: torch.device | str, pinned: bool) -> Tensor:
        return torch.empty(self.chunk_rows, self.width, dtype=self.dtype, device=device, pin_memory=pinned)


class _ChunkFile:
    """A temporary file without a name, made when the first chunk asks for room in it.

    It is read and written, not mapped: mapped pages would count as memory of the process, beside the budget;
    and on a full disk a write raises an error, while a mapped page kills the process.
    """

    def __init__(self) -> None:
        self._end = 0
        self._file: IO[bytes] | None = None

    def reserve(self, nbytes: int) -> int:
        """The offset of new room for `nbytes`."""
        if self._file is None:
            try:
                # `close` closes it.
                self._file = tempfile.TemporaryFile(prefix="spt_fast-tokens-", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise _with_advice(error) from error
        offset, self._end = self._end, self._end + nbytes
        return offset

    def write(self, offset: int, rows: Tensor) -> None:
        assert self._file is not None
        data = _bytes_of(rows.to("cpu").contiguous())
        while data:
            try:
                written = os.pwrite(self._file.fileno(), data, offset)
            except OSError as error:
                raise _with_advice(error) from error
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


def _with_advice(error: OSError) -> OSError:
    """The error with what can be done about it."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else os.strerror(error.errno or 0)
    return OSError(
        error.errno,
        f"cannot keep the tokens in a temporary file in {tempfile.gettempdir()}: {reason}; set TMPDIR to a "
        "folder with room, raise memory_budget, lower max_images, or use mode='stream', which needs no file",
    )
