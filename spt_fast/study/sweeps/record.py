"""What a sweep is of, in its sweep.yaml; and how one differs that would go on with its runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spt_fast.backbones.identity import readable
from spt_fast.study.runs import SWEEP_NAME
from spt_fast.study.sweeps.arms import Arm
from spt_fast.study.sweeps.plan import Plan
from spt_fast.study.sweeps.search import Range, Values
from spt_fast.study.sweeps.tasks import Task
from spt_fast.support.files import write_bytes
from spt_fast.support.versions import version_facts
from spt_fast.support.yaml_text import read_yaml, write_yaml

Record = dict[str, Any]
# What may be another one in each call: where files lie, and how they are read.
_FREE = ("root", "download", "workers", "cache", "cache_budget")
_ABSENT = "nothing"
# What was found, beside what was asked for.
_FOUND = ("backbone", "tasks", "versions")


def record_of(plan: Plan, backbone: Mapping[str, str], tasks: Mapping[str, Any]) -> Record:
    """What was asked for, resolved, and what it is of.

    Args:
        backbone: as `describe` gives it.
        tasks: facts of the images, by the names of the data.
    """
    asked: Record = {
        **plan.model,
        **plan.image_options,
        "data": [_data(task) for task in plan.tasks],
        "recipe": dict(plan.recipe),
        "arms": {name: _arm(arm) for name, arm in plan.arms.items()},
        "search": _axes(plan.search),
        "random": None if plan.random is None else dataclasses.asdict(plan.random),
        "compare": {name: list(values) for name, values in plan.compare.items()},
        "images": dict(plan.images),
        "seeds": list(plan.seeds),
        "nmi": plan.nmi,
    }
    found = {"backbone": readable(backbone), "tasks": dict(tasks), "versions": _versions()}
    return {name: _plain(value) for name, value in {**asked, **found}.items()}


def asked_for(record: Mapping[str, Any]) -> Record:
    """What `Plan.read` takes, of a record; anything else as it is."""
    if not all(part in record for part in _FOUND):
        return dict(record)
    return {name: value for name, value in record.items() if name not in _FOUND}


def without_root(record: Mapping[str, Any]) -> Record:
    """A record for others: where the data lay is nobody's business, and changes from call to call."""
    return {name: value for name, value in record.items() if name != "root"}


def read_record(out: Path) -> Record | None:
    """The record in a folder; None where there is none.

    Raises:
        ValueError: it is no YAML, or lacks a part.
    """
    path = out / SWEEP_NAME
    if not path.exists():
        return None
    found = read_yaml(path.read_text(encoding="utf-8"), str(path))
    for part, kind in (("data", list), ("arms", dict), ("seeds", list), ("tasks", dict), ("versions", dict)):
        if not isinstance(found.get(part), kind):
            raise ValueError(f"{path} is no record of a sweep: it lacks {part}")
    return found


def write_record(out: Path, record: Record) -> None:
    """Write it, over an older one, as a whole."""
    write_bytes(out / SWEEP_NAME, write_yaml(record).encode(), overwrite=True)


def differences(then: Record, now: Record, *, arms: Collection[str], less: bool) -> list[str]:
    """A line for each way in which runs of `then` would be no runs of `now`.

    More tasks, arms, seeds, values and trials are none: their runs come beside those that there are.

    Args:
        arms: those that runs are done of; others may have changed.
        less: whether fewer of them are: not where no run that is done needs what is gone.
    """
    return [*_differences(then, now, arms), *(_fewer(then, now) if less else ())]


def _fewer(then: Record, now: Record) -> Iterator[str]:
    """What `then` has and `now` has not, of what may be more."""
    yield from _gone("data", map(str, then["data"]), map(str, now["data"]))
    yield from _gone("arms", then["arms"], now["arms"])
    axes = [(part, then.get(part) or {}, now[part]) for part in ("search", "compare")]
    for arm in [arm for arm in then["arms"] if arm in now["arms"]]:
        before, after = ((record["arms"][arm] or {}).get("search") or {} for record in (then, now))
        axes.append((f"arms: {arm}: search", before, after))
    for where, before, after in axes:
        for name, values in before.items():
            if isinstance(values, list) and isinstance(after.get(name), list):
                yield from _gone(f"{where}: {name}", values, after[name])
    yield from _gone("seeds", then["seeds"], now["seeds"])


