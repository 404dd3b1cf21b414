"""The study of docs/study.md: what the paper compares, on seven small tasks under one budget.

    python examples/study.py run --root vtab-folder [--model NAME] [--jobs 2] [--max-minutes X] [--out study]
    python examples/study.py collect study [--csv study/csv]
    python examples/study.py draw study/csv [--out study/csv]

`run` does the sweeps of examples/study/*.yaml in their order, each into a folder of its own below OUT, and
goes on where it was stopped. `collect` copies their tables, and the NMI of their runs, into one folder;
`draw` makes the figures of it. The tables are those of `spt-fast table FOLDER/methods.csv`, of each part.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from spt_fast.plots import accuracy_against_prompt_length, nmi_over_epochs
from spt_fast.plots.lines import draw_line, finish, styles
from spt_fast.plots.panels import Panels, new_figure, tidy
from spt_fast.study import sweep
from spt_fast.study.runs import RUNS_FOLDER, RUNS_NAME, SWEEP_NAME, Row, read_runs, read_values
from spt_fast.study.statistics import paired_difference
from spt_fast.study.sweeps.record import without_root
from spt_fast.study.sweeps.sweep import read_plan
from spt_fast.study.tables.arms import Arm, arms_of
from spt_fast.support.arguments import check_number
from spt_fast.support.errors import one_line
from spt_fast.support.files import write_bytes
from spt_fast.support.interrupts import INTERRUPTED
from spt_fast.support.tables import csv_bytes
from spt_fast.support.yaml_text import read_yaml, write_yaml
from spt_fast.training.folder import NMI_NAME

FOLDER = Path(__file__).parent / "study"
CSV_FOLDER = "csv"
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
    minutes = args.max_minutes
    if minutes is not None:
        check_number("--max-minutes", minutes, above=0)
    started = time.monotonic()
    for number, part in enumerate(args.parts):
        left = None if minutes is None else minutes - (time.monotonic() - started) / 60
        if left is not None and left <= 0:
            print(f"the time is over; not begun: {', '.join(args.parts[number:])}")
            return
        plan = {**read_plan(FOLDER / f"{part}.yaml"), "model": args.model, "root": args.root}
        print(f"== {part}", flush=True)
        out = Path(args.out) / part
        sweep(plan, out=out, jobs=args.jobs, max_minutes=left, dry_run=args.dry_run)


def collect(args: argparse.Namespace) -> None:
    """The tables of the runs, and of their NMI, as the mean of the blocks; nothing where one is damaged.

    Of runs whose folders are gone, which another machine did, the NMI that was collected before is kept.
    """
    out = args.csv or args.study / CSV_FOLDER
    parts = [part for part in PARTS if (args.study / part / RUNS_NAME).exists()]
    if not parts:
        raise FileNotFoundError(f"{args.study} has no {RUNS_NAME} in a folder of {', '.join(PARTS)}")
    files: dict[str, bytes] = {}
    for part in parts:
        files |= _collected(part, args.study / part, out)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_bytes(out / name, content, overwrite=True)
        print(f"wrote {out / name}")


def _collected(part: str, folder: Path, out: Path) -> dict[str, bytes]:
    """{name: content} of a part's files, without the place where the data lay."""
    rows = read_runs(folder / RUNS_NAME)
    record = read_yaml((folder / SWEEP_NAME).read_text(encoding="utf-8"), SWEEP_NAME)
    files = {
        f"{part}.csv": (folder / RUNS_NAME).read_bytes(),
        f"{part}.yaml": write_yaml(without_root(record)).encode(),
    }
    nmi = _collected_before(_nmi_file(out, part))
    for row in rows:
        if lines := _nmi_lines(row, folder / RUNS_FOLDER / row.run / NMI_NAME):
            nmi[lines[0][:3]] = lines
    if nmi:
        lines = [line for of_run in nmi.values() for line in of_run]
        files[_nmi_file(out, part).name] = csv_bytes(NMI_COLUMNS, lines)
    return files


def _collected_before(path: Path) -> dict[tuple[str, ...], list[tuple[str, ...]]]:
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
            try:
                steps.setdefault(int(line["step"]), []).append(float(line["nmi"]))
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{path} must have the columns step and nmi, got {line}") from None
    return [
        (row.task, SHOWN[row.arm], str(row.seed), str(step), "0", f"{fmean(values):.5g}")
        for step, values in steps.items()
    ]


