"""`sigmoid_nmi` as the paper writes it, in float64, image by image; right while some score is above -700."""

from __future__ import annotations

import torch
from torch import Tensor


def sigmoid_nmi_reference(prompts: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 7 and 8 for prompts [N_p, D] or [B, N_p, D] and tokens [B, N_e, D]; float64 [B]."""
    each = prompts.double().expand(len(tokens), -1, -1)
    return torch.stack([_nmi(own @ image.double().T) for own, image in zip(each, tokens, strict=True)])


def _nmi(scores: Tensor) -> Tensor:
    s = torch.sigmoid(scores)
    pi = s / s.sum()
    r = pi.sum(dim=1)
    c = pi.sum(dim=0)
    independent = r[:, None] * c[None, :]
    information = pi[pi > 0] * torch.log(pi[pi > 0] / independent[pi > 0])
    return 2 * information.sum() / (_entropy(r) + _entropy(c))


def _entropy(p: Tensor) -> Tensor:
    return -(p[p > 0] * torch.log(p[p > 0])).sum()
