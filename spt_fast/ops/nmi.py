"""Normalised mutual information between prompts and patch tokens (eq. 7, 8): one number per image.

Limits: differentiable once. Triton's kernels serve CUDA tensors in float32, float16 and bfloat16; PyTorch,
with float64 inside, serves the rest.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn import functional

from spt_fast.ops import triton_support, trust
from spt_fast.ops.autograd_guards import refuse_second_derivative, refuse_tangents
from spt_fast.ops.nmi_cpu import nmi_backward, nmi_coefficients, nmi_forward
from spt_fast.support.arguments import check_bool, check_number, check_tensor

KERNEL = trust.Kernel("sigmoid_nmi", "spt_fast.ops.cases:prove_nmi", ("ops/nmi*.py", "ops/triton_*.py"))


class NMIParts(NamedTuple):
    """The NMI of each image and what it is made of; entropies in nats."""

    nmi: Tensor  # [B]: 2 * information / (prompt_entropy + token_entropy)
    information: Tensor  # [B]: I(P; E)
    prompt_entropy: Tensor  # [B]: H(P)
    token_entropy: Tensor  # [B]: H(E)
    prompt_marginal: Tensor  # [B, N_p]: share of each prompt in the sum of all scores; carries no gradient
    token_marginal: Tensor  # [B, N_e]: share of each token; carries no gradient


@overload
def sigmoid_nmi(
    prompts: Tensor,
    tokens: Tensor,
    *,
    scale: float = 1.0,
    normalize: bool = False,
    with_parts: Literal[False] = False,
) -> Tensor: ...
@overload
def sigmoid_nmi(
    prompts: Tensor,
    tokens: Tensor,
    *,
    scale: float = 1.0,
    normalize: bool = False,
    with_parts: Literal[True],
) -> NMIParts: ...
def sigmoid_nmi(
    prompts: Tensor,
    tokens: Tensor,
    *,
    scale: float = 1.0,
    normalize: bool = False,
    with_parts: bool = False,
) -> Tensor | NMIParts:
    """NMI(P; E) = 2 I(P; E) / (H(P) + H(E)) with pi_kj = sigmoid(p_k . e_j) / sum (eq. 7, 8).

    The result is within a relative 1e-4 of exact arithmetic on the same inputs for scores from 1e-3 to 1e3 in
    size; docs/nmi.md says how. Differentiable in prompts and tokens, once, by `torch.autograd` and not by the
    transforms of `torch.func`. With one prompt or one token, with equal scores, and where one pair has all
    the mass, the result is 0. Inputs are not searched for NaN or infinity, which would make a GPU wait: an
    image with a score that is NaN or infinite gets NaN.

    Args:
        prompts: [N_p, D], floating point; or [B, N_p, D], where each image has prompts of its own.
        tokens: [B, N_e, D], same dtype and device; any strides, such as `x[:, 1:]` without the class token.
        scale: s in sigmoid(s p_k . e_j), > 0. The paper has none (eq. 7), but long prompts saturate the
            sigmoid; D ** -0.5 is what attention takes.
        normalize: divide prompts and tokens by their lengths first, so that scores are s cos(p_k, e_j).
        with_parts: return information, entropies and marginals too.

    Returns:
        [B], in [0, 1], or `NMIParts`; float64 for float64 inputs, else float32.

    Raises:
        TypeError: an argument is no floating-point tensor, or the dtypes differ.
        ValueError: empty, wrong rank, different widths or devices, a scale that is not positive, or a tangent
            of forward-mode differentiation.
    """
    _check(prompts, tokens)
    scale, normalize = check_number("scale", scale, above=0), check_bool("normalize", normalize)
    refuse_tangents("sigmoid_nmi", {"prompts": prompts, "tokens": tokens})
    if scale != 1 or normalize:
        prompts, tokens = _scaled(prompts, tokens, scale, normalize)
    nmi, information, prompt_entropy, token_entropy, r, c = torch.ops.spt_fast.sigmoid_nmi(prompts, tokens)
    if not with_parts:
        return nmi  # type: ignore[no-any-return]
    return NMIParts(nmi, information, prompt_entropy, token_entropy, r.detach(), c.detach())


def explain_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Name of the code that serves such tensors, and why; all dispatch goes by it."""
    if device.type == "cpu":
        return "cpu", "PyTorch, float32 scores where they hold the tolerance, else float64"
    reason = triton_support.why_not(device)
    if not reason and dtype == torch.float64:
        reason = "Triton's kernels have no float64"
    if not reason:
        reason = trust.why_not(KERNEL, device, dtype)
    return ("portable", f"PyTorch in float64: {reason}") if reason else ("triton", "compiled at first use")


