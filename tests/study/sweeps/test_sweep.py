"""`sweep` with runs that train nothing: order, choice, going on after any end, budgets, refusals."""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import re
from typing import Any

import pytest
import torch

from spt_fast.data.cache import ImageCache
from spt_fast.study import read_runs, sweep
from spt_fast.study.sweeps.choice import best
from spt_fast.study.sweeps.crew import Workers
from spt_fast.study.sweeps.ledger import Ledger
from spt_fast.study.sweeps.plan import Plan
from spt_fast.support.locks import folder_lock
from spt_fast.support.yaml_text import read_yaml, write_yaml

Lines = list[str]


class Killed(BaseException):
    """What nothing handles, as a kill."""


@pytest.fixture
def unbroken(plan, stub, tmp_path):
    """The rows of the plan in one go; the stub forgets what it has done."""
    rows = sweep(plan, out=tmp_path / "unbroken", say=lambda line: None)
    stub.done.clear()
    return rows


def quiet(plan, out, **options):
    return sweep(plan, out=out, say=lambda line: None, **options)


def test_a_sweep_chooses_by_validation_and_tests_what_it_chose(plan, stub, out):
    said: Lines = []
    rows = sweep(plan, out=out, say=said.append)
    assert [row.run for row in rows] == stub.done
    assert read_runs(out / "runs.csv") == rows
    for task in ("digits", "vtab/cars"):
        for arm in ("spt-deep", "linear"):
            group = [row for row in rows if (row.task, row.arm) == (task, arm)]
            assert [row.stage for row in group] == ["search"] * 3 + ["final"] * 2
            chosen = max(group[:3], key=lambda row: row.val_accuracy)
            assert [(row.lr, row.seed) for row in group[3:]] == [(chosen.lr, 0), (chosen.lr, 1)]
    assert said[:2] == ["training: digits", "training: vtab/cars"]
    assert re.fullmatch(r"\[1/20\] digits-spt-deep-.*: val \d.*%, 0\.0 s; about 0\.0 s left", said[2])
    assert said[-1] == f"wrote {out / 'runs.csv'}: 20 runs"


def test_of_equal_accuracies_the_smaller_rate_is_chosen(stub):
    (group,) = Plan.read(
        {"model": "m", "data": "digits", "arms": ["linear"], "search": {"lr": [0.1, 0.01, 1]}}
    ).groups
    rows = [dataclasses.replace(stub.row_of(run), val_accuracy=0.5) for run in group.search]
    assert best(rows).lr == 0.01
    assert best([dataclasses.replace(rows[0], val_accuracy=0.6), *rows[1:]]).lr == 0.1
    assert best([dataclasses.replace(rows[0], loss=math.nan, val_accuracy=None), rows[2]]).lr == 1
    assert best([dataclasses.replace(rows[0], loss=math.inf, val_accuracy=None)]) is None
    with pytest.raises(ValueError, match="has no validation accuracy, by which values are chosen"):
        best([dataclasses.replace(rows[0], val_accuracy=None)])


def test_the_prototypes_seconds_stand_in_the_first_row_that_needs_them(plan, stub, out):
    rows = quiet(plan | {"data": "digits"}, out)
    first = [row.run for row in rows if row.prototype_seconds is not None]
    of_spt = [row for row in rows if row.arm == "spt-deep"]
    assert first == [of_spt[0].run, of_spt[3].run, of_spt[4].run]


@pytest.mark.parametrize("place", range(0, 20, 3))
def test_a_killed_sweep_goes_on_and_repeats_nothing(place, plan, stub, out, unbroken):
    def kill(planned):
        if len(stub.done) == place:
            raise Killed

    stub.before = staticmethod(kill)
    with pytest.raises(Killed):
        quiet(plan, out)
    stub.before = staticmethod(lambda planned: None)
    assert quiet(plan, out) == unbroken
    assert len(stub.done) == len(set(stub.done)) == 20
    assert (out / "runs.csv").read_bytes() == (out.parent / "unbroken" / "runs.csv").read_bytes()


