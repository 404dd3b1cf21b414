"""The options of a recipe: one for each field, what wins over what, and what is refused."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spt_fast import Recipe
from spt_fast.commands.recipe_options import UNSET, add_recipe, recipe_of
from spt_fast.training.recipe import options


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="spt-fast train")
    add_recipe(made)
    return made


def parsed(parser: argparse.ArgumentParser, *arguments: object) -> Recipe:
    return recipe_of(parser.parse_args([*map(str, arguments)]))


def test_without_options_it_is_the_default(parser: argparse.ArgumentParser) -> None:
    assert parsed(parser) == Recipe()


def other_value(option: Any) -> Any:
    """A value that is not the default and needs no other field."""
    if option.choices:
        return next(each for each in option.choices if each not in (option.default, "linear"))
    if option.kind is bool:
        return not option.default
    return {"optimizer": "lion", "ema": 0.5, "momentum": 0.5, "min_lr": 1e-9}.get(
        option.name, option.kind(0.75 if option.kind is float else 3)
    )


ONE_VALUE = [option for option in options() if option.kind is not dict]


@pytest.mark.parametrize("option", ONE_VALUE, ids=lambda option: option.name)
def test_every_field_has_an_option(option: Any, parser: argparse.ArgumentParser) -> None:
    name, value = f"--{option.name.replace('_', '-')}", other_value(option)
    extra = ("--head-init", "trunc_normal") if option.name == "head_std" else ()
    fields = {"head_init": "trunc_normal"} if extra else {}
    words = (name,) if value is True else (f"--no{name[1:]}",) if value is False else (name, value)
    assert parsed(parser, *words, *extra) == Recipe(**{option.name: value}, **fields)
    assert f"  {name}" in parser.format_help()
    assert option.help.split(" (")[0] in " ".join(parser.format_help().replace("-\n", "-").split())


def test_options_of_the_method_come_one_by_one(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    words = ("--method", "partial", "--method-option", "num_blocks=2", "--method-option", "kind=x")
    given = parsed(parser, *words)
    assert given == Recipe(method="partial", method_options={"num_blocks": 2, "kind": "x"})
    (tmp_path / "mine.yaml").write_text(given.to_yaml())
    assert parsed(parser, "--recipe", tmp_path / "mine.yaml") == given
    with pytest.raises(SystemExit):
        parsed(parser, *words, "--method-option", "kind=y")
    with pytest.raises(TypeError, match=r"method_options must hold numbers, words, .* got 'kind': \[1\]"):
        Recipe(method_options={"kind": [1]})
    with pytest.raises(TypeError, match="method_options must be a mapping, such as"):
        Recipe(method_options=3)  # type: ignore[arg-type]


def test_options_win_over_the_file_and_the_file_over_defaults(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("lr: 5e-2\nema: 0.9\ndrop_last: true\nepochs: 7\naugment: crop\n")
    given = ("--recipe", tmp_path / "mine.yaml", "--epochs", 100, "--ema", UNSET, "--no-drop-last")
    assert parsed(parser, *given, "--augment", UNSET) == Recipe(lr=0.05)
    assert parsed(parser, *given[:2]) == Recipe(lr=0.05, ema=0.9, drop_last=True, epochs=7, augment="crop")


def test_names_are_recipes_that_ship(
    parser: argparse.ArgumentParser, tmp_path: Path, monkeypatch: Any
) -> None:
    assert parsed(parser, "--recipe", "vpt", "--lr", 0.5) == Recipe.named("vpt", lr=0.5)
    assert parsed(parser, "--recipe", "davpt-mae-fgvc/cub") == Recipe.named("davpt-mae-fgvc/cub")
    # A file of the user's without an ending, but not in the place of one that ships.
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "vpt"):
        Path(name).write_text("epochs: 7")
    assert parsed(parser, "--recipe", "mine") == Recipe(epochs=7)
    assert parsed(parser, "--recipe", "vpt") == Recipe.named("vpt")
    assert parsed(parser, "--recipe", "./vpt") == Recipe(epochs=7)


def test_the_help_lists_the_recipes_that_ship(parser: argparse.ArgumentParser) -> None:
    text = "".join(parser.format_help().split())
    for name in Recipe.names():
        family, _, task = name.partition("/")
        assert (f"{family}/TASK" if task else family) in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--recipe", "papper"), ValueError, "recipe must be one of .* got 'papper'; did you mean paper"),
        (("--recipe", "none.yaml"), FileNotFoundError, "recipe: there is no file none.yaml"),
        (
            ("--epochs", 5, "--warmup-epochs", 5),
            ValueError,
            r"warmup_epochs must be below epochs \(5\), got 5",
        ),
        (("--recipe", "vpt", "--method", "linear"), ValueError, "prompt_dropout is for prompts"),
        (("--optimizer", "adamm"), ValueError, "got 'adamm'; did you mean adam"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: tuple[object, ...], error: type[Exception], message: str, parser: argparse.ArgumentParser
) -> None:
    with pytest.raises(error, match=message):
        parsed(parser, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--warmup", 1), "unrecognized arguments: --warmup 1"),
        (("--epochs", 1.5), "argument --epochs: invalid int value: '1.5'"),
        (("--ema", "no"), "argument --ema: invalid float value: 'no'"),
        (("--lr", UNSET), "argument --lr: invalid float value: 'unset'"),
        (("--keep", UNSET), "argument --keep: invalid choice: 'unset'"),
    ],
)
def test_what_is_no_option_or_value_is_refused(
    arguments: tuple[object, ...],
    message: str,
    parser: argparse.ArgumentParser,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parsed(parser, *arguments)
    assert message in capsys.readouterr().err


def test_the_options_need_no_torch(child_environment: dict[str, str], tmp_path: Path) -> None:
    """So that `spt-fast --help` takes no seconds."""
    code = """
