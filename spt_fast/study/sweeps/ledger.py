"""Which runs of a sweep are done, which come next, and runs.csv, written anew after each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from spt_fast.study.runs import PROTOTYPES_FOLDER, RUNS_NAME, Row, read_runs, write_runs
from spt_fast.study.sweeps.choice import best
from spt_fast.study.sweeps.plan import Group, Plan, PlannedRun


class Ledger:
    """The runs of a plan and the rows of those that are done, in a folder.

    Args:
        plan: all its runs.
        out: the folder; its runs.csv is read, if it is there.

    Attributes:
        rows: of the runs that are done, by name.
        dropped: final runs in the folder with values that are not those chosen any more.

    Raises:
        ValueError: runs.csv is not whole, or has a run that the plan has not.
    """

    def __init__(self, plan: Plan, out: Path) -> None:
        self.plan, self._path = plan, out / RUNS_NAME
        self.rows = {row.run: row for row in read_runs(self._path)} if self._path.exists() else {}
        self._check_known()
        self.dropped: list[str] = []
        for group in plan.groups:
            self._drop_old(group)

    def planned(self) -> Iterator[PlannedRun]:
        """The runs that are known now, in order: final ones once validation has chosen."""
        for group in self.plan.groups:
            yield from group.search
            yield from self.final(group)

    def final(self, group: Group) -> Sequence[PlannedRun]:
        """The final runs of a group; none before validation has chosen, or where every run diverged."""
        if not group.search:
            return group.final(None)
        rows = [self.rows[run.name] for run in group.search if run.name in self.rows]
        chosen = best(rows) if len(rows) == len(group.search) else None
        if chosen is None:
            return []
        return group.final(next(run for run in group.search if run.name == chosen.run))

    def failed(self) -> list[Group]:
        """Groups in which every run of the search diverged, so that there is nothing to choose."""
        return [
            group
            for group in self.plan.groups
            if group.search and all(run.name in self.rows for run in group.search) and not self.final(group)
        ]

    def next(self, running: Sequence[PlannedRun]) -> PlannedRun | None:
        """The first run that is neither done nor running; none that waits for prototypes in the making."""
        names = {run.name for run in running}
        needed = {run.prototypes_name for run in running if run.prototypes_name is not None}
        building = {name for name in needed if not (self._path.parent / PROTOTYPES_FOLDER / name).exists()}
        free = (run for run in self.planned() if run.name not in names and run.name not in self.rows)
        return next((run for run in free if run.prototypes_name not in building), None)

    def left(self) -> list[tuple[Group, int]]:
        """Groups, and how many of their runs are to be done."""
        failed = self.failed()
        found = []
        for group in self.plan.groups:
            if group in failed:
                continue
            final = self.final(group)
            done = sum(run.name in self.rows for run in (*group.search, *final))
            found.append((group, len(group.search) + len(self.plan.seeds) - done))
        return [(group, count) for group, count in found if count]

    def progress(self) -> tuple[int, int]:
        """How many runs are done, and how many there are, without final ones that nothing was chosen for."""
        total = self.plan.count() - len(self.plan.seeds) * len(self.failed())
        return total - sum(count for _, count in self.left()), total

    def add(self, row: Row) -> None:
        """Take in the row of a run, and write all rows, in the order of the plan."""
        self.rows[row.run] = row
        for group in self.plan.groups:
            if any(row.run == run.name for run in group.search):
                self._drop_old(group)
        self.write()

    def write(self) -> None:
        """Write runs.csv as a whole."""
        write_runs(self._path, self.in_order())

    def in_order(self) -> list[Row]:
        """The rows, in the order of the plan; the first that needs some prototypes has their seconds."""
        found: list[Row] = []
        built: set[str | None] = set()
        for planned in (run for group in self.plan.groups for run in group.possible):
            row = self.rows.get(planned.name)
            if row is None:
                continue
            if planned.prototypes_name in built:
                row = replace(row, prototype_seconds=None)
            built.add(planned.prototypes_name)
            found.append(row)
        return found

    def _drop_old(self, group: Group) -> None:
        """Forget final runs with other values than a search has chosen that got more values since."""
        final = {run.name for run in self.final(group)}
        if not final:
            return
        names = {run.name for run in group.possible if run.stage == "final"} - final
        found = [name for name in self.rows if name in names]
        for name in found:
            del self.rows[name]
        self.dropped += found

    def _check_known(self) -> None:
        known = {run.name: run for group in self.plan.groups for run in group.possible}
        for row in self.rows.values():
            planned = known.get(row.run)
            if planned is None:
                raise ValueError(
                    f"{self._path} holds {row.run}, which is no run of this sweep: give the values, arms, "
                    "tasks and seeds that it had, or another folder"
                )
            expected = {
                "stage": planned.stage,
                "task": planned.task.data,
                "arm": planned.arm.name,
                "method": planned.arm.method,
                "lr": planned.recipe.lr,
                "weight_decay": planned.recipe.weight_decay,
                "epochs": planned.recipe.epochs,
                "seed": planned.recipe.seed,
                "options": planned.options,
                "compared": planned.compared,
            }
            wrong = [
                f"{name} {getattr(row, name)!r} there, {value!r} now"
                for name, value in expected.items()
                if getattr(row, name) != value
            ]
            if wrong:
                raise ValueError(f"{self._path}: {row.run} is another run: {'; '.join(wrong)}")
