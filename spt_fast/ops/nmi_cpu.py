"""`sigmoid_nmi` and its gradient in PyTorch, for CPU tensors and wherever no Triton kernel serves.

Limits: scores are held for a bounded number of images at a time; a device without float64 cannot run it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spt_fast.ops.float32_products import full_product

# 2 ** 18 float64 scores are 2 MiB: they stay in the cache, and what is held does not grow with the batch.
_SCORES_PER_CHUNK = 2**18
# float32 scores are kept where rounding them moves the NMI by less than this share; four such errors in a row
# stay below the promised 1e-4.
_SHARE_OF_ROUNDING = 2e-5
_HALF_ULP = 2.0**-24
_EXCESS_OF_ROUNDING = 2.0**-50

# NMI, I, H(P), H(E) [B]; marginals of the prompts [B, N_p] and of the tokens [B, N_e]
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def nmi_forward(prompts: Tensor, tokens: Tensor) -> Parts:
    """`Parts` of prompts [N_p, D] or [B, N_p, D] and tokens [B, N_e, D]; float64 of float64, else float32."""
    dtype = torch.promote_types(prompts.dtype, torch.float32)
    # matmul goes another way for inputs that need gradients, whose last bits differ.
    prompts, tokens = prompts.detach(), tokens.detach()
    with torch.autocast(tokens.device.type, enabled=False):
        parts = [_forward_chunk(*chunk) for chunk in _chunks(prompts, tokens)]
    return tuple(torch.cat(column).to(dtype) for column in zip(*parts, strict=True))  # type: ignore[return-value]


def nmi_backward(
    prompts: Tensor,  # [N_p, D] or [B, N_p, D]
    tokens: Tensor,  # [B, N_e, D]
    coefficients: Tensor,  # [B, 3] float64: dL/dI, dL/dH(P), dL/dH(E)
) -> tuple[Tensor, Tensor]:
    """dL/dprompts, in the shape of the prompts, and dL/dtokens [B, N_e, D], in their dtypes."""
    grad_prompts = prompts.new_zeros(prompts.shape, dtype=torch.float64)
    grad_tokens = []
    images = 0
    with torch.autocast(tokens.device.type, enabled=False):
        for own, chunk in _chunks(prompts.double(), tokens):
            last = images + len(chunk)
            wide_tokens = chunk.double()
            joint = _Joint(own @ wide_tokens.mT)
            scores = joint.gradient(coefficients[images:last].double())
            add_prompt_gradients(grad_prompts, images, scores @ wide_tokens)
            grad_tokens.append((scores.mT @ own).to(tokens.dtype))
            images = last
    return grad_prompts.to(prompts.dtype), torch.cat(grad_tokens)


def prompts_of(prompts: Tensor, first: int, last: int) -> Tensor:
    """Those of some images: all of [N_p, D], which the images share, or rows of [B, N_p, D]."""
    return prompts if prompts.dim() == 2 else prompts[first:last]


def add_prompt_gradients(gradients: Tensor, first: int, of_images: Tensor) -> None:
    """Add those of some images [b, N_p, D], of which `first` is the first, to those of all prompts."""
    if gradients.dim() == 2:
        gradients += of_images.sum(0)
    else:
        gradients[first : first + len(of_images)] = of_images


class _Joint:
    """The joint distribution pi of eq. 7 and what follows from it, for scores [B, N_p, N_e] in float64."""

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        # exp(-shift) * sigmoid(scores): the factor cancels in pi, and keeps the numbers from underflowing.
        shift = scores.amax(dim=(1, 2), keepdim=True).clamp(max=0)
        mass = (shift - scores).exp_().add_(shift.exp()).reciprocal_()
        # Summed in two steps: the order of a sum down to one number would depend on the number of threads.
        rows = mass.sum(dim=2, keepdim=True)
        columns = mass.sum(dim=1, keepdim=True)
        total = rows.sum(dim=1, keepdim=True)
        self.pi = mass.div_(total)
        self.r = rows.div_(total)
        self.c = columns.div_(total)
        # pi / (r c) - 1. One ulp above -1 a pair has no weight left, and the logarithm stays finite.
        tiny = torch.finfo(torch.float64).tiny
        ratio = (self.pi / self.r.clamp(min=tiny)).div_(self.c.clamp(min=tiny))
        self.excess = ratio.sub_(1).clamp_(min=-1 + 2**-52)
        # Rounding is no information, and would be larger than it where one pair has nearly all the mass.
        self.excess.mul_(self.excess.abs() > _EXCESS_OF_ROUNDING)
        self.log_ratio = self.excess.log1p()
        self.information = self._information()
        self.prompt_entropy = _entropy(self.r)
        self.token_entropy = _entropy(self.c)

    def _information(self) -> Tensor:
        """I = sum r c [(1 + e) log(1 + e) - e], e the excess: terms that are never negative; [B]."""
        terms = (self.pi * self.log_ratio).sub_(self.excess.mul(self.r).mul_(self.c))
        # The result is NaN where a score is infinite, as where it is NaN.
        return terms.sum(dim=2).sum(dim=1).clamp_(min=0) + 0 * self.scores.sum(dim=2).sum(dim=1)

    @functools.cached_property
    def complement(self) -> Tensor:
        """1 - sigmoid(scores)."""
        return torch.sigmoid(-self.scores)

    def nmi(self) -> Tensor:
        """Eq. 8; 0 where all mass is on one pair, whose entropies are 0."""
        entropies = self.prompt_entropy + self.token_entropy
        safe = torch.where(entropies > 0, entropies, 1)
        return torch.where(entropies == 0, 0, 2 * self.information / safe)

    def gradient(self, coefficients: Tensor) -> Tensor:
        """dL/dscores [B, N_p, N_e] from dL/dI, dL/dH(P), dL/dH(E) in the columns of [B, 3]; docs/nmi.md."""
        of_i, of_p, of_e = (column[:, None, None] for column in coefficients.unbind(1))
        mean = of_i * _wide(self.information) + of_p * _wide(self.prompt_entropy)
        mean = mean + of_e * _wide(self.token_entropy)
        per_prompt = of_p * _log(self.r) + mean
        inner = (of_i * self.log_ratio).sub_(per_prompt).sub_(of_e * _log(self.c))
        return inner.mul_(self.pi).mul_(self.complement)


def nmi_coefficients(nmi: Tensor, prompt_entropy: Tensor, token_entropy: Tensor) -> Tensor:
    """dNMI/d(I, H(P), H(E)), float64 [B, 3]; 0 where both entropies are 0."""
    entropies = (prompt_entropy + token_entropy).double()
    inverse = torch.where(entropies > 0, 1 / entropies, 0)
    of_entropy = -nmi * inverse
    return torch.stack((2 * inverse, of_entropy, of_entropy), dim=1)


def _forward_chunk(prompts: Tensor, tokens: Tensor) -> Parts:
    if prompts.dtype == torch.float64:
        return _parts(_Joint(prompts @ tokens.mT))
    prompts, tokens = prompts.float(), tokens.float()
    joint = _Joint(full_product(prompts, tokens.mT).double())
    parts = _parts(joint)
    rough = (_error_of_float32(prompts, tokens, joint, parts) > _SHARE_OF_ROUNDING * parts[0]).nonzero()[:, 0]
    if len(rough) > 0:
        own = prompts if prompts.dim() == 2 else prompts[rough]
        exact = _parts(_Joint(own.double() @ tokens[rough].double().mT))
        for column, better in zip(parts, exact, strict=True):
            column[rough] = better
    return parts


def _error_of_float32(prompts: Tensor, tokens: Tensor, joint: _Joint, parts: Parts) -> Tensor:
    """About how far rounding errors of float32 scores may have moved the NMI; [B].

    A dot product of D terms, all of one sign, ends with an error of sqrt(D / 3) half ulps (root mean square),
    one of mixed signs with less. Errors of different scores are independent, so their effects add up in
    squares, to first order by the gradient; to second order they look like information of their own.
    """
    width = prompts.shape[-1]
    lengths = torch.linalg.vector_norm(tokens, dim=2).amax(dim=1).double()
    longest_prompt = torch.linalg.vector_norm(prompts, dim=-1).amax(dim=-1).double()
    error = _HALF_ULP * math.sqrt(width / 3) * longest_prompt * lengths
    nmi, _, prompt_entropy, token_entropy = parts[:4]
    gradient = joint.gradient(nmi_coefficients(nmi, prompt_entropy, token_entropy))
    first = 4 * error * torch.linalg.vector_norm(gradient, dim=2).square().sum(dim=1).sqrt()
    entropies = (prompt_entropy + token_entropy).clamp(min=torch.finfo(torch.float64).tiny)
    spread = (joint.pi * joint.complement.square()).sum(dim=2).sum(dim=1)
    total: Tensor = first + error.square() * spread / entropies
    return total


def _parts(joint: _Joint) -> Parts:
    marginals = (joint.r[:, :, 0], joint.c[:, 0])
    return (joint.nmi(), joint.information, joint.prompt_entropy, joint.token_entropy, *marginals)


def _chunks(prompts: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompts and tokens of some images at a time."""
    images = max(1, _SCORES_PER_CHUNK // (prompts.shape[-2] * tokens.shape[1]))
    for first in range(0, len(tokens), images):
        yield prompts_of(prompts, first, first + images), tokens[first : first + images]


def _entropy(p: Tensor) -> Tensor:
    """-sum p log p over all but the first dimension.

    The logarithm of the largest p, which may round to 1, comes from the sum of the others.
    """
    p = p.flatten(1)
    largest = p.argmax(dim=1, keepdim=True)
    others = p.scatter(1, largest, 0)
    rest = others.sum(dim=1)
    return -torch.xlogy(others, others).sum(dim=1) - (1 - rest) * torch.log1p(-rest)


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=torch.finfo(torch.float64).tiny).log()


def _wide(per_image: Tensor) -> Tensor:
    return per_image[:, None, None]
