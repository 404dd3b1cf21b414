"""Small problems for every operation, and how far each is from float64 on them: for `trust` and `self_check`.

Limits: those of `accuracy`. Two runs have to give the same bits, except where PyTorch serves a CUDA device.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spt_fast.ops import accuracy, kmeans, nmi, prompt_attention
from spt_fast.ops.accuracy import ATTENTION_RESULTS, Deviation, deviation
from spt_fast.ops.kmeans_reference import distances_reference
from spt_fast.ops.nmi_reference import sigmoid_nmi_reference
from spt_fast.ops.trust import UndecidedError

# What serves CUDA tensors where the kernels cannot. PyTorch orders the sums there, and not always alike.
_FALLBACKS = ("reference", "joined", "portable")
# What the message of a check says where the machine is at fault and not the kernel: memory is short, a folder
# cannot be written to, or Triton finds no C compiler or no headers of Python.
_MACHINES_FAULT = re.compile(
    r"(OutOfMemory|Memory|OS|Permission|FileNotFound|CalledProcess|Import|ModuleNotFound)Error:"
    r"|.*(out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED|Failed to find C compiler)"
)

_OUTPUT, *_GRADIENTS = ATTENTION_RESULTS
_OF_IMAGES, _OF_PROMPTS = (_OUTPUT, *_GRADIENTS[:3]), (_OUTPUT, *_GRADIENTS[3:])

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

    def worst(self) -> tuple[str, Deviation] | None:
        """The result with the largest share of its bound, and its deviation."""
        if not self.deviations:
            return None
        return max(self.deviations.items(), key=lambda item: _share_of_bound(item[1]))

    def fault(self) -> str:
        """What is wrong, or ""."""
        beyond = [name for name, found in self.deviations.items() if not found.ok]
        reasons = [*([f"beyond the bound: {', '.join(beyond)}"] if beyond else []), self.message]
        return "; ".join(filter(None, reasons))


class Case(NamedTuple):
    """How one operation is checked: its inputs, its call, and the comparison with float64."""

    op: str
    backend: Backend
    inputs: Callable[[torch.dtype, torch.device], Inputs]
    run: Callable[..., Sequence[Tensor]]
    compare: Callable[[Sequence[Tensor], Inputs], Mapping[str, Deviation]]


def kmeans_cases() -> Iterator[Case]:
    """Each path of docs/design/kmeans-cuda.md; sizes that divide no tile."""
    # G, B, N_e, prefix, D, K
    yield _assign("21 centres", 1, 3, 197, 1, 768, 21)
    yield _assign("32 centres", 1, 3, 197, 1, 768, 32)
    yield _assign("100 centres", 1, 3, 197, 1, 768, 100)
    yield Case(
        "assign_accumulate, 100 centres, after another pass",
        kmeans_backend,
        partial(_kmeans_inputs, (1, 3, 197, 1, 768, 100), False),
        _run_second_assign,
        _compare_second_assign,
    )
    yield _assign("20 centres, weighted", 2, 1, 197, 1, 768, 20, weighted=True)
    yield _assign("rows of odd length", 3, 5, 67, 5, 63, 29)
    yield Case(
        "squared_distances",
        kmeans_backend,
        partial(_kmeans_inputs, (1, 3, 197, 1, 768, 121), False),
        lambda tokens, centers, shift, _: [kmeans.squared_distances(tokens, centers, shift=shift)],
        _compare_distances,
    )


def long_kmeans_cases() -> Iterator[Case]:
    """Long enough for a GPU to move partial sums to float64 on the way."""
    yield _assign("many tokens", 1, 1, 600_011, 0, 16, 3)
    yield _assign("many tokens, weighted", 1, 1, 1_100_003, 0, 8, 3, weighted=True)


def attention_cases() -> Iterator[Case]:
    """Several tiles of keys, many prompts, a width that is no power of two; and each form of the kernels.

    Of the first block's gradients prompts alone are wanted, of frozen prompts those of the images; where
    there are more heads of images than a GPU has multiprocessors, one program sums over several images.
    """
    # B, H, N, N_p, d
    yield _attention("prompt_attention", (2, 2, 197, 20, 64), _all_gradients)
    yield _attention("prompt_attention", (2, 2, 63, 7, 80), _all_gradients)
    yield _attention("packed_prompt_attention", (1, 2, 197, 100, 64), _all_gradients_of_packed)
    yield _attention("prompt_attention, frozen prompts", (2, 2, 63, 7, 32), _gradients_of_images, _OF_IMAGES)
    yield _attention("prompt_attention, prompts alone", (64, 6, 5, 3, 64), _gradients_of_prompts, _OF_PROMPTS)
    yield _attention("prompt_attention, prompts by task", (3, 2, 17, 5, 64), _output_by_task, (_OUTPUT,))


def nmi_cases() -> Iterator[Case]:
    """One tile, and scores that go through a buffer."""
    # N_p, B, N_e, D
    yield _nmi((20, 2, 196, 768))
    yield _nmi((100, 1, 300, 64))


def prove_kmeans(device: torch.device, dtype: torch.dtype) -> str:
    """The proof of `kmeans.KERNEL`."""
    return _first_fault(kmeans_cases(), device, dtype)


def prove_prompt_attention(device: torch.device, dtype: torch.dtype) -> str:
    """The proof of `prompt_attention.KERNEL`."""
    return _first_fault(attention_cases(), device, dtype)


def prove_nmi(device: torch.device, dtype: torch.dtype) -> str:
    """The proof of `nmi.KERNEL`."""
    return _first_fault(nmi_cases(), device, dtype)


def _first_fault(cases: Iterable[Case], device: torch.device, dtype: torch.dtype) -> str:
    """What is wrong with the first case that is wrong, or ""; others might fail because of it.

    Raises:
        UndecidedError: the kernel did not run, or something failed that is not the kernel's.
    """
    for case in cases:
        outcome = check_case(case, device, dtype)
        if outcome.fallback:
            raise UndecidedError(outcome.fallback)
        if _MACHINES_FAULT.match(outcome.message):
            raise UndecidedError(outcome.message)
        if not outcome.ok:
            return f"{case.op}: {outcome.fault()}"
    return ""


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


def _assign(name: str, *sizes: int, weighted: bool = False) -> Case:
    return Case(
        f"assign_accumulate, {name}",
        kmeans_backend,
        partial(_kmeans_inputs, sizes, weighted),
        _run_assign,
        _compare_assigned,
    )


def kmeans_backend(device: torch.device, _: torch.dtype) -> tuple[str, str]:
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


def _run_second_assign(
    tokens: Tensor, centers: Tensor, shift: Tensor | None, _: Tensor | None
) -> Sequence[Tensor]:
    """A pass that may correct the sums of another, from which a part of the tokens has moved on.

    The labels of the first pass come last.
    """
    before = kmeans.assign_accumulate(
        tokens, centers + 0.1 * centers.roll(1, dims=-1), shift=shift, with_labels=True
    )
    found = kmeans.assign_accumulate(
        tokens, centers, shift=shift, with_labels=True, with_distances=True, last=before
    )
    return [tensor for tensor in (*found, before.labels) if tensor is not None]


def _compare_second_assign(results: Sequence[Tensor], inputs: Inputs) -> Mapping[str, Deviation]:
    *found, before = (tensor.cpu() for tensor in results)
    tokens, centers, shift, weights = _on_cpu(inputs)
    return accuracy.assigned_deviations(found, tokens, centers, shift, weights, [before])


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
    if shift is None and not (tokens.is_cuda and kmeans_backend(tokens.device, tokens.dtype)[0] == "native"):
        shift = torch.zeros_like(centers[:, 0])
    return [None if tensor is None else tensor.cpu() for tensor in (tokens, centers, shift, weights)]


def _attention(
    name: str,
    shape: Sequence[int],
    run: Callable[..., Sequence[Tensor]],
    names: Sequence[str] = ATTENTION_RESULTS,
) -> Case:
    """`run` gives the results with these names."""
    *_, prompts, width = shape

    def backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
        return prompt_attention.explain_backend(device, dtype, width)

    def inputs(dtype: torch.dtype, device: torch.device) -> Inputs:
        return accuracy.attention_inputs(shape, dtype, device=device)

    def compare(results: Sequence[Tensor], tensors: Inputs) -> Mapping[str, Deviation]:
        bounds = accuracy.attention_bounds(tensors, None)
        return {
            name: Deviation(accuracy.worst_error(ours, bounds[name][0]), bounds[name][1])
            for name, ours in zip(names, results, strict=True)
        }

    return Case(f"{name}, {prompts} prompts, d = {width}", backend, inputs, run, compare)


def _all_gradients(*tensors: Tensor) -> Sequence[Tensor]:
    return accuracy.value_and_gradients(prompt_attention.prompt_attention, tensors, None)


def _all_gradients_of_packed(*tensors: Tensor) -> Sequence[Tensor]:
    return accuracy.value_and_gradients(_through_projection, tensors, None)


def _gradients_of_images(*tensors: Tensor) -> Sequence[Tensor]:
    prompts = [tensor.detach() for tensor in tensors[3:]]

    def attention(*images: Tensor, scale: float | None) -> Tensor:
        return prompt_attention.prompt_attention(*images, *prompts, scale=scale)

    return accuracy.value_and_gradients(attention, tensors[:3], None)


def _gradients_of_prompts(*tensors: Tensor) -> Sequence[Tensor]:
    images = [tensor.detach() for tensor in tensors[:3]]

    def attention(*prompts: Tensor, scale: float | None) -> Tensor:
        return prompt_attention.prompt_attention(*images, *prompts, scale=scale)

    return accuracy.value_and_gradients(attention, tensors[3:], None)


def _output_by_task(q: Tensor, k: Tensor, v: Tensor, *prompts: Tensor) -> Sequence[Tensor]:
    """The output where all images are of the second task."""
    task = torch.ones((), dtype=torch.int64, device=q.device).expand(len(q))
    both = [torch.stack((-tensor, tensor)) for tensor in prompts]
    with torch.no_grad():
        return [prompt_attention.prompt_attention(q, k, v, *both, task=task)]


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
