"""The values that a study takes: those with the best validation accuracy, and of equals the smaller rate."""

from __future__ import annotations

import math
from collections.abc import Iterable

from spt_fast.study.runs import Row


def diverged(row: Row) -> bool:
    """Whether the loss of a run became NaN or infinite: it has no accuracy then, and is never chosen."""
    return not math.isfinite(row.loss)


def best(rows: Iterable[Row]) -> Row | None:
    """The run of a search to take values from; None where all of them diverged.

    The best on validation images after the last epoch; of equals the one with the smaller `lr`, as in VPT,
    and then the first. Test images choose nothing.

    Raises:
        ValueError: a run that did not diverge was not validated.
    """
    found = [row for row in rows if not diverged(row)]
    if missing := next((row for row in found if row.val_accuracy is None), None):
        raise ValueError(f"{missing.run} has no validation accuracy, by which values are chosen")
    return max(found, key=lambda row: (row.val_accuracy, -row.lr), default=None)
