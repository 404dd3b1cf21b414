"""`spt-fast`, which is `python -m spt_fast`: a process from its first import to its exit code."""

import sys
from typing import NoReturn

from spt_fast.support import console, interrupts


def command() -> NoReturn:
    """Run the command that `sys.argv` names, and leave."""
    interrupts.leave_at_once()
    console.accept_any_text()
    from spt_fast.commands.main import main

    sys.exit(main())


if __name__ == "__main__":
    command()
