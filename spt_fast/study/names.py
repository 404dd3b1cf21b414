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
    common = {arm: set.intersection(*(set(_words(row)) for row in rows if row.arm == arm)) for arm in several}
    return {
        row.run: ", ".join([row.arm, *(word for word in _words(row) if word not in common[row.arm])])
        if row.arm in several
        else row.arm
        for row in rows
    }


def _words(row: Row) -> dict[str, None]:
    """What a configuration is told apart by, in order."""
    prompts = [] if row.num_prompts is None else [f"{row.num_prompts} prompts"]
    return dict.fromkeys([*prompts, *(option for option in row.options.split(";") if option)])
