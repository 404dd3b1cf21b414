"""What the Triton kernels of prompt_attention compile to, with all shipped tiles. Needs no GPU.

Prints one line for each kernel, architecture, dtype and head width: registers of a thread; spills, in bytes
of its stack, and how many instructions of the hot loop touch them; shared memory; copies under way while a
step computes; and instructions of the tensor cores.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from typing import Any, NamedTuple

from spt_fast.ops import prompt_attention_tiles as rules
from spt_fast.ops.triton_code import Compiled, compile_ahead

ARCHITECTURES = (80, 90, 100, 120)
WIDTHS = (16, 32, 48, 64, 72, 80, 96, 128)
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
                # The sum knows no width.
                for width in widths if kernel != "sum" else widths[:1]:
                    yield Case(kernel, arch, dtype, width)


def tile_of(case: Case) -> rules.Tiles:
    """The tile that the rule gives for 577 tokens and 100 prompts; of the sum, what it is launched with."""
    if case.kernel == "sum":
        from spt_fast.ops import prompt_attention_triton as module

        return rules.Tiles(module.SUM_COLUMNS, module.SUM_ROWS, 4, module.SUM_STAGES)
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
        "SUM_ROWS": module.SUM_ROWS,
        "SUM_COLUMNS": module.SUM_COLUMNS,
        "SUM_STAGES": module.SUM_STAGES,
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
    if name in ("heads", "tokens", "prompts", "images", "tasks", "splits", "per_split"):
        return "i32"
    if name == "size" or name.endswith(("_image", "_head", "_row", "_task")):
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
    parser.add_argument("--cases", nargs="+", metavar="KERNEL:DTYPE:WIDTH", help="these, on all --archs")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    cases = list(all_cases(tuple(options.archs), tuple(options.dtypes), tuple(options.widths)))
    if options.cases:
        chosen = [text.split(":") for text in options.cases]
        cases = [
            Case(kernel, arch, dtype, int(width)) for arch in options.archs for kernel, dtype, width in chosen
        ]
    cases = [case for case in cases if case.kernel in options.kernels]
    # A process on each core: they are forked here, so that what compiles is imported once.
    import_module("spt_fast.ops.prompt_attention_triton")
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        for case, found in zip(cases, pool.map(compile_case, cases), strict=True):
            tell(case, found, as_json=options.json)


def tell(case: Case, found: Compiled, *, as_json: bool) -> None:
    """Print what a case compiles to."""
    tile = tile_of(case)
    if as_json:
        print(json.dumps(case._asdict() | tile._asdict() | found._asdict()), flush=True)
        return
    print(
        f"{case.kernel:22s} sm_{case.arch:<4d}{case.dtype:5s} d={case.width:<4d}"
        f"{tile.rows:4d} x {tile.step:<3d}{tile.warps} warps {tile.stages} stages"
        f"{found.registers:5d} registers{found.spills:4d} B spilled, {found.loop_spills} in the loop"
        f"{found.shared:8d} B shared{found.in_flight:3d} copies under way"
        f"{found.tensor_products:5d} tensor products",
        flush=True,
    )


if __name__ == "__main__":
    main()
