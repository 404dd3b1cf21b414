"""Methods that learn weights of the model itself: linear, bias, partial and full fine-tuning.

They add nothing, so that `merge` gives a plain model of timm.

| name | learns, beside the head | numbers (width D, L blocks) |
| --- | --- | --- |
| linear | nothing | 0 |
| bias | every tensor named `bias` (BitFit, Ben Zaken et al. 2022; TinyTL, Cai et al. 2020) | 11 D L + 2 D |
| partial | the last k blocks and the norm after them | k (12 D^2 + 13 D) + 2 D |
| full | everything | all |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from spt_fast.backbones.snapshot import classifiers
from spt_fast.methods.base import Blocks, Common, TunedViT
from spt_fast.support.arguments import check_int

if TYPE_CHECKING:
    from typing_extensions import Unpack


class OwnWeights(TunedViT):
    """Base of the methods that learn weights of the model; `_wants` says which."""

    merges = True

    def __init__(
        self, model: nn.Module, options: Mapping[str, int] | None = None, **common: Unpack[Common]
    ) -> None:
        super().__init__(model, options or {}, **common)
        self._take_over()

    def _install(self, blocks: Blocks) -> None:
        of_head = {id(each) for head in classifiers(self.model) for each in head.parameters()}
        self._snapshot.open_weights(
            self.model,
            [
                name
                for name, parameter in self.model.named_parameters()
                if id(parameter) not in of_head and self._wants(name, blocks)
            ],
        )

    def _wants(self, name: str, blocks: Blocks) -> bool:
        """Whether a weight of the model, which is none of the head, learns."""
        raise NotImplementedError

    def _folded(self) -> dict[str, Tensor]:
        return dict(self._snapshot.opened(self.model))


class LinearProbe(OwnWeights):
    """The head alone: a linear probe. Features are then computed once (`training.features`)."""

    method = "linear"

    def _wants(self, name: str, blocks: Blocks) -> bool:
        return False


class Bias(OwnWeights):
    """Every tensor of the model whose name ends in `bias`."""

    method = "bias"

    def _wants(self, name: str, blocks: Blocks) -> bool:
        return name.rpartition(".")[2].endswith("bias")


class Partial(OwnWeights):
    """The last blocks, and what follows them.

    Args:
        num_blocks: how many.
    """

    method = "partial"

    def __init__(self, model: nn.Module, *, num_blocks: int = 1, **common: Unpack[Common]) -> None:
        super().__init__(model, {"num_blocks": check_int("num_blocks", num_blocks, 1)}, **common)

    def _install(self, blocks: Blocks) -> None:
        if self.options["num_blocks"] > len(blocks):
            raise ValueError(
                f"num_blocks must be at most {len(blocks)}, the blocks of the model, "
                f"got {self.options['num_blocks']}"
            )
        super()._install(blocks)

    def _wants(self, name: str, blocks: Blocks) -> bool:
        first = len(blocks) - self.options["num_blocks"]
        if name.startswith("blocks."):
            return int(name.split(".")[1]) >= int(first)
        return name.split(".")[0] in ("norm", "fc_norm")


class Full(OwnWeights):
    """All weights of the model: fine-tuning."""

    method = "full"

    def _wants(self, name: str, blocks: Blocks) -> bool:
        return True
