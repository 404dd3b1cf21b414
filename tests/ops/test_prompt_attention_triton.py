"""The Triton kernels of prompt_attention compiled ahead of time; what they compute: test_prompt_attention.py.

Kernels that run in the interpreter cannot be compiled, so that one process of its own compiles them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from torch.torch_version import TorchVersion as Version

import spt_fast
from spt_fast.ops import prompt_attention_tiles as rules

pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "triton_compiled.py"
# The tiles are chosen for Triton 3.8 and later. What 3.5 and 3.6 spill at most: docs/prompt-attention.md.
MOST_SPILLED = 0 if Version(version("triton")) >= Version("3.8") else 264
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Resources of each kernel for each architecture, as benchmarks/triton_compiled.py prints them."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # The script lies in the checkout; the package is the one imported here, installed or not.
    environment["PYTHONPATH"] = str(Path(spt_fast.__file__).resolve().parents[1])
    command = [sys.executable, str(SCRIPT), "--json", "--dtypes", "bf16", "fp32", "--widths", "64"]
    folder = tmp_path_factory.mktemp("compiled")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_kernels_compile_without_spills(arch: int, compiled: list[dict[str, Any]]) -> None:
    found = [case for case in compiled if case["arch"] == arch]
    assert {case["kernel"] for case in found} >= {"forward", "backward", "backward-prompts-only", "sum"}
    for case in found:
        assert case["spills"] <= MOST_SPILLED, case
        assert case["shared"] <= SHARED_LIMIT[arch], case


@pytest.mark.parametrize("tokens", [1, 197, 577])
@pytest.mark.parametrize("width", [32, 48, 72, 128])
def test_tiles_are_powers_of_two_of_at_least_16(tokens: int, width: int) -> None:
    for rule in (rules.forward_tiles, rules.backward_tiles):
        for arch in (75, 80, 90, 100, 120):
            for itemsize in (2, 4):
                tile = rule(arch, width, itemsize, tokens, tokens + 20)
                for size in (tile.rows, tile.step):
                    assert size >= 16
                    assert size & (size - 1) == 0


@pytest.mark.parametrize("images", [1, 7, 128])
def test_splits_cover_all_images_once(images: int) -> None:
    per_split = rules.images_per_split(90, images, 12)
    splits = -(-images // per_split)
    assert (splits - 1) * per_split < images <= splits * per_split
