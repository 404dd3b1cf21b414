"""Means, spreads and paired differences of accuracies, with Student-t intervals; plain Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from spt_fast.support.arguments import check_int, check_number

CONFIDENCE = 0.95


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; ValueError where there are no values."""
    if not values:
        raise ValueError("values must hold at least one number, got none")
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float | None:
    """The sample standard deviation, with n - 1; None of fewer than two values."""
    if len(values) < 2:
        return None
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean of paired differences, and the interval that holds the true mean with 95 % confidence.

    Attributes:
        mean: of the differences.
        interval: its ends; None of a single pair, which says nothing about its spread.
        of: what was counted as independent: "tasks", each the mean over its seeds, or "seeds" of one task.
        pairs: how many of them.
    """

    mean: float
    interval: tuple[float, float] | None
    of: Literal["tasks", "seeds"]
    pairs: int


Results = Mapping[str, Mapping[int, float]]  # {task: {seed: value}}


def paired_difference(values: Results, reference: Results) -> Difference | None:
    """`values` minus `reference`, by pairs of the same task and seed; None where there is no pair.

    Seeds of one task share its images and its difficulty, so that they are no independent draws. Of several
    tasks the interval is therefore over tasks, and the difference of a task is the mean over its seeds. Of
    one task it is over seeds, and speaks of that task alone.

    Args:
        values, reference: {task: {seed: value}}.
    """
    tasks = [differences for task in values if (differences := _of_task(task, values, reference))]
    if not tasks:
        return None
    if len(tasks) == 1:
        return _difference(tasks[0], "seeds")
    return _difference([mean(differences) for differences in tasks], "tasks")


def _of_task(task: str, values: Results, reference: Results) -> list[float]:
    mine, other = values[task], reference.get(task, {})
    return [value - other[seed] for seed, value in mine.items() if seed in other]


def _difference(differences: Sequence[float], of: Literal["tasks", "seeds"]) -> Difference:
    return Difference(
        mean=mean(differences), interval=mean_interval(differences), of=of, pairs=len(differences)
    )


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """The Student-t interval of the mean of independent draws; None of fewer than two values."""
    spread = deviation(values)
    if spread is None:
        return None
    quantile = student_t_quantile((1 + confidence) / 2, len(values) - 1)
    middle, half = mean(values), quantile * spread / math.sqrt(len(values))
    return middle - half, middle + half


def student_t_quantile(probability: float, degrees: int) -> float:
    """The value that a Student-t variable exceeds with 1 - `probability`.

    Its distribution function, a finite sum for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and
    26.7.4), is inverted by bisection.

    Args:
        probability: in [0.5, 1).
        degrees: of freedom, at least 1.

    Raises:
        TypeError, ValueError: an argument is of another type or out of range.
    """
    degrees = check_int("degrees", degrees, 1)
    within = 2 * check_number("probability", probability, 0.5, below=1) - 1
    low, high = 0.0, math.pi / 2
    # Halved until no float lies between.
    while low < (angle := (low + high) / 2) < high:
        if _probability_within(angle, degrees) < within:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees) * math.tan(high)


def _probability_within(angle: float, degrees: int) -> float:
    """Of -t to t, where t = sqrt(degrees) tan(angle)."""
    sine, squared = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for step in range(odd + 1, degrees, 2):
        total += term
        term *= squared * step / (step + 1)
    return (angle + sine * total) * 2 / math.pi if odd else sine * total
