"""The command `spt-fast`: puts the commands into one parser, runs one, and turns errors into exit codes.

Exit codes: 0 done, 1 `doctor --check` found something wrong, 2 bad input (one line on stderr says what),
130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from spt_fast.commands import doctor, nmi, predict, prototypes, train
from spt_fast.commands import eval as eval_command
from spt_fast.commands.demo import command as demo
from spt_fast.support.errors import one_line

BAD_INPUT = 2
INTERRUPTED = 130
# Each has `add(commands)`, which declares its options, and `run(args)`, which may return an exit code.
COMMANDS = (demo, prototypes, train, eval_command, predict, nmi, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int | None = args.run(args)
    except KeyboardInterrupt:
        print("spt-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if args.traceback:
            raise
        print(f"spt-fast {args.command}: error: {one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    return code or 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of its result is the function of the command that was named."""
    parser = argparse.ArgumentParser(
        prog="spt-fast", description="Self-Prompt Tuning of Vision Transformers."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
