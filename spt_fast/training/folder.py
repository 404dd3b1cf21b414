"""The folder of a run: which files it may hold, who may write into it, and what it can go on from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from torch import Tensor

from spt_fast.prototypes.result import Prototypes
from spt_fast.support.arguments import check_bool
from spt_fast.support.distributed import ALONE, Processes
from spt_fast.support.files import read_safetensors, remove_leftovers, write_bytes, write_safetensors
from spt_fast.support.locks import folder_lock
from spt_fast.support.results import result_folder
from spt_fast.training.checkpoint import CHECKPOINT_NAME, Checkpoint
from spt_fast.training.evaluation import CLASSES_NAME, CONFUSION_NAME

RUN_NAME = "run.yaml"
PROTOTYPES_NAME = "prototypes.safetensors"
START_NAME = "start.safetensors"
TUNED_NAME = "tuned.safetensors"
EMA_NAME = "ema.safetensors"
HISTORY_NAME = "train.csv"
FIGURE_NAME = "train.png"
NMI_NAME = "nmi.csv"
NMI_FIGURE_NAME = "nmi.png"
TEST_NAME = "test.csv"
TEST_CLASSES_NAME = f"test-{CLASSES_NAME}"
TEST_CONFUSION_NAME = f"test-{CONFUSION_NAME}"
# All that a run may write; what it was not asked for it leaves out.
RESULT_NAMES = (
    TUNED_NAME, EMA_NAME, HISTORY_NAME, CLASSES_NAME, CONFUSION_NAME, NMI_NAME, TEST_NAME, TEST_CLASSES_NAME,
    TEST_CONFUSION_NAME, FIGURE_NAME, NMI_FIGURE_NAME,
)  # fmt: skip
FILE_NAMES = (CHECKPOINT_NAME, RUN_NAME, PROTOTYPES_NAME, START_NAME, *RESULT_NAMES)
TENSORBOARD_NAME = "tensorboard"
_START_KIND = "prompt_start"


class RunFolder:
    """The folder of a run while it is open. All ranks have one; rank 0 alone reads and writes files.

    What a run starts from is written before its first checkpoint, and what comes out of an epoch before the
    checkpoint after it: a checkpoint is never newer than the other files.

    Attributes:
        path: the folder.
        processes: those that train together.
        checkpoint: what to go on from; None for a run that starts.
    """

    def __init__(self, path: Path, processes: Processes, checkpoint: Checkpoint | None) -> None:
        self.path = path
        self.processes = processes
        self.checkpoint = checkpoint
        # Whether files in the folder are those of this run, and whether it began here and now.
        self._is_ours, self._begins = checkpoint is not None, False

    def __getitem__(self, name: str) -> Path:
        return self.path / name

    def write(self, contents: Mapping[str, bytes]) -> None:
        """Write files by their names, each whole or not at all, over older ones; all ranks call it."""

        def write() -> None:
            for name, content in contents.items():
                write_bytes(self[name], content, overwrite=True)

        self.processes.on_rank_0(write)

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Write it; from then on the run can go on from there. All ranks call it."""
        self.processes.on_rank_0(lambda: checkpoint.write(self[CHECKPOINT_NAME]))
        self.checkpoint = checkpoint

    def start(self, *, overwrite: bool) -> None:
        """Take the folder for a run that starts; with `overwrite`, all of an older one is removed."""
        self._is_ours = self._begins = True
        if overwrite:
            self.processes.on_rank_0(self._clear)

    def discard_a_start(self) -> None:
        """Remove the files of a run that began here and has not made a step; on rank 0.

        What another process has left stays: the next one goes on from there.
        """
        if self._begins and self.processes.rank == 0 and not self.what_is_kept():
            self._clear()

    def write_start(self, prompts: Prototypes | Tensor) -> None:
        """Keep what prompts start from, where the run built it; all ranks call it."""

        def write() -> None:
            if isinstance(prompts, Prototypes):
                prompts.save(self[PROTOTYPES_NAME], overwrite=True)
            else:
                write_safetensors(
                    self[START_NAME], {"prompts": prompts}, {}, kind=_START_KIND, overwrite=True
                )

        self.processes.on_rank_0(write)

    def kept_start(self) -> Prototypes | Tensor | None:
        """What `write_start` kept; None where the run starts now, or built nothing. On every rank."""
        found: Prototypes | Tensor | None = None
        with self.processes.together():
            if self.checkpoint is not None and self.processes.rank == 0:
                if self[PROTOTYPES_NAME].exists():
                    found = Prototypes.load(self[PROTOTYPES_NAME])
                elif self[START_NAME].exists():
                    found = read_safetensors(self[START_NAME], kind=_START_KIND)[0]["prompts"]
        return self.processes.gather(found)[0]

    def paths(self) -> dict[str, Path]:
        """The files of the run that are there, by name, on every rank."""
        there = [name for name in FILE_NAMES if os.path.lexists(self[name])]
        return {name: self[name] for name in self.processes.gather(there)[0]}

    def what_is_kept(self) -> str:
        """How far the run is on disk, for a message about its end; empty where no step is kept."""
        # Read, as what ended the run may have ended the note of what was written, too.
        try:
            found = Checkpoint.read(self[CHECKPOINT_NAME]) if self._is_ours else None
        except FileNotFoundError:
            found = None
        progress = "" if found is None else _progress(found)
        return f"{self.path} holds the run up to {progress}" if progress else ""

    def _clear(self) -> None:
        # The checkpoint first: nobody shall go on with half of a run.
        for name in FILE_NAMES:
            self[name].unlink(missing_ok=True)
        events = self[TENSORBOARD_NAME]
        for path in events.glob("events.out.tfevents.*"):
            path.unlink()
        with suppress(OSError):
            events.rmdir()


