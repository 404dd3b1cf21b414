"""Compares every operation on this machine with float64: `spt-fast doctor --check`.

Limits: small problems, seconds on a CPU. After an illegal address on a GPU everything later fails there too:
the first WRONG line is the one to look at.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spt_fast.clustering.lloyd import lloyd
from spt_fast.clustering.moments import mean_of
from spt_fast.clustering.weighted import WeightedTokens
from spt_fast.ops import accuracy, kmeans, nmi, prompt_attention
from spt_fast.ops.accuracy import Deviation, deviation
from spt_fast.ops.kmeans_reference import distances_reference
from spt_fast.ops.nmi_reference import sigmoid_nmi_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# What serves CUDA tensors where the kernels cannot. PyTorch orders the sums there, and not always alike.
_FALLBACKS = ("reference", "joined", "portable")
_LLOYD_ITERATIONS = 20  # it ends after seven

Inputs = Sequence[Any]
Backend = Callable[[torch.device, torch.dtype], tuple[str, str]]


class Outcome(NamedTuple):
    """What the check of one operation on one device in one dtype found."""

    op: str
    device: str
    dtype: str
    backend: str
    fallback: str  # why it is not the kernels that serve a CUDA device, or ""
    deviations: Mapping[str, Deviation]  # of each result; empty where the operation raised
    message: str  # what else is wrong, or ""

    @property
    def ok(self) -> bool:
        return not self.message and all(found.ok for found in self.deviations.values())

    def line(self) -> str:
        """The operation, the result with the largest share of its bound, and the verdict."""
        result, numbers = "-", ("-", "-")
        if self.deviations:
            result, worst = max(self.deviations.items(), key=lambda item: _share_of_bound(item[1]))
            numbers = (f"{worst.error:.1e}", f"{worst.bound:.1e}")
        columns = _columns(self.op, self.device, self.dtype, self.backend, result, *numbers)
        return f"{columns}  {self._verdict()}"

    def _verdict(self) -> str:
        if self.ok:
            return f"ok, but it is a fallback: {self.fallback}" if self.fallback else "ok"
        beyond = [name for name, found in self.deviations.items() if not found.ok]
        reasons = [*([f"beyond the bound: {', '.join(beyond)}"] if beyond else []), self.message]
        return f"WRONG: {'; '.join(filter(None, reasons))}"


class Case(NamedTuple):
    """How one operation is checked: its inputs, its call, and the comparison with float64."""

    op: str
    backend: Backend
    inputs: Callable[[torch.dtype, torch.device], Inputs]
    run: Callable[..., Sequence[Tensor]]
    compare: Callable[[Sequence[Tensor], Inputs], Mapping[str, Deviation]]


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
        print(outcome.line(), flush=True)
        outcomes.append(outcome)
    wrong = sum(not outcome.ok for outcome in outcomes)
    print(f"{wrong} of {len(outcomes)} WRONG" if wrong else f"all {len(outcomes)} ok")
    if all(outcome.device == "cpu" for outcome in outcomes):
        print("no CUDA device is available: nothing is said of the kernels for CUDA")
    return not wrong


def check() -> Iterator[Outcome]:
    """Check every operation on every device in every dtype; an exception is an outcome, too."""
    for device in devices():
        for case in cases(device):
            for dtype in DTYPES:
                yield check_case(case, device, dtype)


def check_case(case: Case, device: torch.device, dtype: torch.dtype) -> Outcome:
    """Run one check."""
    backend, fallback, message = "-", "", ""
    found: Mapping[str, Deviation] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fallback, which the outcome names
        try:
            backend, reason = case.backend(device, dtype)
            if device.type == "cuda" and backend in _FALLBACKS:
                fallback = reason
            inputs = case.inputs(dtype, device)
            results, again = (case.run(*inputs) for _ in range(2))
            found = case.compare(results, inputs)
            if not fallback and not all(map(torch.equal, results, again)):
                message = "a second run gave other bits"
        except Exception as error:  # whatever it is, the other operations are to be checked
            message = " ".join(f"{type(error).__name__}: {error}".split())
    kind = str(dtype).removeprefix("torch.")
    return Outcome(case.op, str(device), kind, backend, fallback, found, message)


def _share_of_bound(found: Deviation) -> float:
    return math.inf if math.isnan(found.error) else found.error / found.bound


def cases(device: torch.device) -> Iterator[Case]:
    """Every check of a device; some are for CUDA devices only."""
    # G, B, N_e, prefix, D, K: the paths of docs/design/kmeans-cuda.md; sizes that divide no tile.
    yield _assign("21 centres", 1, 3, 197, 1, 768, 21)
    yield _assign("32 centres", 1, 3, 197, 1, 768, 32)
    yield _assign("100 centres", 1, 3, 197, 1, 768, 100)
    yield _assign("20 centres, weighted", 2, 1, 197, 1, 768, 20, weighted=True)
    yield _assign("rows of odd length", 3, 5, 67, 5, 63, 29)
    if device.type == "cuda":
        # Long enough there for partial sums to move to float64 on the way.
        yield _assign("many tokens", 1, 1, 600_011, 0, 16, 3)
        yield _assign("many tokens, weighted", 1, 1, 1_100_003, 0, 8, 3, weighted=True)
    yield Case(
        "squared_distances",
        _kmeans_backend,
        partial(_kmeans_inputs, (1, 3, 197, 1, 768, 121), False),
        lambda tokens, centers, shift, _: [kmeans.squared_distances(tokens, centers, shift=shift)],
        _compare_distances,
    )
    yield Case(
        "Lloyd's algorithm",
        _kmeans_backend,
        accuracy.lloyd_problem,
        _run_lloyd,
        _compare_lloyd,
    )
    # B, H, N, N_p, d: several tiles of keys, many prompts, a width that is no power of two.
    yield _attention("prompt_attention", (2, 2, 197, 20, 64), prompt_attention.prompt_attention)
    yield _attention("prompt_attention", (2, 2, 63, 7, 80), prompt_attention.prompt_attention)
    yield _attention("packed_prompt_attention", (1, 2, 197, 100, 64), _through_projection)
    # N_p, B, N_e, D: one tile, and scores that go through a buffer.
    yield _nmi((20, 2, 196, 768))
    yield _nmi((100, 1, 300, 64))


def _assign(name: str, *sizes: int, weighted: bool = False) -> Case:
    return Case(
        f"assign_accumulate, {name}",
        _kmeans_backend,
        partial(_kmeans_inputs, sizes, weighted),
        _run_assign,
        _compare_assigned,
    )


def _kmeans_backend(device: torch.device, _: torch.dtype) -> tuple[str, str]:
    return kmeans.explain_backend(device)


def _kmeans_inputs(sizes: Sequence[int], weighted: bool, dtype: torch.dtype, device: torch.device) -> Inputs:
    groups, images, patches, prefix, width, num_centers = sizes
    return accuracy.kmeans_problem(
        groups, images, patches, prefix, width, num_centers, dtype, weighted, device=device
    )


def _run_assign(
    tokens: Tensor, centers: Tensor, shift: Tensor | None, weights: Tensor | None
) -> Sequence[Tensor]:
    found = kmeans.assign_accumulate(
        tokens, centers, shift=shift, weights=weights, with_labels=True, with_distances=True
    )
    return [tensor for tensor in found if tensor is not None]


def _compare_assigned(results: Sequence[Tensor], inputs: Inputs) -> Mapping[str, Deviation]:
    return accuracy.assigned_deviations([tensor.cpu() for tensor in results], *_on_cpu(inputs))


def _compare_distances(results: Sequence[Tensor], inputs: Inputs) -> Mapping[str, Deviation]:
    tokens, centers, shift, _ = _on_cpu(inputs)
    flat = tokens.flatten(1, 2)
    exact = distances_reference(flat.double(), centers.double())
    return {"distances": deviation(results[0], exact, accuracy.rounding_band(flat, centers, shift))}


def _on_cpu(inputs: Inputs) -> Inputs:
    """The problem, with a shift of zero where none is given and the kernels take none."""
    tokens, centers, shift, weights = inputs
    if shift is None and not (tokens.is_cuda and _kmeans_backend(tokens.device, tokens.dtype)[0] == "native"):
        shift = torch.zeros_like(centers[:, 0])
    return [None if tensor is None else tensor.cpu() for tensor in (tokens, centers, shift, weights)]


def _run_lloyd(tokens: Tensor, starts: Tensor) -> Sequence[Tensor]:
    problem = WeightedTokens(tokens, None, mean_of(tokens, None))
    return [lloyd(problem, starts, max_iter=_LLOYD_ITERATIONS).centers]


def _compare_lloyd(results: Sequence[Tensor], inputs: Inputs) -> Mapping[str, Deviation]:
    tokens, starts = (tensor.cpu() for tensor in inputs)
    return {"centres": deviation(results[0], *accuracy.lloyd_reference(tokens, starts, _LLOYD_ITERATIONS))}


def _attention(name: str, shape: Sequence[int], attention: Callable[..., Tensor]) -> Case:
    *_, prompts, width = shape

    def backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
        return prompt_attention.explain_backend(device, dtype, width)

    def inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
        return accuracy.attention_inputs(shape, dtype, device=device)

    def run(*tensors: Tensor) -> Sequence[Tensor]:
        return accuracy.value_and_gradients(attention, tensors, None)

    def compare(results: Sequence[Tensor], tensors: Inputs) -> Mapping[str, Deviation]:
        bounds = accuracy.attention_bounds(tensors, None)
        return {
            name: Deviation(accuracy.worst_error(ours, exact), bound)
            for ours, (name, (exact, bound)) in zip(results, bounds.items(), strict=True)
        }

    return Case(f"{name}, {prompts} prompts, d = {width}", backend, inputs, run, compare)


def _through_projection(
    q: Tensor, k: Tensor, v: Tensor, prompt_k: Tensor, prompt_v: Tensor, *, scale: float | None
) -> Tensor:
    """`packed_prompt_attention`, with the arguments and the result of `prompt_attention`."""
    qkv = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4)
    out = prompt_attention.packed_prompt_attention(qkv, prompt_k, prompt_v, scale=scale)
    return out.reshape(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


def _nmi(shape: Sequence[int]) -> Case:
    def backend(device: torch.device, _: torch.dtype) -> tuple[str, str]:
        return nmi.explain_backend(device)

    def inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
        return accuracy.nmi_inputs(shape, 5.0, dtype, device)

    def compare(results: Sequence[Tensor], tensors: Inputs) -> Mapping[str, Deviation]:
        values, *gradients = _nmi_and_gradients(sigmoid_nmi_reference, *accuracy.in_float64(tensors))
        found = {"nmi": deviation(results[0], values, accuracy.NMI_SHARE * values)}
        for name, ours, exact in zip(("dprompts", "dtokens"), results[1:], gradients, strict=True):
            found[name] = deviation(ours, exact, accuracy.nmi_gradient_bound(exact, tensors[0].dtype))
        return found

    run = partial(_nmi_and_gradients, nmi.sigmoid_nmi)
    return Case(f"sigmoid_nmi, {shape[0]} prompts", backend, inputs, run, compare)


def _nmi_and_gradients(op: Callable[..., Tensor], *inputs: Tensor) -> Sequence[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    values = op(*leaves)
    return [values.detach(), *torch.autograd.grad(values.sum(), leaves)]


def _columns(op: str, device: str, dtype: str, backend: str, result: str, error: str, bound: str) -> str:
    return f"{op:45} {device:7} {dtype:9} {backend:9} {result:9} {error:>8} {bound:>8}"
