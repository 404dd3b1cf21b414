"""A sweep as it is asked for: model, data, arms, values to search, seeds; and the runs it stands for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from spt_fast.study.runs import Stage
from spt_fast.study.sweeps.arms import Arm, read_arms
from spt_fast.study.sweeps.search import RandomSearch, Trial, Values, read_axes, trials
from spt_fast.study.sweeps.tasks import IMAGE_OPTIONS, SUBSETS, Task, check_subset, read_subset, read_tasks
from spt_fast.support.arguments import check_bool, check_seed
from spt_fast.support.names import instead
from spt_fast.support.yaml_text import read_yaml
from spt_fast.training.build import method_options
from spt_fast.training.recipe import Recipe, check_names
from spt_fast.training.shipped_recipes import shipped

# Varied values that have columns of their own in runs.csv; the others go to its column `options`.
_COLUMNS = ("lr", "weight_decay", "num_prompts")
_MODEL_OPTIONS = ("checkpoint", "pretrained", "img_size", "in_chans", "model_options")
_NOT_IN_A_SWEEP = ("method", "method_options", "seed")
_KEYS = (
    "model", *_MODEL_OPTIONS, *IMAGE_OPTIONS, "data", "recipe", "arms", "search", "random", "compare",
    "images", "seeds", "nmi",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a sweep, before it is done.

    Attributes:
        name: of its folder and its row.
        stage: as in `runs.Row`.
        task: whose images it is of.
        arm: what is compared.
        recipe: with method and seed.
        subset: {"share": ...} or {"per_class": ...} of the images to learn from, or empty.
        options, compared: the columns of these names.
        nmi: whether to measure it.
    """

    name: str
    stage: Stage
    task: Task
    arm: Arm
    recipe: Recipe
    subset: Mapping[str, Any]
    options: str
    compared: str
    nmi: bool = False

    @property
    def prototypes_name(self) -> str | None:
        """Of the file that its prompts start from, shared with other runs; None where there is none."""
        if not self.recipe.needs_prototypes:
            return None
        start, recipe = self.arm.prototypes, self.recipe
        source = start.task or self.task
        number = recipe.prompts_per_block
        how = {name: value for name in ("resize", "mean_std") if (value := getattr(recipe, name))}
        parts = [
            source.name,
            self.stage,
            *start.words(),
            recipe.depth,
            f"n{number}",
            *_words(how | dict(self.subset)),
        ]
        return "-".join([*parts, f"batch{recipe.batch_size}", f"seed{recipe.seed}"]) + ".safetensors"


