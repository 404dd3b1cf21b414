"""Progress bars, which stay out of logs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from spt_fast.support.arguments import check_bool


def progress_bar(iterable: Iterable[Any] | None = None, *, show: bool = True, **options: Any) -> tqdm[Any]:
    """tqdm's bar of `iterable`, where `show` asks for it and somebody looks: on a terminal or in a notebook.

    The environment variable TQDM_DISABLE decides where it is set: any value hides bars, an empty one shows
    them, in logs too. `options` are tqdm's.

    Raises:
        TypeError: `show`, which callers name `progress`, is no bool.
    """
    return tqdm(iterable, disable=not (check_bool("progress", show) and _is_watched()), **options)


def _is_watched() -> bool:
    # Not left to tqdm, which reads it once, when it is imported.
    wish = os.environ.get("TQDM_DISABLE")
    if wish is not None:
        return wish == ""
    # A notebook's stream says that it is no terminal.
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
