"""The command `spt-fast`: puts the commands into one parser, runs one, and turns errors into exit codes.

Exit codes: 0 done, 1 `doctor --check` found something wrong, 2 bad input (one line on stderr says what),
130 interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

from spt_fast import __version__
from spt_fast.commands import doctor, nmi, predict, prototypes, report, sweep, table, train
from spt_fast.commands import eval as eval_command
from spt_fast.commands.demo import command as demo
from spt_fast.support.console import CLOSED_PIPE, ClosedPipeError, flushed_output
from spt_fast.support.errors import one_line
from spt_fast.support.interrupts import INTERRUPTED, MESSAGE, raised_once

BAD_INPUT = 2
# Each has `add(commands)`, which declares its options, and `run(args)`, which may return an exit code. A
# command that torchrun may start in several processes says so: `set_defaults(several_processes=True)`.
COMMANDS = (demo, prototypes, train, eval_command, predict, sweep, table, report, nmi, doctor)
# Raised with a message for the user; of others the class is part of the message.
_EXPECTED = (ArithmeticError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name; returns the exit code."""
    args = argparse.Namespace(command="", traceback=False)
    try:
        with flushed_output():
            build_parser().parse_args(argv, args)
            _import_libraries()
            with raised_once():
                return _run(args)
    except KeyboardInterrupt:
        _say(MESSAGE)
        return INTERRUPTED
    except ClosedPipeError:
        return CLOSED_PIPE
    except Exception as error:
        if args.traceback:
            raise
        name = f"spt-fast {args.command}".rstrip()
        _say(f"{name}: error: {_explain(error)}")
        return BAD_INPUT


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of its result is the function of the command that was named."""
    parser = _Parser(prog="spt-fast", description="Self-Prompt Tuning of Vision Transformers.")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.add_argument("--version", action="version", version=f"spt-fast {__version__}")
    parser.set_defaults(several_processes=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Refuses an option that its command does not have with the names of those that are like it."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        known, others = super().parse_known_args(args, namespace)
        for word in others:
            name = word.partition("=")[0]
            if name.startswith("--"):
                close = difflib.get_close_matches(name, [*self._option_string_actions], cutoff=0.7)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                self.error(f"unrecognized arguments: {' '.join(others)}{hint}")
        return known, others


def _import_libraries() -> None:
    """Load what takes seconds, before there is anything that Ctrl-C would have to clean up."""
    for name in ("torch", "timm"):
        # The command itself says what it misses.
        with suppress(ImportError):
            import_module(name)


def _run(args: argparse.Namespace) -> int:
    from spt_fast.support.distributed import check_single_process

    if not args.several_processes:
        check_single_process(args.command)
    code: int | None = args.run(args)
    return code or 0


def _explain(error: Exception) -> str:
    message = one_line(error)
    if isinstance(error, _EXPECTED):
        return message
    return f"{type(error).__name__}: {message} (spt-fast --traceback ... shows where)"


def _say(line: str) -> None:
    # There may be nobody to read that either.
    with suppress(OSError):
        print(line, file=sys.stderr)
