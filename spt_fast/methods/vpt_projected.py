"""VPT with projected prompts: prompts of a width d of their own, and a linear layer that takes them to D.

P_i = p_i W^T + b, with p_i [N_p, d], and W [D, d] and b [D] the same for all blocks.

Source: Jia et al., "Visual Prompt Tuning", ECCV 2022, whose released code has this as an option that is off:
p uniform in +-sqrt(6 / (3 * patch height * patch width + d)), W by Kaiming's normal initialisation (fan out),
b as a layer of torch starts. Learned numbers: N_p d L + (d + 1) D, shallow N_p d + (d + 1) D.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from spt_fast.methods.added_modules import learned_like
from spt_fast.methods.prompt_variant import ComputedPrompts, PromptUse, without_autocast
from spt_fast.prompting.initial_prompts import random_prompts
from spt_fast.support.arguments import check_choice, check_int

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from spt_fast.methods.file_format import TunedState


class ProjectedVPT(ComputedPrompts):
    """`model` with VPT's prompts of a width of their own: `tune(model, "vpt-deep", project=64)`.

    Args:
        prompts: how many there are in a block.
        depth: "deep" or "shallow".
        project: d, their width.
        use: options of `PromptedViT`.

    Attributes:
        prompts: [L or 1, N_p, D], as they leave the layer; from them VPT goes on without one:
            `tune(model, "spt-deep", prompts=tuned.prompts)`.
        source: has the Parameter `prompts` [L or 1, N_p, d] and the layer `projection`.

    Raises:
        TypeError, ValueError: as `PromptedViT`; `project` is no integer above 0, or `prompts` is no number.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: int,
        *,
        depth: Literal["deep", "shallow"] = "deep",
        project: int,
        **use: Unpack[PromptUse],
    ) -> None:
        check_choice("depth", depth, ("deep", "shallow"))
        project = check_int("project", project, 1, "or None")
        count = check_int("prompts", prompts, 0)
        self._own_options = {"depth": depth, "project": project}
        super().__init__(model, count, depth=depth, **use)

    def _make_source(self, values: Tensor) -> nn.Module:
        layers, count, width = values.shape
        narrow = random_prompts(self.model, layers, count, self.options["project"])
        return _Projected(narrow, width).to(**learned_like(self.model))

    @classmethod
    def _opens(cls, state: TunedState) -> bool:
        return state.method in ("vpt-deep", "vpt-shallow") and "project" in state.options

    @classmethod
    def _start_of(cls, state: TunedState) -> int:
        # The file has their values.
        return state.tensors["source.prompts"].shape[1]


class _Projected(nn.Module):
    """Prompts [L, N_p, D] of prompts [L, N_p, d]."""

    def __init__(self, values: Tensor, width: int) -> None:
        super().__init__()
        # Without prompts there is nothing to learn; DDP would wait for a gradient that never comes.
        learns = values.numel() > 0
        self.prompts = nn.Parameter(values, requires_grad=learns)
        self.projection = nn.Linear(values.shape[2], width).requires_grad_(learns)
        nn.init.kaiming_normal_(self.projection.weight, mode="fan_out")

    def forward(self) -> Tensor:
        return without_autocast(lambda: self.projection(self.prompts), self.prompts.device)
