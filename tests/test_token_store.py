"""Tokens kept for exact clustering: in memory up to a budget, on disk beyond it, and never lost."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch

from spt_fast.token_store import TokenStore, parse_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 1_000, 4_000, 2**30])
def test_gives_back_what_was_put_in(dtype: torch.dtype, budget: int) -> None:
    batches = [[torch.randn(b, 5, 7).to(dtype)[:, 1:] for b in (3, 1, 4, 2)] for _ in range(3)]
    with TokenStore(3, budget) as store:
        for i in range(4):
            for layer, tokens in enumerate(batches):
                store.append(layer, tokens[i])
                assert store.bytes_in_memory <= budget
        for layer, tokens in enumerate(batches):
            assert torch.equal(store.take(layer), torch.cat([t.reshape(-1, 7) for t in tokens]))


def test_copies_what_it_is_given() -> None:
    tokens = torch.ones(2, 3)
    with TokenStore(1, 2**20) as store:
        store.append(0, tokens)
        tokens.zero_()
        assert torch.equal(store.take(0), torch.ones(2, 3))


def test_memory_in_use_leaves_room_for_taking_a_layer() -> None:
    with TokenStore(2, 1_000) as store:
        for _ in range(100):
            for layer in range(2):
                store.append(layer, torch.zeros(2, 4))
                assert store.bytes_in_memory + max(store._in_memory) <= 1_000


def test_leaves_no_file_behind(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with TokenStore(1, 0) as store:
        store.append(0, torch.ones(4, 4))
        mapped = store.take(0)
        assert os.listdir(tmp_path) == []
    assert torch.equal(mapped, torch.ones(4, 4))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_full_disk_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
        with pytest.raises(OSError, match="the disk is full; set TMPDIR"), TokenStore(1, 0) as store:
            store.append(0, torch.ones(4, 4))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (123, 123),
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
    with pytest.raises(ValueError, match="memory_budget must be a number of bytes >= 0, got -1"):
        parse_bytes("memory_budget", -1)
    for value in (None, 1.5, True, b"4GiB"):
        with pytest.raises(TypeError, match="memory_budget must be a number of bytes or text"):
            parse_bytes("memory_budget", value)
