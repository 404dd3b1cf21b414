"""prompt_attention against joining and PyTorch's attention, attention on joined tensors, and FlexAttention.

`pytest benchmarks/bench_prompt_attention.py --benchmark-only`: ViT-B/16 at full size in bfloat16 on a GPU,
small and in float32 on the CPU. Results are checked before anything is timed. The ratios to quote are those
of `python -m benchmarks.bench_prompt_attention`, which alternates the sides within one process.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.timing import Rotating, alternate, finished, medians
from spt_fast.ops.prompt_attention import packed_prompt_attention

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HEADS, WIDTH = 12, 64
CASES = [
    (batch, tokens, prompts)
    for batch in ((32, 128) if GPU else (4,))
    for tokens in ((197, 577) if GPU else (197,))
    for prompts in (20, 100)
]

Form = Callable[..., Tensor]


def ours(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return packed_prompt_attention(qkv, prompt_k, prompt_v)


def join_and_attend(
    qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, keys: Tensor, values: Tensor, attend: Form | None = None
) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    keys = torch.cat((prompt_k.expand(len(qkv), -1, -1, -1), k), dim=2)
    values = torch.cat((prompt_v.expand(len(qkv), -1, -1, -1), v), dim=2)
    return (attend or F.scaled_dot_product_attention)(q, keys, values).transpose(1, 2).flatten(2)


def already_joined(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    q = qkv[:, :, 0].transpose(1, 2)
    return F.scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2)


_compiled_flex: Any = torch.compile(flex_attention)


def flex(qkv: Tensor, prompt_k: Tensor, prompt_v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return join_and_attend(qkv, prompt_k, prompt_v, keys, values, attend=_compiled_flex)


SIDES: dict[str, Form] = {"ours": ours, "join + sdpa": join_and_attend, "sdpa on joined": already_joined}
if GPU:
    # On the CPU FlexAttention has no backward.
    SIDES["join + flex"] = flex
    # Each shape and mode is a graph; beyond its limit Dynamo leaves FlexAttention as it is, unfused.
    torch._dynamo.config.recompile_limit = 64


def make_inputs(
    batch: int,
    tokens: int,
    prompts: int,
    heads: int = HEADS,
    width: int = WIDTH,
    dtype: torch.dtype = DTYPE,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, tokens, 3, heads, width), (heads, prompts, width), (heads, prompts, width))
    qkv, *shared = (torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes)
    images = qkv[:, :, 1:].permute(2, 0, 3, 1, 4)
    joined = [torch.cat((p.expand(batch, -1, -1, -1), x), dim=2) for p, x in zip(shared, images, strict=True)]
    return [tensor.requires_grad_() for tensor in (qkv, *shared, *joined)]


def check(side: str, inputs: list[Tensor]) -> None:
    tolerance = 1e-5 if inputs[0].dtype == torch.float32 else 0.03
    torch.testing.assert_close(SIDES[side](*inputs), ours(*inputs), atol=tolerance, rtol=tolerance)


def passes(side: str, inputs: list[Tensor]) -> bool:
    """`check`; a peer that fails is left out, so that the others are timed all the same."""
    try:
        check(side, inputs)
    except Exception as error:
        if side == "ours":
            raise
        print(f"{side} is left out: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return False
    return True


def run(side: str, rotating: Rotating, cotangent: Tensor, backward: bool) -> None:
    inputs = rotating()
    with torch.set_grad_enabled(backward):
        out = SIDES[side](*inputs)
    if backward:
        torch.autograd.grad(out, inputs, cotangent, allow_unused=True)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "B{}-N{}-P{}".format(*case))
def test_prompt_attention(benchmark: Any, case: tuple[int, int, int], side: str, backward: bool) -> None:
    inputs = make_inputs(*case)
    kind = "forward and backward" if backward else "forward"
    benchmark.group = f"prompt_attention {kind} B{case[0]} N{case[1]} P{case[2]} {DEVICE} {DTYPE}"
    benchmark.extra_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    check(side, inputs)
    cotangent = torch.randn_like(ours(*inputs))
    step = functools.partial(run, side, Rotating(inputs), cotangent, backward)
    benchmark.pedantic(finished(step, DEVICE), rounds=10, warmup_rounds=3)


def report(case: tuple[int, ...], rounds: int, dtype: torch.dtype) -> None:
    """One line for each side, forward alone and with backward; `case` is what `make_inputs` takes."""
    inputs = make_inputs(*case, dtype=dtype)
    cotangent = torch.randn_like(ours(*inputs)).detach()
    sides = [side for side in SIDES if passes(side, inputs)]
    for backward in (False, True):
        rotating = Rotating(inputs)
        steps = {side: functools.partial(run, side, rotating, cotangent, backward) for side in sides}
        timed = medians(alternate(steps, rounds, device=DEVICE, warmup=3, launched_ahead=True))
        kind = "forward-backward" if backward else "forward"
        for side, median in timed.items():
            sizes = "B{} N{} P{} H{} d{}".format(*case)
            ratio = median / timed["ours"]
            print(
                f"{sizes:24s} {kind:17s} {side:15s} {1e3 * median:8.3f} ms  {ratio:6.3f} x ours", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=60, help="counted runs of each side (default: 60)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if GPU else "fp32")
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    print(f"{DEVICE}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for case in CASES if GPU else [(batch, 197, prompts) for batch in (4, 8) for prompts in (20, 100)]:
        report((*case, HEADS, WIDTH), options.rounds, dtype)
    # Small images, and a call that is nearly nothing but overhead.
    report((32, 64, 20, 3, WIDTH), options.rounds, dtype)
    report((2, 17, 5, 2, 16), 10 * options.rounds, dtype)


if __name__ == "__main__":
    main()
