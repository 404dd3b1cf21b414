"""Benchmarks, started in the checkout: `python -m benchmarks.NAME` or `pytest benchmarks --benchmark-only`.

They measure a `spt_fast` that has its compiled module: that of the checkout after an editable or in-place
build, else the installed one. `python -m` puts the checkout first. After a plain `pip install .` its
`spt_fast/` has no such module, and the PyTorch fallback would be measured.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


def _is_compiled(folders: Iterable[str]) -> bool:
    """Whether one of the package's folders has the module for this Python."""
    return any(
        Path(folder, f"_kmeans{suffix}").is_file() for folder in folders for suffix in EXTENSION_SUFFIXES
    )


if not _is_compiled([str(CHECKOUT / "spt_fast")]):
    # Not left out: processes that a benchmark starts look for `benchmarks` there.
    sys.path.sort(key=lambda entry: Path(entry).resolve() == CHECKOUT)
_found = importlib.util.find_spec("spt_fast")
if _found is None or not _is_compiled(_found.submodule_search_locations or []):
    raise SystemExit(
        f"benchmarks: {sys.executable} finds no spt_fast with its compiled module; "
        f"run `pip install .` in {CHECKOUT}"
    )
