"""How far the operations may be from float64, and problems to see it on: for the tests and `self_check`.

Limits: everything is compared on the CPU, with float64 copies of all that is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spt_fast.ops.kmeans_reference import assign_accumulate_reference, distances_reference
from spt_fast.ops.prompt_attention_reference import prompt_attention_reference

# Of the sum of |x|, for sums of tokens; of weights, for counts: docs/design/kmeans-cuda.md, "Rounding".
SUM_SHARE, COUNT_SHARE = 1e-5, 1e-12
# Relative, of NMI, information and entropies; a tenth of what docs/nmi.md promises.
NMI_SHARE = 1e-5
# What `value_and_gradients` returns.
ATTENTION_RESULTS = ("output", "dq", "dk", "dv", "dprompt_k", "dprompt_v")
_TINY = 1e-30  # a bound above zero where nothing may be lost


class Deviation(NamedTuple):
    """The element of a result that is nearest to its bound, or farthest beyond it."""

    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Whether the bound holds; NaN never does."""
        return self.error <= self.bound


def deviation(ours: Tensor, exact: Tensor, bound: Tensor) -> Deviation:
    """The worst element of `ours` beside float64; `bound`, above zero, has their shape or expands to it."""
    if ours.shape != exact.shape:
        raise ValueError(f"the result has shape {tuple(ours.shape)}, not {tuple(exact.shape)}")
    error = (ours.detach().cpu().double() - exact.detach().cpu()).abs()
    bounds = bound.expand_as(error)
    worst = int((error / bounds).argmax())  # NaN counts as the largest
    return Deviation(float(error.flatten()[worst]), float(bounds.flatten()[worst]))


def _normal(*shape: int, generator: torch.Generator) -> Tensor:
    """Normal numbers in float32, whatever the default dtype."""
    return torch.randn(*shape, dtype=torch.float32, generator=generator, device="cpu")


