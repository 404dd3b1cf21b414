"""`spt-fast sweep`: the plan that a file and options make, and what it prints."""

from __future__ import annotations

import pytest

from spt_fast.commands.main import build_parser, main
from spt_fast.commands.sweep import plan_of
from spt_fast.study.sweeps.plan import Plan

BASE = ("--model", "shipped", "--data", "digits", "--methods", "spt-deep", "linear")


def plan(*arguments):
    return plan_of(build_parser().parse_args(["sweep", *map(str, arguments), "--out", "out"]))


def test_options_are_keys_of_the_file():
    found = plan(
        *BASE, "--search", "lr=1e-3,1e-2", "optimizer=adamw,sgd", "--compare", "num_prompts=5,20",
        "--seeds", 0, 1,
        "--per-class", 10, "--random", 4, "--random-seed", 2, "--nmi", "--epochs", 3, "--workers", 0,
        "--no-pretrained", "--img-size", 64, "--model-option", "global_pool=avg",
    )  # fmt: skip
    assert found == {
        "model": "shipped",
        "pretrained": False,
        "img_size": 64,
        "model_options": {"global_pool": "avg"},
        "workers": 0,
        "data": ["digits"],
        "arms": ["spt-deep", "linear"],
        "recipe": {"epochs": 3},
        "search": {"lr": [1e-3, 1e-2], "optimizer": ["adamw", "sgd"]},
        "compare": {"num_prompts": [5, 20]},
        "random": {"trials": 4, "seed": 2},
        "images": {"per_class": 10},
        "seeds": [0, 1],
        "nmi": True,
    }
    read = Plan.read(found)
    assert read.model["model_options"] == {"global_pool": "avg", "img_size": 64}


def test_what_is_not_given_is_left_to_the_defaults():
    assert plan(*BASE) == {"model": "shipped", "data": ["digits"], "arms": ["spt-deep", "linear"]}


def test_a_range_and_folders():
    found = plan(
        "--model", "m", "--data", "train", "--val-data", "val", "--test-data", "test", "--methods", "linear",
        "--search", "lr=1e-4..1e-1", "--random", 3,
    )  # fmt: skip
    assert found["search"] == {"lr": {"low": 1e-4, "high": 1e-1}}
    assert found["data"] == [{"data": "train", "val_data": "val", "test_data": "test"}]


def test_no_trials_are_not_taken_for_all_of_them():
    with pytest.raises(ValueError, match="random: trials must be an integer >= 1, got 0"):
        Plan.read(plan(*BASE, "--search", "lr=1,2", "--random", 0))


def test_options_win_over_the_file(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("model: a\ndata: digits\narms: {linear: {}}\nrecipe: {epochs: 9, lr: 1.0}\nseeds: [5]\n")
    found = plan(path, "--model", "b", "--epochs", 2)
    assert found["model"] == "b"
    assert found["recipe"] == {"epochs": 2, "lr": 1.0}
    assert (found["seeds"], found["data"]) == ([5], "digits")
    assert plan(path)["recipe"] == {"epochs": 9, "lr": 1.0}


def test_a_named_recipe(tmp_path):
    found = plan(*BASE, "--recipe", "paper-fgvc", "--lr", 0.5)
    assert Plan.read(found).groups[0].final(None)[0].recipe.lr == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "linear"), "method is the same for no two arms or seeds of a sweep: give --methods"),
        (("--seed", "1"), "give --seeds"),
        (
            ("--val-data", "x", "--data", "a", "b"),
            "val_data is for a single --data, got ['digits', 'a', 'b']",
        ),
        (("--search", "rate=1"), "search: 'rate' is no field of a recipe"),
    ],
)
def test_bad_options(arguments, message, tmp_path, only_error):
    code = main(["sweep", *BASE, *arguments, "--out", str(tmp_path / "out")])
    assert message in only_error(code, "sweep")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_prints_the_runs(tmp_path, capsys):
    assert main(["sweep", *BASE, "--search", "lr=0.1,1", "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "todo  digits-linear-lr0.1-wd0.0001-seed0-search\n" in printed
    assert printed.endswith("0 of 6 runs are done\n")


def test_options_that_are_given_twice_are_put_together_or_refused():
    found = plan(
        "--model", "m", "--data", "digits", "--data", "vtab/cars", "--methods", "linear", "--methods", "full",
        "--search", "lr=1,2", "--search", "weight_decay=0,1", "--seeds", 0, "--seeds", 1,
    )  # fmt: skip
    assert found["data"] == ["digits", "vtab/cars"]
    assert found["arms"] == ["linear", "full"]
    assert found["search"] == {"lr": [1, 2], "weight_decay": [0, 1]}
    assert found["seeds"] == [0, 1]
    for option, values in (("--search", ("lr=1", "lr=2")), ("--model-option", ("a=1", "a=2"))):
        with pytest.raises(ValueError, match=r"must give each option once, got (lr|a) more than once"):
            plan(*BASE, *(word for value in values for word in (option, value)))


def test_a_seed_of_trials_joins_those_of_the_file(tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text("random: {trials: 7}\n")
    assert plan(file, *BASE, "--random-seed", 3)["random"] == {"trials": 7, "seed": 3}
    assert plan(file, *BASE, "--random", 2)["random"] == {"trials": 2}
    with pytest.raises(ValueError, match="random_seed is for random trials"):
        plan(*BASE, "--random-seed", 3)
