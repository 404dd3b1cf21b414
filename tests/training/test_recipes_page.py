"""docs/recipes.md: its table has every field with its default and help, its list every recipe that ships."""

from __future__ import annotations

import re
from pathlib import Path

from spt_fast import Recipe
from spt_fast.training.recipe import GROUPS, options
from spt_fast.training.recipe_values import Option

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"


def row(option: Option) -> str:
    words = {"None": "unset", "True": "true", "False": "false", "{}": "none"}
    default = words.get(str(option.default), str(option.default))
    values = f"{' '.join(f'`{each}`' for each in option.choices)}: " if option.choices else ""
    return f"| `{option.name}` | {default} | {values}{option.help} |"


def test_the_table_has_the_fields_in_their_order() -> None:
    found = [line for line in PAGE.read_text().splitlines() if re.match(r"\| `\w+` \| \S+ \| ", line)]
    assert found == [row(option) for group in GROUPS for option in options() if option.group == group]


def test_every_recipe_that_ships_is_listed() -> None:
    text = PAGE.read_text()
    for name in Recipe.names():
        assert f"| `{name.partition('/')[0]}{'/TASK' if '/' in name else ''}` |" in text, name
