"""The runs that a sweep stands for: their names, values and number; and what a plan refuses."""

from __future__ import annotations

import re
from typing import Any

import pytest

from spt_fast import Recipe
from spt_fast.study.sweeps.plan import Plan
from spt_fast.study.sweeps.search import RandomSearch, Range, read_axes, trials


def read(**given: Any) -> Plan:
    return Plan.read({"model": "shipped", "data": "digits", "arms": ["spt-deep"], **given})


def test_names_of_runs_are_readable_and_say_what_differs():
    plan = read(data=["vtab/flowers17"], search={"lr": [1e-3, 1e-2]}, seeds=[0, 1])
    (group,) = plan.groups
    assert [run.name for run in group.search] == [
        "flowers17-spt-deep-lr0.001-wd0.0001-n20-seed0-search",
        "flowers17-spt-deep-lr0.01-wd0.0001-n20-seed0-search",
    ]
    assert [run.name for run in group.final(group.search[1])] == [
        "flowers17-spt-deep-lr0.01-wd0.0001-n20-seed0-final",
        "flowers17-spt-deep-lr0.01-wd0.0001-n20-seed1-final",
    ]
    assert plan.count() == 4


def test_tasks_with_the_same_end_of_a_name_have_longer_names():
    plan = read(data=["vtab/cars", "fgvc/cars"])
    assert [task.name for task in plan.tasks] == ["cars", "fgvc-cars"]


def test_a_root_is_for_the_tasks_that_lie_below_one(tmp_path):
    plan = read(data=["digits", "vtab/cars"], root=str(tmp_path), download=False)
    assert [task.takes("root") for task in plan.tasks] == [False, True]
    with pytest.raises(ValueError, match="root is for other data than digits, got x"):
        read(root="x")


def test_a_grid_has_all_combinations_and_prompts_only_where_there_are_any():
    axes = {"lr": [1e-3, 1e-2], "num_prompts": [5, 10, 20]}
    plan = read(arms=["vpt-deep", "linear"], search=axes, recipe={"num_prompts": 7, "epochs": 3})
    prompted, linear = plan.groups
    tried = [(run.recipe.lr, run.recipe.num_prompts) for run in prompted.search]
    assert tried == [(rate, number) for rate in axes["lr"] for number in axes["num_prompts"]]
    assert [run.recipe.lr for run in linear.search] == axes["lr"]
    assert {run.recipe.num_prompts for run in linear.search} == {None}
    assert {run.recipe.epochs for run in prompted.search} == {3}


def test_what_an_arm_states_is_not_searched_and_it_may_search_values_of_its_own():
    arms = {"vpt-deep": {"lr": 0.5}, "full": {"search": {"lr": [1e-5, 1e-4]}}}
    stated, own = read(arms=arms, search={"lr": [1e-3, 1e-2], "weight_decay": [0.0, 1e-4]}).groups
    assert {run.recipe.lr for run in stated.search} == {0.5}
    assert {run.recipe.lr for run in own.search} == {1e-5, 1e-4}
    assert {run.recipe.weight_decay for run in own.search} == {0.0, 1e-4}


def test_where_there_is_nothing_to_choose_nothing_is_searched():
    (group,) = read(search={"lr": [1e-3]}, seeds=[3, 4]).groups
    assert group.search == []
    assert [run.recipe.seed for run in group.final(None)] == [3, 4]


def test_compared_values_have_final_runs_of_their_own_and_stand_in_options():
    plan = read(arms=["spt-deep", "linear"], compare={"num_prompts": [5, 50], "share": [0.1, 1.0]})
    finals = [group.final(None)[0] for group in plan.groups]
    assert [(run.arm.name, run.recipe.num_prompts, run.options) for run in finals] == [
        ("spt-deep", 5, "share=0.1"),
        ("spt-deep", 5, "share=1"),
        ("spt-deep", 50, "share=0.1"),
        ("spt-deep", 50, "share=1"),
        ("linear", None, "share=0.1"),
        ("linear", None, "share=1"),
    ]
    assert finals[0].name == "digits-spt-deep-lr0.01-wd0.0001-n5-share0.1-seed0-final"
    assert finals[0].subset == {"share": 0.1}


def test_other_chosen_values_stand_in_options_in_alphabetical_order():
    (group,) = read(
        search={"label_smoothing": [0.0, 0.1], "drop_path": [0.2]}, images={"per_class": 5}
    ).groups
    assert group.search[1].options == "drop_path=0.2;label_smoothing=0.1;per_class=5"


