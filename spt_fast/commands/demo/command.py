"""The demo's options, and the call of what they ask for."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from spt_fast.commands import options

if TYPE_CHECKING:
    from spt_fast.commands.options import Commands


def add(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "demo",
        help="tune the shipped backbone on a few shipped images, offline",
        description="SPT-Deep, VPT-Deep and a linear probe on a few handwritten digits, shipped backbone: "
        "prints a table, writes figures (spt_fast_demo.png, spt_fast_demo_nmi.png) and numbers "
        "(spt_fast_demo.json, spt_fast_demo_nmi.csv). Minutes on two cores.",
    )
    options.add_folder(parser, default=Path())
    parser.add_argument("--epochs", type=int, help="of tuning, instead of the documented budget")
    parser.add_argument("--seeds", type=int, help="number of seeds, instead of the documented budget")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Say what will be run, run it, and print the table."""
    from spt_fast.commands.demo.budget import Budget
    from spt_fast.commands.demo.compare import introduction, run_demo
    from spt_fast.commands.demo.report import FILE_NAMES
    from spt_fast.support.results import result_paths

    budget = Budget().scaled(epochs=args.epochs, seeds=args.seeds)
    # The introduction is for those whose files can be written.
    result_paths(args.out, FILE_NAMES, overwrite=args.overwrite)
    print(introduction(budget), flush=True)
    print(run_demo(args.out, overwrite=args.overwrite, budget=budget).summary())
