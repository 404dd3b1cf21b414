"""SNF: a flow on each of the two skip connections of a block (Wang et al., CVPR 2023).

x = F1(x) + attn(norm1(x)) and then x = F2(x) + mlp(norm2(x)), with timm's LayerScale and drop path, in the
blocks of its ViT, EVA and BEiT that normalise first. F is an affine flow and then K planar ones, on each
token by itself:

    z_0 = mu + exp(s) * x                            start: mu = s = 0, the model
    z_k = z_(k-1) + u_k tanh(w_k . z_(k-1) + b_k)    start: u, w, b uniform in +-0.01, nearly the model

The log-determinants of the flows are not needed. Numbers: 2 L (2 D + K (2 D + 1)). K = 16 is the default of
the released code; the counts in the paper's tables are those of K = 1 (FGVC) and K = 6 (VTAB).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from timm.models import beit, eva
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from spt_fast.backbones.anatomy import embed_dim
from spt_fast.methods.added_modules import learned_like
from spt_fast.methods.base import Blocks, Common, TunedViT
from spt_fast.support.arguments import check_int

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BOUND = 0.01
# Of these forwards the one below is the same with flows on its skips.
_FORWARDS = (Block.forward, eva.EvaBlock.forward, beit.Block.forward)


class SkipFlows(TunedViT):
    """Flows on the skip connections of every block, and the head.

    Args:
        num_flows: K, the planar flows of each skip; 0 leaves the affine one.

    Raises:
        TypeError: a block is none of timm's that normalise first, one part after the other, so that its skips
            can be reached: `Block` of its ViT and of BEiT, and `EvaBlock`.
    """

    method = "snf"

    def __init__(self, model: nn.Module, *, num_flows: int = 16, **common: Unpack[Common]) -> None:
        super().__init__(model, {"num_flows": check_int("num_flows", num_flows, 0)}, **common)
        self.flows = nn.ModuleList()
        self._take_over()

    def _install(self, blocks: Blocks) -> None:
        for index, block in enumerate(blocks):
            if type(block).forward not in _FORWARDS or "forward" in vars(block):
                raise TypeError(
                    "snf needs blocks that run as timm's Block of a Vision Transformer or BEiT, or EvaBlock, "
                    f"but block {index + 1} is a {type(block).__name__}"
                )
            first, second = (
                Flow(embed_dim(self.model), self.options["num_flows"], **learned_like(self.model))
                for _ in range(2)
            )
            self.flows.extend([first, second])
            self._snapshot.replace_forward(block, functools.partial(_run_block, block, first, second))


class Flow(nn.Module):
    """F of tokens [..., D], in their dtype.

    Attributes:
        shift, log_scale: mu and s [D].
        directions, weights, biases: u and w [K, D], b [K].
    """

    def __init__(self, width: int, num_flows: int, **kind: Any) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width, **kind))
        self.log_scale = nn.Parameter(torch.zeros(width, **kind))

        def drawn(*shape: int) -> nn.Parameter | None:
            # DDP would wait for the gradient of a parameter without numbers.
            return nn.Parameter(torch.empty(*shape, **kind).uniform_(-_BOUND, _BOUND)) if num_flows else None

        self.directions = drawn(num_flows, width)
        self.weights = drawn(num_flows, width)
        self.biases = drawn(num_flows)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.addcmul(self.shift.to(x.dtype), x, self.log_scale.exp().to(x.dtype))
        if self.directions is None or self.weights is None or self.biases is None:
            return z
        learned = (each.to(x.dtype) for each in (self.directions, self.weights, self.biases))
        for direction, weight, bias in zip(*learned, strict=True):
            gate = torch.tanh(z @ weight + bias)
            z = torch.addcmul(z, gate.unsqueeze(-1), direction)
        return z


def _run_block(block: Any, first: Flow, second: Flow, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """timm's block with flows on its skips; what else it is called with is for its attention."""
    mixed = block.attn(block.norm1(x), *args, **kwargs)
    x = first(x) + block.drop_path1(_scaled(block, "1", mixed))
    x = second(x) + block.drop_path2(_scaled(block, "2", block.mlp(block.norm2(x))))
    return x


def _scaled(block: Any, number: str, branch: Tensor) -> Tensor:
    """Through the block's LayerScale: a module in timm's ViT, elsewhere a vector or None."""
    if hasattr(block, f"ls{number}"):
        return getattr(block, f"ls{number}")(branch)  # type: ignore[no-any-return]
    gamma = getattr(block, f"gamma_{number}")
    return branch if gamma is None else gamma * branch
