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
# The tiles are chosen for Triton 3.8 and later. What 3.5 and 3.6 spill: docs/design/prompt-attention.md.
CHOSEN_FOR = Version(version("triton")) >= Version("3.8")
# Outside the loop that multiplies: pointers to the keys, which are read again once for each tile of keys.
MOST_SPILLED = 80 if CHOSEN_FOR else 400
# Bytes a program may have on sm_80, 90, 100 and 120; the code for sm_80 also runs on sm_86 and 89.
SHARED_LIMIT = 99 * 1024
CASES = [
    "forward:bf16:64", "forward:bf16:128", "forward:fp32:128",
    "backward:bf16:48", "backward:bf16:64", "backward:fp16:128", "backward:fp32:128",
    "backward-prompts-only:bf16:64", "sum:bf16:64",
]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each kernel is on each architecture, as benchmarks/triton_compiled.py prints it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # The script lies in the checkout; the package is the one imported here, installed or not.
    environment["PYTHONPATH"] = str(Path(spt_fast.__file__).resolve().parents[1])
    command = [sys.executable, str(SCRIPT), "--json", "--cases", *CASES]
    folder = tmp_path_factory.mktemp("compiled")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 4 * len(CASES)
    return found


def test_kernels_fit_registers_and_shared_memory(compiled: list[dict[str, Any]]) -> None:
    for case in compiled:
        assert case["loop_spills"] == 0 or not CHOSEN_FOR, case
        assert case["spills"] <= MOST_SPILLED, case
        assert case["shared"] <= SHARED_LIMIT, case


def test_copies_are_under_way_while_a_step_computes(compiled: list[dict[str, Any]]) -> None:
    for case in compiled:
        assert case["in_flight"] > 0, case


def test_products_are_on_tensor_cores(compiled: list[dict[str, Any]]) -> None:
    for case in compiled:
        assert (case["tensor_products"] > 0) == (case["kernel"] != "sum"), case
        # Three products of TensorFloat-32 make one of float32.
        assert case["tf32"] == (case["dtype"] == "fp32"), case
        assert case["dtype"] != "fp32" or case["tensor_products"] % 3 == 0, case


def test_a_barrier_parts_each_write_from_the_reads_before_it(compiled: list[dict[str, Any]]) -> None:
    """The gradients of the queries so far are overwritten where other threads read them."""
    for case in compiled:
        if case["kernel"] == "backward":
            assert len(case["unordered"]) > 1, case
            assert not any(case["unordered"]), case


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
