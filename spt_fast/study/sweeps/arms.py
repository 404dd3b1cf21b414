"""The arms of a sweep: what is compared, each a method with its own values and its prompts' start."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from spt_fast.methods.registry import METHODS
from spt_fast.prototypes.directions import METRICS
from spt_fast.prototypes.options import MODES, SAMPLINGS, STRATEGIES
from spt_fast.study.sweeps.search import Values, read_axes
from spt_fast.study.sweeps.tasks import Task, read_subset, read_tasks
from spt_fast.support.arguments import check_bool, check_choice, check_number
from spt_fast.support.names import instead, nearest
from spt_fast.training.recipe import check_names
from spt_fast.training.recipe_values import OF_PROMPTS

Source = Literal["own", "first", "last"]
_SOURCES: tuple[Source, ...] = get_args(Source)
_BUILD_CHOICES = {"strategy": STRATEGIES, "mode": MODES, "metric": METRICS, "sampling": SAMPLINGS}
_PROTOTYPES_KEYS = ("task", "source", "share", *_BUILD_CHOICES, "position_embedding")
_OWN_KEYS = ("prototypes", "images", "search")


@dataclass(frozen=True)
class Start:
    """What the prompts of SPT start from.

    Attributes:
        task: whose training images the prototypes are of; None is the task that is learned (Fig. 3b).
        source: the blocks whose tokens they are of (Table S2).
        share: of the images to learn from that they are of, the same of each class (Fig. 3a).
        build: other options of `build_prototypes`.
    """

    task: Task | None = None
    source: Source = "own"
    share: float = 1.0
    build: Mapping[str, Any] = field(default_factory=dict)

    @property
    def strategy(self) -> str:
        """Of `build_prototypes`."""
        return str(self.build.get("strategy", "kmeans"))

    def words(self) -> list[str]:
        """For the name of a file."""
        others = [
            f"{name.replace('_', '')}{value}"
            for name, value in sorted(self.build.items())
            if name != "strategy"
        ]
        share = [] if self.share == 1 else [f"of{self.share:g}"]
        return [self.strategy, *([] if self.source == "own" else [self.source]), *share, *others]


@dataclass(frozen=True)
class Arm:
    """A named configuration.

    Attributes:
        fields: of `Recipe` that it states.
        images: {"share": ...} or {"per_class": ...} of its own.
        search: values of its own to choose from.
    """

    name: str
    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    prototypes: Start = Start()
    images: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Values] = field(default_factory=dict)

    def takes(self, name: str) -> bool:
        """Whether a field is one of the arm's: those of prompts are not where there are none."""
        return name not in OF_PROMPTS or METHODS[self.method].prompts is not None


def read_arms(given: Any, tasks: Sequence[Task]) -> dict[str, Arm]:
    """The arms of a mapping, or of names of methods.

    Raises:
        TypeError, ValueError: a name, a key or a value is none of those allowed.
    """
    if isinstance(given, list | tuple):
        if len(set(given)) < len(given):
            raise ValueError(f"arms must have different names, got {', '.join(map(str, given))}")
        given = {name: {} for name in given}
    if not isinstance(given, Mapping):
        raise TypeError(f"arms must map names to fields of a recipe, got {given!r:.60}")
    arms: dict[str, Arm] = {}
    known = list(tasks)
    for name, own in given.items():
        arm = _read_arm(str(name), own or {}, known)
        arms[arm.name] = arm
        # The next task that lends prototypes needs a short name beside this one's.
        known += [task for task in [arm.prototypes.task] if task is not None and task not in known]
    return arms


def _read_arm(name: str, given: Any, tasks: Sequence[Task]) -> Arm:
    where = f"arms: {name}"
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"{where}: a name must be of letters, digits and . + - _, as folders have it")
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} must be fields of a recipe, got {given!r:.60}")
    fields = {key: value for key, value in given.items() if key not in _OWN_KEYS}
    try:
        check_names(fields)
    except TypeError as error:
        raise ValueError(f"{where}: {error}; beside these it may have {', '.join(_OWN_KEYS)}") from error
    for key in ("seed", "keep", "patience"):
        if key in fields:
            raise ValueError(f"{where}: {key} is the same for all arms: seeds, and the last epoch")
    method = fields.pop("method", None) or (name if name in METHODS else None)
    if method is None:
        raise ValueError(f"{where}: its name is none of a method's{nearest(name, METHODS)}; give method")
    check_choice(f"{where}: method", method, METHODS)
    if METHODS[method].prompts is None and (wrong := [key for key in OF_PROMPTS if key in fields]):
        raise ValueError(f"{where}: {wrong[0]} is for prompts, which {method} does not have")
    prototypes = given.get("prototypes") or {}
    starts_from = fields.get("prompt_init") or METHODS[method].prompts
    if prototypes and starts_from != "prototypes":
        raise ValueError(
            f"{where}: prototypes are for prompts that start from them, which those of {method} do not; "
            "prompt_init: prototypes lets others start so"
        )
    return Arm(
        name,
        method,
        fields,
        _read_start(where, prototypes, tasks, METHODS[method].depth),
        read_subset(given.get("images") or {}, f"{where}: images"),
        read_axes(given.get("search") or {}, f"{where}: search"),
    )


def _read_start(where: str, given: Any, tasks: Sequence[Task], depth: str) -> Start:
    where = f"{where}: prototypes"
    if not isinstance(given, Mapping):
        raise TypeError(f"{where} must be a mapping with {', '.join(_PROTOTYPES_KEYS)}, got {given!r:.60}")
    for key in given:
        if key not in _PROTOTYPES_KEYS:
            raise ValueError(f"{where}: {key!r} is no key{instead(str(key), _PROTOTYPES_KEYS)}")
    source = check_choice(f"{where}: source", given.get("source", "own"), _SOURCES)
    if source == "first" and depth == "shallow":
        raise ValueError(f"{where}: source='first' is for prompts in every block; of shallow ones it is own")
    share = check_number(f"{where}: share", given.get("share", 1), above=0, maximum=1)
    build: dict[str, Any] = {
        key: check_choice(f"{where}: {key}", given[key], _BUILD_CHOICES[key])
        for key in _BUILD_CHOICES
        if key in given
    }
    if "position_embedding" in given:
        build["position_embedding"] = check_bool(f"{where}: position_embedding", given["position_embedding"])
    return Start(_task_of(given.get("task"), tasks), source, share, build)  # type: ignore[arg-type]


def _task_of(given: Any, tasks: Sequence[Task]) -> Task | None:
    if given is None:
        return None
    found = next((task for task in tasks if task.data == given), None)
    if found is None:
        (read,) = read_tasks(given, [task.name for task in tasks])
        # A study's own record names a task by all it is of.
        found = next((task for task in tasks if task.names() == read.names()), read)
    return found
