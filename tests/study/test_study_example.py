"""The script of docs/study.md: its sweeps are plans, and what it collects and draws is what the runs hold."""

from __future__ import annotations

import csv
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from spt_fast.study.runs import Row, write_runs
from spt_fast.study.sweeps.plan import Plan
from spt_fast.study.sweeps.sweep import read_plan

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "study.py"


@pytest.fixture(scope="module")
def script(load_script) -> ModuleType:
    return load_script(SCRIPT)


def row(task: str, arm: str, seed: int, accuracy: float, **values) -> Row:
    facts = {"lr": 0.01, "weight_decay": 1e-4, "epochs": 6, "train_images": 100, "learned": 1, "trainable": 2}
    of_run = {"run": f"{task}-{arm}-{seed}-{values.get('options', '')}-{values.get('num_prompts')}"}
    return Row(
        **{**facts, **of_run, "stage": "final", "backbone": "tiny", "task": task, "arm": arm, "method": arm},
        backbone_parameters=3,
        loss=1.0,
        seconds=1.0,
        test_accuracy=accuracy,
        seed=seed,
        **values,
    )


def test_every_part_is_a_plan(script):
    plans = {
        part: Plan.read({**read_plan(script.FOLDER / f"{part}.yaml"), "model": "shipped"})
        for part in script.PARTS
    }
    assert {path.stem for path in script.FOLDER.glob("*.yaml")} == set(script.PARTS)
    assert len(plans["methods"].tasks) == 7
    assert len({plan.seeds for plan in plans.values()}) == 1
    # What is compared across parts is learned with the same recipe and rates, on the same tasks.
    whole = plans[script.WHOLE]
    for part in ("shares", "lengths"):
        compared = plans[part].compare
        assert plans[part].recipe == {name: v for name, v in whole.recipe.items() if name not in compared}
        assert plans[part].tasks == whole.tasks
        assert all(arm == whole.arms[name] for name, arm in plans[part].arms.items())
        assert plans[part].search == whole.search
    # Figures take arms by name.
    assert all(name in plans[part].arms for part, name in script.REFERENCES.items())


def test_parts_are_done_in_order_within_the_time(script, monkeypatch):
    calls, now = [], iter([0.0, 0.0, 60.0, 600.0])
    monkeypatch.setattr(script.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(script, "sweep", lambda plan, **options: calls.append((plan, options)))
    script.main(["run", "--root", "data", "--out", "out", "--model", "shipped", "--max-minutes", "5"])
    assert [options["out"] for _, options in calls] == [Path("out/methods"), Path("out/starts")]
    assert [options["max_minutes"] for _, options in calls] == [5, 4]
    assert all((plan["model"], plan["root"]) == ("shipped", "data") for plan, _ in calls)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("run", "there is no folder of vtab/imagenette in"),
        ("collect", "no runs.csv"),
        ("draw", "methods.csv"),
    ],
)
def test_what_is_not_there_is_one_line_and_nothing_is_made(script, command, message, tmp_path):
    places = {
        "run": ["--root", str(tmp_path / "data"), "--out", str(tmp_path / "out")],
        "collect": [str(tmp_path / "out")],
        "draw": [str(tmp_path / "csv"), "--out", str(tmp_path / "out")],
    }
    with pytest.raises(SystemExit, match=f"^study.py: error: [^\n]*{message}[^\n]*$"):
        script.main([command, *places[command]])
    assert list(tmp_path.glob("*")) == []


