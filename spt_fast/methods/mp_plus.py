"""Moment probing with a part in every block (MP+, Gao et al., ICCV 2023): the head of `mp`, rescaled MLPs.

mlp(z) becomes (1 + w) * mlp(z) + b, of the MLP's input z, with w = U_w relu(V z) and b = U_b relu(V z), no
biases, V [16, D], U_w and U_b [D, 16]. They start as layers of torch do, so not as the model. LayerScale and
the sum with the skip come afterwards.

Numbers: those of `mp`, and 48 D L.
"""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from spt_fast.backbones.anatomy import embed_dim
from spt_fast.methods.added_modules import around, learned_like, linear_as, parts_of_blocks
from spt_fast.methods.base import Blocks
from spt_fast.methods.mp import MomentProbing

_RANK = 16


class MomentProbingPlus(MomentProbing):
    """Moment probing, and in every block a scale and a shift of the MLP that depend on its input.

    Raises:
        TypeError, ValueError: as `MomentProbing`; or a block has no `mlp`.
    """

    method = "mp+"

    def _install(self, blocks: Blocks) -> None:
        super()._install(blocks)
        self.rescales = nn.ModuleList()
        for part in parts_of_blocks(self.method, blocks, {"mlp": nn.Module}).values():
            rescale = Rescale(embed_dim(self.model)).to(**learned_like(self.model))
            self.rescales.append(rescale)
            forward = functools.partial(around, rescale.of_output, part.forward)
            self._snapshot.replace_forward(part, forward)


class Rescale(nn.Module):
    """(1 + w) * y + b of the output y of a part [..., D], w and b from its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, _RANK, bias=False)
        self.up_scale = nn.Linear(_RANK, width, bias=False)
        self.up_shift = nn.Linear(_RANK, width, bias=False)

    def of_output(self, z: Tensor, output: Tensor) -> Tensor:
        hidden = F.relu(linear_as(z, self.down))
        return output * (1 + linear_as(hidden, self.up_scale)) + linear_as(hidden, self.up_shift)
