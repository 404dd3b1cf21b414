"""Forks itself for each script that it is asked to run, so that the tests import torch in one process only.

    python fork_server.py FOLDER

Reads a JSON object a line: the text of a script, its arguments, its folder and its seconds to live. A fork of
this process runs it there as `python -c` would, with one thread; its output goes to FOLDER/stdout and
FOLDER/stderr. The exit code is printed, negative for a signal.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from PIL import Image

# What scripts import, some of it late: what is missing here, every rank and run of theirs imports for itself.
PRELOADED = (
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_pdf",
    "matplotlib.projections",
    "spt_fast.commands.main",
    "spt_fast.data.images",
    "spt_fast.plots.training_figures",
    "spt_fast.training.run",
    "timm.optim",
    "torch.distributed.fsdp",
    "torch.distributed.launcher",
)


def become(script: str, arguments: list[str], folder: str, seconds: int, output: Path) -> None:
    """Run `script` in this process, a fork, as if it had been started for it."""
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / stream, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(folder)
    signal.alarm(seconds)
    sys.argv[:] = ["-c", *arguments]
    names: dict[str, Any] = vars(sys.modules["__main__"])
    exec(compile(script, "<script>", "exec", dont_inherit=True), names)


def main() -> None:
    output = Path(sys.argv[1])
    for name in PRELOADED:
        importlib.import_module(name)
    Image.init()
    answers = os.fdopen(os.dup(1), "w")
    # What is here now is never garbage: collectors of the forks need not look at it, and so copy it.
    gc.freeze()
    while request := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            answers.close()
            become(**json.loads(request), output=output)
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


if __name__ == "__main__":
    main()