def kmeans_problem(
    groups: int, images: int, patches: int, prefix: int, width: int, num_centers: int, dtype: torch.dtype,
    weighted: bool, seed: int = 0, device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Tokens [G, B, N, D], a view that skips prefix tokens; centres [G, K, D]; shift if K is odd; weights."""
    generator = torch.Generator().manual_seed(seed)
    activations = _normal(groups, images, prefix + patches, width, generator=generator).add(3).to(dtype)
    centers = _normal(groups, num_centers, width, generator=generator).add(3)
    shift = torch.full((groups, width), 3.0, dtype=torch.float32, device=device) if num_centers % 2 else None
    weights = (
        torch.rand(groups, images * patches, dtype=torch.float32, generator=generator, device="cpu").to(
            device
        )
        if weighted
        else None
    )
    # Moved before the view is taken: a copy to another device would close its gaps.
    return activations.to(device)[:, :, prefix:], centers.to(device), shift, weights


def rounding_band(tokens: Tensor, centers: Tensor, shift: Tensor | None) -> Tensor:
    """The bound of docs/design/kmeans-cuda.md on a squared distance's error, [G, M, K] float64, tokens flat.

    It also covers float32 products added one after the other, as those of the CPU are. Without a shift, the
    kernels for CUDA take the mean of the centres.
    """
    width = tokens.shape[-1]
    shift = centers.mean(1) if shift is None else shift
    x, c, s = tokens.double(), centers.double() - shift.double()[:, None], shift.double()[:, None]
    near = x - s
    lengths = near.square().sum(2)[:, :, None] + c.square().sum(2)[:, None]
    if tokens.dtype == torch.float32:
        products = near.abs() @ c.abs().mT
        kept = 2.0**-21 * products
    else:
        products = (x.abs() + s.abs()) @ c.abs().mT
        kept = 2.0**-16 * (near.abs() @ c.abs().mT)
    return (width / 4 + 16) * 2.0**-23 * (lengths + 2 * products) + kept + _TINY


def assigned_deviations(
    given: Sequence[Tensor | None],
    tokens: Tensor,
    centers: Tensor,
    shift: Tensor | None,
    weights: Tensor | None,
    before: Sequence[Tensor] = (),
) -> dict[str, Deviation]:
    """`given` (as `PassResult`) beside float64; all on the CPU.

    Labels and distances are held to the rounding band, the rest to the sums that belong to our own labels.
    Sums that were corrected pass after pass keep the errors of all: `before` has the labels of those passes.
    """
    sums, counts, inertia, labels, distances = given
    assert sums is not None
    assert counts is not None
    assert inertia is not None
    assert labels is not None
    groups, width = tokens.shape[0], tokens.shape[-1]
    flat = tokens.reshape(groups, -1, width)
    exact = distances_reference(flat.double(), centers.double())
    band = rounding_band(flat, centers, shift)
    lengths = sum(_members(of_pass, centers.shape[1]).mT @ flat.double().abs() for of_pass in before)
    index = labels.long()[:, :, None]
    chosen, chosen_band = exact.gather(2, index)[:, :, 0], band.gather(2, index)[:, :, 0]
    ones = torch.ones(flat.shape[:2], dtype=torch.float64, device="cpu")
    weights = ones if weights is None else weights.double()
    members = _members(labels, centers.shape[1]) * weights[:, :, None]
    lengths = lengths + members.mT @ flat.double().abs()
    found = {"labels": deviation(chosen, exact.amin(2), 2 * band.amax(2))}
    if distances is not None:
        found["distances"] = deviation(distances, chosen, chosen_band)
    return found | {
        "counts": deviation(counts, members.sum(1), COUNT_SHARE * members.sum(1) + _TINY),
        "sums": deviation(sums, members.mT @ flat.double(), SUM_SHARE * lengths + _TINY),
        "inertia": deviation(inertia, (weights * chosen).sum(1), (weights * chosen_band).sum(1)),
    }


def _members(labels: Tensor, num_centers: int) -> Tensor:
    """Which centre has which token: ones and zeros [G, M, K], float64."""
    return torch.nn.functional.one_hot(labels.long(), num_centers).double()


def lloyd_problem(dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """300 tokens [M, D] in 8 clusters, and 8 of them to start from; in no iteration two centres tie."""
    generator = torch.Generator().manual_seed(33)
    middles = _normal(8, 64, generator=generator) + 3
    members = torch.randint(8, (300,), generator=generator, device="cpu")
    tokens = (middles[members] + _normal(300, 64, generator=generator)).to(device, dtype)
    return tokens, tokens[:8].float()


def lloyd_reference(tokens: Tensor, centers: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations in float64: centres [K, D], and how far rounding may move them.

    Raises:
        ArithmeticError: in some iteration rounding may change a label, and then anything may follow.
    """
    x, centers = tokens.double(), centers.double()
    bound = torch.full_like(centers, _TINY)
    for _ in range(iterations):
        nearest = distances_reference(x[None], centers[None])[0].topk(2, largest=False).values
        band = rounding_band(tokens[None], centers[None].float(), x.mean(0)[None])[0].amax(1)
        if (nearest[:, 1] - nearest[:, 0] <= 2 * band).any():
            raise ArithmeticError("two centres tie in the reference of Lloyd's algorithm")
        sums, counts, _, labels, _ = assign_accumulate_reference(x[None], centers[None])
        centers = sums[0] / counts[0][:, None]
        lengths = torch.zeros_like(centers).index_add_(0, labels[0], x.abs())
        bound = SUM_SHARE * lengths / counts[0][:, None] + 2.0**-24 * centers.abs() + _TINY
    return centers, bound


def attention_inputs(
    shape: Sequence[int], dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
) -> list[Tensor]:
    """q, k, v [B, H, N, d] and two prompts [H, N_p, d] that need gradients; `shape` is B, H, N, N_p, d."""
    batch, heads, tokens, prompts, width = shape
    generator = torch.Generator().manual_seed(seed)
    images = [_normal(batch, heads, tokens, width, generator=generator) for _ in range(3)]
    shared = [_normal(heads, prompts, width, generator=generator) for _ in range(2)]
    return [tensor.to(device, dtype).requires_grad_() for tensor in images + shared]


def in_float64(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The same values on the CPU, where no kernel of ours for another device is at work."""
    return [tensor.detach().cpu().double().requires_grad_() for tensor in inputs]


def worst_error(ours: Tensor, reference: Tensor) -> float:
    """Largest difference relative to the largest reference value, but at least 0.1; 0 for empty tensors.

    Inputs are of order one, and with a single key the gradients of the scores are exactly zero.
    """
    ours, reference = ours.detach().cpu().double(), reference.detach().cpu()
    if reference.numel() == 0:
        return 0.0
    scale = reference.abs().max().clamp_min(0.1)
    return float((ours - reference).abs().max() / scale)


def value_and_gradients(
    attention: Callable[..., Tensor], inputs: Sequence[Tensor], scale: float | None
) -> list[Tensor]:
    """The output and the gradient of each input for one fixed cotangent; zero where there is no path."""
    out = attention(*inputs, scale=scale)
    generator = torch.Generator().manual_seed(1)
    # Rounded to bfloat16, so that every precision is given the same one.
    cotangent = _normal(*out.shape, generator=generator).bfloat16().to(out)
    return [out, *torch.autograd.grad(out, inputs, cotangent, allow_unused=True, materialize_grads=True)]


def attention_bounds(inputs: Sequence[Tensor], scale: float | None) -> dict[str, tuple[Tensor, float]]:
    """The output and the five gradients in float64, and what `worst_error` may be.

    That is twice the error of plain PyTorch in the same dtype and on the same device, and a floor.
    """
    same_precision = value_and_gradients(prompt_attention_reference, inputs, scale)
    oracle = value_and_gradients(prompt_attention_reference, in_float64(inputs), scale)
    # Fused kernels rebuild the weights as exp(score - log sum), in float32 for half types: a score of 20
    # costs 20 roundings, and its sum over tokens some more. Rounding the result itself is the rest. float64
    # against itself is left to gradcheck.
    eps = torch.finfo(inputs[0].dtype).eps
    floor = 64 * min(eps, torch.finfo(torch.float32).eps) + eps
    return {
        name: (exact, 2 * worst_error(plain, exact) + floor)
        for name, plain, exact in zip(ATTENTION_RESULTS, same_precision, oracle, strict=True)
    }


def nmi_inputs(
    shape: Sequence[int], largest_score: float, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Prompts, and tokens that skip a prefix token without a copy; `shape` is N_p, B, N_e, D."""
    num_prompts, batch, num_tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    prompts = _normal(num_prompts, width, generator=generator)
    tokens = _normal(batch, 1 + num_tokens, width, generator=generator)
    factor = (largest_score / float((tokens @ prompts.T).abs().max())) ** 0.5
    return (prompts * factor).to(device, dtype), (tokens * factor).to(device, dtype)[:, 1:]


def nmi_gradient_bound(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """What a gradient in `dtype` may be off by.

    Rounding a score of 1e3 moves its share by 3e-5. Rounding the gradient to its dtype comes on top, which
    costs small numbers up to the smallest that the dtype has.
    """
    limits = torch.finfo(dtype)
    return (1e-4 + limits.eps) * exact.abs().max() + limits.tiny * limits.eps