@dataclass(frozen=True)
class Group:
    """An arm on a task, with compared values: runs among which validation chooses, and final ones.

    Attributes:
        search: runs by which values are chosen; none where there is nothing to choose.
    """

    plan: Plan
    task: Task
    arm: Arm
    compared: Mapping[str, Any]

    @cached_property
    def trials(self) -> list[Trial]:
        """Values to choose from; those that the arm or the comparison states are not searched."""
        stated = {*self.arm.fields, *self.compared}
        axes = {**self.plan.search, **self.arm.search}
        own = {name: values for name, values in axes.items() if name not in stated or name in self.arm.search}
        return trials(
            {name: values for name, values in own.items() if self.arm.takes(name)}, self.plan.random
        )

    @cached_property
    def search(self) -> list[PlannedRun]:
        """In the order of the trials."""
        if len(self.trials) < 2:
            return []
        return [self._run("search", trial, self.plan.seeds[0]) for trial in self.trials]

    def final(self, chosen: PlannedRun | None) -> list[PlannedRun]:
        """A run for each seed, with the values of the run of `search` that was chosen."""
        return self._finals[0 if chosen is None else self.search.index(chosen)]

    @property
    def possible(self) -> list[PlannedRun]:
        """The runs of the search, and the final ones of whatever it chooses."""
        return [*self.search, *(run for runs in self._finals for run in runs)]

    @cached_property
    def _finals(self) -> list[list[PlannedRun]]:
        """For each trial."""
        return [[self._run("final", trial, seed) for seed in self.plan.seeds] for trial in self.trials]

    @property
    def title(self) -> str:
        """For messages."""
        return ", ".join([self.task.data, self.arm.name, *_words(self.compared)])

    def _run(self, stage: Stage, trial: Trial, seed: int) -> PlannedRun:
        values = {**self.plan.recipe, **self.arm.fields, **self.compared, **trial}
        subset = {**self.plan.images, **self.arm.images}
        subset |= {name: values.pop(name) for name in SUBSETS if name in values}
        if len(subset) > 1:
            raise ValueError(
                f"images must be share or per_class, got {subset} of images and compare together"
            )
        values = {name: value for name, value in values.items() if self.arm.takes(name)}
        # Of a search, the last validation counts.
        values.setdefault("val_every", values.get("epochs", Recipe().epochs))
        recipe = Recipe(**{**values, "method": self.arm.method, "seed": seed})
        method_options(recipe)
        varied = {**self.compared, **trial}
        others = {name: value for name, value in varied.items() if name not in (*_COLUMNS, *SUBSETS)}
        others = {name: value for name, value in others.items() if self.arm.takes(name)} | subset
        return PlannedRun(
            name=self._name(recipe, others, stage),
            stage=stage,
            task=self.task,
            arm=self.arm,
            recipe=recipe,
            subset=subset,
            options=_listed(others),
            compared=_listed(self.compared),
            nmi=self.plan.nmi and stage == "final" and recipe.has_prompts and not recipe.freeze_prompts,
        )

    def _name(self, recipe: Recipe, others: Mapping[str, Any], stage: str) -> str:
        number = recipe.prompts_per_block
        parts = [
            self.task.name,
            self.arm.name,
            f"lr{text_of(recipe.lr)}",
            f"wd{text_of(recipe.weight_decay)}",
            *([f"n{number}"] if number else []),
            *_words(others),
            f"seed{recipe.seed}",
            stage,
        ]
        return "-".join(parts)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that decides the runs of a sweep. `read` makes one from what a YAML file or options say.

    Attributes:
        model: of `open_model`: name, checkpoint, pretrained, model_options.
        image_options: how images are found and read, for all tasks.
        tasks: whose images are learned, in their order.
        recipe: values of `Recipe` that all arms share.
        arms: what is compared, in their order.
        search: values to choose from by validation, by field.
        random: how they are drawn; None is the whole grid.
        compare: values that are not chosen from but compared: each makes final runs of its own.
        images: of all arms: {"share": ...} or {"per_class": ...}.
        seeds: of the final runs; the first is that of the search.
        nmi: whether to measure it in final runs whose prompts learn.
    """

    model: Mapping[str, Any]
    image_options: Mapping[str, Any]
    tasks: Sequence[Task]
    recipe: Mapping[str, Any]
    arms: Mapping[str, Arm]
    search: Mapping[str, Values] = field(default_factory=dict)
    random: RandomSearch | None = None
    compare: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    nmi: bool = False

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Plan:
        """The plan of a mapping with the keys of docs/sweep.md.

        Raises:
            TypeError, ValueError: a key is unknown or missing, or a value is none of those allowed; the key,
                and the arm where it is one's, are named.
        """
        for key in given:
            if key not in _KEYS:
                raise ValueError(f"{key!r} is no key of a sweep{instead(key, _KEYS)}")
        for key in ("model", "data", "arms"):
            if not given.get(key):
                raise ValueError(f"{key} must be given: what a sweep is of")
        options = {key: given[key] for key in IMAGE_OPTIONS if given.get(key) is not None}
        tasks = read_tasks(given["data"])
        plan = cls(
            model=_model(given),
            image_options=options,
            tasks=tasks,
            recipe=shared_recipe(given.get("recipe")),
            arms=read_arms(given["arms"], tasks),
            search=read_axes(given.get("search") or {}),
            random=None if given.get("random") is None else RandomSearch.of(given["random"]),
            compare=_compared(given.get("compare") or {}),
            images=read_subset(given.get("images") or {}, "images"),
            seeds=_seeds(given.get("seeds", [0])),
            nmi=check_bool("nmi", given.get("nmi", False)),
        )
        plan._check()
        return plan

    @cached_property
    def groups(self) -> list[Group]:
        """In the order in which they are done: task by task, arm by arm."""
        return [
            Group(self, task, arm, compared)
            for task in self.tasks
            for arm in self.arms.values()
            for compared in self._compared_of(arm)
        ]

    def all_tasks(self) -> list[Task]:
        """The tasks, and those that lend their prototypes."""
        starts = [arm.prototypes.task for arm in self.arms.values()]
        return list(dict.fromkeys([*self.tasks, *(task for task in starts if task is not None)]))

    def count(self) -> int:
        """How many runs there are."""
        return sum(len(group.search) + len(self.seeds) for group in self.groups)

    def _compared_of(self, arm: Arm) -> Iterator[dict[str, Any]]:
        own = {
            name: values
            for name, values in self.compare.items()
            if arm.takes(name) and name not in arm.fields and name not in arm.images
        }
        return iter(trials(own, None))

    def _check(self) -> None:
        """Make every run, so that what is wrong with any of them is found now."""
        _check_fields(self.search, "search")
        _check_fields(self.compare, "compare", SUBSETS)
        if both := [name for name in self.compare if name in self.search]:
            raise ValueError(f"compare and search must have other fields, got {', '.join(both)} in both")
        for option, value in self.image_options.items():
            if value and not any(task.takes(option) for task in self.all_tasks()):
                tasks = ", ".join(task.data for task in self.tasks)
                raise ValueError(f"{option} is for other data than {tasks}, got {value}")
        names: set[str] = set()
        for group in self.groups:
            _check_fields(group.arm.search, f"arms: {group.arm.name}: search")
            try:
                runs = group.possible
            except (TypeError, ValueError) as error:
                raise type(error)(f"arms: {group.arm.name}: {error}") from error
            for run in runs:
                if run.name in names:
                    raise ValueError(f"two runs would have the name {run.name}: give arms other names")
                names.add(run.name)


def text_of(value: Any) -> str:
    """A value in a name: 0.01, not 0.010000000000000000208."""
    if isinstance(value, float) and not isinstance(value, bool):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return re.sub(r"[^\w.+]", "_", str(value))


def _listed(values: Mapping[str, Any]) -> str:
    return ";".join(f"{name}={text_of(values[name])}" for name in sorted(values))


def _words(values: Mapping[str, Any]) -> list[str]:
    return [f"{name.replace('_', '')}{text_of(values[name])}" for name in sorted(values)]


def _model(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `open_model` is given, with the name as "model"; sizes are options of timm's."""
    options = {name: given[name] for name in _MODEL_OPTIONS if given.get(name) is not None}
    of_timm = {
        **options.pop("model_options", {}),
        **{name: options.pop(name) for name in ("img_size", "in_chans") if name in options},
    }
    return {"model": given["model"], **options, **({"model_options": of_timm} if of_timm else {})}