@pytest.mark.parametrize("name", ["ledger.write_runs", "sweep.tidy", "sweep.write_record"])
def test_a_kill_while_files_are_written_loses_one_run_at_most(name, plan, stub, out, unbroken, monkeypatch):
    calls = []
    module, _, called = f"spt_fast.study.sweeps.{name}".rpartition(".")
    function = getattr(importlib.import_module(module), called)

    def killed(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) in (1, 6):
            raise Killed
        function(*arguments)

    monkeypatch.setattr(f"spt_fast.study.sweeps.{name}", killed)
    ends = 0
    while True:
        try:
            rows = quiet(plan, out)
            break
        except Killed:
            ends += 1
    assert ends == (1 if name == "sweep.write_record" else 2)
    assert rows == unbroken
    assert len(stub.done) <= 20 + ends


def test_what_a_killed_process_left_beside_its_rows_is_removed(plan, stub, out):
    rows = quiet(plan, out)
    names = ("checkpoint.pt", "tuned.safetensors")
    for row in rows:
        folder = out / "runs" / row.run
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
    (out / ".spt_fast.abc.part").touch()
    quiet(plan, out)
    for row in rows:
        left = {path.name for path in (out / "runs" / row.run).iterdir()}
        assert left == ({"tuned.safetensors"} if row.stage == "final" else set())
    assert not list(out.glob(".spt_fast*"))


def test_a_budget_stops_between_runs_and_says_how_to_go_on(plan, stub, out, unbroken, monkeypatch):
    said: Lines = []
    assert len(sweep(plan, out=out, max_runs=7, say=said.append)) == 7
    assert said[-1] == "stopped with 13 runs left; the same command goes on with them"
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr("spt_fast.study.sweeps.sweep.time.monotonic", lambda: float(next(clock)))
    assert 7 < len(quiet(plan, out, max_minutes=2)) < 20
    monkeypatch.undo()
    monkeypatch.setattr("spt_fast.study.sweeps.sweep.Workshop", stub)
    assert sweep(plan, out=out, say=said.append) == unbroken
    assert f"{out} holds" in "".join(said)


def test_a_dry_run_says_what_there_is_to_do_and_does_nothing(plan, stub, out):
    said: Lines = []
    assert sweep(plan, out=out, dry_run=True, say=said.append) == []
    assert not out.exists()
    assert said[:4] == [
        *(f"todo  digits-spt-deep-lr{rate}-wd0.0001-n20-seed0-search" for rate in ("0.001", "0.01", "0.1")),
        "todo  2 final runs of digits, spt-deep, with what validation chooses",
    ]
    assert said[-1] == "0 of 20 runs are done"
    quiet(plan, out, max_runs=4)
    said.clear()
    sweep(plan, out=out, dry_run=True, say=said.append)
    assert [line[:4] for line in said] == ["done"] * 4 + ["todo"] * 13 + ["4 of"]


def test_more_tasks_arms_seeds_and_values_run_what_is_new(plan, stub, out):
    quiet(plan, out)
    more = plan | {
        "data": ["vtab/pets", *plan["data"]],
        "arms": {"full": {}, **plan["arms"]},
        "search": {"lr": [1e-4, *plan["search"]["lr"]]},
        "seeds": [0, 1, 2],
    }
    before = set(stub.done)
    stub.done.clear()
    rows = quiet(more, out)
    assert not before & set(stub.done)
    assert [row.run for row in rows] == [run.name for run in _planned(more, rows)]
    assert len(rows) == 3 * 3 * (4 + 3)


def _planned(given, rows):
    by_name = {row.run: row for row in rows}
    for group in Plan.read(given).groups:
        chosen = best(by_name[run.name] for run in group.search)
        yield from group.search
        yield from group.final(next(run for run in group.search if run.name == chosen.run))


