"""`Recipe`: its fields and their checks, YAML, the recipes that ship, and how two of them differ."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from spt_fast import Recipe
from spt_fast.data.fgvc import SETS
from spt_fast.data.vtab import TASKS
from spt_fast.training.recipe import options

FIELDS = [field.name for field in dataclasses.fields(Recipe)]


def test_the_defaults_are_the_papers() -> None:
    """Sec. 4.1, in numbers."""
    recipe = Recipe()
    assert (recipe.optimizer, recipe.batch_size, recipe.epochs, recipe.warmup) == ("adamw", 32, 100, 10.0)
    assert (recipe.schedule, recipe.min_lr, recipe.lr_scale) == ("cosine", 1e-8, "none")
    assert recipe == Recipe.named("paper").replace(method=None, num_prompts=None)


def test_every_field_has_help_and_a_default_that_it_takes() -> None:
    for option in options():
        assert option.help
        assert option.check(option.default) == option.default
        assert option.optional == (option.default is None)


def test_a_recipe_is_frozen_and_holds_plain_values() -> None:
    recipe = Recipe(lr=np.float32(0.5), epochs=np.int64(3), drop_last=np.bool_(True), warmup_epochs=1)
    assert [type(each) for each in (recipe.lr, recipe.epochs, recipe.drop_last)] == [float, int, bool]
    assert recipe == Recipe(lr=0.5, epochs=3, drop_last=True, warmup_epochs=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.lr = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Recipe("spt-deep")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"lr": 0}, ValueError, "lr must be a finite number > 0, got 0"),
        ({"lr": float("nan")}, ValueError, "lr must be a finite number > 0, got nan"),
        ({"lr": "0.1"}, TypeError, "lr must be a finite number > 0, got '0.1'"),
        ({"lr": True}, TypeError, "lr must be a finite number > 0, got True"),
        ({"lr": 1e-9}, ValueError, "lr must be above min_lr (1e-08), got 1e-09"),
        ({"prompt_lr": 1e-8}, ValueError, "prompt_lr must be above min_lr (1e-08), got 1e-08"),
        (
            {"lr": 2e-8, "lr_scale": "batch"},
            ValueError,
            "lr must be above min_lr (1e-08), got 2.5e-09 after lr_scale='batch'",
        ),
        ({"epochs": 0}, ValueError, "epochs must be an integer >= 1, got 0"),
        ({"epochs": 2.0}, TypeError, "epochs must be an integer >= 1, got 2.0"),
        ({"epochs": 5, "warmup_epochs": 5}, ValueError, "warmup_epochs must be below epochs (5), got 5"),
        ({"ema": 1}, ValueError, "ema must be a finite number > 0 and < 1, got 1"),
        ({"ema": 0}, ValueError, "ema must be a finite number > 0 and < 1, got 0"),
        ({"drop_path": -0.1}, ValueError, "drop_path must be a finite number >= 0 and < 1, got -0.1"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be a finite number >= 0, got -1"),
        ({"patience": 0}, ValueError, "patience must be an integer >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
        ({"seed": 2**63}, ValueError, f"seed must be below 2**63, got {2**63}"),
        ({"compile": 1}, TypeError, "compile must be True or False, got 1"),
        ({"keep": None}, ValueError, "keep must be one of 'last', 'best', got None"),
        ({"amp": "bf"}, ValueError, "amp must be one of 'auto', 'off', 'bf16', 'fp16', got 'bf'"),
        ({"head_std": 0.01}, ValueError, "head_std is for head_init='trunc_normal', got 0.01 with 'timm'"),
        (
            {"optimizer": "adamv"},
            ValueError,
            "optimizer must be a name of timm.optim.list_optimizers(), got 'adamv'; did you mean adam or "
            "radam or nadam?",
        ),
        (
            {"optimizer": "adahessian"},
            ValueError,
            "optimizer must be one without second derivatives, got 'adahessian'",
        ),
        (
            {"method": "linear", "prompt_lr": 0.1},
            ValueError,
            "prompt_lr is for prompts, which method='linear' does not have, got 0.1",
        ),
        (
            {"method": "linear", "freeze_prompts": True},
            ValueError,
            "freeze_prompts is for prompts, which method='linear' does not have, got True",
        ),
        (
            {"cutmix": 1.0, "balance": "loss"},
            ValueError,
            "cutmix mixes classes, which balance='loss' would weigh one by one: take balance='sampler', or "
            "one of the two",
        ),
        (
            {"amp": "fp16", "weight_dtype": "bf16"},
            ValueError,
            "amp='fp16' and weight_dtype='bf16' contradict each other",
        ),
    ],
    ids=str,
)
def test_bad_values_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        Recipe(**given)


def test_a_constant_rate_may_be_as_low_as_asked() -> None:
    assert Recipe(lr=1e-9, schedule="constant").peak_lr == 1e-9


def test_rates_grow_with_the_images_of_a_step() -> None:
    recipe = Recipe(lr=0.5, prompt_lr=2.0, lr_scale="batch", batch_size=64, accumulate=2)
    assert (recipe.peak_lr, recipe.peak_prompt_lr) == (0.25, 1.0)
    plain = recipe.replace(lr_scale="none")
    assert (plain.peak_lr, plain.peak_prompt_lr) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("optimizer", "expected"), [("adamw", None), ("momentum", 0.5), ("sgd", 0.5), ("lion", None)]
)
def test_the_default_rate_of_prompts_is_that_of_the_head_where_steps_have_no_fixed_length(
    optimizer: str, expected: float | None
) -> None:
    assert Recipe(optimizer=optimizer, lr=0.5).peak_prompt_lr == expected


def test_yaml_gives_the_recipe_back(tmp_path: Path) -> None:
    recipe = Recipe(method="vpt-shallow", amp="off", lr=1, ema=0.999, augment="none", drop_last=True, seed=7)
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == recipe
    assert [line.partition(":")[0] for line in recipe.to_yaml().splitlines()] == [o.name for o in options()]


def test_fields_that_a_file_leaves_out_have_their_defaults_and_changes_win(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("lr: 5e-2   # as people write it\nepochs: 20\nema:\n")
    assert Recipe.from_yaml(path) == Recipe(lr=0.05, epochs=20)
    assert Recipe.from_yaml(str(path), epochs=30, amp="off") == Recipe(lr=0.05, epochs=30, amp="off")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "{}: 'epoch' is no field of a recipe; did you mean epochs?"),
        ("warmup: 3", "{}: 'warmup' is no field of a recipe; did you mean warmup_epochs?"),
        (
            "momentm: 0",
            "{}: 'momentm' is no field of a recipe; did you mean momentum?",
        ),
        ("zzz: 3", f"{{}}: 'zzz' is no field of a recipe; there are {', '.join(FIELDS)}"),
        ("lr: fast", "{}: lr must be a finite number > 0, got 'fast'"),
        ("lr: 1\nlr: 2", "{} is no valid YAML: lr is given more than once, again in line 2"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message.format(path))}$"):
        Recipe.from_yaml(path)


def test_a_value_that_is_given_is_not_taken_for_the_files(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("epochs: 3")
    with pytest.raises(
        ValueError, match=r"my\.yaml with lr, seed given: lr must be a finite number > 0, got -1$"
    ):
        Recipe.from_yaml(tmp_path / "my.yaml", lr=-1, seed=0)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="recipe"):
        Recipe.from_yaml(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"# \xe4\n")
    with pytest.raises(ValueError, match="it is not UTF-8"):
        Recipe.from_yaml(tmp_path / "latin.yaml")


def test_names_that_are_no_field_are_refused_everywhere(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    for make in (
        lambda **changes: Recipe().replace(**changes),
        lambda **changes: Recipe.named("paper", **changes),
        lambda **changes: Recipe.from_yaml(tmp_path / "empty.yaml", **changes),
    ):
        with pytest.raises(TypeError, match="'warmup' is no field of a recipe; did you mean warmup_epochs"):
            make(warmup=1)


def test_differences_are_a_line_each() -> None:
    here = Recipe(lr=0.01, ema=0.9)
    assert here.differences(here.replace()) == []
    assert here.differences(Recipe(lr=0.05, keep="best")) == [
        "lr: 0.01 here, 0.05 there",
        "ema: 0.9 here, None there",
        "keep: last here, best there",
    ]


@pytest.mark.parametrize("name", Recipe.names())
def test_recipes_that_ship_are_valid(name: str) -> None:
    recipe = Recipe.named(name)
    assert recipe == Recipe.named(name, seed=0)
    # A short trial of it needs no other change.
    assert (recipe.warmup, Recipe.named(name, epochs=5).warmup) == (10, 0.5)
    assert Recipe.named(name, epochs=5, seed=3).differences(recipe) == [
        "epochs: 5 here, 100 there",
        "seed: 3 here, 0 there",
    ]
    family, _, task = name.partition("/")
    if task:
        assert task in (TASKS if family.endswith("vtab") else SETS)


def test_the_recipes_that_ship() -> None:
    names = Recipe.names()
    assert list(names) == sorted(names)
    alone = {name for name in names if "/" not in name}
    assert alone == {
        "paper",
        "paper-fgvc",
        "paper-mae-cub",
        "paper-supervised-dogs",
        "paper-vtab",
        "vpt",
    }
    assert {name.partition("/")[2] for name in names if name.startswith("vpt-vtab/")} == set(TASKS)
    assert {name.partition("/")[2] for name in names if name.startswith("vpt-fgvc/")} == set(SETS)


def test_the_two_published_command_lines() -> None:
    for name, lr, head_decay in (("paper-mae-cub", 5e-2, 0.5), ("paper-supervised-dogs", 1e-3, 3.0)):
        recipe = Recipe.named(name)
        assert (recipe.lr, recipe.prompt_lr, recipe.lr_scale) == (lr, lr, "none")
        assert (recipe.weight_decay, recipe.head_weight_decay, recipe.drop_path) == (1e-2, head_decay, 0)
        assert (recipe.method, recipe.num_prompts, recipe.batch_size) == ("spt-deep", 20, 32)
        assert (recipe.epochs, recipe.warmup, recipe.min_lr) == (100, 10, 1e-8)
        fgvc = Recipe.named("paper-fgvc")
        changed = {line.partition(":")[0] for line in recipe.differences(fgvc)}
        assert changed <= {"lr", "prompt_lr", "weight_decay", "head_weight_decay"}


def test_values_by_task() -> None:
    """A few, against the tables that the files were made from."""
    cub = Recipe.named("davpt-mae-fgvc/cub")
    assert (cub.lr, cub.prompt_lr, cub.weight_decay, cub.head_weight_decay) == (5e-3, 5e-3, 0.01, 0.5)
    assert (cub.num_prompts, cub.min_lr) == (15, 1e-9)
    small = Recipe.named("davpt-mae-vtab/smallnorb_ele")
    assert (small.lr, small.weight_decay, small.head_weight_decay) == (1e-4, 5, 0.1)
    assert (small.num_prompts, small.drop_path, small.augment, small.resize) == (10, 0.1, "none", "vtab")
    deep = Recipe.named("bpt-mae-deep/nabirds")
    assert (deep.lr, deep.weight_decay, deep.head_weight_decay, deep.num_prompts) == (0.05, 5e-3, 0.3, 50)
    shallow = Recipe.named("bpt-supervised-shallow/cars")
    assert (shallow.method, shallow.lr, shallow.weight_decay) == ("spt-shallow", 0.02, 0.01)
    assert Recipe.named("bpt-moco-shallow/dogs").head_std == 0.01
    vpt = Recipe.named("vpt-fgvc/cars")
    assert (vpt.num_prompts, vpt.peak_lr, vpt.peak_prompt_lr) == (200, 0.25, 0.25)


NOT_A_NAME = "recipe must be one of Recipe.names(), or on the command line a YAML file, got "


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("paper-vatb", f"{NOT_A_NAME}'paper-vatb'; did you mean paper-vtab or"),
        (
            "davpt-mae-vtab",
            f"{NOT_A_NAME}'davpt-mae-vtab'; did you mean davpt-mae-vtab/",
        ),
        ("", f"{NOT_A_NAME}''"),
    ],
)
def test_other_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Recipe.named(name)


def test_the_recipe_of_a_run_is_read_back(tmp_path: Path) -> None:
    recipe = Recipe(epochs=7, method="partial", method_options={"num_blocks": 2})
    text = "".join(f"  {line}\n" for line in recipe.to_yaml().splitlines())
    file = tmp_path / "run.yaml"
    file.write_text(f"recipe:\n{text}model: shipped\nversions:\n  torch: 2.14.1\n", encoding="utf-8")
    assert Recipe.from_yaml(file, seed=1) == recipe.replace(seed=1)


def test_a_recipe_is_the_key_of_a_dict() -> None:
    given = Recipe(method="partial", method_options={"num_blocks": 2})
    assert {given: "here"}[given.replace()] == "here"


def test_options_cannot_be_changed_and_are_plain_where_they_leave() -> None:
    given = {"num_blocks": 2}
    recipe = Recipe(method="partial", method_options=given)
    given["num_blocks"] = 3
    with pytest.raises(TypeError, match="does not support item assignment"):
        recipe.method_options["num_blocks"] = 3  # type: ignore[index]
    assert recipe.method_options == {"num_blocks": 2}
    assert repr(recipe.method_options) == "{'num_blocks': 2}"
    plain = dataclasses.asdict(recipe)
    assert type(plain["method_options"]) is dict
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    assert Recipe(**plain) == recipe
    for copied in (pickle.loads(pickle.dumps(recipe)), copy.deepcopy(recipe), copy.copy(recipe)):
        assert copied == recipe
        assert hash(copied) == hash(recipe)
        assert type(copied.method_options) is type(recipe.method_options)
    assert hash(recipe) != hash(recipe.replace(method_options={"num_blocks": 3}))


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ({}, "prototypes"),
        ({"method": "vpt-deep"}, "random"),
        ({"method": "bpt"}, "random"),
        ({"method": "bpt", "prompt_init": "prototypes"}, "prototypes"),
        ({"method": "spt-shallow", "prompt_init": "vipamin", "prompt_init_options": {"k": 2}}, "vipamin"),
        ({"method": "linear"}, None),
    ],
)
def test_where_prompts_start(given: dict[str, Any], start: str | None) -> None:
    recipe = Recipe(**given)
    assert recipe.prompts_from == start
    assert recipe.needs_prototypes == (start == "prototypes")


def test_depth_is_as_the_options_say() -> None:
    assert Recipe(method="bpt").depth == "deep"
    assert Recipe(method="bpt", method_options={"depth": "shallow"}).depth == "shallow"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_init": "random"}, "prompt_init='random' is VPT, method='vpt-deep', not method='spt-deep'"),
        ({"method": "vpt-deep", "prompt_init": "vipamin"}, "prompt_init must be 'random' for method='vpt"),
        ({"prompt_init_options": {"k": 2}}, "prompt_init_options is for prompt_init='vipamin', got {'k': 2}"),
        ({"prompt_init": "vipamin", "prompt_init_options": {"ks": 2}}, "prompt_init_options has 'ks', but"),
        ({"method": "linear", "prompt_init": "vipamin"}, "prompt_init is for prompts, which method='linear'"),
    ],
)
def test_starts_that_a_method_does_not_have_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Recipe(**given)


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match=r"recipe must be one of Recipe.names\(\), got None"):
        Recipe.named(None)  # type: ignore[arg-type]


def test_options_of_another_method_or_start_go_with_it(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("method: bpt\nmethod_options: {rank: 75}\n")
    assert Recipe.from_yaml(file, method="bpt").method_options == {"rank": 75}
    assert Recipe.from_yaml(file, method="ssf").method_options == {}
    file.write_text("prompt_init: vipamin\nprompt_init_options: {k: 4}\n")
    assert Recipe.from_yaml(file, method="spt-deep").prompt_init_options == {"k": 4}
    assert Recipe.from_yaml(file, prompt_init="prototypes").prompt_init_options == {}
