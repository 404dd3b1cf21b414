"""Tokens kept for exact clustering: in memory up to a budget, in a file beyond it, and never lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import spt_fast
from spt_fast.prototypes.token_store import TokenStore
from spt_fast.support.arguments import parse_bytes

CHUNK = 200  # bytes; rows of seven numbers do not divide it


def fill(store: TokenStore, layers: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Four batches of sizes that divide no chunk; returns all tokens of each layer."""
    kept: list[list[Tensor]] = [[] for _ in range(layers)]
    for batch in (3, 1, 4, 2):
        for layer in range(layers):
            tokens = torch.randn(batch, 5, 7).to(dtype)[:, 1:]
            store.append(layer, tokens)
            kept[layer].append(tokens.reshape(-1, 7))
    return [torch.cat(layer) for layer in kept]


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


@pytest.mark.parametrize("budget", [0, 1_000, 2**30])
def test_reads_only_the_chunks_that_are_wanted(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with TokenStore(3, budget, chunk_bytes=CHUNK) as store:
        expected = fill(store, 3)
        in_file = [chunk.offset for chunk in store._layers[1].chunks if chunk.memory is None]
        offsets, read_file = [], store._file.read
        monkeypatch.setattr(
            store._file, "read", lambda offset, rows: offsets.append(offset) or read_file(offset, rows)
        )
        assert store.layer(1).chunk_rows == [7, 7, 7, 7, 7, 5]
        for wanted in ([0, 1, 2, 3, 4, 5], [0, 3, 5], [4], []):
            offsets.clear()
            chunks = [chunk.clone() for chunk in store.chunks(1, wanted)]
            assert len(chunks) == len(wanted)
            for index, chunk in zip(wanted, chunks, strict=True):
                assert torch.equal(chunk, expected[1][7 * index : 7 * index + 7])
            here = [store._layers[1].chunks[index] for index in wanted]
            assert offsets == [chunk.offset for chunk in here if chunk.memory is None]
    assert bool(in_file) == (budget < 2**30)


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


def test_lower_layers_stay_in_memory_and_make_room_for_the_next() -> None:
    one_layer = 6 * 196  # full chunks of 7 rows of 28 bytes
    with TokenStore(3, one_layer + 100, chunk_bytes=CHUNK) as store:
        expected = fill(store, 3)
        for layer in range(3):
            store.load(layer)
            assert [chunk.memory is None for chunk in store._layers[layer].chunks] == [False] * 6
            assert torch.equal(read(store, layer), expected[layer])
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


def test_leaves_no_file_behind_when_killed(tmp_path: Path) -> None:
    script = (
        "import os, signal, torch\n"
        "from spt_fast.prototypes.token_store import TokenStore\n"
        "store = TokenStore(1, 0)\n"
        "store.append(0, torch.ones(1000, 1000))\n"
        "held = [os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd')[:-1]]\n"
        "assert any('(deleted)' in name or '/#' in name for name in held), held\n"
        "print('kept', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run_python(script, TMPDIR=str(tmp_path))
    assert done.stdout == "kept\n", done.stderr
    assert done.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="VmHWM is Linux's")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tokens would be on the device")
def test_peak_memory_is_the_budget_and_a_constant() -> None:
    """Tokens for five times the budget. The constant is what a run takes that keeps nothing in memory."""
    script = (
        "import sys, numpy as np, torch\n"
        "from spt_fast.clustering.out_of_core import OutOfCoreKMeans\n"
        "from spt_fast.prototypes.token_store import TokenStore\n"
        "def peak():\n"
        "    lines = open('/proc/self/status').read().splitlines()\n"
        "    return int(next(l for l in lines if l.startswith('VmHWM')).split()[1]) * 1024\n"
        "budget, means = int(sys.argv[1]), 20 * torch.randn(4, 128)\n"
        "for rows, budget in ((70_000, 0), (640_000, budget)):\n"
        "    with TokenStore(1, budget) as store:\n"
        "        for start in range(0, rows, 10_000):\n"
        "            labels = torch.arange(start, start + 10_000) % 4\n"
        "            store.append(0, means[labels] + torch.randn(10_000, 128))\n"
        "        store.load(0)\n"
        "        OutOfCoreKMeans(store.layer(0), 4, np.random.default_rng(0)).run()\n"
        "    print(peak())\n"
    )
    budget = 640_000 * 128 * 4 // 5
    done = run_python(script, str(budget))
    # The first run takes what every run takes: the sample (65,536 tokens), two chunks, loaded libraries. The
    # bounds of the pruned passes (18 bytes a token, 11 MiB) come when the sample (32 MiB) has gone.
    constant, peak = (int(line) for line in done.stdout.split())
    assert peak - constant <= budget + 8 * 2**20
    assert peak - constant >= budget - 32 * 2**20


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


def test_file_cut_short_is_a_clear_error() -> None:
    with TokenStore(1, 0) as store:
        store.append(0, torch.ones(4, 4))
        assert store._file._file is not None
        store._file._file.truncate(10)
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


def run_python(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, in a folder of its own, that imports the package imported here."""
    package = str(Path(spt_fast.__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": package, **environment},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (123, 123),
        (np.int64(123), 123),
        ("123", 123),
        ("64B", 64),
        ("4GiB", 4 * 2**30),
        ("1.5 GB", 1_500_000_000),
        (" 20 kB ", 20_000),
        ("2KiB", 2048),
        ("3 MiB", 3 * 2**20),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_parsed(value: int | str, expected: int) -> None:
    assert parse_bytes("memory_budget", value) == expected


@pytest.mark.parametrize("value", ["", "GiB", "4 gigs", "-1GB", "1e9", "4GiBs", "4 G B"])
def test_bad_sizes_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="memory_budget must be a number with a unit"):
        parse_bytes("memory_budget", value)


def test_sizes_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r'memory_budget must be an integer >= 0 .* such as "4GiB", got -1'):
        parse_bytes("memory_budget", -1)
    for value in (None, 1.5, True, b"4GiB"):
        with pytest.raises(TypeError, match=r"memory_budget must be an integer >= 0 \(bytes\) or text"):
            parse_bytes("memory_budget", value)