def test_where_validation_chooses_other_values_the_tests_of_the_old_ones_leave_the_table(plan, stub, out):
    plan["data"] = "digits"
    rows = quiet(plan, out)
    said: Lines = []
    # A value that beats the others by the stub's accuracies.
    rates = [rate / 1000 + 1e-4 for rate in range(2, 30)]
    after = sweep(plan | {"search": {"lr": [*plan["search"]["lr"], *rates]}}, out=out, say=said.append)
    old = {row.run for row in rows if row.stage == "final"}
    assert not old & {row.run for row in after}
    assert any(f"{len(old)} final runs with those before have left runs.csv" in line for line in said)
    assert sum(row.stage == "final" for row in after) == 4
    assert (
        sweep(plan | {"search": {"lr": [*plan["search"]["lr"], *rates]}}, out=out, say=said.append) == after
    )


def test_a_run_that_diverges_is_noted_and_never_chosen(plan, stub, out):
    plan["search"] = {"lr": [1e-2, 5.0]}
    rows = quiet(plan, out)
    lost = [row for row in rows if row.lr == 5.0]
    assert {row.stage for row in lost} == {"search"}
    assert all(math.isnan(row.loss) and row.val_accuracy is None for row in lost)
    stub.done.clear()
    quiet(plan, out)
    assert stub.done == []


def test_where_all_diverge_the_others_are_done_before_it_is_an_error(plan, stub, out):
    plan["data"] = "digits"
    plan["arms"] = {"bad": {"method": "linear", "search": {"lr": [2.0, 3.0]}}, "linear": {}}
    with pytest.raises(FloatingPointError, match="every run of the search diverged in digits, bad: nothing"):
        quiet(plan, out)
    rows = read_runs(out / "runs.csv")
    assert [row.arm for row in rows] == ["bad"] * 2 + ["linear"] * 5


def test_a_final_run_that_diverges_is_named(plan, stub, out):
    said: Lines = []
    sweep(plan | {"data": "digits", "search": {"lr": [5.0]}, "arms": ["linear"]}, out=out, say=said.append)
    assert "final runs that diverged, and have no test accuracy: digits-linear-lr5" in said[-2]


CHANGES: list[tuple[dict[str, Any], list[str]]] = [
    ({"recipe": {"epochs": 5}}, ["recipe: epochs: nothing in the folder, 5 now"]),
    ({"model": "other"}, ["model: shipped in the folder, other now"]),
    (
        {"data": ["digits"]},
        ["data: {'data': 'vtab/cars', 'val_split': 'val200', 'test_split': 'test'} in the folder"],
    ),
    ({"arms": {"spt-deep": {}}}, ["arms: linear in the folder, and not now"]),
    (
        {"arms": {"spt-deep": {"prototypes": {"share": 0.5}}, "linear": {}}},
        ["arms: spt-deep: prototypes: nothing in the folder, {'share': 0.5} now"],
    ),
    (
        {"arms": {"spt-deep": {"lr": 1.0}, "linear": {}}},
        ["arms: spt-deep: lr: nothing in the folder, 1.0 now"],
    ),
    ({"search": {"lr": [1e-3, 1e-2]}}, ["search: lr: 0.1 in the folder, and not now"]),
    ({"random": {"trials": 2}}, ["random: nothing in the folder, {'trials': 2, 'seed': 0} now"]),
    ({"seeds": [1, 0]}, ["seeds: the first, of the search: 0 in the folder, 1 now"]),
    ({"seeds": [0]}, ["seeds: 1 in the folder, and not now"]),
    ({"images": {"per_class": 5}}, ["images: nothing in the folder, {'per_class': 5} now"]),
    ({"nmi": True, "seeds": [0]}, ["nmi: False in the folder, True now", "seeds: 1 in the folder"]),
]


@pytest.mark.parametrize(("change", "lines"), CHANGES, ids=lambda value: str(value)[:30])
def test_a_folder_of_another_sweep_is_refused_with_each_difference(change, lines, plan, stub, out):
    quiet(plan, out)
    stub.done.clear()
    kept = (out / "sweep.yaml").read_bytes()
    with pytest.raises(ValueError, match="are of another sweep: ") as error:
        quiet(plan | change, out)
    assert all(line in str(error.value) for line in lines)
    assert (out / "sweep.yaml").read_bytes() == kept
    assert stub.done == []


