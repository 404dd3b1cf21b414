"""Which accuracies are compared, and what is chosen."""

from __future__ import annotations

import pytest

from spt_fast.study.names import arm_names, common_values
from spt_fast.study.report.comparison import chosen_rows, comparison


def test_means_and_spreads_over_seeds(make_row):
    rows = [
        make_row("a0", test_accuracy=0.8),
        make_row("a1", seed=1, test_accuracy=0.6),
        make_row("b0", arm="linear", test_accuracy=0.9),
        make_row("s", stage="search", val_accuracy=1.0),
    ]
    found = comparison(rows)
    assert found.measure == "test"
    assert [*found.cells] == ["linear", "spt-deep"]
    cell = found.cells["spt-deep"]["birds"]
    assert (cell.mean, cell.spread) == (pytest.approx(0.7), pytest.approx(0.02**0.5))
    assert found.cells["linear"]["birds"].spread is None
    assert found.best("birds", ["spt-deep", "linear"]) == "linear"
    assert found.best("birds", ["spt-deep", "other"]) == "spt-deep"
    assert found.best("fish", ["linear"]) is None


def test_an_arm_that_lacks_a_task_comes_last(make_row):
    rows = [
        make_row("a", arm="half", test_accuracy=0.9),
        make_row("b", arm="whole", test_accuracy=0.1),
        make_row("c", arm="whole", task="fish", test_accuracy=0.2),
    ]
    found = comparison(rows)
    assert [*found.cells] == ["whole", "half"]
    assert found.mean("half") is None
    assert found.mean("whole") == pytest.approx(0.15)


def test_a_run_without_test_is_no_zero(make_row):
    rows = [make_row("a", test_accuracy=0.8), make_row("b", seed=1)]
    assert comparison(rows).cells["spt-deep"]["birds"].mean == 0.8


def test_without_tests_the_search_is_compared(make_row):
    rows = [
        make_row("a", stage="search", lr=0.1, val_accuracy=0.5),
        make_row("b", stage="search", lr=0.01, val_accuracy=0.7),
        make_row("c", stage="search", lr=0.001),
    ]
    found = comparison(rows)
    assert found.measure == "validation"
    assert [row.run for row in found.cells["spt-deep"]["birds"].rows] == ["b"]


def test_of_equals_the_smaller_rate_is_chosen(make_row):
    rows = [make_row(f"{lr}", stage="search", lr=lr, val_accuracy=0.5) for lr in (0.1, 0.01, 1.0)]
    assert [row.lr for row in chosen_rows(rows)] == [0.01]


def test_chosen_are_those_that_were_run_at_last(make_row):
    """Of each length that is compared, whatever the accuracy."""
    search = [
        make_row(f"{n}-{lr}", stage="search", num_prompts=n, lr=lr, val_accuracy=0.5 + lr)
        for n in (5, 10)
        for lr in (0.1, 0.01)
    ]
    final = [make_row("f5", num_prompts=5, lr=0.01), make_row("f10", num_prompts=10, lr=0.1)]
    assert [row.run for row in chosen_rows([*search, *final])] == ["5-0.01", "10-0.1"]


def test_configurations_of_one_arm_are_told_apart(make_row):
    rows = [
        make_row("a", compared="num_prompts=5;share=0.5;x=1", num_prompts=5, options="share=0.5;x=1"),
        make_row("b", compared="num_prompts=10", num_prompts=10),
        make_row("c", arm="linear", num_prompts=None),
        make_row("d", arm="linear", num_prompts=None, seed=1),
    ]
    assert arm_names(rows) == {
        "a": "spt-deep, 5 prompts, share=0.5, x=1",
        "b": "spt-deep, 10 prompts",
        "c": "linear",
        "d": "linear",
    }


def test_what_all_runs_share_is_not_in_their_names(make_row):
    rows = [
        make_row("a", compared="per_class=5;x=1"),
        make_row("b", compared="per_class=5;x=2"),
        make_row("c", arm="linear", num_prompts=None, compared="per_class=5"),
    ]
    assert arm_names(rows) == {"a": "spt-deep, x=1", "b": "spt-deep, x=2", "c": "linear"}
    assert common_values(rows) == ["per_class=5"]
    assert common_values([make_row("a")]) == common_values([]) == []


def test_of_a_study_that_is_not_finished_no_name_stands_for_two_configurations(make_row):
    """The probe is done with a tenth of the images only: it is no row of all images."""
    rows = [
        make_row("a", compared="share=0.1"),
        make_row("b", compared="share=1"),
        make_row("c", arm="linear", num_prompts=None, compared="share=0.1"),
    ]
    assert arm_names(rows)["c"] == "linear, share=0.1"


def test_what_validation_chose_is_not_in_the_name_of_an_arm(make_row):
    rows = [
        make_row(
            f"{task}-{share}", task=task, compared=f"share={share}", options=f"drop_path={path};share={share}"
        )
        for task, path in (("birds", 0.0), ("cars", 0.1))
        for share in (0.1, 1)
    ]
    names = ["spt-deep, share=0.1", "spt-deep, share=1"]
    assert list(arm_names(rows).values()) == names * 2