def _has_kernel(tensor: Tensor) -> bool:
    """Whether Triton serves such tensors; warns once for each reason why a GPU has to do without."""
    name, reason = explain_backend(tensor.device, tensor.dtype)
    if name == "portable":
        _warn_once(reason)
    return name == "triton"


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"sigmoid_nmi is computed by {reason}, which is slower", stacklevel=4)


@torch.library.custom_op("spt_fast::sigmoid_nmi", mutates_args=())
def _sigmoid_nmi(prompts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `NMIParts`."""
    if _has_kernel(prompts):
        from spt_fast.ops.nmi_triton import launch_nmi_forward

        return launch_nmi_forward(prompts, tokens)
    return nmi_forward(prompts, tokens)


@torch.library.custom_op("spt_fast::sigmoid_nmi_backward", mutates_args=())
def _sigmoid_nmi_backward(
    prompts: Tensor,  # [N_p, D] or [B, N_p, D]
    tokens: Tensor,  # [B, N_e, D]
    coefficients: Tensor,  # [B, 3] float64: dL/dI, dL/dH(P), dL/dH(E)
    information: Tensor,  # [B]
    prompt_entropy: Tensor,  # [B]
    token_entropy: Tensor,  # [B]
) -> tuple[Tensor, Tensor]:
    """Gradients of prompts and tokens."""
    if _has_kernel(prompts):
        from spt_fast.ops.nmi_triton import launch_nmi_backward

        return launch_nmi_backward(prompts, tokens, coefficients, information, prompt_entropy, token_entropy)
    return nmi_backward(prompts, tokens, coefficients)


@_sigmoid_nmi.register_fake
def _(prompts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(prompts.dtype, torch.float32)
    batch, num_tokens, _ = tokens.shape
    shapes = [(batch,)] * 4 + [(batch, prompts.shape[-2]), (batch, num_tokens)]
    return tuple(tokens.new_empty(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


@_sigmoid_nmi_backward.register_fake
def _(
    prompts: Tensor,
    tokens: Tensor,
    coefficients: Tensor,
    information: Tensor,
    prompt_entropy: Tensor,
    token_entropy: Tensor,
) -> tuple[Tensor, Tensor]:
    return prompts.new_empty(prompts.shape), tokens.new_empty(tokens.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[:4])


def _differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
    prompts, tokens, nmi, information, prompt_entropy, token_entropy = ctx.saved_tensors
    of_nmi, of_information, of_prompts, of_tokens = (gradient.double() for gradient in gradients[:4])
    direct = torch.stack((of_information, of_prompts, of_tokens), dim=1)
    coefficients = direct + of_nmi[:, None] * nmi_coefficients(nmi, prompt_entropy, token_entropy)
    return torch.ops.spt_fast.sigmoid_nmi_backward(  # type: ignore[no-any-return]
        prompts, tokens, coefficients, information, prompt_entropy, token_entropy
    )


_sigmoid_nmi.register_autograd(_differentiate, setup_context=_save)
_sigmoid_nmi_backward.register_autograd(refuse_second_derivative("sigmoid_nmi"))


def _scaled(prompts: Tensor, tokens: Tensor, scale: float, normalize: bool) -> tuple[Tensor, Tensor]:
    """Prompts and tokens whose products are the scores wanted; at least float32, to keep rounding small."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    prompts, tokens = prompts.to(dtype), tokens.to(dtype)
    if normalize:
        prompts, tokens = functional.normalize(prompts, dim=-1), functional.normalize(tokens, dim=-1)
    return prompts * scale, tokens


def _check(prompts: Tensor, tokens: Tensor) -> None:
    own = isinstance(prompts, Tensor) and prompts.dim() == 3
    check_tensor("prompts", prompts, ("B", "N_p", "D") if own else ("N_p", "D"))
    shape = ("B", "N_e", prompts.shape[-1])
    check_tensor("tokens", tokens, shape, dtype=prompts.dtype, device=prompts.device)
    if own:
        check_tensor("prompts", prompts, (len(tokens), "N_p", "D"))
