"""DataFrames, without pandas and scikit-learn: names of columns of what is given, containers of results."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from spt_fast.support.user_warnings import warn_user

CONTAINERS = ("default", "pandas", "polars")
_SHOWN = 5


def feature_names(X: Any) -> np.ndarray | None:
    """The names of the columns of a DataFrame, an object array [D]; None where it has none that are strings.

    Raises:
        TypeError: some names are strings, others are not.
    """
    columns = None if isinstance(X, Tensor | np.ndarray) else getattr(X, "columns", None)
    if columns is None or callable(columns):
        return None
    names = np.asarray(columns, dtype=object)
    kinds = sorted({type(name).__qualname__ for name in names})
    if "str" in kinds and len(kinds) > 1:
        raise TypeError(
            "Feature names are only supported if all input features have string names, but X has "
            f"{kinds} as names of columns; X.columns = X.columns.astype(str) makes them strings"
        )
    return names if kinds == ["str"] else None


def check_feature_names(X: Any, fitted: np.ndarray | None, estimator: str) -> None:
    """Compare the names of X with those of the data that were fitted; the words are scikit-learn's.

    Raises:
        ValueError: they differ, or are in another order. Names on one side only are a warning.
    """
    names = feature_names(X)
    if names is None and fitted is None:
        return
    if fitted is None:
        warn_user(f"X has feature names, but {estimator} was fitted without feature names")
    elif names is None:
        warn_user(f"X does not have valid feature names, but {estimator} was fitted with feature names")
    elif not np.array_equal(names, fitted):
        raise ValueError(
            "The feature names should match those that were passed during fit.\n"
            + _difference(set(names), set(fitted))
        )


def _difference(given: set[str], fitted: set[str]) -> str:
    lists = (
        ("Feature names unseen at fit time:\n", given - fitted),
        ("Feature names seen at fit time, yet now missing:\n", fitted - given),
    )
    text = "".join(title + _listed(sorted(names)) for title, names in lists if names)
    return text or "Feature names must be in the same order as they were in fit.\n"


def _listed(names: list[str]) -> str:
    more = ["- ...\n"] if len(names) > _SHOWN else []
    return "".join([*(f"- {name}\n" for name in names[:_SHOWN]), *more])


def check_container(name: Any) -> str:
    """`name` as a kind of output; ValueError in scikit-learn's words where it is none."""
    if name not in CONTAINERS:
        raise ValueError(f"output config must be in {sorted(CONTAINERS)}, got {name!r}")
    return str(name)


def chosen_container(config: dict[str, str]) -> str:
    """What `set_output` has asked for, else `sklearn.set_config`; "default" where neither did."""
    sklearn = sys.modules.get("sklearn")
    everywhere = "default" if sklearn is None else sklearn.get_config()["transform_output"]
    return check_container(config.get("transform", everywhere))


def in_container(values: Any, X: Any, container: str, columns: np.ndarray) -> Any:
    """The matrix `values` as a DataFrame with these columns, and the index of X where that is a DataFrame.

    Raises:
        ImportError: pandas or polars, which was asked for, is not installed.
    """
    table = values.cpu().numpy() if isinstance(values, Tensor) else values
    library = import_module(container)
    if container == "polars":
        return library.DataFrame(table, schema=list(columns), orient="row")
    index = X.index if isinstance(X, library.DataFrame) else None
    return library.DataFrame(table, index=index, columns=columns, copy=False)
