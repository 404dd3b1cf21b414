"""The study of docs/study.md: what the paper compares, on seven small tasks under one budget.

    python examples/study.py run --root vtab-folder [--model NAME] [--jobs 2] [--max-minutes X] [--out study]
    python examples/study.py collect study [--csv study/csv]
    python examples/study.py draw study/csv [--out docs]

`run` does the sweeps of examples/study/*.yaml in their order, each into a folder of its own below OUT, and
goes on where it was stopped. `collect` copies their tables, and the NMI of their runs, into one folder;
`draw` makes the figures of it. The tables are those of `spt-fast table FOLDER/methods.csv`, of each part.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from spt_fast.plots import accuracy_against_prompt_length, nmi_over_epochs
from spt_fast.plots.lines import draw_line, finish, styles
from spt_fast.plots.panels import Panels, new_figure, tidy
from spt_fast.study import sweep
from spt_fast.study.runs import RUNS_FOLDER, RUNS_NAME, SWEEP_NAME, Row, read_runs
from spt_fast.study.statistics import paired_difference
from spt_fast.study.sweeps.sweep import read_plan
from spt_fast.study.tables.arms import Arm, arms_of
from spt_fast.support.errors import one_line
from spt_fast.support.tables import csv_bytes
from spt_fast.support.yaml_text import read_yaml, write_yaml

FOLDER = Path(__file__).parent / "study"
# In the order in which they are done: what is most worth knowing first.
PARTS = ("methods", "starts", "shares", "lengths", "pooling")
NMI_COLUMNS = ("task", "run", "seed", "step", "block", "nmi")
# The arms in figures of lines, by the names whose colours all figures share.
SHOWN = {
    "spt-deep": "SPT-Deep",
    "vpt-deep": "VPT-Deep",
    "spt-deep-own-norm": "SPT-Deep, MAE's norm",
    "spt-deep-new-norm": "SPT-Deep, new norm",
    "vpt-deep-own-norm": "VPT-Deep, MAE's norm",
    "vpt-deep-new-norm": "VPT-Deep, new norm",
}
# With what the arms of a part are compared in its figure.
REFERENCES = {"methods": "vpt-deep", "starts": "spt-deep"}
# The sweeps of lengths and shares leave out the value that all arms of this part have.
WHOLE = "starts"


def run(args: argparse.Namespace) -> None:
    """All sweeps, until they are done or the time is over."""
    started = time.monotonic()
    for part in args.parts:
        left = None
        if args.max_minutes is not None:
            left = args.max_minutes - (time.monotonic() - started) / 60
            if left <= 0:
                break
        plan = {**read_plan(FOLDER / f"{part}.yaml"), "model": args.model, "root": args.root}
        print(f"== {part}", flush=True)
        sweep(plan, out=Path(args.out) / part, jobs=args.jobs, max_minutes=left)


def collect(args: argparse.Namespace) -> None:
    """The tables of the runs, and of their NMI, as the mean of the blocks.

    Of runs whose folders are gone, which another machine did, the NMI that was collected before is kept.
    """
    out = args.csv or args.study / "csv"
    parts = [part for part in PARTS if (args.study / part / RUNS_NAME).exists()]
    if not parts:
        raise FileNotFoundError(f"{args.study} has no {RUNS_NAME} in a folder of {', '.join(PARTS)}")
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        folder = args.study / part
        shutil.copyfile(folder / RUNS_NAME, out / f"{part}.csv")
        # Where the data lay is nobody else's business, and may differ in each call.
        record = read_yaml((folder / SWEEP_NAME).read_text(encoding="utf-8"), SWEEP_NAME)
        record.pop("root", None)
        (out / f"{part}.yaml").write_text(write_yaml(record), encoding="utf-8")
        found = _collected(_nmi_file(out, part))
        for row in read_runs(folder / RUNS_NAME):
            if lines := _nmi_lines(row, folder / RUNS_FOLDER / row.run / "nmi.csv"):
                found[lines[0][:3]] = lines
        if found:
            content = [line for lines in found.values() for line in lines]
            _nmi_file(out, part).write_bytes(csv_bytes(NMI_COLUMNS, content))


def _collected(path: Path) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """{(task, run, seed): lines} of a file that `collect` wrote; empty where there is none."""
    found: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for line in list(csv.reader(file))[1:]:
                found.setdefault(tuple(line[:3]), []).append(tuple(line))
    return found


def _nmi_file(folder: Path, part: str) -> Path:
    return folder / f"{part}-nmi.csv"


def _nmi_lines(row: Row, path: Path) -> list[tuple[str, ...]]:
    """A line for each step that was recorded; block 0 stands for the mean of all."""
    if row.arm not in SHOWN or not path.exists():
        return []
    steps: dict[int, list[float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            steps.setdefault(int(line["step"]), []).append(float(line["nmi"]))
    return [
        (row.task, SHOWN[row.arm], str(row.seed), str(step), "0", f"{fmean(values):.5g}")
        for step, values in steps.items()
    ]


def draw(args: argparse.Namespace) -> None:
    """The figures of docs/study.md, of as many parts as there are."""
    tables = {part: read_runs(path) for part in PARTS if (path := args.csv / f"{part}.csv").exists()}
    if not tables:
        raise FileNotFoundError(f"{args.csv} has none of {', '.join(f'{part}.csv' for part in PARTS)}")
    figures: dict[str, Any] = {}
    for part, reference in REFERENCES.items():
        if part in tables:
            figures[part] = _differences(tables[part], reference)
    if "lengths" in tables:
        runs = _over(_with_whole("lengths", tables), lambda row: float(row.num_prompts or 0))
        figures["lengths"] = accuracy_against_prompt_length(runs) if runs else None
    if "shares" in tables:
        runs = _over(_with_whole("shares", tables), _share)
        figures["shares"] = _against_share(runs) if runs else None
    for part in tables:
        if (path := _nmi_file(args.csv, part)).exists():
            figures[f"{part}_nmi"] = nmi_over_epochs(path)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        if figure is None:
            print(f"study_{name}.png: not drawn, as there is nothing yet that all arms of {name} have")
        else:
            figure.savefig(args.out / f"study_{name}.png")


def _differences(rows: Sequence[Row], against: str) -> Any:
    """A line for each arm: what it has more than another, by task, and the mean with its interval."""
    arms = arms_of(rows) if any(row.test_accuracy is not None for row in rows) else []
    reference = next((arm for arm in arms if arm.name == against), None)
    if reference is None:
        return None
    looks = styles(["SPT-Deep", "VPT-Deep"])
    found = [(arm, paired_difference(arm.accuracies(), reference.accuracies())) for arm in arms]
    lines = sorted(((arm, each) for arm, each in found if each is not None), key=lambda line: line[1].mean)
    figure = new_figure(6.4, 0.3 * len(lines) + 0.8)
    axes = figure.subplots()
    axes.axvline(0, color="#bbbbbb", linewidth=1)
    for place, (arm, difference) in enumerate(lines):
        colour = looks.get(f"{arm.method[:3].upper()}-Deep", {"color": "#444444"})["color"]
        both = [task for task in arm.runs if task in reference.runs]
        by_task = [_of_task(arm, task) - _of_task(reference, task) for task in both]
        axes.plot(
            by_task, [place] * len(by_task), "o", color=colour, alpha=0.3, markersize=4, markeredgewidth=0
        )
        if difference.interval is not None:
            axes.plot(difference.interval, [place] * 2, color=colour, linewidth=2)
        axes.plot([difference.mean], [place], "o", color=colour, markersize=7)
    most = max(len(arm.runs) for arm in arms)
    names = [arm.name if len(arm.runs) == most else f"{arm.name} ({len(arm.runs)} tasks)" for arm, _ in lines]
    axes.set_yticks(range(len(lines)), names)
    axes.set_xlabel(f"test accuracy above {against}, percentage points")
    tidy(axes)
    return figure


def _of_task(arm: Arm, task: str) -> float:
    return fmean(arm.accuracies()[task].values())


def _with_whole(part: str, tables: Mapping[str, Sequence[Row]]) -> list[Row]:
    """The rows of a part, and those of WHOLE with the same arms, tasks and seeds."""
    rows = tables[part]
    wanted = {(row.arm, row.task, row.seed) for row in rows}
    others = tables.get(WHOLE, ())
    return [*rows, *(row for row in others if (row.arm, row.task, row.seed) in wanted)]


def _over(rows: Sequence[Row], x: Callable[[Row], float]) -> dict[str, tuple[list[float], list[list[float]]]]:
    """{arm: (values of x, accuracies [R, X])}: a line of R for each seed, the mean over tasks.

    Tasks that are not done by all arms with all seeds and values are left out: of others means would compare
    easy tasks with hard ones.
    """
    finals = [row for row in rows if row.test_accuracy is not None]
    found = {(row.arm, row.seed, x(row), row.task): row.test_accuracy or 0.0 for row in finals}
    seeds = sorted({row.seed for row in finals})
    places = {arm: sorted({x(row) for row in finals if row.arm == arm}) for arm in _in_order(finals, "arm")}
    wanted = [(arm, seed, place) for arm in places for seed in seeds for place in places[arm]]
    tasks = [task for task in _in_order(finals, "task") if all((*each, task) in found for each in wanted)]
    if not tasks:
        return {}
    return {
        SHOWN.get(arm, arm): (
            places[arm],
            [
                [fmean(found[arm, seed, place, task] for task in tasks) for place in places[arm]]
                for seed in seeds
            ],
        )
        for arm in places
    }


def _in_order(rows: Sequence[Row], name: str) -> list[str]:
    return list(dict.fromkeys(getattr(row, name) for row in rows))


def _share(row: Row) -> float:
    """Of the images that a run learned from."""
    return float(dict(option.split("=") for option in row.options.split(";") if option).get("share", 1))


def _against_share(curves: Mapping[str, tuple[list[float], list[list[float]]]]) -> Any:
    figure = new_figure(4.6, 3.2)
    axes = figure.subplots()
    looks = styles(list(curves))
    for name, (shares, accuracies) in curves.items():
        percent = 100 * np.array(accuracies)
        draw_line(axes, 100 * np.array(shares), percent, looks[name], label=name, markevery=1)
    axes.set_xscale("log")
    axes.set_xticks([10, 30, 100], ["10", "30", "100"])
    axes.minorticks_off()
    axes.set_xlabel("images to learn from, per cent of 1,000")
    axes.set_ylabel("accuracy (%)")
    return finish(Panels([axes], own=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("--model", default="shipped", help="as `spt-fast train` takes it (%(default)s)")
    running.add_argument("--root", help="the folder that the tasks' folders lie in")
    running.add_argument("--out", type=Path, default=Path("study"), help="the study's folder (%(default)s)")
    running.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which sweeps (all)")
    running.add_argument("--jobs", type=int, default=1, help="processes, each with a GPU or some cores")
    running.add_argument("--max-minutes", type=float, help="begin no run after so long")
    running.set_defaults(do=run)
    collecting = commands.add_parser("collect")
    collecting.add_argument("study", type=Path, help="the folder that `run` wrote")
    collecting.add_argument("--csv", type=Path, help="a folder (default: csv in that of the study)")
    collecting.set_defaults(do=collect)
    drawing = commands.add_parser("draw")
    drawing.add_argument("csv", type=Path, help="the folder that `collect` wrote")
    drawing.add_argument("--out", type=Path, default=Path("docs"), help="where figures go (%(default)s)")
    drawing.set_defaults(do=draw)
    args = parser.parse_args(argv)
    try:
        args.do(args)
    except (ArithmeticError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"study.py: error: {one_line(error)}") from error
    except KeyboardInterrupt:
        raise SystemExit("study.py: stopped; the same command goes on") from None


if __name__ == "__main__":
    main()