@contextmanager
def run_folder(
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    processes: Processes = ALONE,
) -> Iterator[RunFolder]:
    """The folder `out`, made if need be, for this run alone while the context is open.

    Folders made here that are still empty at the end, as after an error, are removed.

    Args:
        resume: go on with the run in it; without one, start.
        overwrite: start, and replace what a run has left there.
        processes: those that train together; errors of rank 0 are raised by all of them.

    Raises:
        TypeError: `out` is no name.
        FileExistsError: there are results, and neither `resume` nor `overwrite`; or `resume`, and there is
            no checkpoint beside them.
        ValueError: both are given, another run writes there now, or its checkpoint cannot be read.
        OSError: the folder cannot be written into.
    """
    if check_bool("resume", resume) and check_bool("overwrite", overwrite):
        raise ValueError("resume goes on with what is in out, and overwrite replaces it: give one of them")
    if not isinstance(out, str | os.PathLike):
        raise TypeError(f"out must be the name of a folder, a string or a Path, got {out!r}")
    folder = Path(out)
    with ExitStack() as stack:
        found: Checkpoint | None = None
        with processes.together():
            if processes.rank == 0:
                found = stack.enter_context(_opened(folder, resume, overwrite))
        opened = RunFolder(folder, processes, processes.gather(found)[0] if resume else None)
        try:
            yield opened
        except BaseException:
            opened.discard_a_start()
            raise


@contextmanager
def _opened(folder: Path, resume: bool, overwrite: bool) -> Iterator[Checkpoint | None]:
    path = folder / CHECKPOINT_NAME

    def holds_run() -> bool:
        found = os.path.lexists(path)
        if found and not (resume or overwrite):
            raise FileExistsError(
                f"{folder} holds a run already; go on with it (resume=True, --resume), write over it "
                "(overwrite=True, --overwrite), or give another folder"
            )
        return found

    # Without a checkpoint, what a run starts from may be there: its process ended before its first step.
    names = FILE_NAMES if overwrite or holds_run() or not resume else (CHECKPOINT_NAME, *RESULT_NAMES)
    with result_folder(folder, names, overwrite=overwrite or holds_run()), folder_lock(folder):
        remove_leftovers(folder)
        # Once more, now that no other run can begin one.
        yield Checkpoint.read(path) if holds_run() and resume else None


def _progress(checkpoint: Checkpoint) -> str:
    epoch, step = (checkpoint.trainer.get(name, 0) for name in ("epoch", "step"))
    """ "epoch 3, step 12 of the next one"; empty at the start."""
    steps = f"step {step} of epoch {epoch + 1}"
    return f"epoch {epoch}" * bool(epoch) + ", " * bool(epoch and step) + steps * bool(step)
