"""What the kernels of `sigmoid_nmi` compile to: registers, spills and shared memory of all shipped tiles.

Needs no GPU. Spills are bytes of stack of a thread. fp16 compiles like bf16; the sweep is that for up to 128
prompts and 1,024 tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context

import torch

from spt_fast.ops import nmi_tiles as tiles
from spt_fast.ops.triton_code import Compiled, compile_ahead

ARCHITECTURES = (80, 90, 100, 120)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def compile_all(arch: int, least_scores: int = 0) -> Iterator[tuple[str, Compiled]]:
    """Each kernel's name and resources on capability `arch`.

    The fused kernel comes in all its tiles of at least `least_scores` scores.
    """
    from spt_fast.ops import nmi_triton as kernels

    counts = {name: "i32" for name in kernels.COUNTS}
    for dtype, torch_dtype in DTYPES.items():
        inputs = {name: f"*{dtype}:16" for name in ("prompts", "tokens")}
        inputs |= {name: "i32:16" for name in ("p_image", "p_row", "e_image", "e_row", "width")} | counts
        results = {name: "*fp32:16" for name in ("parts", "r", "c")}
        channels = tiles.CHANNELS[torch_dtype]
        for block_p, block_e in fused_tiles(least_scores):
            blocks = {"BLOCK_P": block_p, "BLOCK_E": block_e, "BLOCK_D": channels}
            warps = tiles.fused_warps(block_p, block_e)
            compiled = compile_ahead(
                kernels.nmi_fused_kernel, inputs | results, blocks, arch, warps, tiles.STAGES
            )
            yield f"fused {dtype} {block_p} x {block_e}", compiled
        scored = {name: kind for name, kind in inputs.items() if name != "images"} | {"scores": "*fp32:16"}
        blocks = {"BLOCK_P": tiles.SCORES_PROMPTS, "BLOCK_E": tiles.SCORES_TOKENS, "BLOCK_D": channels}
        compiled = compile_ahead(kernels.nmi_scores_kernel, scored, blocks, arch, tiles.WARPS, tiles.STAGES)
        yield f"scores {dtype} {tiles.SCORES_PROMPTS} x {tiles.SCORES_TOKENS}", compiled
    names = ("scores", "parts", "r", "c", "of_rows", "of_columns", "coefficients")
    swept = {name: "*fp32:16" for name in names} | counts
    blocks = {"BLOCK_P": tiles.SWEEP_PROMPTS, "BLOCK_E": tiles.SWEEP_TOKENS, "ALL_P": 128, "ALL_E": 1024}
    for gradient in (False, True):
        compiled = compile_ahead(
            kernels.nmi_sweep_kernel, swept, blocks | {"GRADIENT": gradient}, arch, tiles.WARPS,
            tiles.STAGES, maxnreg=tiles.SWEEP_REGISTERS,
        )  # fmt: skip
        yield f"sweep{' gradient' if gradient else ''} {tiles.SWEEP_PROMPTS} x {tiles.SWEEP_TOKENS}", compiled


def list_all(least_scores: int, arch: int) -> list[tuple[str, Compiled]]:
    """`compile_all` as a process can return it."""
    return list(compile_all(arch, least_scores))


def fused_tiles(least_scores: int) -> list[tuple[int, int]]:
    """Padded prompts and tokens of every tile of the fused kernel with at least so many scores."""
    sides = [2**power for power in range(4, 9)]
    pairs = [(block_p, block_e) for block_p in sides for block_e in sides if tiles.is_fused(block_p, block_e)]
    return [pair for pair in pairs if pair[0] * pair[1] >= least_scores]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--archs", nargs="+", type=int, default=list(ARCHITECTURES))
    parser.add_argument("--least-scores", type=int, default=0, help="leave out smaller tiles (default: none)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    if not options.json:
        print("python -m benchmarks.nmi_compiled")
    # A process on each core: they are forked here, so that what compiles is imported once.
    import_module("spt_fast.ops.nmi_triton")
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        for arch, kernels in zip(
            options.archs, pool.map(partial(list_all, options.least_scores), options.archs), strict=True
        ):
            for name, found in kernels:
                if options.json:
                    print(json.dumps({"arch": arch, "kernel": name} | found._asdict()), flush=True)
                else:
                    print(
                        f"sm_{arch:<4d}{name:23s}{found.registers:4d} registers{found.spills:5d} B spilled"
                        f"{found.shared:8d} B shared",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
