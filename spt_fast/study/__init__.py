"""Studies: many runs under one budget, and the tables and pages that compare them."""

from typing import TYPE_CHECKING

from spt_fast.support.console import is_the_command

# As in `spt_fast` itself: reading rows can do without torch.
if TYPE_CHECKING or not is_the_command():
    from spt_fast.study.runs import Row, read_runs
    from spt_fast.study.sweeps.sweep import sweep

__all__ = ["Row", "read_runs", "sweep"]
