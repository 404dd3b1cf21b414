"""VFPT: a share of the prompts of each block is replaced by its Fourier transform.

Of the N_p prompts of a block the first m = floor(fraction N_p), P_F [m, D], become

    Re(F_m P_F F_D),  with F_n the discrete Fourier transform of n numbers (unscaled),

the real part of their 2-D transform over prompts and channels; the others stay as they are. So 0 is VPT.

Source: Zeng et al., "Visual Fourier Prompt Tuning", NeurIPS 2024, where the fraction is chosen for each task;
0.5 and 20 prompts are our defaults. Nothing is learned but the prompts: N_p D L numbers (deep), N_p D
(shallow); 184,320 for ViT-B with 20 deep prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from spt_fast.methods.prompt_variant import ComputedPrompts, PromptUse, part_of
from spt_fast.support.arguments import check_choice, check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from spt_fast.prototypes.result import Prototypes


class VFPT(ComputedPrompts):
    """`model` with prompts of which some are Fourier transforms of what is learned.

    Args:
        prompts: what the prompts start from before the transform, as in `PromptedViT`.
        depth: "deep" or "shallow".
        fraction: of the prompts that are transformed, from 0 to 1.
        use: options of `PromptedViT`.

    Attributes:
        prompts: [L or 1, N_p, D], after the transform.
        source: has the Parameter `prompts` [L or 1, N_p, D] before it.

    Raises:
        TypeError, ValueError: as `PromptedViT`; `fraction` is no number from 0 to 1.
    """

    method = "vfpt"

    def __init__(
        self,
        model: nn.Module,
        prompts: Prototypes | Tensor | int,
        *,
        depth: Literal["deep", "shallow"] = "deep",
        fraction: float = 0.5,
        **use: Unpack[PromptUse],
    ) -> None:
        check_choice("depth", depth, ("deep", "shallow"))
        if check_number("fraction", fraction, 0) > 1:
            raise ValueError(f"fraction must be a number from 0 to 1, got {fraction}")
        self._own_options = {"depth": depth, "fraction": float(fraction)}
        super().__init__(model, prompts, depth=depth, **use)

    def _make_source(self, values: Tensor) -> nn.Module:
        return _Fourier(values, part_of(values.shape[1], self.options["fraction"]))


class _Fourier(nn.Module):
    """Prompts [L, N_p, D] with the first `transformed` of each layer replaced by their transform."""

    def __init__(self, values: Tensor, transformed: int) -> None:
        super().__init__()
        self.prompts = nn.Parameter(values, requires_grad=values.numel() > 0)
        self.transformed = transformed

    def forward(self) -> Tensor:
        before, others = self.prompts.tensor_split((self.transformed,), dim=1)
        if before.numel() == 0:
            return self.prompts
        # There is no transform of half types everywhere.
        wide = torch.promote_types(before.dtype, torch.float32)
        return torch.cat((torch.fft.fft2(before.to(wide)).real.to(before.dtype), others), dim=1)
