"""The constructor's side of scikit-learn's conventions, without scikit-learn: get, set, show, describe.

A class keeps them by storing the arguments of its `__init__` under their own names and checking them later.
"""

from __future__ import annotations

import inspect
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

Self = TypeVar("Self", bound="Parameters")


class Parameters:
    """Base of the estimators: what `sklearn.base.clone`, pipelines and searches ask of them."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor, as they were given or set; `deep` changes nothing here."""
        return {name: getattr(self, name) for name in _defaults(type(self))}

    def set_params(self: Self, **params: Any) -> Self:
        """Change arguments of the constructor; they are checked by the next `fit`.

        Raises:
            ValueError: a name is not one of the constructor's arguments.
        """
        known = _defaults(type(self))
        for name in params:
            if name not in known:
                raise ValueError(
                    f"parameters of {type(self).__name__} must be among {', '.join(known)}, got {name!r}"
                )
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = _defaults(type(self))
        changed = [
            f"{name}={_shown(value)}"
            for name, value in self.get_params().items()
            if _is_array(value) or not _same(value, defaults[name])
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn (1.6 and later) wants to know; only it calls this, so it is installed."""
        from sklearn.utils import Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="clusterer",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=[]),
        )


def _defaults(owner: type) -> dict[str, Any]:
    """Names of the constructor's arguments, in order, with their defaults."""
    arguments = list(inspect.signature(owner.__init__).parameters.values())[1:]  # type: ignore[misc]
    return {argument.name: argument.default for argument in arguments}


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray)


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _shown(value: Any) -> str:
    return f"<array {list(value.shape)}>" if _is_array(value) else repr(value)