def test_a_time_that_is_over_or_none_is_said(script, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="--max-minutes must be"):
        script.main(["run", "--max-minutes", "0"])
    now = iter([0.0, 0.0, 600.0])
    monkeypatch.setattr(script.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(script, "sweep", lambda plan, **options: None)
    script.main(["run", "--parts", "shares", "lengths", "--max-minutes", "5"])
    assert capsys.readouterr().out.splitlines() == ["== shares", "the time is over; not begun: lengths"]


def test_ctrl_c_ends_as_in_commands(script, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "sweep", interrupted)
    with pytest.raises(SystemExit) as stopped:
        script.main(["run"])
    assert stopped.value.code == 130
    assert "goes on" in capsys.readouterr().err


def test_what_is_damaged_leaves_what_was_collected_as_it_was(script, tmp_path):
    folder, csvs = tmp_path / "methods", tmp_path / "csv"
    folder.mkdir()
    rows = [row("a", "spt-deep", seed, 0.5) for seed in (0, 1)]
    write_runs(folder / "runs.csv", rows)
    (folder / "sweep.yaml").write_text("model: tiny\n")
    script.main(["collect", str(tmp_path)])
    before = {path.name: path.read_bytes() for path in csvs.iterdir()}
    assert set(before) == {"methods.csv", "methods.yaml"}
    whole = (folder / "runs.csv").read_text()
    (folder / "runs.csv").write_text(whole[:-20])
    with pytest.raises(SystemExit, match="not written whole"):
        script.main(["collect", str(tmp_path)])
    (folder / "runs.csv").write_text(whole)
    (folder / "runs" / rows[0].run).mkdir(parents=True)
    (folder / "runs" / rows[0].run / "nmi.csv").write_text("step,block\n0,1\n")
    with pytest.raises(SystemExit, match=r"nmi\.csv must have the columns step and nmi"):
        script.main(["collect", str(tmp_path)])
    assert {path.name: path.read_bytes() for path in csvs.iterdir()} == before


def test_without_matplotlib_a_figure_is_one_line(script, tmp_path, monkeypatch):
    write_runs(tmp_path / "methods.csv", [row("a", arm, 0, 0.5) for arm in ("spt-deep", "vpt-deep")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"^study.py: error: matplotlib is not installed[^\n]*$"):
        script.main(["draw", str(tmp_path)])


def test_what_is_collected_and_drawn_is_what_the_runs_hold(script, tmp_path):
    methods = [
        row(task, arm, seed, 0.5 + 0.1 * (arm == "spt-deep") + 0.01 * seed, num_prompts=10)
        for task in ("a", "b")
        for arm in ("spt-deep", "vpt-deep", "full")
        for seed in (0, 1)
    ]
    lengths = [
        row("a", "spt-deep", seed, 0.1 * number, num_prompts=number) for number in (1, 3) for seed in (0, 1)
    ]
    shares = [row("a", "full", seed, 0.2, options="share=0.1") for seed in (0, 1)]
    tables = {"methods": methods, "starts": methods, "lengths": lengths, "shares": shares}
    for part, rows in tables.items():
        folder = tmp_path / "study" / part
        folder.mkdir(parents=True)
        write_runs(folder / "runs.csv", rows)
        (folder / "sweep.yaml").write_text("model: tiny\nroot: /here\n")
    for each in methods:
        folder = tmp_path / "study/methods/runs" / each.run
        folder.mkdir(parents=True)
        (folder / "nmi.csv").write_text("step,block,nmi\n0,1,0.25\n0,2,0.75\n5,1,0.5\n5,2,0.5\n")
    script.main(["collect", str(tmp_path / "study"), "--csv", str(tmp_path / "csv")])
    assert (tmp_path / "csv/methods.csv").read_bytes() == (tmp_path / "study/methods/runs.csv").read_bytes()
    assert (tmp_path / "csv/methods.yaml").read_text() == "model: tiny\n"
    with (tmp_path / "csv/methods-nmi.csv").open(newline="") as file:
        lines = list(csv.reader(file))
    assert lines[:3] == [
        ["task", "run", "seed", "step", "block", "nmi"],
        ["a", "SPT-Deep", "0", "0", "0", "0.5"],
        ["a", "SPT-Deep", "0", "5", "0", "0.5"],
    ]
    assert {line[1] for line in lines[1:]} == {"SPT-Deep", "VPT-Deep"}
    # Another machine went on, without the folders of the first.
    shutil.rmtree(tmp_path / "study/methods/runs")
    script.main(["collect", str(tmp_path / "study"), "--csv", str(tmp_path / "csv")])
    with (tmp_path / "csv/methods-nmi.csv").open(newline="") as file:
        assert list(csv.reader(file)) == lines

    script.main(["draw", str(tmp_path / "csv"), "--out", str(tmp_path / "figures")])
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"study_{name}.png" for name in (*tables, "methods_nmi")}
    # Of another arm or task of the whole nothing is taken.
    assert script._curves("lengths", tables, script._length) == (
        {
            "SPT-Deep": (
                [1.0, 3.0, 10.0],
                [[pytest.approx(value) for value in (0.1, 0.3, 0.6 + 0.01 * seed)] for seed in (0, 1)],
            )
        },
        1,
    )
    assert script._curves("shares", tables, script._share) == (
        {"full": ([0.1, 1.0], [[0.2, 0.5], [0.2, pytest.approx(0.51)]])},
        1,
    )


def test_figures_of_a_study_that_is_not_finished_compare_like_with_like(script, tmp_path, capsys):
    easy = [row("easy", "spt-deep", seed, 0.9, num_prompts=n) for n in (1, 3) for seed in (0, 1)]
    hard = [row("hard", "spt-deep", seed, 0.1, num_prompts=1) for seed in (0, 1)]

    def lengths(rows, whole=()):
        return script._curves("lengths", {"lengths": rows, "starts": whole}, script._length)

    assert lengths([*easy, *hard]) == ({"SPT-Deep": ([1.0, 3.0], [[0.9, 0.9]] * 2)}, 1)
    # A seed lacks a length: no task has all. One length is no curve.
    assert lengths(easy[1:]) is None
    assert lengths(hard) is None
    # The part that has the whole lacks a seed, or is of another backbone or budget.
    whole = [row("easy", "spt-deep", seed, 1.0, num_prompts=10) for seed in (0, 1)]
    assert lengths(easy, whole)[0]["SPT-Deep"][0] == [1.0, 3.0, 10.0]
    assert lengths(hard, [replace(each, task="hard") for each in whole])[0]["SPT-Deep"][0] == [1.0, 10.0]
    assert lengths(easy, whole[1:])[0]["SPT-Deep"][0] == [1.0, 3.0]
    assert lengths(easy, [replace(each, epochs=7) for each in whole])[0]["SPT-Deep"][0] == [1.0, 3.0]
    # An arm has a task that VPT-Deep lacks; then there is no VPT-Deep at all.
    methods = [
        row("easy", "spt-deep", 0, 0.9),
        row("hard", "spt-deep", 0, 0.1),
        row("easy", "vpt-deep", 0, 0.8),
    ]
    for number, rows in enumerate((methods, methods[:2])):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_runs(folder / "methods.csv", rows)
        write_runs(folder / "lengths.csv", easy[1:])
        script.main(["draw", str(folder), "--out", str(folder / "figures")])
        assert (folder / "figures/study_methods.png").exists() == (number == 0)
        printed = capsys.readouterr().out
        assert "study_lengths.png: not drawn, as no task has all arms, seeds and values yet" in printed
        assert ("not drawn, as no run of vpt-deep is tested" in printed) == (number == 1)
