"""Normalised mutual information between prompts and patch tokens; one number per image, in float64 inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spt_fast.errors import NonFiniteError

# 2 ** 21 float64 scores are 16 MiB: what is held at once does not grow with the batch.
_SCORES_PER_CHUNK = 2**21


def sigmoid_nmi(prompts: Tensor, tokens: Tensor) -> Tensor:
    """NMI(P; E) = 2 I(P; E) / (H(P) + H(E)) with pi_kj = sigmoid(p_k . e_j) / sum (eq. 7, 8).

    Scores and entropies are computed in float64: at scores of 1e3 a single rounding to float32 already
    moves pi by 6e-5, and at scores of 1e-3 the information is 1e-8 of the entropies. Work is in the log
    domain, so that scores far below zero do not underflow. Differentiable. With one prompt or one token the
    result is 0.

    Args:
        prompts: [N_p, D], floating point.
        tokens: [B, N_e, D], same dtype and device; any strides.

    Returns:
        [B], in [0, 1]; float64 for float64 inputs, else float32.

    Raises:
        TypeError: an argument is no floating-point tensor, or the dtypes differ.
        ValueError: empty, wrong rank, different widths or devices.
        NonFiniteError: a prompt or a token holds NaN or infinity (not checked while compiling).
    """
    _check(prompts, tokens)
    dtype = torch.promote_types(prompts.dtype, torch.float32)
    if prompts.shape[0] == 1 or tokens.shape[1] == 1:
        return tokens.new_zeros(tokens.shape[0], dtype=dtype)
    wide = prompts.double()
    images = max(1, _SCORES_PER_CHUNK // (prompts.shape[0] * tokens.shape[1]))
    return torch.cat([_nmi_of_scores(wide @ chunk.double().mT) for chunk in torch.split(tokens, images)]).to(
        dtype
    )


def _nmi_of_scores(scores: Tensor) -> Tensor:
    """Eq. 8 from scores [B, N_p, N_e] to [B]."""
    log_s = F.logsigmoid(scores)
    log_pi = log_s - log_s.logsumexp(dim=(1, 2), keepdim=True)
    log_r = log_pi.logsumexp(dim=2, keepdim=True)
    log_c = log_pi.logsumexp(dim=1, keepdim=True)
    entropies = _entropy(log_r) + _entropy(log_c)
    information = _mutual_information(log_pi, log_r + log_c)
    # All mass on one pair: both entropies are 0, and so is what the two share.
    positive = entropies > 0
    return torch.where(positive, 2 * information / torch.where(positive, entropies, 1), 0)


def _entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(dim=(1, 2))


def _mutual_information(log_pi: Tensor, log_rc: Tensor) -> Tensor:
    """sum pi log(pi / rc) as a sum of terms that are never negative, so that nothing cancels.

    pi and rc both sum to 1, hence I = sum [pi u - pi + rc] with u = log(pi / rc). The bracket is
    pi (u + expm1(-u)) and also rc (u e^u - expm1(u)); the first form is safe for u >= 0, the second for
    u <= 0, and either is 0 at u = 0, so clamping chooses between them.
    """
    u = log_pi - log_rc
    above, below = u.clamp(min=0), u.clamp(max=0)
    terms = log_pi.exp() * (above + torch.expm1(-above)) + log_rc.exp() * (
        below * below.exp() - torch.expm1(below)
    )
    return terms.sum(dim=(1, 2))


def _check(prompts: Tensor, tokens: Tensor) -> None:
    for name, tensor, layout in (("prompts", prompts, "[N_p, D]"), ("tokens", tokens, "[B, N_e, D]")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
        if tensor.ndim != layout.count(",") + 1:
            raise ValueError(f"{name} must have shape {layout}, got {tuple(tensor.shape)}")
        if tensor.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {tuple(tensor.shape)}")
    if prompts.shape[-1] != tokens.shape[-1]:
        raise ValueError(
            f"tokens must have the width of prompts, {prompts.shape[-1]}, got {tokens.shape[-1]}"
        )
    if prompts.device != tokens.device:
        raise ValueError(f"tokens must be on the device of prompts, {prompts.device}, got {tokens.device}")
    if prompts.dtype != tokens.dtype:
        raise TypeError(f"tokens must have the dtype of prompts, {prompts.dtype}, got {tokens.dtype}")
    if not torch.compiler.is_compiling():
        _check_finite("prompts", prompts)
        _check_finite("tokens", tokens)


def _check_finite(name: str, tensor: Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        row = int((~torch.isfinite(tensor)).any(dim=-1).flatten().nonzero()[0])
        raise NonFiniteError(f"{name} must be finite, but row {row} holds NaN or infinity", row)
