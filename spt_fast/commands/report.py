"""`spt-fast report`: a study as one HTML page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spt_fast.commands import options

if TYPE_CHECKING:
    from spt_fast.commands.options import Commands


def add(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "report",
        help="a study as one HTML page",
        description="Tables, curves, NMI, CKA, confusion, and the patches nearest to prompts before and "
        "after tuning, in one HTML page that asks for nothing else. What cannot be shown is said in the "
        "page and on stderr.",
        epilog="example: spt-fast report study --root data",
    )
    parser.add_argument(
        "runs", type=Path, metavar="RUNS", help="folder of `spt-fast sweep`, or the runs.csv in it"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page (default: report.html beside runs.csv)"
    )
    parser.add_argument("--overwrite", action="store_true", help="write over FILE if it is there")
    images = parser.add_argument_group("prompts", "for these, model and images are opened")
    images.add_argument(
        "--no-patches", dest="patches", action="store_false", help="leave out CKA and nearest patches"
    )
    images.add_argument(
        "--root", type=Path, metavar="FOLDER", help="where the data lie (default: as sweep.yaml says)"
    )
    options.add_limit(images, default=512)
    images.add_argument("--workers", type=int, default=4)
    options.add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the page, and say what it lacks."""
    from spt_fast.study.report import write_report

    report = write_report(
        args.runs,
        args.out,
        overwrite=args.overwrite,
        patches=args.patches,
        root=args.root,
        max_images=args.max_images,
        device=options.find_device(args),
        workers=args.workers,
    )
    for line in report.missing:
        print(f"spt-fast report: {line}", file=sys.stderr)
    print(f"wrote {report.path} ({report.size / 1000:,.0f} kB)")