@pytest.mark.parametrize(
    "change",
    [
        {"data": ["digits"]},
        {"arms": {"spt-deep": {}}},
        {"arms": {"spt-deep": {}, "linear": {}}},
        {"arms": {"spt-deep": {}, "linear": {}, "full": {"drop_path": 0.1}}},
        {"search": {"lr": [1e-3, 1e-2]}},
        {"compare": {"per_class": [5]}},
        {"seeds": [0]},
    ],
    ids=str,
)
def test_what_no_run_is_done_with_may_be_left_out(change, plan, stub, out):
    """A value that could not be run is no dead end."""
    wanted = plan | {"compare": {"per_class": [5]}}
    more = {
        "data": [*plan["data"], "vtab/pets"],
        "arms": {**plan["arms"], "full": {}},
        "search": {"lr": [1e-3, 1e-2, 1e-1, 1e6]},
        "compare": {"per_class": [5, 1000]},
        "seeds": [0, 1, 2],
    }
    quiet(wanted | {name: more[name] for name in change}, out, max_runs=1)
    quiet(wanted | change, out)
    assert read_yaml((out / "sweep.yaml").read_text(), "record")["seeds"] == (wanted | change)["seeds"]
    assert len(stub.done) == len(set(stub.done))


def test_a_folder_goes_on_from_its_own_record(plan, stub, out, unbroken):
    """With arms that take the prototypes of another task, which is one of the sweep's."""
    plan["arms"] = {**plan["arms"], "lent": {"method": "spt-deep", "prototypes": {"task": "vtab/cars"}}}
    rows = sweep(plan, out=out, say=lambda line: None)
    stub.done.clear()
    assert sweep(out / "sweep.yaml", out=out, say=lambda line: None) == rows
    assert stub.done == []


def test_other_images_backbones_and_versions_are_refused(plan, stub, out, monkeypatch):
    quiet(plan, out, max_runs=1)
    record = read_yaml((out / "sweep.yaml").read_text(), "record")
    record["versions"]["torch"] = "1.0"
    record["backbone"]["width"] = "64"
    (out / "sweep.yaml").write_text(write_yaml(record))
    stub.images = 99
    with pytest.raises(ValueError, match="of another sweep") as error:
        quiet(plan, out)
    for line in (
        "backbone: width: 64 in the folder, 32 now",
        "digits: train: images: 100 in the folder, 99 now",
        "vtab/cars: train: images: 100 in the folder, 99 now",
        f"versions: torch: 1.0 in the folder, {torch.__version__.split('+')[0]}",
    ):
        assert line in str(error.value)


def test_a_half_written_table_is_refused_with_its_line(plan, stub, out):
    quiet(plan, out, max_runs=3)
    path = out / "runs.csv"
    whole = path.read_text()
    path.write_text(whole[:-30])
    with pytest.raises(ValueError, match=r"runs.csv, line 4: .* was not written whole"):
        quiet(plan, out)
    # As the message says.
    path.write_text("".join(line for line in whole.splitlines(keepends=True)[:-1]))
    quiet(plan, out, max_runs=1)
    assert stub.done[-1] == stub.done[-2]
    assert path.read_text() == whole


def test_rows_that_the_plan_has_not_or_has_otherwise_are_refused(plan, stub, out):
    quiet(plan, out, max_runs=3)
    path = out / "runs.csv"
    whole = path.read_text()
    path.write_text(whole.replace("-lr0.1-", "-lr0.5-"))
    with pytest.raises(ValueError, match=r"holds digits-spt-deep-lr0.5-.*, which is no run of this sweep"):
        quiet(plan, out)
    path.write_text(whole.replace(",digits,", ",vtab/cars,"))
    with pytest.raises(ValueError, match="is another run: task 'vtab/cars' there, 'digits' now"):
        quiet(plan, out)
    path.write_text(whole)
    (out / "sweep.yaml").unlink()
    with pytest.raises(ValueError, match=r"holds runs.csv without sweep.yaml"):
        quiet(plan, out)


