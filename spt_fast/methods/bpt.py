"""BPT: the prompts of a block are a product of two factors of low rank, P = A B.

A [N_p, r] and B [r, D] both learn, where VPT learns P itself. In deep prompts only the last blocks learn
their B; the B of the others stay as they were drawn.

Source: Wang et al., "Attention to the Burstiness in Visual Prompt Tuning!", ICCV 2025 (bilinear model), and
the released code (MIT): r = 75 of 100 shallow prompts, 50 of 50 deep ones, and four blocks that learn B. A is
drawn from N(0, 0.02^2), B by Xavier's uniform initialisation. The code may start B from a whitening of the
tokens of a data set; here both may start from SPT's prototypes P: A = U S^(1/2), B = S^(1/2) V^T with the r
largest singular values of P. Learned numbers: L N_p r + k r D, with the k blocks that learn B (shallow:
L = k = 1); 183,600 for ViT-B with 50 deep prompts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from spt_fast.methods.prompt_variant import ComputedPrompts, PromptUse, without_autocast
from spt_fast.support.arguments import check_choice, check_int

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from spt_fast.methods.file_format import TunedState
    from spt_fast.prototypes.result import Prototypes

_RANKS = {"deep": 50, "shallow": 75}


class BPT(ComputedPrompts):
    """`model` with prompts of low rank.

    Args:
        prompts: how many there are in a block; or what their product starts from, as in `PromptedViT`.
        depth: "deep" or "shallow".
        rank: r, at most N_p and D; None is 50 (deep) or 75 (shallow), or N_p or D where that is less.
        learned_bases: how many of the last blocks learn their B; at least 1, more than there are is all.
        use: options of `PromptedViT`.

    Attributes:
        prompts: [L or 1, N_p, D], the product.
        source: has the Parameters `left` [L or 1, N_p, r], A, and `right` [k, r, D], B of the last k blocks,
            and the buffer `fixed` [L - k, r, D], B of the others.

    Raises:
        TypeError, ValueError: as `PromptedViT`; an option is no such integer, or `rank` is too large.
    """

    method = "bpt"
    _start = "source.left"

    def __init__(
        self,
        model: nn.Module,
        prompts: Prototypes | Tensor | int,
        *,
        depth: Literal["deep", "shallow"] = "deep",
        rank: int | None = None,
        learned_bases: int = 4,
        **use: Unpack[PromptUse],
    ) -> None:
        check_choice("depth", depth, ("deep", "shallow"))
        rank = None if rank is None else check_int("rank", rank, 1, "or None")
        learned_bases = check_int("learned_bases", learned_bases, 1)
        self._is_random = not isinstance(getattr(prompts, "prompts", prompts), Tensor)
        self._own_options = {"depth": depth, "rank": rank, "learned_bases": learned_bases}
        super().__init__(model, prompts, depth=depth, **use)

    def _make_source(self, values: Tensor) -> nn.Module:
        rank, most = self.options["rank"], min(values.shape[1:])
        if rank is None:
            rank = min(_RANKS[self.depth], most)
        if rank > most:
            raise ValueError(
                f"rank must be at most {most}, the number of prompts or, if less, their width, got {rank}"
            )
        left, right = _drawn(values, rank) if self._is_random else _factors(values, rank)
        return _Product(left, right, min(self.options["learned_bases"], len(right)))

    @classmethod
    def _start_of(cls, state: TunedState) -> Tensor:
        left, right = state.tensors["source.left"], state.tensors["source.right"]
        # Both factors are in the file.
        return left.new_zeros(*left.shape[:2], right.shape[-1])


class _Product(nn.Module):
    """Prompts [L, N_p, D] from factors [L, N_p, r] and [L, r, D]; of the latter the last `learned` learn."""

    fixed: Tensor

    def __init__(self, left: Tensor, right: Tensor, learned: int) -> None:
        super().__init__()
        first = len(right) - learned
        self.left = nn.Parameter(left, requires_grad=left.numel() > 0)
        self.right = nn.Parameter(right[first:].clone(), requires_grad=left.numel() > 0)
        self.register_buffer("fixed", right[:first].clone())

    def forward(self) -> Tensor:
        right = torch.cat((self.fixed, self.right))
        return without_autocast(lambda: self.left @ right, right.device)


def _drawn(values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Random factors of prompts of the shape of `values` [L, N_p, D]."""
    layers, num_prompts, width = values.shape
    left = torch.empty(layers, num_prompts, rank, dtype=torch.float32, device="cpu").normal_(std=0.02)
    right = torch.empty(layers, rank, width, dtype=torch.float32, device="cpu")
    for each in right:
        nn.init.xavier_uniform_(each)
    return left.to(values), right.to(values)


def _factors(values: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Of the best approximation of this rank."""
    left, sizes, right = torch.linalg.svd(values, full_matrices=False)
    root = sizes[:, :rank].sqrt()
    return left[..., :rank] * root[:, None], root[..., None] * right[:, :rank]
