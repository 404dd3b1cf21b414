"""YAML: numbers and words as they are meant, keys that come twice, texts that hold something else."""

from __future__ import annotations

import math
import re

import pytest

from spt_fast.support.yaml_text import read_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5e-2", 0.05),
        ("1E3", 1000.0),
        ("1.0e-08", 1e-8),
        (".5", 0.5),
        ("-2", -2),
        ("010", 10),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2026-11-28", "2026-11-28"),
        ("off", "off"),
        ("no", "no"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        (".inf", math.inf),
        ("'1'", "1"),
    ],
)
def test_scalars_mean_what_they_look_like(text: str, expected: object) -> None:
    found = read_yaml(f"key: {text}\n", "text")["key"]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    "values", [{"a": 1e-8, "b": 1.0, "c": None, "d": "off", "e": "1e-2", "f": True, "g": 3, "h": "ä" * 200}]
)
def test_what_is_written_is_read_back(values: dict[str, object]) -> None:
    text = write_yaml(values)
    assert len(text.splitlines()) == len(values)
    found = read_yaml(text, "text")
    assert found == values
    assert list(map(type, found.values())) == list(map(type, values.values()))


def test_an_empty_text_is_an_empty_mapping() -> None:
    assert read_yaml("# nothing\n", "text") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- lr\n- 3", "f.yaml must hold lines such as `epochs: 20`, got ['lr', 3]"),
        ("0.1", "f.yaml must hold lines such as `epochs: 20`, got 0.1"),
        ("1: 2", "f.yaml must hold lines such as `epochs: 20`, got {1: 2}"),
        ("lr: 1\nseed: 2\nlr: 3", "f.yaml is no valid YAML: lr is given more than once, again in line 3"),
        ("a: {b: 1, b: 2}", "f.yaml is no valid YAML: b is given more than once, again in line 1"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_yaml(text, "f.yaml")


@pytest.mark.parametrize(
    "text", ["lr: [1", "a: b: c", "\tlr: 1", "x: !!python/object/apply:os.getcwd []", "a: *b"]
)
def test_what_is_no_yaml_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^f\.yaml is no valid YAML: .+$"):
        read_yaml(text, "f.yaml")
