"""What a search tries: all combinations of values, or some that a seed draws."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spt_fast.support.arguments import check_choice, check_int, check_number, check_seed
from spt_fast.support.randomness import seed_of
from spt_fast.training.recipe import options

SCALES = ("log", "linear")
# Drawn values are rounded to so many digits: names and tables shall show all of them.
_DIGITS = 3
# Of a range of them, whole numbers are drawn.
_WHOLE = {option.name for option in options() if option.kind is int} | {"per_class"}
# Draws for each trial that is wanted: lists have few combinations, which come again.
_PATIENCE = 100


@dataclass(frozen=True)
class Range:
    """All numbers between two, of which a random search draws; whole ones for a field of whole numbers."""

    low: float
    high: float
    scale: str = "log"

    @classmethod
    def of(cls, name: str, value: Mapping[str, Any]) -> Range:
        """`{low: 1e-4, high: 1e-1, scale: log}`.

        Raises:
            TypeError, ValueError: a key is missing or unknown, or a value out of range.
        """
        where = f"search: {name}"
        if not {"low", "high"} <= set(value) <= {"low", "high", "scale"}:
            raise ValueError(
                f"{where} must be a list of values, or have low, high and scale, got {dict(value)}"
            )
        scale = check_choice(f"{where}: scale", value.get("scale", "log"), SCALES)
        low = check_number(f"{where}: low", value["low"], above=0 if scale == "log" else None)
        high = check_number(f"{where}: high", value["high"], above=low)
        if name not in _WHOLE:
            return cls(float(low), float(high), scale)
        if low != int(low) or high != int(high):
            raise ValueError(f"{where}: low and high must be whole numbers, got {low} and {high}")
        return cls(int(low), int(high), scale)

    def draw(self, generator: random.Random) -> float:
        """One number, rounded to three digits, but not out of the range."""
        low, high = (math.log(end) if self.scale == "log" else end for end in (self.low, self.high))
        drawn = generator.uniform(low, high)
        drawn = math.exp(drawn) if self.scale == "log" else drawn
        if isinstance(self.low, int):
            return round(drawn)
        return min(max(float(f"{drawn:.{_DIGITS}g}"), self.low), self.high)

    def asked(self) -> dict[str, Any]:
        """As it stands in a sweep's file."""
        return {"low": self.low, "high": self.high, "scale": self.scale}


Values = Sequence[Any] | Range
Trial = dict[str, Any]


@dataclass(frozen=True)
class RandomSearch:
    """So many trials, drawn by a seed; more of them begin with the same ones."""

    trials: int
    seed: int = 0

    @classmethod
    def of(cls, value: Any) -> RandomSearch:
        """`{trials: 20, seed: 0}`.

        Raises:
            TypeError, ValueError: a key is missing or unknown, or a value out of range.
        """
        if not isinstance(value, Mapping) or not {"trials"} <= set(value) <= {"trials", "seed"}:
            raise ValueError(f"random must have trials, and may have seed, got {value!r}")
        return cls(
            check_int("random: trials", value["trials"], 1),
            check_seed(value.get("seed", 0), "random: seed"),
        )


def read_axes(given: Any, where: str = "search") -> dict[str, Values]:
    """What is searched, by the names of fields.

    Raises:
        TypeError, ValueError: it maps no names to lists of values that differ, or to ranges.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} must map fields of a recipe to lists of values, got {given!r:.60}")
    axes: dict[str, Values] = {}
    for name, values in given.items():
        if isinstance(values, Mapping):
            axes[name] = Range.of(name, values)
            continue
        listed = list(values) if isinstance(values, list | tuple) else [values]
        if not listed or any(listed.count(value) > 1 for value in listed):
            raise ValueError(f"{where}: {name} must be a list of different values, got {values!r}")
        axes[name] = listed
    return axes


def trials(axes: Mapping[str, Values], how: RandomSearch | None) -> list[Trial]:
    """What is tried: the grid of all values, or draws from it; one empty trial where nothing is searched.

    Raises:
        ValueError: a range, and no random search.
    """
    if how is not None and axes:
        return _drawn(axes, how)
    for name, values in axes.items():
        if isinstance(values, Range):
            raise ValueError(
                f"search: {name} is a range, of which only a random search draws: give random: {{trials: N}}"
            )
    lists = [list(values) for values in axes.values() if not isinstance(values, Range)]
    return [dict(zip(axes, chosen, strict=True)) for chosen in itertools.product(*lists)]


def _drawn(axes: Mapping[str, Values], how: RandomSearch) -> list[Trial]:
    found: list[Trial] = []
    for number in range(_PATIENCE * how.trials):
        # Each axis by itself: what another axis has changes nothing.
        trial = {
            name: _draw(values, random.Random(seed_of(how.seed, number, name)))
            for name, values in axes.items()
        }
        if trial not in found:
            found.append(trial)
        if len(found) == how.trials:
            break
    return found


def _draw(values: Values, generator: random.Random) -> Any:
    return values.draw(generator) if isinstance(values, Range) else generator.choice(list(values))
