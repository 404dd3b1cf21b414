"""`spt-fast table`: runs of a study as tables, beside what the paper has printed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spt_fast.commands.options import Commands

# As in spt_fast.study, which would load torch.
_FORMATS = ("markdown", "latex", "csv")
_BACKBONES = ("mae", "moco", "supervised")


def add(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "table",
        help="runs of a study as tables, beside the paper's",
        description="Tables of a study's final runs: its arms by its tasks, or Tables 1 to 4 and S2 to S4 of "
        "the paper with our runs below the published rows.",
        epilog="example: spt-fast table study --table comparison 2 --out tables.md",
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUNS", help="folders of studies, or their runs.csv"
    )
    parser.add_argument(
        "--table",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="behind RUNS: comparison (default), 1, 2, 3, 4, s2, s3, s4, or several of them",
    )
    parser.add_argument(
        "--tasks", nargs="+", action="extend", metavar="TASK", help="behind RUNS: of these tasks alone"
    )
    parser.add_argument(
        "--format", choices=_FORMATS, default="markdown", help="of the tables (default: markdown)"
    )
    parser.add_argument(
        "--against",
        metavar="ARM",
        help="of comparison: the arm that others are compared with (default: vpt-deep, or else the first)",
    )
    parser.add_argument(
        "--backbone",
        choices=_BACKBONES,
        help="which backbone of the paper that of the runs is (default: by its name)",
    )
    parser.add_argument(
        "--published",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="rows of the paper and of later papers beside ours (default: yes)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables there, not to stdout")
    parser.add_argument("--overwrite", action="store_true", help="write over a file that is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the tables, or write them to a file."""
    from spt_fast.study.tables import TABLES, format_tables, make_tables, read_studies
    from spt_fast.support.files import check_output_path, write_bytes

    if args.overwrite and args.out is None:
        raise ValueError("overwrite is for the file of out, but no file is given")
    if args.out is not None:
        check_output_path(args.out, overwrite=args.overwrite)
    tables = make_tables(
        read_studies(args.runs),
        args.table or TABLES[:1],
        against=args.against,
        backbone=args.backbone,
        published=args.published,
        tasks=args.tasks,
    )
    text = format_tables(tables, args.format)
    if args.out is None:
        print(text, end="")
        return
    write_bytes(args.out, text.encode(), overwrite=args.overwrite)
    print(f"wrote {args.out}")
