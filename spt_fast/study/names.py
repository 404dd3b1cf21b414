"""The names of what a study compares: its arms, and the configurations of one arm where there are several."""

from __future__ import annotations

from collections.abc import Iterable

from spt_fast.study.runs import Row, read_values


def arm_names(rows: Iterable[Row]) -> dict[str, str]:
    """Run to the name of its arm, with what tells apart several configurations of one arm.

    Those are what a study compares and does not choose: lengths of prompts, shares of the data, epochs.

    Args:
        rows: of one stage of a study, or of several studies.
    """
    rows = list(rows)
    found: dict[str, set[str]] = {}
    for row in rows:
        found.setdefault(row.arm, set()).add(row.compared)
    several = {arm: compared for arm, compared in found.items() if len(compared) > 1}
    common = {arm: set.intersection(*(set(_words(each)) for each in several[arm])) for arm in several}
    return {
        row.run: ", ".join([row.arm, *(word for word in _words(row.compared) if word not in common[row.arm])])
        if row.arm in several
        else row.arm
        for row in rows
    }


def _words(compared: str) -> list[str]:
    """What a configuration is told apart by, the number of prompts first."""
    values = read_values(compared)
    number = values.pop("num_prompts", None)
    prompts = [] if number is None else [f"{number} prompts"]
    return [*prompts, *(f"{name}={value}" for name, value in values.items())]
