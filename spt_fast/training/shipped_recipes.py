"""The recipes that ship with the package: the YAML files in recipes/."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from spt_fast.support.yaml_text import read_yaml


@cache
def shipped() -> Mapping[str, Mapping[str, Any]]:
    """The values of the recipes in recipes/, by name; a file with `tasks` has one for each of them."""
    found: dict[str, Mapping[str, Any]] = {}
    for file in (Path(__file__).parent / "recipes").glob("*.yaml"):
        values = read_yaml(file.read_text(encoding="utf-8"), file.name)
        tasks = values.pop("tasks", None)
        if tasks is None:
            found[file.stem] = values
        else:
            found.update({f"{file.stem}/{task}": {**values, **own} for task, own in tasks.items()})
    return dict(sorted(found.items()))
