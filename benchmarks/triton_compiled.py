"""What the Triton kernels compile to: registers, spills and shared memory of all shipped tiles. Needs no GPU.

Prints one line for each kernel, architecture, dtype and head width. Spills are bytes of stack of a thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from spt_fast.ops import prompt_attention_tiles as rules
from spt_fast.ops.triton_support import Compiled, compile_ahead

ARCHITECTURES = (80, 90, 100)
WIDTHS = (32, 64, 80, 128)
ITEMSIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
KERNELS = ("forward", "forward-tasks", "backward", "backward-prompts-only", "sum")
TOKENS, PROMPTS = 577, 100


class Case(NamedTuple):
    """One kernel as it is shipped for one architecture, dtype and head width."""

    kernel: str
    arch: int
    dtype: str
    width: int


def all_cases(
    archs: tuple[int, ...] = ARCHITECTURES,
    dtypes: tuple[str, ...] = ("bf16", "fp32"),
    widths: tuple[int, ...] = WIDTHS,
) -> Iterator[Case]:
    """Every kernel for the given architectures, dtypes and widths; fp16 compiles like bf16."""
    for kernel in KERNELS:
        for arch in archs:
            for dtype in dtypes:
                for width in widths:
                    yield Case(kernel, arch, dtype, width)


def tile_of(case: Case) -> rules.Tiles:
    """The tile that the rule gives for 577 tokens and 100 prompts."""
    size = ITEMSIZES[case.dtype]
    if case.kernel.startswith("forward"):
        return rules.forward_tiles(case.arch, case.width, size, TOKENS, TOKENS + PROMPTS)
    keys = PROMPTS if case.kernel == "backward-prompts-only" else TOKENS + PROMPTS
    return rules.backward_tiles(case.arch, case.width, size, TOKENS, keys)


def compile_case(case: Case) -> Compiled:
    """Compile one case as its launcher would."""
    from spt_fast.ops import prompt_attention_triton as module

    name = case.kernel.split("-")[0]
    kernel: Any = getattr(module, f"prompt_attention_{name}_kernel")
    tile = tile_of(case)
    constexprs: dict[str, Any] = {
        "HAS_TASK": case.kernel == "forward-tasks",
        "IMAGES": case.kernel != "backward-prompts-only",
        "PROMPTS": True,
        "TRANSPOSED": tile.transposed,
        "WIDTH": case.width,
        "BLOCK_D": rules.padded_width(case.width),
        "ROWS": tile.rows,
        "STEP": tile.step,
        "PRECISION": module.FLOAT32_PRODUCT,
        "BLOCK": module.SUM_BLOCK,
    }
    constexprs = {key: value for key, value in constexprs.items() if key in kernel.arg_names}
    signature = {name: _argument_type(name, case) for name in kernel.arg_names if name not in constexprs}
    return compile_ahead(kernel, signature, constexprs, case.arch, tile.warps, tile.stages)


def _argument_type(name: str, case: Case) -> str:
    """Types as a launch has them: pointers aligned, steps between rows multiples of 16, counts any number."""
    if name in ("lse", "running", "partial"):
        return "*fp32:16"
    if name == "task":
        return "*i64:16"
    if name in ("scale", "scale_log2"):
        return "fp32"
    if name in ("heads", "tokens", "prompts", "images", "tasks", "splits", "per_split", "size"):
        return "i32"
    if name.endswith(("_image", "_head", "_row", "_task")):
        return "i32:16"
    return f"*{case.dtype}:16"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--archs", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--dtypes", nargs="+", choices=list(ITEMSIZES), default=["bf16", "fp32"])
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    for case in all_cases(tuple(options.archs), tuple(options.dtypes), tuple(options.widths)):
        if case.kernel not in options.kernels:
            continue
        tile, found = tile_of(case), compile_case(case)
        if options.json:
            print(json.dumps(case._asdict() | tile._asdict() | found._asdict()), flush=True)
        else:
            print(
                f"{case.kernel:22s} sm_{case.arch:<4d}{case.dtype:5s} d={case.width:<4d}"
                f"{tile.rows:4d} x {tile.step:<3d}{tile.warps} warps {tile.stages} stages"
                f"{found.registers:5d} registers{found.spills:5d} B spilled{found.shared:8d} B shared",
                flush=True,
            )


if __name__ == "__main__":
    main()
