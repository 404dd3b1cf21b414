"""NMI of the prompts of a block and the patch tokens that enter it (eq. 7, 8), image by image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spt_fast.ops.nmi import sigmoid_nmi
from spt_fast.support.errors import NonFiniteError


def nmi_per_image(prompts: Tensor, tokens: Tensor, **scores: Any) -> Tensor:
    """NMI [B] of prompts [1 or B, N_p, D] and patch tokens [B, N_e, D], in the dtype of the tokens.

    One set of prompts is compared with every image, B sets each with its own image. `scores` are `scale` and
    `normalize` of `sigmoid_nmi`.
    """
    prompts = prompts.to(tokens.dtype)
    values: Tensor = sigmoid_nmi(prompts[0] if len(prompts) == 1 else prompts, tokens, **scores)
    return values


def check_finite_nmi(values: Tensor) -> None:
    """NonFiniteError naming the first block and image where NMI values [L, B] are NaN or infinite."""
    bad = (~torch.isfinite(values)).nonzero()
    if len(bad) > 0:
        layer, image = bad[0].tolist()
        raise NonFiniteError(
            f"block {layer + 1}: its prompts or the tokens of image {image} hold NaN or infinity",
            image=image,
            layer=layer,
        )
