"""Adapters: small bottlenecks behind the parts of a block (Houlsby et al. 2019), or beside its MLP.

With A(z) = W_up gelu(W_down z + b_down) + b_up and a bottleneck of d:

| style | a block computes | numbers (width D, L blocks) | by |
| --- | --- | --- | --- |
| houlsby | y + s A(y), of the outputs y of `attn` and `mlp` | 2 L (2 D d + d + D) | Houlsby et al. 2019 |
| pfeiffer | y + s A(y), of the output y of `mlp` | L (2 D d + d + D) | Pfeiffer et al. 2021 |
| parallel | mlp(z) + s A(z), of the input z of `mlp` | L (2 D d + d + D) | AdaptFormer, 2022 |

All of this is inside the branch: LayerScale and the sum with the skip come afterwards.

| init | W_down | W_up | at the start |
| --- | --- | --- | --- |
| houlsby | normal of deviation 0.01, truncated at two deviations | the same | nearly the model |
| lora | uniform, Kaiming's with a = sqrt(5) | zero | the model |
| vpt_zero | zero | zero | the model |

Biases start at zero. With vpt_zero, which is VPT's code, W_up = 0 and gelu(0) = 0 keep both matrices without
a gradient for ever: only b_up learns. It is here to reproduce the adapters of the paper's tables (d = 12).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from spt_fast.backbones.anatomy import embed_dim
from spt_fast.methods.added_modules import around, learned_like, linear_as, parts_of_blocks
from spt_fast.methods.base import Blocks, Common, TunedViT
from spt_fast.support.arguments import check_choice, check_int, check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PLACES = {"houlsby": ("attn", "mlp"), "pfeiffer": ("mlp",), "parallel": ("mlp",)}
INITS = ("houlsby", "lora", "vpt_zero")


class Adapter(TunedViT):
    """Adapters in every block, and the head.

    Args:
        style: "houlsby", "pfeiffer" or "parallel"; see the module.
        init: "houlsby", "lora" or "vpt_zero", whose matrices never learn.
        bottleneck: width d of the adapters.
        scale: factor s of what an adapter adds (AdaptFormer: 0.1).

    Raises:
        TypeError: a block of the model has no `mlp`, or no `attn` for "houlsby".
    """

    method = "adapter"

    def __init__(
        self,
        model: nn.Module,
        *,
        style: Literal["houlsby", "pfeiffer", "parallel"] = "pfeiffer",
        init: Literal["houlsby", "lora", "vpt_zero"] = "houlsby",
        bottleneck: int = 8,
        scale: float = 1.0,
        **common: Unpack[Common],
    ) -> None:
        options = {
            "style": check_choice("style", style, _PLACES),
            "init": check_choice("init", init, INITS),
            "bottleneck": check_int("bottleneck", bottleneck, 1),
            "scale": check_number("scale", scale, above=0),
        }
        super().__init__(model, options, **common)
        self.adapters = nn.ModuleList()
        self._take_over()

    def _install(self, blocks: Blocks) -> None:
        style, width = self.options["style"], embed_dim(self.model)
        places = dict.fromkeys(_PLACES[style], nn.Module)
        for part in parts_of_blocks(f"style={style!r}", blocks, places).values():
            adapter = Bottleneck(width, self.options["bottleneck"], self.options["scale"])
            adapter.to(**learned_like(self.model)).start(self.options["init"])
            self.adapters.append(adapter)
            add: Callable[[Tensor, Tensor], Tensor] = (
                adapter.beside if style == "parallel" else adapter.behind
            )
            self._snapshot.replace_forward(part, functools.partial(around, add, part.forward))


class Bottleneck(nn.Module):
    """s A(z) of tokens z [..., D], in their dtype."""

    def __init__(self, width: int, bottleneck: int, scale: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        self.scale = scale

    def start(self, init: str) -> None:
        """Draw the weights."""
        for layer in (self.down, self.up):
            nn.init.zeros_(layer.bias)
            nn.init.zeros_(layer.weight)
            if init == "houlsby":
                nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        if init == "lora":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))

    def forward(self, z: Tensor) -> Tensor:
        return linear_as(F.gelu(linear_as(z, self.down)), self.up) * self.scale

    def behind(self, _: Tensor, output: Tensor) -> Tensor:
        """Output of a part, and what the adapter makes of it."""
        return output + self.forward(output)

    def beside(self, x: Tensor, output: Tensor) -> Tensor:
        """Output of a part, and what the adapter makes of its input."""
        return output + self.forward(x)
