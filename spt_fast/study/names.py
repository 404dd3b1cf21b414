"""The names of what a study compares: its arms, with what tells apart the configurations of its runs."""

from __future__ import annotations

from collections.abc import Iterable

from spt_fast.study.runs import Row, read_values


def arm_names(rows: Iterable[Row]) -> dict[str, str]:
    """Run to the name of its arm, with what tells its configuration from that of any other run.

    That is what a study compares and does not choose: lengths of prompts, shares of the data, epochs.

    Args:
        rows: of a study, or of several. Of a part of them names may be shorter.
    """
    rows = list(rows)
    common = common_values(rows)
    return {
        row.run: ", ".join([row.arm, *(word for word in _words(row.compared) if word not in common)])
        for row in rows
    }


def common_values(rows: Iterable[Row]) -> list[str]:
    """What is no part of a name, as all runs have it: "10 prompts", "share=0.1"."""
    configurations = [_words(compared) for compared in dict.fromkeys(row.compared for row in rows)]
    first = configurations[0] if configurations else []
    return [word for word in first if all(word in others for others in configurations)]


def _words(compared: str) -> list[str]:
    """What a configuration is told apart by, the number of prompts first."""
    values = read_values(compared)
    number = values.pop("num_prompts", None)
    prompts = [] if number is None else [f"{number} prompts"]
    return [*prompts, *(f"{name}={value}" for name, value in values.items())]
