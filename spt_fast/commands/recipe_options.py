"""The options of a recipe: one for each field of `Recipe`, and the file or the name that they win over."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spt_fast.commands.options import key_and_value

if TYPE_CHECKING:
    from spt_fast.training.recipe import Recipe
    from spt_fast.training.recipe_values import Option

# What an option says for None.
UNSET = "unset"
_FILE_ENDINGS = (".yaml", ".yml")


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """`--recipe`, and an option for each field, named as the field, in a group for each of its groups."""
    from spt_fast.training.recipe import GROUPS, Recipe, options

    # `--warm` may be another option tomorrow.
    parser.allow_abbrev = False
    recipe = parser.add_argument_group("recipe", "Options win over --recipe; 'unset' takes its value away.")
    recipe.add_argument(
        "--recipe",
        metavar="NAME-OR-FILE",
        help="YAML file with the names of the options below as keys, or one of "
        + ", ".join(_families(Recipe.names())),
    )
    for group in GROUPS:
        arguments = parser.add_argument_group(f"recipe: {group}")
        for option in options():
            if option.group == group:
                _add(arguments, option)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe that the options make of `--recipe`, or of the defaults.

    Raises:
        FileNotFoundError: `--recipe` names a file that does not exist.
        ValueError: there is no such recipe, its file is wrong, or values are out of range or contradict each
            other.
    """
    from spt_fast.training.recipe import Recipe, options

    given = {option.name: vars(args)[option.name] for option in options() if option.name in args}
    given = {name: None if value == UNSET else value for name, value in given.items()}
    if args.recipe is None:
        return Recipe(**given)
    is_file = args.recipe not in Recipe.names() and _is_file(args.recipe)
    read = Recipe.from_yaml if is_file else Recipe.named
    dicts = [option.name for option in options() if option.kind is dict and option.name in given]
    if dicts:
        # Those of the file that are still meant, and over them, key by key, those that are given.
        stated = read(args.recipe, **{name: value for name, value in given.items() if name not in dicts})
        given |= {name: {**getattr(stated, name), **given[name]} for name in dicts}
    return read(args.recipe, **given)


def _is_file(name: str) -> bool:
    return name.endswith(_FILE_ENDINGS) or Path(name).is_file()


def _families(names: tuple[str, ...]) -> list[str]:
    """The names, with those of one family as FAMILY/TASK."""
    shown = [f"{name.partition('/')[0]}/TASK" if "/" in name else name for name in names]
    return list(dict.fromkeys(shown))


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    name = f"--{option.name.replace('_', '-')}"
    if option.kind is dict:
        # One of them at a time: --method-option KEY=VALUE.
        name = name.removesuffix("s")
    # No default here: what is given differs from what is not.
    settings: dict[str, Any] = {"dest": option.name, "default": argparse.SUPPRESS}
    if option.kind is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif option.kind is dict:
        settings |= {"action": _Collect, "type": _key_and_word, "metavar": "KEY=VALUE"}
    elif option.choices:
        settings["choices"] = [*option.choices, *([UNSET] if option.optional else [])]
    else:
        settings["metavar"] = {int: "N", float: "X", str: "NAME"}[option.kind]
        settings["type"] = _or_unset(option.kind) if option.optional else option.kind
    # Set afterwards: some Pythons add the default to the help of a switch by themselves.
    group.add_argument(name, **settings).help = _help(option).replace("%", "%%")


class _Collect(argparse.Action):
    """Puts every pair of a name and a value into one dict."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        name, value = values
        found = dict(getattr(namespace, self.dest, {}))
        if name in found:
            raise argparse.ArgumentError(self, f"must give each option once, got {name} more than once")
        setattr(namespace, self.dest, {**found, name: value})


def _key_and_word(text: str) -> tuple[str, Any]:
    """As `key_and_value`; the options of a recipe are no lists and mappings, but words that may hold JSON."""
    name, value = key_and_value(text)
    return name, text.partition("=")[2] if isinstance(value, dict | list | tuple | set) else value


def _help(option: Option) -> str:
    if option.default is None or option.kind is dict:
        return option.help
    default = option.default
    if option.kind is bool:
        default = "on" if default else "off"
    return f"{option.help} (default: {default})"


def _or_unset(kind: type) -> Any:
    def parse(text: str) -> Any:
        return text if text == UNSET else kind(text)

    # argparse names it where a value is wrong.
    parse.__name__ = kind.__name__
    return parse