def test_one_sweep_at_a_time_writes_into_a_folder(plan, stub, out):
    out.mkdir()
    with folder_lock(out), pytest.raises(ValueError, match=r"another run .* writes into it"):
        quiet(plan, out)


def test_a_refused_sweep_leaves_the_folder_as_it_was(plan, stub, out):
    rows = sweep(plan, out=out)
    before = (out / "sweep.yaml").read_text()
    with pytest.raises(ValueError, match="which is no run of this sweep"):
        sweep({**plan, "compare": {"epochs": [1, 2]}}, out=out)
    assert (out / "sweep.yaml").read_text() == before
    assert sweep(plan, out=out) == rows


def test_runs_with_the_same_prototypes_go_side_by_side_once_these_are_there(plan, out):
    ledger = Ledger(Plan.read({**plan, "arms": ["spt-deep"], "data": ["digits"]}), out)
    first = ledger.next([])
    assert ledger.next([first]) is None
    (out / "prototypes").mkdir(parents=True)
    (out / "prototypes" / first.prototypes_name).touch()
    assert ledger.next([first]).prototypes_name == first.prototypes_name


def test_bad_options(plan, stub, out, tmp_path):
    for options, message in (
        ({"jobs": 0}, "jobs must be an integer >= 1"),
        ({"max_runs": 0}, "max_runs must be an integer >= 1"),
        ({"max_minutes": 0}, "max_minutes must be a finite number > 0"),
        ({"device": "abacus"}, "device must be"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet(plan, out, **options)
    with pytest.raises(FileNotFoundError, match="sweep: there is no file"):
        quiet(tmp_path / "none.yaml", out)
    assert not out.exists()


def test_a_yaml_file_is_the_same_plan(plan, stub, out, tmp_path, unbroken):
    path = tmp_path / "plan.yaml"
    path.write_text(write_yaml(plan))
    assert quiet(path, out) == unbroken


_WORKSHOP = """
import os, time
from spt_fast.data.cache import ImageCache

class Made:
    def __init__(self, model, images, out, device, sharing):
        self.facts = str(device), sharing

    def run(self, planned):
        if planned.name == "error":
            raise ValueError("that cannot be done")
        if planned.name == "death":
            os._exit(7)
        return planned.name, *self.facts, os.getpid(), ImageCache("ram", 1000).works_with(4)
"""


def test_workers_do_runs_side_by_side_and_hand_over_errors(tmp_path, monkeypatch):
    (tmp_path / "made_workshop.py").write_text(_WORKSHOP)
    monkeypatch.syspath_prepend(tmp_path)
    make = importlib.import_module("made_workshop").Made
    (group,) = Plan.read({"model": "m", "data": "digits", "arms": ["linear"]}).groups

    def planned(name):
        return dataclasses.replace(group.final(None)[0], name=name)

    workers = Workers(2, torch.device("cpu"), {}, {}, tmp_path, make=make)
    try:
        for name in ("a", "b"):
            workers.start(planned(name))
        rows = sorted(workers.wait()[1] for _ in range(2))
        assert [row[:3] for row in rows] == [("a", "cpu", 2), ("b", "cpu", 2)]
        assert len({row[3] for row in rows} | {os.getpid()}) == 3
        assert workers.running == []
        # Decoded images are kept there as they are here.
        assert [row[4] for row in rows] == [ImageCache("ram", 1000).works_with(4)] * 2
        workers.start(planned("error"))
        with pytest.raises(ValueError, match="that cannot be done"):
            workers.wait()
        workers.start(planned("death"))
        with pytest.raises(RuntimeError, match="the process that did death ended with code 7"):
            workers.wait()
    finally:
        workers.end()
