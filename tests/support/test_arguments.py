"""Checks of arguments: what passes, and what the error says of the rest."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from spt_fast.support.arguments import (
    check_bool,
    check_choice,
    check_device,
    check_int,
    check_number,
    check_seed,
    check_tensor,
    parse_bytes,
)


@pytest.mark.parametrize("value", [1, 7, np.int64(3)])
def test_integers_pass(value: Any) -> None:
    found = check_int("n", value, 1)
    assert type(found) is int
    assert found == value


@pytest.mark.parametrize("value", [2.5, 2.0, "2", True, None, np.float64(2)])
def test_what_is_no_integer_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^n must be an integer >= 1 or None, got "):
        check_int("n", value, 1, "or None")


def test_a_small_integer_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"^n must be an integer >= 1, got 0$"):
        check_int("n", 0, 1)


@pytest.mark.parametrize("value", [0, 0.5, 3, np.float32(2), np.int32(2)])
def test_numbers_pass(value: Any) -> None:
    found = check_number("x", value, 0)
    assert type(found) is float
    assert found == value


@pytest.mark.parametrize("value", ["1", True, None, [1.0], torch.tensor(1.0)])
def test_what_is_no_number_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^x must be a finite number >= 0, got "):
        check_number("x", value, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.1])
def test_numbers_out_of_range_are_value_errors(value: float) -> None:
    with pytest.raises(ValueError, match=r"^x must be a finite number >= 0, got "):
        check_number("x", value, 0)


def test_a_number_may_have_to_be_above_a_bound() -> None:
    assert check_number("x", 0.1, above=0) == 0.1
    with pytest.raises(ValueError, match=r"^x must be a finite number > 0, got 0$"):
        check_number("x", 0, above=0)


def test_seeds_are_integers_that_all_generators_take() -> None:
    assert check_seed(2**63 - 1) == 2**63 - 1
    with pytest.raises(ValueError, match=r"^seed must be below 2\*\*63, got 9223372036854775808$"):
        check_seed(2**63)
    with pytest.raises(ValueError, match=r"^random_state must be an integer >= 0, got -1$"):
        check_seed(-1, "random_state")
    with pytest.raises(TypeError, match=r"^seed must be an integer >= 0, got 1\.5$"):
        check_seed(1.5)


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_])
def test_bools_pass(value: Any) -> None:
    found = check_bool("flag", value)
    assert type(found) is bool
    assert found == value


@pytest.mark.parametrize("value", ["False", "no", 0, 1, None])
def test_what_is_no_bool_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^flag must be True or False, got {value!r}$"):
        check_bool("flag", value)


@pytest.mark.parametrize("value", ["c", 1, None, ["a"]])
def test_choices_are_named(value: Any) -> None:
    assert check_choice("kind", "a", ("a", "b")) == "a"
    with pytest.raises(ValueError, match=r"^kind must be one of 'a', 'b', got "):
        check_choice("kind", value, ("a", "b"))


def test_tensors_pass_as_they_are() -> None:
    value = torch.zeros(3, 2, 4)
    assert check_tensor("x", value, ("L", "N_p", 4), dtype=torch.float32, device=value.device) is value


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ([1.0], TypeError, "x must be a tensor, got list"),
        (
            torch.zeros(2, 4, dtype=torch.int64),
            TypeError,
            "x must be a floating-point tensor, got torch.int64",
        ),
        (torch.zeros(2, 5), ValueError, r"x must be \[M, 4\], got \[2, 5\]"),
        (torch.zeros(0, 4), ValueError, r"x must be \[M, 4\], got \[0, 4\]"),
        (torch.zeros(4), ValueError, r"x must be \[M, 4\], got \[4\]"),
    ],
)
def test_other_tensors_are_refused(value: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^{message}$"):
        check_tensor("x", value, ("M", 4))


def test_dtype_and_device_are_named() -> None:
    with pytest.raises(TypeError, match=r"^x must be torch.float32, got torch.float64$"):
        check_tensor("x", torch.zeros(2, dtype=torch.float64), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"^x must be on cpu, got meta$"):
        check_tensor("x", torch.zeros(2, device="meta"), device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (123, 123),
        (np.int64(123), 123),
        ("123", 123),
        ("64B", 64),
        ("4GiB", 4 * 2**30),
        ("1.5 GB", 1_500_000_000),
        (" 20 kB ", 20_000),
        ("2KiB", 2048),
        ("3 MiB", 3 * 2**20),
        ("1TB", 10**12),
    ],
)
def test_sizes_are_parsed(value: int | str, expected: int) -> None:
    assert parse_bytes("memory_budget", value) == expected


@pytest.mark.parametrize("value", ["", "GiB", "4 gigs", "-1GB", "1e9", "4GiBs", "4 G B"])
def test_bad_sizes_are_refused(value: str) -> None:
    with pytest.raises(ValueError, match="memory_budget must be a number with a unit"):
        parse_bytes("memory_budget", value)


def test_sizes_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r'memory_budget must be an integer >= 0 .* such as "4GiB", got -1'):
        parse_bytes("memory_budget", -1)
    for value in (None, 1.5, True, b"4GiB"):
        with pytest.raises(TypeError, match=r"memory_budget must be an integer >= 0 \(bytes\) or text"):
            parse_bytes("memory_budget", value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        *((value, "not a device's name") for value in ("tpu", "nonsense", "cpu:x", 3.5)),
        ("meta", "holds no data"),
        ("xpu", "."),
        ("cuda:99", "."),
    ],
)
def test_devices_that_cannot_be_used_are_refused(value: object, reason: str) -> None:
    expected = rf"^device must be 'cpu', or 'cuda' .*, got '{value}' \(.*{reason}.*\)$"
    with pytest.raises(ValueError, match=expected) as found:
        check_device("device", value)
    assert "\n" not in str(found.value)


def test_a_device_that_works_is_returned() -> None:
    assert check_device("device", "cpu") == torch.device("cpu")
