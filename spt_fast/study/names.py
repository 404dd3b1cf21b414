"""The names of what a study compares: its arms, and the configurations of one arm where there are several."""

from __future__ import annotations

from collections.abc import Iterable

from spt_fast.study.runs import Row


def arm_names(rows: Iterable[Row]) -> dict[str, str]:
    """Run to the name of its arm, with what tells apart several configurations of one arm in one task.

    Those are what a study compares and does not choose: lengths of prompts, shares of the data.

    Args:
        rows: of one stage of a study. In a search, every value that is tried is a configuration.
    """
    rows = list(rows)
    found: dict[tuple[str, str], set[tuple[int | None, str]]] = {}
    for row in rows:
        found.setdefault((row.arm, row.task), set()).add((row.num_prompts, row.options))
    several = {arm for (arm, _), configurations in found.items() if len(configurations) > 1}
    return {row.run: _full_name(row) if row.arm in several else row.arm for row in rows}


def _full_name(row: Row) -> str:
    prompts = "" if row.num_prompts is None else f"{row.num_prompts} prompts"
    return ", ".join(part for part in (row.arm, prompts, row.options.replace(";", ", ")) if part)
