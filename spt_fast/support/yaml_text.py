"""YAML as its users mean it: `1e-2` is a number, `off` is a word, and no key counts twice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from spt_fast.support.errors import one_line

# YAML 1.2, whose numbers and words are those of JSON; PyYAML reads 1.1, where 1e-2 is text and off is false.
_SCALARS = {
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "int": (re.compile(r"^[-+]?[0-9]+$"), "-+0123456789"),
    "float": (
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        "-+0123456789.",
    ),
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
}


def read_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping that `text` holds; an empty text is an empty one.

    Args:
        source: what errors call it, such as the path of a file.

    Raises:
        ValueError: it is no YAML, no mapping with text as its keys, or has a key twice.
    """
    import yaml

    try:
        found = yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{source} is no valid YAML: {one_line(error)}") from error
    found = {} if found is None else found
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"{source} must hold lines such as `epochs: 20`, got {_shown(found)}")
    return found


def write_yaml(values: Mapping[str, Any]) -> str:
    """`values` as YAML in their order, one line for each plain value, that `read_yaml` reads back."""
    import yaml

    # A width that breaks no line.
    layout = {"sort_keys": False, "allow_unicode": True, "width": float("inf")}
    return str(yaml.dump(dict(values), Dumper=_dumper(), **layout))


@cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = []
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if key in seen:
                    line = key_node.start_mark.line + 1
                    raise ValueError(f"{key} is given more than once, again in line {line}")
                seen.append(key)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

        def construct_number(self, node: Any) -> int:
            return int(self.construct_scalar(node))

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_number)
    _resolve_scalars(Loader)
    return Loader


@cache
def _dumper() -> Any:
    import yaml

    class Dumper(yaml.SafeDumper):  # type: ignore[misc]
        """Quotes text that YAML 1.1 or 1.2 would take for something else."""

    _resolve_scalars(Dumper)
    return Dumper


def _resolve_scalars(of: Any) -> None:
    for kind, (pattern, first) in _SCALARS.items():
        of.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", pattern, list(first))


def _shown(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:57]}..."
