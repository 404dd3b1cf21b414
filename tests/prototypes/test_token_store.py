"""Tokens kept for exact clustering: in memory up to a budget, in a file beyond it, and never lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import spt_fast
from spt_fast.prototypes.token_store import CHUNK_BYTES, TokenStore

CHUNK = 200  # bytes; rows of seven numbers do not divide it
BUDGET = 2 * CHUNK_BYTES


def fill(store: TokenStore, layers: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Four batches of sizes that divide no chunk; returns all tokens of each layer."""
    kept: list[list[Tensor]] = [[] for _ in range(layers)]
    for batch in (3, 1, 4, 2):
        for layer in range(layers):
            tokens = torch.randn(batch, 5, 7).to(dtype)[:, 1:]
            store.append(layer, tokens)
            kept[layer].append(tokens.reshape(-1, 7))
    return [torch.cat(layer) for layer in kept]


@pytest.fixture
def file_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offset of every read of a file."""
    offsets: list[int] = []
    preadv = os.preadv

    def noted(handle: int, buffers: Any, offset: int) -> int:
        offsets.append(offset)
        return preadv(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", noted)
    return offsets


def read(store: TokenStore, layer: int) -> Tensor:
    return torch.cat([chunk.clone() for chunk in store.chunks(layer)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 500, 1_000, 2_000, 2**30])
def test_gives_back_what_was_put_in_as_often_as_asked(dtype: torch.dtype, budget: int) -> None:
    with TokenStore(3, budget, chunk_bytes=CHUNK) as store:
        expected = fill(store, 3, dtype)
        for layer in (2, 0, 1, 1, 0):
            assert torch.equal(read(store, layer), expected[layer])
            assert len(store.layer(layer)) == 40


@pytest.mark.parametrize("budget", [0, 1_000, 2**30])
def test_chunks_do_not_depend_on_where_they_are(budget: int) -> None:
    with TokenStore(3, budget, chunk_bytes=CHUNK) as store:
        fill(store, 3)
        assert [len(chunk) for chunk in store.chunks(2)] == [7, 7, 7, 7, 7, 5]


@pytest.mark.parametrize(("budget", "most_in_memory"), [(0, 0), (1_500, 5), (2**30, 6)])
def test_reads_only_the_chunks_that_are_wanted(
    budget: int, most_in_memory: int, file_reads: list[int]
) -> None:
    with TokenStore(3, budget, chunk_bytes=CHUNK) as store:
        expected = fill(store, 3)
        assert store.layer(1).chunk_rows == [7, 7, 7, 7, 7, 5]
        offsets = {}  # of the chunks in the file
        for index in range(6):
            file_reads.clear()
            list(store.chunks(1, [index]))
            if file_reads:
                (offsets[index],) = file_reads
        assert 6 - len(offsets) <= most_in_memory
        assert (len(offsets) == 0) == (budget == 2**30)
        for wanted in ([0, 1, 2, 3, 4, 5], [0, 3, 5], [4], []):
            file_reads.clear()
            chunks = [chunk.clone() for chunk in store.chunks(1, wanted)]
            assert len(chunks) == len(wanted)
            for index, chunk in zip(wanted, chunks, strict=True):
                assert torch.equal(chunk, expected[1][7 * index : 7 * index + 7])
            assert file_reads == [offsets[index] for index in wanted if index in offsets]


@pytest.mark.parametrize("budget", [0, 1_000, 2**30])
def test_picks_rows_by_position(budget: int) -> None:
    index = np.array([0, 6, 7, 8, 20, 21, 39])
    with TokenStore(2, budget, chunk_bytes=CHUNK) as store:
        expected = fill(store, 2)
        assert torch.equal(store.layer(1).rows(index), expected[1][torch.from_numpy(index)])
        assert store.layer(1).rows(index[:0]).shape == (0, 7)


@pytest.mark.parametrize("budget", [0, 150, 196, 500, 1_000, 5_000])
def test_memory_stays_within_the_budget(budget: int) -> None:
    with TokenStore(3, budget, chunk_bytes=CHUNK) as store:
        for _ in range(20):
            for layer in range(3):
                store.append(layer, torch.zeros(2, 7))
                assert store.bytes_in_memory <= budget
        for layer in range(3):
            store.load(layer)
            assert store.bytes_in_memory <= budget
            store.release(layer)
        assert store.bytes_in_memory == 0


def test_lower_layers_stay_in_memory_and_make_room_for_the_next(file_reads: list[int]) -> None:
    one_layer = 6 * 196  # full chunks of 7 rows of 28 bytes
    with TokenStore(3, one_layer + 100, chunk_bytes=CHUNK) as store:
        expected = fill(store, 3)
        for layer in range(3):
            store.load(layer)
            # Each chunk of a higher layer comes from the file, once; later reads find it in memory.
            assert len(file_reads) == (0 if layer == 0 else 6)
            file_reads.clear()
            assert torch.equal(read(store, layer), expected[layer])
            assert file_reads == []
            store.release(layer)


def test_copies_what_it_is_given() -> None:
    tokens = torch.ones(2, 3)
    with TokenStore(1, 2**20, chunk_bytes=CHUNK) as store:
        store.append(0, tokens)
        tokens.zero_()
        assert torch.equal(read(store, 0), torch.ones(2, 3))


def test_layer_without_tokens_is_empty() -> None:
    with TokenStore(1, 0) as store:
        assert len(store.layer(0)) == 0
        assert list(store.chunks(0)) == []


def test_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with TokenStore(1, 0) as store:
        store.append(0, torch.ones(4, 4))
        assert os.listdir(tmp_path) == []
        assert torch.equal(read(store, 0), torch.ones(4, 4))


@pytest.fixture(scope="module")
def killed_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A process that clusters stored tokens, prints its peak memory, and is killed while it has a store open.

    Returns:
        the process, and the folder of its temporary files.
    """
    script = """
import glob, os, signal, sys
import numpy as np, torch
from spt_fast.clustering.out_of_core import OutOfCoreKMeans
from spt_fast.prototypes.token_store import TokenStore

def cluster(rows, budget):
    means = 20 * torch.randn(4, 128)
    with TokenStore(1, budget) as store:
        for tokens in torch.arange(rows).split(10_000):
            store.append(0, means[tokens % 4] + torch.randn(len(tokens), 128))
        store.load(0)
        kept = store.bytes_in_memory
        OutOfCoreKMeans(store.layer(0), 4, np.random.default_rng(0)).run()
    lines = open("/proc/self/status").read().splitlines()
    print(kept, int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) * 1024)

budget = int(sys.argv[1])
cluster(70_000, 0)
cluster(5 * budget // (128 * 4), budget)
store = TokenStore(1, 0)
store.append(0, torch.ones(1000, 1000))
held = [os.readlink(link) for link in glob.glob("/proc/self/fd/*") if os.path.islink(link)]
assert any("(deleted)" in name or "/#" in name for name in held), held
print("kept", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    folder = tmp_path_factory.mktemp("tokens")
    package = str(Path(spt_fast.__file__).resolve().parents[1])
    # glibc then gives the memory of every chunk back as soon as it is freed, instead of keeping it for later.
    fixed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(BUDGET)],
        cwd=tmp_path_factory.mktemp("empty"),
        env={**os.environ, **fixed, "PYTHONPATH": package, "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, folder


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="VmHWM is Linux's")
def test_leaves_no_file_behind_when_killed(
    killed_process: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    done, folder = killed_process
    assert done.stdout.endswith("kept\n"), done.stderr
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(folder) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="VmHWM is Linux's")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tokens would be on the device")
def test_peak_memory_is_at_most_the_budget_and_a_constant(
    killed_process: tuple[subprocess.CompletedProcess[str], Path],
) -> None:
    """Tokens for five times the budget. The constant is what a run takes that keeps nothing in memory."""
    first, second = killed_process[0].stdout.splitlines()[:2]
    # The first run takes what every run takes: the sample (65,536 tokens), two chunks, loaded libraries. The
    # bounds of the pruned passes (18 bytes a token, 6 MiB) come when the sample (32 MiB) has gone.
    (kept_nothing, constant), (kept, peak) = (map(int, line.split()) for line in (first, second))
    assert (kept_nothing, kept) == (0, BUDGET)
    assert peak - constant <= BUDGET + 8 * 2**20


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_full_disk_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
        with pytest.raises(OSError, match="the disk is full; set TMPDIR"), TokenStore(1, 0) as store:
            store.append(0, torch.ones(4, 4))


def test_no_folder_for_the_file_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(OSError, match="cannot keep the tokens in a temporary file in /no/such/folder"):
        TokenStore(1, 0).append(0, torch.ones(4, 4))


def test_file_cut_short_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "tokens", "w+b", buffering=0) as file, TokenStore(1, 0) as store:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: file)
        store.append(0, torch.ones(4, 4))
        file.truncate(10)
        with pytest.raises(OSError, match="the temporary file of tokens is shorter than what was written"):
            read(store, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [0, 1_000, 2**20])
def test_gives_back_on_the_device(budget: int) -> None:
    with TokenStore(2, budget, torch.device("cuda"), chunk_bytes=CHUNK) as store:
        expected = fill(store, 2)
        for layer in (0, 1, 0):
            chunks = [chunk.clone() for chunk in store.chunks(layer)]
            assert all(chunk.is_cuda for chunk in chunks)
            assert torch.equal(torch.cat(chunks).cpu(), expected[layer])