def _differences(then: Record, now: Record, arms: Collection[str]) -> Iterator[str]:
    parts = (
        "data",
        "recipe",
        "arms",
        "search",
        "random",
        "compare",
        "seeds",
        "backbone",
        "tasks",
        "versions",
    )
    for name in dict.fromkeys([*then, *now]):
        if name not in (*parts, *_FREE):
            yield from _changed(name, _file_name(then.get(name)), _file_name(now.get(name)))
    yield from _changes("recipe", then.get("recipe"), now["recipe"])
    for arm in then["arms"]:
        if arm in now["arms"] and arm in arms:
            yield from _arm_differences(f"arms: {arm}", then["arms"][arm] or {}, now["arms"][arm])
    for part in ("search", "compare"):
        yield from _axes_differences(part, then.get(part) or {}, now[part])
    yield from _random_differences(then.get("random"), now["random"])
    if then["seeds"][:1] != now["seeds"][:1] and then["seeds"][0] in now["seeds"]:
        yield from _changed("seeds: the first, of the search", then["seeds"][0], now["seeds"][0])
    yield from _changes("backbone", then.get("backbone"), now["backbone"])
    for task, facts in then["tasks"].items():
        if task in now["tasks"]:
            for use in dict.fromkeys([*facts, *now["tasks"][task]]):
                yield from _changes(f"{task}: {use}", facts.get(use), now["tasks"][task].get(use))
    yield from _changes("versions", then["versions"], now["versions"])


def _arm_differences(where: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*then, *now]):
        if name == "search":
            yield from _axes_differences(f"{where}: search", then.get(name) or {}, now.get(name) or {})
        else:
            yield from _changed(f"{where}: {name}", then.get(name), now.get(name))


def _axes_differences(where: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for name, values in then.items():
        others = now.get(name)
        if not (isinstance(values, list) and isinstance(others, list)):
            yield from _changed(f"{where}: {name}", values, others)


def _random_differences(then: Mapping[str, int] | None, now: Mapping[str, int] | None) -> Iterator[str]:
    """More trials of the same seed begin with the same ones."""
    if then is None or now is None or then["seed"] != now["seed"] or then["trials"] > now["trials"]:
        yield from _changed("random", then, now)


def _changes(where: str, then: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> Iterator[str]:
    then, now = then or {}, now or {}
    for name in dict.fromkeys([*then, *now]):
        yield from _changed(f"{where}: {name}", then.get(name), now.get(name))


def _changed(where: str, then: Any, now: Any) -> Iterator[str]:
    if then != now:
        yield f"{where}: {_shown(then)} in the folder, {_shown(now)} now"


def _gone(where: str, then: Iterable[Any], now: Iterable[Any]) -> Iterator[str]:
    left = list(now)
    for each in then:
        if each not in left:
            yield f"{where}: {each} in the folder, and not now"


def _shown(value: Any) -> str:
    return _ABSENT if value is None or value == {} else str(value)


def _file_name(value: Any) -> Any:
    """Of a file that is there the name, wherever it lies."""
    return Path(value).name if isinstance(value, str) and Path(value).is_file() else value


def _data(task: Task) -> str | dict[str, str]:
    return task.names()


def _arm(arm: Arm) -> Record:
    start = arm.prototypes
    prototypes = {
        **({} if start.task is None else {"task": start.task.names()}),
        **({} if start.source == "own" else {"source": start.source}),
        **({} if start.share == 1 else {"share": start.share}),
        **start.build,
    }
    own = {"prototypes": prototypes, "images": dict(arm.images), "search": _axes(arm.search)}
    return {"method": arm.method, **arm.fields, **{name: value for name, value in own.items() if value}}


def _axes(axes: Mapping[str, Values]) -> Record:
    return {
        name: values.asked() if isinstance(values, Range) else list(values) for name, values in axes.items()
    }


def _plain(value: Any) -> Any:
    """As YAML gives it back."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _versions() -> dict[str, str]:
    return {
        name.removesuffix("_version"): version
        for name, version in version_facts("spt_fast", "torch", "timm").items()
    }
