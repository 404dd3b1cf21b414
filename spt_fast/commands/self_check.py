"""Compares every operation on this machine with float64: `spt-fast doctor --check`.

Limits: small problems, seconds on a CPU. After an illegal address on a GPU everything later fails there too:
the first WRONG line is the one to look at.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from spt_fast.clustering.lloyd import lloyd
from spt_fast.clustering.moments import mean_of
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops import accuracy, cases
from spt_fast.ops.accuracy import Deviation, deviation
from spt_fast.ops.cases import Case, Inputs, Outcome, check_case
from spt_fast.ops.trust import every_kernel_trusted

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LLOYD_ITERATIONS = 20  # it ends after seven


def devices() -> Iterator[torch.device]:
    """The CPU, and every CUDA device."""
    yield torch.device("cpu")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield torch.device("cuda", index)


def report() -> bool:
    """Print a line for each outcome as it comes, and a summary; whether all is right."""
    for device in devices():
        if device.type == "cuda":
            print(f"{device}: {torch.cuda.get_device_name(device)}")
    print(_columns("operation", "device", "dtype", "backend", "worst", "error", "allowed"))
    outcomes = []
    for outcome in check():
        print(line(outcome), flush=True)
        outcomes.append(outcome)
    wrong = sum(not outcome.ok for outcome in outcomes)
    print(f"{wrong} of {len(outcomes)} WRONG" if wrong else f"all {len(outcomes)} ok")
    if all(outcome.device == "cpu" for outcome in outcomes):
        print("no CUDA device is available: nothing is said of the kernels for CUDA")
    return not wrong


def check() -> Iterator[Outcome]:
    """Check every operation on every device in every dtype; an exception is an outcome, too."""
    # A kernel that was refused is the one to look at.
    with every_kernel_trusted():
        for device in devices():
            for case in all_cases(device):
                for dtype in DTYPES:
                    yield check_case(case, device, dtype)


def all_cases(device: torch.device) -> Iterator[Case]:
    """Every check of a device; some are for CUDA devices only."""
    yield from cases.kmeans_cases()
    if device.type == "cuda":
        yield from cases.long_kmeans_cases()
    yield Case(
        "Lloyd's algorithm",
        cases.kmeans_backend,
        accuracy.lloyd_problem,
        _run_lloyd,
        _compare_lloyd,
    )
    yield from cases.attention_cases()
    yield from cases.nmi_cases()


def line(outcome: Outcome) -> str:
    """The operation, the result with the largest share of its bound, and the verdict."""
    result, numbers = "-", ("-", "-")
    if (found := outcome.worst()) is not None:
        result, worst = found
        numbers = (f"{worst.error:.1e}", f"{worst.bound:.1e}")
    columns = _columns(outcome.op, outcome.device, outcome.dtype, outcome.backend, result, *numbers)
    return f"{columns}  {_verdict(outcome)}"


def _verdict(outcome: Outcome) -> str:
    if not outcome.ok:
        return f"WRONG: {outcome.fault()}"
    return f"ok, but it is a fallback: {outcome.fallback}" if outcome.fallback else "ok"


def _run_lloyd(tokens: Tensor, starts: Tensor) -> Sequence[Tensor]:
    problem = WeightedTokens(tokens, None, mean_of(tokens, None))
    return [lloyd(problem, starts, max_iter=_LLOYD_ITERATIONS).centers]


def _compare_lloyd(results: Sequence[Tensor], inputs: Inputs) -> Mapping[str, Deviation]:
    tokens, starts = (tensor.cpu() for tensor in inputs)
    return {"centres": deviation(results[0], *accuracy.lloyd_reference(tokens, starts, _LLOYD_ITERATIONS))}


def _columns(op: str, device: str, dtype: str, backend: str, result: str, error: str, bound: str) -> str:
    return f"{op:53} {device:7} {dtype:9} {backend:9} {result:9} {error:>8} {bound:>8}"