def test_arms_share_prototypes_where_these_are_the_same():
    arms = {
        "a": {"method": "spt-deep"},
        "b": {"method": "spt-deep", "weight_decay": 0.1},
        "first": {"method": "spt-deep", "prototypes": {"source": "first"}},
        "other": {"method": "spt-deep", "prototypes": {"task": "vtab/cars"}},
        "mean": {"method": "spt-deep", "prototypes": {"strategy": "mean", "share": 0.1}},
        "shallow": {"method": "spt-shallow"},
        "vpt-deep": {},
    }
    names = [group.final(None)[0].prototypes_name for group in read(arms=arms).groups]
    assert names[0] == names[1] == "digits-final-kmeans-deep-n20-batch32-seed0.safetensors"
    assert names[2:5] == [
        "digits-final-kmeans-first-deep-n20-batch32-seed0.safetensors",
        "cars-final-kmeans-deep-n20-batch32-seed0.safetensors",
        "digits-final-mean-of0.1-deep-n20-batch32-seed0.safetensors",
    ]
    assert names[5] == "digits-final-kmeans-shallow-n100-batch32-seed0.safetensors"
    assert names[6] is None


def test_tasks_that_lend_prototypes_have_files_of_their_own():
    lent = {
        name: {"method": "spt-deep", "prototypes": {"task": task}}
        for name, task in {
            "cars": "vtab/cars",
            "others": "fgvc/cars",
            "again": "vtab/cars",
            "mine": {"data": "a/train", "val_data": "a/val", "test_data": "a/test"},
            "yours": {"data": "b/train", "val_data": "b/val", "test_data": "b/test"},
        }.items()
    }
    names = [group.final(None)[0].prototypes_name for group in read(arms=lent).groups]
    assert [name.partition("-final")[0] for name in names] == [
        "cars", "fgvc-cars", "cars", "train", "b-train",
    ]  # fmt: skip


def test_what_is_compared_stands_in_a_column_and_all_that_varies_in_options():
    plan = read(
        arms=["linear"],
        compare={"epochs": [5, 10], "share": [0.5]},
        search={"lr": [0.1, 1.0], "label_smoothing": [0.0, 0.1]},
    )
    first = plan.groups[0].search[1]
    assert (first.compared, first.options) == (
        "epochs=5;share=0.5",
        "epochs=5;label_smoothing=0.1;share=0.5",
    )
    assert first.name == "digits-linear-lr0.1-wd0.0001-epochs5-labelsmoothing0.1-share0.5-seed0-search"


