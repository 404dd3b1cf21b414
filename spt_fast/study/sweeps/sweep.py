"""`sweep`: the runs of a study in their order, none of them twice, whatever has ended it before."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from spt_fast.study.runs import PROTOTYPES_FOLDER, RUNS_NAME, SWEEP_NAME, Row, read_runs
from spt_fast.study.sweeps.choice import diverged
from spt_fast.study.sweeps.crew import Alone, Crew, Workers
from spt_fast.study.sweeps.execute import Workshop, tidy
from spt_fast.study.sweeps.ledger import Ledger
from spt_fast.study.sweeps.plan import Group, Plan, PlannedRun
from spt_fast.study.sweeps.record import Record, asked_for, differences, read_record, record_of, write_record
from spt_fast.support.arguments import check_device, check_int, check_number
from spt_fast.support.files import check_input_path, remove_leftovers
from spt_fast.support.locks import folder_lock
from spt_fast.support.results import result_folder
from spt_fast.support.yaml_text import read_yaml

Say = Callable[[str], None]


def sweep(
    plan: Mapping[str, Any] | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    jobs: int = 1,
    device: str | torch.device | None = None,
    max_runs: int | None = None,
    max_minutes: float | None = None,
    dry_run: bool = False,
    say: Say = print,
) -> list[Row]:
    """Tune by every arm on every task: validation chooses values, with which all seeds are then tested.

    >>> rows = spt_fast.study.sweep("sweep.yaml", out="studies/vtab")

    A row of `out`/runs.csv is written for each run. The same call goes on where one was ended, whatever ended
    it, and repeats no run; a run that was going on continues from its checkpoint. More tasks, arms, seeds and
    values may be given then. On one CPU process, the rows are those of a sweep that was not ended, but for
    seconds. One sweep at a time writes into `out`.

    Args:
        plan: a YAML file, or a mapping with its keys (docs/sweep.md).
        out: the folder, made if need be.
        jobs: processes that do runs, each on a GPU of its own, or with a share of the CPU's threads.
        device: None is CUDA where there is one, else the CPU.
        max_runs, max_minutes: begin no run after so many, or so long.
        dry_run: say what would be done, and do nothing.
        say: takes each line that is printed.

    Returns:
        The rows of all runs that are done, in the order of the plan.

    Raises:
        FileNotFoundError: there is no such YAML file, or data are not there.
        FloatingPointError: in an arm every run of the search diverged; all other runs are done.
        TypeError, ValueError: the plan is wrong; the runs in `out` are of another sweep, with each difference
            named; runs.csv is not whole; another sweep writes into `out` now; or as `train`.
        OSError: a file cannot be written.
        RuntimeError: a worker process died.
    """
    jobs = check_int("jobs", jobs, 1)
    if max_runs is not None:
        max_runs = check_int("max_runs", max_runs, 1)
    if max_minutes is not None:
        max_minutes = check_number("max_minutes", max_minutes, above=0)
    asked = plan if isinstance(plan, Mapping) else read_plan(plan)
    wanted = Plan.read(asked)
    folder = Path(out)
    if dry_run:
        return _show(wanted, folder, say)
    where = check_device("device", device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with result_folder(folder, (SWEEP_NAME, RUNS_NAME), overwrite=True), folder_lock(folder):
        remove_leftovers(folder)
        remove_leftovers(folder / PROTOTYPES_FOLDER)
        workshop = Workshop(wanted.model, wanted.image_options, folder, where)
        record = _checked(wanted, workshop, folder, say)
        ledger = Ledger(wanted, folder)
        write_record(folder, record)
        _tidy(ledger, folder, say)
        ledger.write()
        crew: Crew = Alone(workshop)
        if jobs > 1:
            crew = Workers(jobs, where, wanted.model, wanted.image_options, folder)
        with closing(_Closable(crew)):
            _Work(ledger, crew, folder, say).go_on(max_runs, max_minutes)
        return _ended(ledger, folder, say)


class _Closable:
    def __init__(self, crew: Crew) -> None:
        self.close = crew.end


class _Work:
    """Hands runs to a crew, takes in their rows, and says how long the others will take."""

    def __init__(self, ledger: Ledger, crew: Crew, folder: Path, say: Say) -> None:
        self._ledger, self._crew, self._folder, self._say = ledger, crew, folder, say
        self._begun: dict[str, float] = {}
        # Wall-clock seconds of runs, by task and arm.
        self._took: dict[tuple[str, str], list[float]] = {}

    def go_on(self, max_runs: int | None, max_minutes: float | None) -> None:
        """Do what is left, up to the budget."""
        started, begun, crew = time.monotonic(), 0, self._crew
        while True:
            while len(crew.running) < crew.size:
                over = max_minutes is not None and time.monotonic() - started >= 60 * max_minutes
                if over or begun == max_runs or (planned := self._ledger.next(crew.running)) is None:
                    break
                self._begun[planned.name] = time.monotonic()
                crew.start(planned)
                begun += 1
            if not crew.running:
                return
            self._take_in(*crew.wait())

    def _take_in(self, planned: PlannedRun, row: Row) -> None:
        took = time.monotonic() - self._begun.pop(planned.name)
        self._took.setdefault((planned.task.data, planned.arm.name), []).append(took)
        self._ledger.add(row)
        tidy(self._folder, planned)
        left = self._ledger.left()
        done, total = self._ledger.progress()
        rest = f"; about {_duration(self._seconds_of(left))} left" if left else ""
        self._say(f"[{done}/{total}] {planned.name}: {_result(row)}, {_duration(took)}{rest}")

    def _seconds_of(self, left: list[tuple[Group, int]]) -> float:
        """Of runs of an arm on a task as long as those before, else as all before took."""
        overall = statistics.fmean(each for took in self._took.values() for each in took)
        seconds = (
            count * statistics.fmean(self._took.get((group.task.data, group.arm.name), [overall]))
            for group, count in left
        )
        return sum(seconds) / self._crew.size


def read_plan(plan: str | os.PathLike[str]) -> dict[str, Any]:
    """What a sweep's YAML file asks for: one that was written for it, or the sweep.yaml of a study.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no YAML.
    """
    path = check_input_path(plan, argument="sweep")
    return asked_for(read_yaml(path.read_text(encoding="utf-8"), str(path)))


def _checked(plan: Plan, workshop: Workshop, folder: Path, say: Say) -> Record:
    """What the sweep is of, for its folder; one whose folder is of something else is refused."""
    recipe = next(iter(plan.groups)).final(None)[0].recipe if plan.groups else None
    assert recipe is not None
    tasks = {}
    for task in plan.all_tasks():
        # Of one data set there may be several splits.
        tasks[task.name if task.data in tasks else task.data] = workshop.facts(task, recipe)
        for line in workshop.description(task, recipe):
            say(line)
    runs = {run.name: run for group in plan.groups for run in group.possible}
    workshop.check_subsets(runs.values())
    workshop.check_models(runs.values())
    now = record_of(plan, workshop.backbone(recipe), tasks)
    then = read_record(folder)
    done = read_runs(folder / RUNS_NAME) if (folder / RUNS_NAME).exists() else []
    if then is None and (folder / RUNS_NAME).exists():
        raise ValueError(
            f"out: {folder} holds {RUNS_NAME} without {SWEEP_NAME}: what its runs are of is not known; "
            "give another folder"
        )
    less, arms = any(row.run not in runs for row in done), {row.arm for row in done}
    if then is not None and (lines := differences(then, now, arms=arms, less=less)):
        raise ValueError(
            f"out: the runs in {folder} are of another sweep: {'; '.join(lines)}; give what the folder has, "
            "to which tasks, arms, seeds and values may be added, and from which any may go that no run has, "
            "or another folder"
        )
    return now


def _tidy(ledger: Ledger, folder: Path, say: Say) -> None:
    """What a process that ended has left undone."""
    for planned in ledger.planned():
        if planned.name in ledger.rows:
            tidy(folder, planned)
    if ledger.rows:
        say("{} holds {} of {} runs; going on".format(folder, *ledger.progress()))


def _ended(ledger: Ledger, folder: Path, say: Say) -> list[Row]:
    """Say how the sweep ended, and what is not as it should be."""
    rows = ledger.in_order()
    if ledger.dropped:
        say(
            f"validation chooses other values now: {len(ledger.dropped)} final runs with those before have "
            f"left {RUNS_NAME}: {', '.join(ledger.dropped)}"
        )
    if lost := [row.run for row in rows if row.stage == "final" and diverged(row)]:
        say(f"final runs that diverged, and have no test accuracy: {', '.join(lost)}")
    count = sum(number for _, number in ledger.left())
    if count:
        say(f"stopped with {count} runs left; the same command goes on with them")
    else:
        say(f"wrote {folder / RUNS_NAME}: {len(rows)} runs")
    if failed := ledger.failed():
        raise FloatingPointError(
            f"every run of the search diverged in {'; '.join(group.title for group in failed)}: nothing "
            "could be chosen there; add smaller rates to search; the other runs are done"
        )
    return rows


def _show(plan: Plan, folder: Path, say: Say) -> list[Row]:
    """The plan, and what is done of it."""
    ledger = Ledger(plan, folder)
    for group in plan.groups:
        for run in group.search:
            say(f"{'done' if run.name in ledger.rows else 'todo'}  {run.name}")
        final = ledger.final(group)
        for run in final:
            say(f"{'done' if run.name in ledger.rows else 'todo'}  {run.name}")
        if not final:
            say(f"todo  {len(plan.seeds)} final runs of {group.title}, with what validation chooses")
    say("{} of {} runs are done".format(*ledger.progress()))
    return ledger.in_order()


def _result(row: Row) -> str:
    if diverged(row):
        return "diverged"
    name, value = ("val", row.val_accuracy) if row.stage == "search" else ("test", row.test_accuracy)
    return "no accuracy" if value is None else f"{name} {value:.1%}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
