"""A sweep that is killed at random moments ends with the table of one that is not, but for seconds."""

from __future__ import annotations

import re

# All sweeps are forks of one process that has imported everything; images and backbone are few and tiny.
_SCRIPT = r"""
import os, random, signal, sys, time
import torch
from timm.models.vision_transformer import VisionTransformer
from spt_fast.data import shipped, names
from spt_fast.study import read_runs
from spt_fast.study.sweeps import execute
from spt_fast.study.sweeps.sweep import sweep

torch.set_num_threads(1)
kills, seed = int(sys.argv[1]), int(sys.argv[2])
SPLITS = {split: shipped.load_digits(split) for split in ("train", "val", "test")}
names.load_digits = lambda split: tuple(tensor[:40] for tensor in SPLITS[split])

def opened(name, **options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
    return VisionTransformer(**sizes).eval()

execute.open_model = opened
PLAN = {
    "model": "tiny",
    "data": "digits",
    "recipe": {"epochs": 2, "batch_size": 20},
    "arms": {
        "last": {"method": "spt-deep", "num_prompts": 3, "prototypes": {"source": "last"}},
        "linear": {},
    },
    "search": {"lr": [1e-3, 3e-3, 1e-2]},
    "images": {"share": 0.5},
    "seeds": [0, 1, 2],
    "nmi": True,
}

def start(out):
    child = os.fork()
    if not child:
        code = 1
        try:
            sweep(PLAN, out=out, say=lambda line: None)
            code = 0
        finally:
            os._exit(code)
    return child

def rows():
    return len(read_runs("broken/runs.csv")) if os.path.exists("broken/runs.csv") else 0

began = time.monotonic()
assert os.waitpid(start("unbroken"), 0)[1] == 0
whole = time.monotonic() - began
draw = random.Random(seed)
for number in range(kills):
    before = rows()
    child = start("broken")
    # Some moment of the run after the first one that it finishes; well before twelve runs are through.
    while rows() == before:
        time.sleep(0.01)
    time.sleep(draw.uniform(0, whole / 24))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it ended before it was killed"
    print(f"killed with {rows()} rows", flush=True)
assert os.waitpid(start("broken"), 0)[1] == 0
"""
_KILLS = 5


def test_a_sweep_killed_five_times_ends_with_the_same_table(tmp_path, run_script):
    done = run_script(_SCRIPT, tmp_path, str(_KILLS), "0", seconds=500)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [int(count) for count in re.findall(r"killed with (\d+) rows", done.stdout)]
    assert len(rows) == _KILLS
    assert rows == sorted(set(rows))
    unbroken, broken = (_without_seconds(tmp_path / name / "runs.csv") for name in ("unbroken", "broken"))
    assert broken == unbroken
    assert len(unbroken) == 1 + 2 * (3 + 3)
    assert not list((tmp_path / "broken").glob("runs/*/checkpoint.pt"))
    finals = [line[0] for line in unbroken if line[1] == "final"]
    for name in finals:
        files = [tmp_path / out / "runs" / name / "tuned.safetensors" for out in ("unbroken", "broken")]
        assert files[0].read_bytes() == files[1].read_bytes()


def _without_seconds(path):
    """The cells of each line; of seconds only whether there are any."""
    lines = [line.split(",") for line in path.read_text().splitlines()]
    places = [place for place, name in enumerate(lines[0]) if name.endswith("seconds")]
    return [
        [str(bool(cell)) if place in places and number else cell for place, cell in enumerate(line)]
        for number, line in enumerate(lines)
    ]
