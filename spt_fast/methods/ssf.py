"""SSF: scale and shift what every operation of a block gives (Lian et al., NeurIPS 2022).

y = gamma * x + beta, channel by channel, after `norm1`, `attn.qkv`, `attn.proj`, `norm2`, `mlp.fc1` and
`mlp.fc2` of every block, after `patch_embed` and after the final norm (`norm`, or `fc_norm` where the model
averages first). gamma starts from a normal distribution around 1, beta around 0, both of deviation 0.02.

Numbers, with an MLP of 4 D: 22 D L + 4 D, of which 2 for each channel that is scaled.

Each is folded into the weights before it (`merge`): W' = gamma W and b' = gamma b + beta. A layer without a
bias gets one, except a norm that takes none, such as RmsNorm.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import embed_dim
from spt_fast.methods.added_modules import around, learned_like, parts_of_blocks
from spt_fast.methods.base import Blocks, Common, TunedViT

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Of every block, with the class that each must have.
_OPERATIONS: dict[str, type[nn.Module]] = {
    "norm1": nn.Module,
    "attn.qkv": nn.Linear,
    "attn.proj": nn.Linear,
    "norm2": nn.Module,
    "mlp.fc1": nn.Linear,
    "mlp.fc2": nn.Linear,
}


class ScaleShiftFeatures(TunedViT):
    """Scales and shifts behind every operation, and the head. It has no options.

    Raises:
        TypeError: the model lacks one of the operations.
    """

    method = "ssf"
    merges = True

    def __init__(self, model: nn.Module, **common: Unpack[Common]) -> None:
        super().__init__(model, {}, **common)
        self.operations = nn.ModuleDict()
        self._take_over()

    def _install(self, blocks: Blocks) -> None:
        for name, part in self._parts(blocks).items():
            scaled = ScaleShift(_width(part, self.model), **learned_like(self.model))
            self.operations[name.replace(".", "-")] = scaled
            self._snapshot.replace_forward(part, functools.partial(around, scaled.of_output, part.forward))

    def _parts(self, blocks: Blocks) -> dict[str, nn.Module]:
        """What is scaled, by its name in the model."""
        embedding = _embedding(self.model)
        found = parts_of_blocks("ssf", blocks, _OPERATIONS)
        return {"patch_embed": embedding, **found, **_final_norm(self.model)}

    def _folded(self) -> dict[str, Tensor]:
        folded: dict[str, Tensor] = {}
        for key, scaled in self.operations.items():
            name = key.replace("-", ".")
            if name == "patch_embed":
                norm = getattr(self.model.patch_embed, "norm", None)
                name += ".norm" if getattr(norm, "weight", None) is not None else ".proj"
            layer = self.model.get_submodule(name)
            assert isinstance(scaled, ScaleShift)
            folded |= {f"{name}.{each}": value for each, value in scaled.folded_into(name, layer).items()}
        return folded


class ScaleShift(nn.Module):
    """gamma * x + beta of x [..., width], in its dtype."""

    def __init__(self, width: int, **kind: Any) -> None:
        super().__init__()
        self.scale = nn.Parameter(nn.init.normal_(torch.empty(width, **kind), 1.0, 0.02))
        self.shift = nn.Parameter(nn.init.normal_(torch.empty(width, **kind), 0.0, 0.02))

    def of_output(self, _: Tensor, output: Tensor) -> Tensor:
        return torch.addcmul(self.shift.to(output.dtype), output, self.scale.to(output.dtype))

    def folded_into(self, name: str, layer: nn.Module) -> dict[str, Tensor]:
        """Weight and bias with which `layer` gives what it gave scaled and shifted.

        Raises:
            ValueError: `layer` takes no bias.
        """
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.LayerNorm) or layer.weight is None:
            raise ValueError(
                f"merge needs a weight and a bias in `{name}`, which {type(layer).__name__} does not take"
            )
        weight, bias = layer.weight, layer.bias
        scale = self.scale.view(-1, *[1] * (weight.ndim - 1))
        shifted = self.shift if bias is None else torch.addcmul(self.shift, bias.to(self.shift), self.scale)
        return {"weight": (weight * scale).to(weight.dtype), "bias": shifted.to(weight.dtype)}


def _width(part: nn.Module, model: nn.Module) -> int:
    """Of the output of a part."""
    return part.out_features if isinstance(part, nn.Linear) else embed_dim(model)


def _embedding(model: nn.Module) -> nn.Module:
    embedding = getattr(model, "patch_embed", None)
    if not isinstance(getattr(embedding, "proj", None), nn.Conv2d | nn.Linear):
        raise TypeError(f"ssf needs a model with `patch_embed.proj`, which {type(model).__name__} lacks")
    assert isinstance(embedding, nn.Module)
    return embedding


def _final_norm(model: nn.Module) -> dict[str, nn.Module]:
    for name in ("norm", "fc_norm"):
        norm = getattr(model, name, None)
        if isinstance(norm, nn.Module) and getattr(norm, "weight", None) is not None:
            return {name: norm}
    raise TypeError(
        f"ssf needs a model with a final norm, `norm` or `fc_norm`, which {type(model).__name__} lacks"
    )