import argparse, sys
sys.argv = ["spt-fast"]
from spt_fast.commands.recipe_options import add_recipe
add_recipe(argparse.ArgumentParser())
print({"torch", "timm", "numpy"} & sys.modules.keys())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"


def test_options_of_a_method_join_those_of_a_file(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("method: bpt\nmethod_options: {depth: shallow, rank: 75}\n")
    found = parsed(
        parser, "--recipe", file, "--method-option", "learned_bases=2", "--method-option", "rank=8"
    )
    assert found.method_options == {"depth": "shallow", "rank": 8, "learned_bases": 2}
    # Of another method they are none.
    other = parsed(parser, "--recipe", file, "--method", "adapter", "--method-option", "bottleneck=4")
    assert other.method_options == {"bottleneck": 4}
    assert parsed(parser, "--recipe", file, "--method", "ssf").method_options == {}
    same = parsed(parser, "--recipe", file, "--method", "bpt")
    assert same.method_options == {"depth": "shallow", "rank": 75}


def test_a_file_that_options_make_whole(parser: argparse.ArgumentParser, tmp_path: Path) -> None:
    """By itself it would be refused: its last rate is above the default one."""
    file = tmp_path / "recipe.yaml"
    file.write_text("min_lr: 0.1\n")
    assert parsed(parser, "--recipe", file, "--lr", "0.5").lr == 0.5
    assert parsed(parser, "--recipe", file, "--lr", "0.5", "--method", "ssf").method == "ssf"
    words = ("--method", "partial", "--method-option", "num_blocks=2")
    assert parsed(parser, "--recipe", file, "--lr", "0.5", *words).method_options == {"num_blocks": 2}


@pytest.mark.parametrize(("given", "options"), [((), {"k": 4}), (("--prompt-init", "prototypes"), {})])
def test_options_of_another_start_are_none(
    parser: argparse.ArgumentParser, tmp_path: Path, given: tuple[str, ...], options: dict[str, int]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("method: spt-deep\nprompt_init: vipamin\nprompt_init_options: {k: 4}\n")
    assert parsed(parser, "--recipe", file, *given).prompt_init_options == options
    assert parsed(parser, "--recipe", file, "--prompt-init", UNSET).prompt_init_options == {}


def test_json_stays_the_word_that_it_is(parser: argparse.ArgumentParser) -> None:
    text = '{"r": 4}'
    found = parsed(parser, "--method", "peft", "--method-option", f"config={text}")
    assert found.method_options == {"config": text}
