"""Tables and plots with ratios from the JSON files of pytest-benchmark.

    pytest benchmarks/ --benchmark-only --benchmark-json bench.json
    python -m benchmarks.report bench.json                  the tables, as Markdown
    python -m benchmarks.report bench.json --out folder     also report.md and a bar plot per group

Times are medians; a ratio is a side's time over that of the baseline, so above 1 the baseline is faster. The
baseline is the first side whose name starts with `spt_fast` or `ours`, unless --baseline names another; where
a group has none of these it is the fastest side. Groups of several files are kept apart by file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spt_fast.plots.panels import new_figure
from spt_fast.support.results import matplotlib_missing, png, result_folder, write_results

OURS = ("spt_fast", "ours")
UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
REPORT_NAME = "report.md"


@dataclass(frozen=True)
class Side:
    """One benchmark: times in seconds, and what it noted beside them."""

    label: str
    median: float
    spread: float  # interquartile range
    rounds: int
    notes: dict[str, str]


@dataclass(frozen=True)
class Group:
    """Sides that were measured on the same work."""

    title: str
    sides: list[Side]
    notes: dict[str, str]  # the same for all sides

    def baseline(self, wanted: str | None) -> Side:
        """The side that ratios are against."""
        chosen = [side for side in self.sides if side.label == wanted]
        ours = [side for side in self.sides if side.label.startswith(OURS)]
        return (chosen or ours or [min(self.sides, key=lambda side: side.median)])[0]


def read_groups(path: Path) -> tuple[list[Group], str]:
    """The groups of a file in its order, and a line on machine and date.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON of pytest-benchmark, or holds no benchmark.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        benchmarks = content["benchmarks"]
        members: dict[str, list[dict[str, Any]]] = {}
        for benchmark in benchmarks:
            members.setdefault(benchmark.get("group") or "no group", []).append(benchmark)
        groups = [_group(title, sides) for title, sides in members.items()]
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} was not written by pytest-benchmark ({error!r})") from error
    if not groups:
        raise ValueError(f"{path} holds no benchmark")
    return groups, _origin(content)


def markdown(groups: list[Group], baseline: str | None = None) -> str:
    """A table per group."""
    return "\n\n".join(_table(group, baseline) for group in groups)


def bar_plot(group: Group, baseline: str | None = None) -> bytes:
    """Times of a group as bars, with the spread and the ratio; PNG."""
    ours = group.baseline(baseline)
    scale, unit = _unit(group)
    # The first side on top, as in the table.
    sides = group.sides[::-1]
    figure = new_figure(6.4, 1.0 + 0.42 * len(sides))
    axes = figure.subplots()
    times = [side.median / scale for side in sides]
    bars = axes.barh(
        [side.label for side in sides],
        times,
        xerr=[side.spread / scale / 2 for side in sides],
        color=["#D55E00" if side is ours else "#7A9CB8" for side in sides],
        error_kw={"ecolor": "#333333", "elinewidth": 1, "capsize": 2},
        height=0.65,
    )
    texts = [
        f"{time:.3g} {unit}, {side.median / ours.median:.2f}x"
        for time, side in zip(times, sides, strict=True)
    ]
    axes.bar_label(bars, texts, padding=6, fontsize=8)
    axes.set_xlim(0, 1.35 * max(times))
    axes.set_xlabel(f"median time ({unit}), bar: interquartile range")
    axes.set_title(group.title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return png(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where report.md and plots go")
    parser.add_argument("--overwrite", action="store_true", help="write over these files if they are there")
    parser.add_argument("--baseline", metavar="SIDE", help="what ratios are against (default: spt_fast)")
    args = parser.parse_args(argv)
    try:
        _run(args.files, args.out, args.baseline, args.overwrite)
    except (OSError, ValueError) as error:
        print(f"benchmarks.report: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(files: list[Path], out: Path | None, baseline: str | None, overwrite: bool) -> None:
    sections, named = [], {}
    for file in files:
        groups, origin = read_groups(file)
        sections.append(f"# {file.stem}\n\n{origin}\n\n{markdown(groups, baseline)}\n")
        prefix = f"{file.stem} " if len(files) > 1 else ""
        for group in groups:
            named[_free_name(prefix + group.title, named)] = group
    text = "\n".join(sections)
    print(text, end="")
    if out is None:
        return
    with result_folder(out, [REPORT_NAME, *named], overwrite=overwrite) as paths:
        contents = {REPORT_NAME: text.encode()}
        contents |= {name: bar_plot(group, baseline) for name, group in named.items() if name in paths}
        for path in write_results(paths, contents, overwrite=overwrite):
            print(f"wrote {path}")
    if matplotlib_missing():
        print(matplotlib_missing())


def _group(title: str, benchmarks: list[dict[str, Any]]) -> Group:
    params = [benchmark.get("params") or {} for benchmark in benchmarks]
    varying = [key for key in params[0] if len({str(p.get(key)) for p in params}) > 1]
    all_notes = [{str(k): str(v) for k, v in (b.get("extra_info") or {}).items()} for b in benchmarks]
    shared = {k: v for k, v in all_notes[0].items() if all(notes.get(k) == v for notes in all_notes)}
    sides = []
    for benchmark, own, notes in zip(benchmarks, params, all_notes, strict=True):
        stats = benchmark["stats"]
        sides.append(
            Side(
                ", ".join(str(own.get(key)) for key in varying) or benchmark["name"],
                float(stats["median"]),
                float(stats["iqr"]),
                int(stats["rounds"]),
                {k: v for k, v in notes.items() if k not in shared},
            )
        )
    return Group(title, sides, shared)


def _table(group: Group, baseline: str | None) -> str:
    ours = group.baseline(baseline)
    scale, unit = _unit(group)
    columns = list(dict.fromkeys(key for side in group.sides for key in side.notes))
    header = ["side", f"median {unit}", f"± {unit}", f"time / {ours.label}", "rounds", *columns]
    rows = [
        [
            side.label,
            f"{side.median / scale:.4g}",
            f"{side.spread / scale / 2:.2g}",
            f"{side.median / ours.median:.2f}",
            str(side.rounds),
            *(side.notes.get(key, "") for key in columns),
        ]
        for side in group.sides
    ]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (header, *rows)]
    lines.insert(1, "| --- |" + " ---: |" * (len(header) - 1))
    notes = ", ".join(f"{key} {value}" for key, value in group.notes.items())
    return "\n".join([f"## {group.title}", "", *([notes, ""] if notes else []), *lines])


def _unit(group: Group) -> tuple[float, str]:
    """The largest unit in which the fastest side is at least 1."""
    fastest = min(side.median for side in group.sides)
    return next((unit for unit in UNITS if fastest >= unit[0]), UNITS[-1])


def _origin(content: dict[str, Any]) -> str:
    machine = content.get("machine_info") or {}
    cpu = (machine.get("cpu") or {}).get("brand_raw") or machine.get("processor") or machine.get("machine")
    facts = (
        cpu,
        machine.get("python_version") and f"Python {machine['python_version']}",
        content.get("datetime"),
    )
    return ", ".join(str(fact) for fact in facts if fact) or "machine unknown"


def _free_name(title: str, taken: dict[str, Group]) -> str:
    """A file name for a plot that no other plot has."""
    stem = re.sub(r"[^a-z0-9]+", "_", title.lower()).strip("_") or "group"
    names = (f"{stem}{suffix}.png" for suffix in ("", *(f"_{i}" for i in range(2, len(taken) + 3))))
    return next(name for name in names if name not in taken)


if __name__ == "__main__":
    sys.exit(main())
