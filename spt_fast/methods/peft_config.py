"""What the methods `lora` and `peft` are told, as peft takes it; peft is loaded here, when it is needed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from spt_fast.support.arguments import check_choice
from spt_fast.support.errors import first_line

# These would train weights of the model itself, change how many layers it has, or train nothing.
_REFUSED = (
    "bias",
    "inference_mode",
    "layer_replication",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
)
# These need a loop, tokens or tasks of their own.
_NOT_HERE = ("adalora", "adaption_prompt", "poly", "shadow", "trainable_tokens")


def check_target(target: str | Sequence[str]) -> list[str]:
    """Names of layers, as a list; ValueError where there are none."""
    names = target.split(",") if isinstance(target, str) else target
    good = isinstance(names, Sequence) and len(names) > 0
    if not good or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError(f"target must be names of layers, such as 'qkv' or 'qkv,proj', got {target!r}")
    return [name.strip() for name in names]


def check_config(config: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Arguments of a class of peft; ValueError where they are none, or let more learn than what is added."""
    try:
        found = json.loads(
            config if isinstance(config, str) else json.dumps({} if config is None else config)
        )
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"config must be a dict of what JSON knows, or the JSON of one, got {config!r}")
    for name in (name for name in found if name in _REFUSED):
        raise ValueError(f"config must say nothing of {name!r}: only what is added learns")
    return found


def config_of(kind: str, target: list[str], arguments: Mapping[str, Any]) -> Any:
    """peft's object that says what to add.

    Raises:
        ImportError: peft is not installed.
        ValueError: it has no such kind of tuner, or not with these arguments.
    """
    mapping = load_peft("mapping")
    configs = _by_name(mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    known = [
        name
        for name, tuner in _by_name(mapping.PEFT_TYPE_TO_TUNER_MAPPING).items()
        if "target_modules" in configs[name].__dataclass_fields__
        and not getattr(tuner, "uses_shared_state", False)
        and name not in _NOT_HERE
    ]
    config = configs[check_choice("type", kind, sorted(known))]
    try:
        return config(target_modules=target, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config must be arguments of peft's {config.__name__} ({first_line(error)})"
        ) from error


def _by_name(mapping: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(each.value).lower(): found for each, found in mapping.items()}


def load_peft(module: str) -> Any:
    """A module of peft; ImportError where it is not installed."""
    try:
        return import_module(f"peft.{module}")
    except ImportError as error:
        raise ImportError("the methods lora and peft need peft: pip install 'spt_fast[peft]'") from error