def _seeds(given: Any) -> tuple[int, ...]:
    seeds = given if isinstance(given, list | tuple) else [given]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be a list of different numbers, got {given!r}")
    return tuple(check_seed(seed, "seeds") for seed in seeds)


def shared_recipe(given: Any) -> dict[str, Any]:
    """The values that a recipe states for all runs: of a mapping, a `Recipe`, a name or a file.

    Raises:
        TypeError, ValueError: a field is unknown, or is none that all runs can share.
    """
    if given is None:
        values: dict[str, Any] = {}
    elif isinstance(given, Mapping):
        check_names(given)
        values = dict(given)
    else:
        recipe = given if isinstance(given, Recipe) else _named_recipe(given)
        default = dataclasses.asdict(Recipe())
        values = {name: value for name, value in dataclasses.asdict(recipe).items() if value != default[name]}
        # Of all fields this one has another default in a sweep.
        if not isinstance(given, Recipe) and "val_every" in _stated_by(given):
            values["val_every"] = recipe.val_every
    for name in _NOT_IN_A_SWEEP:
        if values.pop(name, None) and isinstance(given, Mapping):
            raise ValueError(f"recipe: {name} is for arms and seeds of a sweep, not for what all runs share")
    for name, chooses in (("keep", values.get("keep") == "best"), ("patience", values.get("patience"))):
        if chooses:
            raise ValueError(
                f"recipe: {name}={values[name]!r} lets validation images choose an epoch, but final runs "
                "learn from these, too: a sweep keeps the last epoch"
            )
    return values


def _named_recipe(given: Any) -> Recipe:
    return Recipe.from_yaml(given) if _is_file(given) else Recipe.named(given)


def _stated_by(given: str) -> Mapping[str, Any]:
    """The fields of a recipe by name or file, as they stand there."""
    if not _is_file(given):
        return shipped()[given]
    values = read_yaml(Path(given).read_text(encoding="utf-8"), given)
    of_run = values.get("recipe")
    return of_run if isinstance(of_run, Mapping) else values


def _is_file(given: Any) -> bool:
    return isinstance(given, str) and given not in Recipe.names() and given.endswith((".yaml", ".yml"))


def _compared(given: Any) -> dict[str, Sequence[Any]]:
    axes = read_axes(given, "compare")
    if ranges := [name for name, values in axes.items() if not isinstance(values, list)]:
        raise ValueError(f"compare: {ranges[0]} must be a list of values")
    for name in SUBSETS:
        for value in axes.get(name, ()):  # type: ignore[union-attr]
            check_subset(f"compare: {name}", name, value)
    return {name: list(values) for name, values in axes.items()}  # type: ignore[arg-type]


def _check_fields(axes: Mapping[str, Any], where: str, others: Sequence[str] = ()) -> None:
    try:
        check_names(name for name in axes if name not in others)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
    for name in (*_NOT_IN_A_SWEEP, "keep", "patience"):
        if name in axes:
            raise ValueError(
                f"{where}: {name} has no values to choose from; arms and seeds have their own keys"
            )
