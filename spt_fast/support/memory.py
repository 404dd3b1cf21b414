"""How much memory is free here, and sizes as text."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def free_memory(root: str | os.PathLike[str] = "/") -> int:
    """Bytes that new data may take without swapping: those of the machine, or of the container if fewer.

    Args:
        root: where `proc` and `sys` of Linux lie; without them, the machine's unused pages count.
    """
    machine, container = _free_of_the_machine(Path(root)), _free_of_the_container(Path(root))
    return machine if container is None else min(machine, container)


def mebibytes(size: int) -> str:
    """`size` bytes as text, in MiB."""
    return f"{size / 2**20:,.1f} MiB"


def _free_of_the_machine(root: Path) -> int:
    with suppress(OSError):
        for line in (root / "proc" / "meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return 1024 * int(rest.split()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_the_container(root: Path) -> int | None:
    """By version 2 of Linux's control groups; None where they set no limit."""
    group = root / "sys" / "fs" / "cgroup"
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Pages of files that nobody needs any more are given back when memory is wanted.
    return max(0, limit - used + int(facts.get("inactive_file", 0)))
