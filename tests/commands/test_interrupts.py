"""Ctrl-C at any time: exit code 130, no traceback, no process and no half-written file left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from spt_fast.support.files import read_safetensors
from spt_fast.support.interrupts import raised_once
from spt_fast.training.checkpoint import Checkpoint

# Each runs in a process and a session of its own, forked from one that has imported everything, and sends
# SIGINT to its group when its moment comes, as a terminal does. It leaves as the command does.
_MOMENTS = r"""
import json, os, signal, sys
from pathlib import Path
import torch
from PIL import Image
import spt_fast.training, spt_fast.data.images
from spt_fast.__main__ import command

torch.set_num_threads(1)
folder = Path.cwd()

def ctrl_c():
    os.killpg(0, signal.SIGINT)

def before(owner, name, act):
    original = getattr(owner, name)
    def patched(*args, **options):
        act(*args)
        return original(*args, **options)
    setattr(owner, name, patched)

def at_call(owner, name, number, act):
    calls = []
    def count(*_):
        calls.append(1)
        if len(calls) == number:
            act()
    before(owner, name, count)

def at_step(number, act):
    at_call(torch.optim.AdamW, "step", number, act)

def at_image_7(path, *_):
    if str(path).endswith("7.png"):
        ctrl_c()

class Lost:
    def __del__(self):
        ctrl_c()
        sum(range(100))

def swallow():
    try:
        ctrl_c()
        sum(range(100))
    except BaseException:
        pass

MOMENTS = {
    "a worker starts": lambda: os.register_at_fork(after_in_child=ctrl_c),
    "a worker reads": lambda: before(Image, "open", at_image_7),
    "the second epoch": lambda: at_step(7, ctrl_c),
    # After run.yaml, the first checkpoint, the weights and the table: the checkpoint of the first epoch.
    "a file gets its name": lambda: at_call(os, "replace", 5, ctrl_c),
    "an object is deleted": lambda: at_step(2, Lost),
    "a module is imported": lambda: at_step(2, lambda: __import__("swallows")),
    "a library swallows it": lambda: at_step(2, swallow),
}
Path("swallows.py").write_text('''
import os, signal
try:
    os.killpg(0, signal.SIGINT)
    sum(range(100))
except BaseException:
    pass
''')
sys.path.insert(0, str(folder))

def start(name):
    place = folder / name.replace(" ", "_")
    place.mkdir()
    child = os.fork()
    if child:
        return child
    os.setsid()
    os.chdir(place)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(stream, os.O_CREAT | os.O_WRONLY), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["spt-fast", "train", "--model", "shipped", "--data", DATA]
    sys.argv += ["--method", "vpt-deep", "--num-prompts", "2"]
    sys.argv += ["--batch-size", "5", "--epochs", "100000", "--workers", "2", "--out", "out"]
    MOMENTS[name]()
    command()

def group(leader):
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group, *_ = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(its_group) == leader and state != "Z":
            yield int(stat.parent.name)

children = {name: start(name) for name in MOMENTS}
found = {}
for name, child in children.items():
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found[name] = {"code": code, "left": list(group(child))}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def outcomes(folders, tmp_path_factory, run_script):
    """Exit code, processes left and folder of each moment."""
    place = tmp_path_factory.mktemp("interrupted")
    done = run_script(f"DATA = {str(folders / 'train')!r}\n{_MOMENTS}", place)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: (each, place / name.replace(" ", "_")) for name, each in found.items()}


@pytest.mark.parametrize(
    "moment",
    [
        "a worker starts",
        "a worker reads",
        "the second epoch",
        "a file gets its name",
        "an object is deleted",
        "a module is imported",
        "a library swallows it",
    ],
)
def test_ctrl_c_when(moment, outcomes):
    found, place = outcomes[moment]
    errors = (place / "stderr").read_text()
    assert found["code"] == 130, errors[-3000:]
    assert found["left"] == []
    assert errors.count("spt-fast: interrupted") == 1
    assert "Traceback" not in errors
    assert "Exception ignored" not in errors
    files = sorted(path.name for path in place.glob("out/*"))
    if moment in ("the second epoch", "a library swallows it", "a file gets its name"):
        # What was being written is whole, too.
        assert files == ["checkpoint.pt", "run.yaml", "train.csv", "tuned.safetensors"]
        assert Checkpoint.read(place / "out" / "checkpoint.pt").trainer["epoch"] >= 1
        assert "out holds the run up to epoch" in errors
    else:
        assert not (place / "out").exists()
    for path in place.glob("out/*.safetensors"):
        read_safetensors(path, kind="prompted_vit")


def test_ctrl_c_during_imports(child_environment, tmp_path):
    """Python says on stderr what it has imported; torch takes seconds from its first module to its last."""
    command = ("nmi", "--model", "shipped", "--data", "digits", "--random", "2", "--out", "out")
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "spt_fast", *command],
        env=child_environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if line.rpartition("|")[2].strip().startswith("torch."):
            os.killpg(process.pid, signal.SIGINT)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 130
    assert "Traceback" not in rest
    assert "spt-fast: interrupted" in rest
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_wait_for_torch(child_environment, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "spt_fast", "train", "--help"],
        env=child_environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "usage: spt-fast train" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"spt_fast", "spt_fast.commands.main"} <= imported
    assert imported.isdisjoint({"torch", "timm", "numpy"})


def test_other_signals_and_handlers_are_as_before(ctrl_c):
    def mine(*_: object) -> None:
        pass

    signal.signal(signal.SIGINT, mine)
    before = signal.getsignal(signal.SIGALRM)
    with raised_once():
        assert signal.getsignal(signal.SIGINT) is not mine
    assert signal.getsignal(signal.SIGINT) is mine
    assert signal.getsignal(signal.SIGALRM) is before


def test_an_error_after_ctrl_c_is_ctrl_c(ctrl_c):
    def library() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            # As libraries do that take every exception in an import for a missing module.
            raise ImportError("no module") from None

    with pytest.raises(KeyboardInterrupt), raised_once():
        library()


def test_a_job_in_the_background_keeps_ignoring_ctrl_c(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with raised_once():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_a_second_signal_while_the_command_ends_says_nothing_more(run_script, tmp_path):
    done = run_script(
        """
import os, signal
from spt_fast.support import interrupts
# A job in the background is started with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupts.leave_at_once()
try:
    with interrupts.raised_once():
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(100))
except KeyboardInterrupt:
    os.kill(os.getpid(), signal.SIGINT)
    print("ended once")
""",
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended once\n", "")
