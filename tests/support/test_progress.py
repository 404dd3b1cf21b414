"""Progress bars show where somebody looks, and stay out of logs."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import pytest

from spt_fast.support.progress import progress_bar


class Stream(io.StringIO):
    """Standard error, of a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.parametrize(
    ("terminal", "notebook", "variable", "show", "expected"),
    [
        (True, False, None, True, True),
        (False, False, None, True, False),
        (False, True, None, True, True),
        (True, False, "1", True, False),
        (False, True, "1", True, False),
        (False, False, "", True, True),
        (True, False, None, False, False),
        (True, False, "", False, False),
    ],
)
def test_where_a_bar_shows(
    terminal: bool, notebook: bool, variable: str | None, show: bool, expected: bool, monkeypatch: Any
) -> None:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if variable is not None:
        monkeypatch.setenv("TQDM_DISABLE", variable)
    assert list(progress_bar(range(3), show=show, desc="work")) == [0, 1, 2]
    assert ("work: 100%" in stream.getvalue()) is expected


def test_no_standard_error_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress_bar(range(2))) == [0, 1]


def test_a_wish_that_is_no_bool_is_refused() -> None:
    with pytest.raises(TypeError, match="progress must be True or False, got 'no'"):
        progress_bar(show="no")  # type: ignore[arg-type]
