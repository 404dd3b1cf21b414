"""Means, deviations, quantiles of Student's t, and which differences count as independent."""

from __future__ import annotations

import math
import statistics

import pytest

from spt_fast.study.statistics import (
    deviation,
    mean,
    mean_interval,
    paired_difference,
    student_t_quantile,
)


def test_mean_and_deviation_are_those_of_the_standard_library() -> None:
    values = [0.1, 0.4, 0.25, 0.9]
    assert mean(values) == pytest.approx(statistics.mean(values), rel=1e-15)
    assert deviation(values) == pytest.approx(statistics.stdev(values), rel=1e-15)


def test_one_value_has_no_deviation_and_no_interval() -> None:
    assert deviation([3.0]) is None
    assert mean_interval([3.0]) is None
    with pytest.raises(ValueError, match="at least one number"):
        mean([])


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 18, 101])
@pytest.mark.parametrize("probability", [0.5, 0.6, 0.95, 0.975, 0.9995])
def test_quantiles_are_those_of_scipy(degrees: int, probability: float) -> None:
    special = pytest.importorskip("scipy.special")
    expected = float(special.stdtrit(degrees, probability))
    assert student_t_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_quantiles_in_closed_form() -> None:
    assert student_t_quantile(0.975, 1) == pytest.approx(math.tan(0.95 * math.pi / 2), rel=1e-12)
    inside = 0.95
    assert student_t_quantile(0.975, 2) == pytest.approx(inside * math.sqrt(2 / (1 - inside**2)), rel=1e-12)


@pytest.mark.parametrize(("probability", "degrees"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_quantiles_out_of_range_are_refused(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        student_t_quantile(probability, degrees)


def test_an_interval_is_that_of_scipy() -> None:
    special = pytest.importorskip("scipy.special")
    values = [1.0, 2.5, -0.5, 3.0]
    half = float(special.stdtrit(3, 0.975)) * statistics.stdev(values) / 2
    assert mean_interval(values) == pytest.approx((1.5 - half, 1.5 + half), rel=1e-9)


def test_of_several_tasks_the_interval_is_over_tasks() -> None:
    """Seeds count as one number a task: three seeds of two tasks are two pairs, not six."""
    values = {"a": {0: 5.0, 1: 6.0, 2: 7.0}, "b": {0: 2.0, 1: 2.0, 2: 2.0}}
    reference = {"a": {0: 1.0, 1: 2.0, 2: 3.0}, "b": {0: 0.0, 1: 1.0, 2: 2.0}}
    found = paired_difference(values, reference)
    assert found is not None
    assert (found.of, found.pairs, found.mean) == ("tasks", 2, 2.5)
    assert found.interval == mean_interval([4.0, 1.0])


def test_of_one_task_the_interval_is_over_seeds() -> None:
    found = paired_difference({"a": {0: 3.0, 1: 5.0, 7: 9.0}}, {"a": {1: 1.0, 0: 2.0}, "b": {0: 4.0}})
    assert found is not None
    assert (found.of, found.pairs, found.mean) == ("seeds", 2, 2.5)
    assert found.interval == mean_interval([1.0, 4.0])


def test_a_single_pair_has_no_interval_and_no_pair_no_difference() -> None:
    found = paired_difference({"a": {0: 3.0}}, {"a": {0: 2.0}})
    assert found is not None
    assert (found.mean, found.interval, found.pairs) == (1.0, None, 1)
    assert paired_difference({"a": {0: 3.0}}, {"a": {1: 2.0}}) is None
    assert paired_difference({"a": {0: 3.0}}, {"b": {0: 2.0}}) is None


def test_tasks_weigh_the_same_whatever_their_seeds() -> None:
    found = paired_difference(
        {"a": {0: 1.0, 1: 1.0, 2: 1.0}, "b": {0: 5.0}}, {"a": dict.fromkeys(range(3), 0.0), "b": {0: 0.0}}
    )
    assert found is not None
    assert found.mean == 3.0
