"""Values of a recipe: what an option says of its own, and how they are checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from spt_fast.methods.registry import METHODS
from spt_fast.support.names import nearest


class FrozenOptions(Mapping[str, Any]):
    """Options that nobody changes, equal to any mapping of the same: a frozen recipe holds them.

    A deep copy is a plain dict: what `dataclasses.asdict` makes of a recipe is plain too.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = dict(options)

    def __getitem__(self, name: str) -> Any:
        return self._options[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)

    def __hash__(self) -> int:
        return hash(frozenset(self._options.items()))

    def __repr__(self) -> str:
        return repr(self._options)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return dict(self._options)


def check_options(name: str, value: Any) -> FrozenOptions:
    """A mapping of names to numbers, words, switches or None; which there are is known to the method."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping, such as {{'bottleneck': 8}}, got {value!r}")
    for option, given in value.items():
        if not (isinstance(option, str) and isinstance(given, bool | int | float | str | None)):
            raise TypeError(
                f"{name} must hold numbers, words, true, false or null, got {option!r}: {given!r}"
            )
    return FrozenOptions(value)


# What only prompts have; a method without any refuses values of these.
OF_PROMPTS = (
    "num_prompts", "prompt_init", "prompt_init_options", "prompt_lr", "prompt_dropout", "freeze_prompts",
)  # fmt: skip
# Of `vipamin_prompts`, beside those that a recipe has for all.
VIPAMIN_OPTIONS = ("k", "weight", "max_images")


def check_prompt_init(method: str, init: str | None, given: Mapping[str, Any]) -> None:
    """ValueError where prompts of a method cannot start so, with the options `given` for it."""
    kind = METHODS[method].prompts
    if kind == "prototypes" and init == "random":
        raise ValueError(
            f"prompt_init='random' is VPT, method='vpt-{method.removeprefix('spt-')}', not method={method!r}"
        )
    if kind == "random" and init not in ("random", None):
        raise ValueError(
            f"prompt_init must be 'random' for method={method!r}, which draws its prompts, got {init!r}; "
            f"method='spt-{method.removeprefix('vpt-')}' starts from others"
        )
    if given and init != "vipamin":
        raise ValueError(
            f"prompt_init_options is for prompt_init='vipamin', got {given!r} with prompt_init={init!r}; "
            "`spt-fast prototypes` makes prototypes with options"
        )
    for name in given:
        if name not in VIPAMIN_OPTIONS:
            close = nearest(name, VIPAMIN_OPTIONS)
            raise ValueError(
                f"prompt_init_options has {name!r}, but vipamin has {', '.join(VIPAMIN_OPTIONS)}{close}"
            )


def check_optimizer(value: Any) -> str:
    from timm.optim import list_optimizers  # type: ignore[attr-defined]

    if value == "adahessian":
        raise ValueError("optimizer must be one without second derivatives, got 'adahessian'")
    known = [str(name) for name in list_optimizers()]
    if not isinstance(value, str) or value not in known:
        raise ValueError(
            "optimizer must be a name of timm.optim.list_optimizers(), "
            f"got {value!r}{nearest(str(value), known)}"
        )
    return value


class Option(NamedTuple):
    """A field of `Recipe` as an option sees it.

    Attributes:
        kind: bool, int, float, str, or dict.
        choices: the words that a str may be; empty where any may.
        optional: whether None is allowed.
        bounds: of a number: as in `support.arguments.check_number`.
    """

    name: str
    group: str
    help: str
    default: Any
    kind: type
    choices: tuple[str, ...]
    optional: bool
    bounds: Mapping[str, Any]

    def check(self, value: Any) -> Any:
        """`value` in the type of the field; TypeError or ValueError where it is none of its values."""
        from spt_fast.support.arguments import (
            check_bool,
            check_choice,
            check_int,
            check_number,
            check_seed,
        )

        if value is None and self.optional:
            return None
        if self.name == "seed":
            return check_seed(value)
        if self.name == "optimizer":
            return check_optimizer(value)
        if self.kind is dict:
            return check_options(self.name, value)
        if self.choices:
            return check_choice(self.name, value, self.choices)
        if self.kind is bool:
            return check_bool(self.name, value)
        if self.kind is int:
            return check_int(self.name, value, int(self.bounds["minimum"]))
        return check_number(self.name, value, **self.bounds)
