"""Names that a user gives, against those that there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, names: Iterable[str]) -> str:
    """ "; did you mean ... or ...?" with up to three names that `name` begins, or else is like."""
    known = list(names)
    close = [each for each in known if name and each.startswith(name)][:3]
    close = close or difflib.get_close_matches(name, known)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def instead(name: str, names: Iterable[str]) -> str:
    """As `nearest`; where none is near, all names that there are."""
    known = list(names)
    return nearest(name, known) or f"; there are {', '.join(known)}"
