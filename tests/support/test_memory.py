"""Free memory, as Linux states it for a machine and for a container."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spt_fast.support.memory import free_memory, mebibytes


def make_linux(root: Path, limit: str) -> Path:
    """A machine with 1,000 KiB to give, and a container that uses 300 KiB, 50 of them for files."""
    group = root / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (root / "proc").mkdir()
    (root / "proc" / "meminfo").write_text("MemTotal:  4000 kB\nMemAvailable:   1000 kB\nBuffers: 7 kB\n")
    (group / "memory.max").write_text(limit)
    (group / "memory.current").write_text(f"{300 * 1024}\n")
    (group / "memory.stat").write_text(f"anon {200 * 1024}\ninactive_file {50 * 1024}\n")
    return root


@pytest.mark.parametrize(
    ("limit", "kibibytes"),
    [("max\n", 1000), (f"{800 * 1024}\n", 550), (f"{9999 * 1024}\n", 1000), (f"{100 * 1024}\n", 0)],
)
def test_the_smaller_of_machine_and_container_counts(limit, kibibytes, tmp_path):
    assert free_memory(make_linux(tmp_path, limit)) == kibibytes * 1024


def test_memory_of_this_machine(tmp_path):
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory() <= total
    # Without the files of Linux.
    assert 0 < free_memory(tmp_path) <= total


def test_sizes_as_text():
    assert mebibytes(1536 * 2**20) == "1,536.0 MiB"