def test_val_every_that_a_file_states_is_not_left_out(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("epochs: 20\nval_every: 1\n")
    for recipe in (str(path), {"epochs": 20, "val_every": 1}):
        assert read(recipe=recipe).groups[0].final(None)[0].recipe.val_every == 1
    path.write_text("epochs: 20\n")
    assert read(recipe=str(path)).groups[0].final(None)[0].recipe.val_every == 20


def test_a_range_draws_whole_numbers_for_fields_that_are():
    axes = read_axes(
        {
            "weight_decay": {"low": 0, "high": 1, "scale": "linear"},
            "epochs": {"low": 5, "high": 50},
            "prompt_lr": {"low": 1, "high": 100},
        }
    )
    drawn = trials(axes, RandomSearch(8))
    assert all(isinstance(trial["epochs"], int) for trial in drawn)
    for name in ("weight_decay", "prompt_lr"):
        assert sum(trial[name] != int(trial[name]) for trial in drawn) > 4
    with pytest.raises(
        ValueError, match=r"search: epochs: low and high must be whole numbers, got 0.5 and 9"
    ):
        read_axes({"epochs": {"low": 0.5, "high": 9}})


def test_nmi_is_measured_where_prompts_learn():
    arms = {"vpt-deep": {}, "frozen": {"method": "spt-deep", "freeze_prompts": True}, "linear": {}}
    plan = read(arms=arms, nmi=True, search={"lr": [0.1, 1.0]})
    assert [group.final(group.search[0])[0].nmi for group in plan.groups] == [True, False, False]
    assert not any(run.nmi for group in plan.groups for run in group.search)


@pytest.mark.parametrize("recipe", ["paper-fgvc", Recipe.named("paper-fgvc")])
def test_a_named_recipe_is_shared_by_all_arms(recipe):
    wanted = Recipe.named("paper-fgvc", method="linear", val_every=100, num_prompts=None)
    (group,) = read(arms=["linear"], recipe=recipe).groups
    assert group.final(None)[0].recipe == wanted.replace(val_every=wanted.epochs)


def test_random_trials_are_those_of_the_seed_and_more_begin_with_the_same():
    axes = {"lr": Range(1e-4, 1e-1), "weight_decay": [0.0, 1e-4, 1e-3], "num_prompts": Range(1, 100)}
    few, many, other = (trials(axes, RandomSearch(*how)) for how in ((5, 0), (9, 0), (5, 1)))
    assert many[:5] == few
    assert other != few
    assert len(many) == 9
    assert all(1e-4 <= trial["lr"] <= 1e-1 and trial["lr"] == float(f"{trial['lr']:.3g}") for trial in many)
    assert all(isinstance(trial["num_prompts"], int) for trial in many)
    # What another axis has changes nothing.
    alone = trials({"lr": axes["lr"]}, RandomSearch(5))
    assert [trial["lr"] for trial in alone] == [trial["lr"] for trial in few]


def test_random_trials_of_few_values_end_with_the_grid():
    axes = {"lr": [1e-3, 1e-2], "weight_decay": [0.0, 1e-4]}
    found = trials(axes, RandomSearch(50))
    assert sorted(map(str, found)) == sorted(map(str, trials(axes, None)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "'epoch' is no key of a sweep; there are model, "),
        ({"model": None}, "model must be given"),
        ({"arms": {}}, "arms must be given"),
        ({"arms": {"mine": {}}}, "arms: mine: its name is none of a method's"),
        ({"arms": {"my arm": {"method": "linear"}}}, "arms: my arm: a name must be of letters"),
        ({"arms": {"linear": {"rate": 1}}}, "arms: linear: 'rate' is no field"),
        ({"arms": {"linear": {"seed": 1}}}, "arms: linear: seed is the same for all arms"),
        ({"arms": {"linear": {"num_prompts": 5}}}, "arms: linear: num_prompts is for prompts"),
        ({"arms": {"linear": {"lr": -1}}}, "arms: linear: lr must be"),
        ({"arms": {"lora": {"method_options": {"size": 3}}}}, "arms: lora: 'size' is no option"),
        ({"arms": {"vpt-deep": {"prototypes": {"source": "first"}}}}, "arms: vpt-deep: prototypes are for"),
        ({"arms": {"spt-deep": {"prototypes": {"source": "mid"}}}}, "source must be one of 'own', 'first'"),
        ({"arms": {"spt-deep": {"prototypes": {"share": 2}}}}, "share must be a finite number > 0 and <= 1"),
        (
            {"arms": {"spt-deep": {"prototypes": {"from": "x"}}}},
            "arms: spt-deep: prototypes: 'from' is no key",
        ),
        ({"arms": {"spt-shallow": {"prototypes": {"source": "first"}}}}, "is for prompts in every block"),
        ({"arms": ["linear", "linear"]}, "arms must have different names"),
        ({"search": {"rate": [1]}}, "search: 'rate' is no field"),
        ({"search": {"lr": [0.1, 0.1]}}, "search: lr must be a list of different values"),
        ({"search": {"lr": {"low": 1, "high": 2}}}, "search: lr is a range, of which only a random search"),
        ({"search": {"lr": {"low": 1}}}, "search: lr must be a list of values, or have low, high"),
        ({"search": {"seed": [1, 2]}}, "search: seed has no values to choose from"),
        ({"search": {"lr": [1]}, "compare": {"lr": [2]}}, "compare and search must have other fields"),
        ({"random": {"trials": 0}}, "random: trials must be an integer >= 1"),
        ({"recipe": {"keep": "best"}}, "recipe: keep='best' lets validation images choose an epoch"),
        ({"recipe": {"method": "linear"}}, "recipe: method is for arms"),
        ({"recipe": "paper-nothing"}, "recipe must be one of Recipe.names"),
        ({"images": {"per_class": 5, "share": 1}}, "images must be {share: X} or {per_class: N}"),
        ({"images": {"per_class": 0}}, "images: per_class must be an integer >= 1, got 0"),
        ({"images": {"share": 1.5}}, "images: share must be a finite number > 0 and <= 1, got 1.5"),
        ({"compare": {"per_class": [5, 0]}}, "compare: per_class must be an integer >= 1, got 0"),
        ({"compare": {"share": [2]}}, "compare: share must be a finite number > 0 and <= 1, got 2"),
        ({"compare": {"share": [0.5, 1]}, "images": {"per_class": 5}}, "images must be share or per_class"),
        ({"seeds": [1, 1]}, "seeds must be a list of different numbers"),
        ({"seeds": [-1]}, "seeds must be an integer >= 0"),
        ({"data": ["digits", "digits"]}, "digits is given more than once"),
        ({"data": "photos"}, "photos has no splits: give test_data"),
        ({"data": {"data": "photos", "tests": "x"}}, "'tests' is no key of a task"),
        ({"nmi": "yes"}, "nmi must be True or False"),
    ],
)
def test_bad_plans(given, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        read(**given)
