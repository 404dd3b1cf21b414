"""How much memory is free here."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that new data may take without swapping: those of the machine, or of the container if fewer."""
    machine, container = _free_of_the_machine(), _free_of_the_container()
    return machine if container is None else min(machine, container)


def mebibytes(size: int) -> str:
    """`size` bytes as text, in MiB."""
    return f"{size / 2**20:,.1f} MiB"


def _free_of_the_machine() -> int:
    with suppress(OSError):
        for line in _MEMINFO.read_text().splitlines():
            name, _, rest = line.partition(":")
            if name == "MemAvailable":
                return 1024 * int(rest.split()[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_of_the_container() -> int | None:
    """By version 2 of Linux's control groups; None where they set no limit."""
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        facts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # Pages of files that nobody needs any more are given back when memory is wanted.
    return max(0, limit - used + int(facts.get("inactive_file", 0)))