def draw(args: argparse.Namespace) -> None:
    """The figures of docs/study.md, of as many parts as there are."""
    tables = {part: read_runs(path) for part in PARTS if (path := args.csv / f"{part}.csv").exists()}
    if not tables:
        raise FileNotFoundError(
            f"{args.csv} has none of {', '.join(f'{part}.csv' for part in PARTS)}; give a folder that "
            "`collect` wrote"
        )
    figures: dict[str, Any] = {}
    for part, reference in REFERENCES.items():
        if part in tables:
            figures[part] = _differences(tables[part], reference) or f"no run of {reference} is tested"
    for part, x, figure in (
        ("shares", _share, _against_share),
        ("lengths", _length, accuracy_against_prompt_length),
    ):
        if part in tables:
            curves = _curves(part, tables, x)
            figures[part] = "no task has all arms, seeds and values yet"
            if curves is not None:
                figures[part] = figure(curves.lines)
                figures[part].axes[0].set_ylabel(f"accuracy (%), mean of {_of_tasks(curves.tasks)}")
    for part in tables:
        if (path := _nmi_file(args.csv, part)).exists():
            figures[f"{part}_nmi"] = nmi_over_epochs(path)
    out = args.out or args.csv
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = out / f"study_{name}.png"
        if isinstance(figure, str):
            print(f"{path}: not drawn, as {figure}")
        else:
            figure.savefig(path)
            print(f"wrote {path}")


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
    fewer = {arm.name: f" ({_of_tasks(len(arm.runs))})" for arm in arms if len(arm.runs) < most}
    axes.set_yticks(range(len(lines)), [arm.name + fewer.get(arm.name, "") for arm, _ in lines])
    axes.set_xlabel(f"test accuracy above {against} on {_of_tasks(most)}, percentage points")
    tidy(axes)
    return figure


def _of_task(arm: Arm, task: str) -> float:
    return fmean(arm.accuracies()[task].values())


class Curves(NamedTuple):
    """{arm: (values of x, accuracies [R, X])}, a line of R for each seed; each the mean of so many tasks."""

    lines: dict[str, tuple[list[float], list[list[float]]]]
    tasks: int


def _curves(part: str, tables: Mapping[str, Sequence[Row]], x: Callable[[Row], float]) -> Curves | None:
    """Accuracy of each arm of a part against what it compares; None where that is no curve yet.

    Tasks that are not done by all arms with all seeds and values are left out: of others means would compare
    easy tasks with hard ones. The value of WHOLE is added where it has all of that.
    """
    found = _accuracies(tables[part], x)
    arms, seeds, places, tasks = ([*dict.fromkeys(key[axis] for key in found)] for axis in range(4))
    done = [task for task in tasks if found.keys() >= {*product(arms, seeds, places, [task])}]
    about = {(row.backbone, row.epochs) for row in tables[part]}
    whole = _accuracies([row for row in tables.get(WHOLE, ()) if (row.backbone, row.epochs) in about], x)
    for place in dict.fromkeys(place for _, _, place, _ in whole):
        if place not in places and whole.keys() >= {*product(arms, seeds, [place], done)}:
            found, places = {**found, **whole}, [*places, place]
    if not done or len(places) == 1:
        return None
    places.sort()
    lines = {}
    for arm in arms:
        by_seed = [[[found[arm, seed, each, task] for task in done] for each in places] for seed in seeds]
        lines[SHOWN.get(arm, arm)] = (places, np.mean(by_seed, axis=2).tolist())
    return Curves(lines, len(done))


def _accuracies(rows: Sequence[Row], x: Callable[[Row], float]) -> dict[tuple[str, int, float, str], float]:
    """{(arm, seed, value of x, task): test accuracy} of the runs that were tested."""
    tested = [(row, row.test_accuracy) for row in rows if row.test_accuracy is not None]
    return {(row.arm, row.seed, x(row), row.task): accuracy for row, accuracy in tested}


def _length(row: Row) -> float:
    return float(row.num_prompts or 0)


def _share(row: Row) -> float:
    """Of the images that a run learned from."""
    return float(read_values(row.options).get("share", 1))


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
    axes.set_xlabel("share of the images to learn from (%)")
    return finish(Panels([axes], own=True))


def _of_tasks(count: int) -> str:
    return f"{count} task" if count == 1 else f"{count} tasks"


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
    running.add_argument("--dry-run", action="store_true", help="say which runs there are, and do nothing")
    running.set_defaults(do=run)
    collecting = commands.add_parser("collect")
    collecting.add_argument("study", type=Path, help="the folder that `run` wrote")
    collecting.add_argument("--csv", type=Path, help="a folder (default: csv in that of the study)")
    collecting.set_defaults(do=collect)
    drawing = commands.add_parser("draw")
    drawing.add_argument("csv", type=Path, help="the folder that `collect` wrote")
    drawing.add_argument("--out", type=Path, help="where figures go (default: beside the tables)")
    drawing.set_defaults(do=draw)
    args = parser.parse_args(argv)
    try:
        args.do(args)
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"study.py: error: {one_line(error)}") from error
    except KeyboardInterrupt:
        print("study.py: interrupted; the same command goes on", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
