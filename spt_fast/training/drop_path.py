"""Stochastic depth (Huang et al. 2016) of a model whose blocks stay in evaluation mode while it is tuned."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from timm.layers import drop_path  # type: ignore[attr-defined]
from torch import Tensor, nn

from spt_fast.backbones.anatomy import get_blocks, unwrap
from spt_fast.methods.base import TunedViT

# timm's names of the places at the end of both branches of a block.
_PLACES = ("drop_path1", "drop_path2")


@contextmanager
def stochastic_depth(tuned: nn.Module, rate: float) -> Iterator[None]:
    """Within the context, training drops both branches of layer i of L with probability rate * i / (L - 1).

    Layers count from 0, as in timm and in the paper's released code. Blocks are as before afterwards. While
    `tuned` is in evaluation mode nothing is dropped.

    Raises:
        ValueError: `rate` is above 0 and the blocks of `tuned` have no place for it.
    """
    if rate == 0:
        yield
        return
    inner = unwrap(tuned)
    blocks = get_blocks(inner.model if isinstance(inner, TunedViT) else inner)
    before = [(block, place, _module_at(block, place)) for block in blocks for place in _PLACES]
    rates = {block: rate * index / max(1, len(blocks) - 1) for index, block in enumerate(blocks)}
    try:
        for block, place, _ in before:
            setattr(block, place, _DropPath(inner, rates[block]))
        yield
    finally:
        for block, place, found in before:
            setattr(block, place, found)


def _module_at(block: nn.Module, place: str) -> nn.Module:
    found = getattr(block, place, None)
    if not isinstance(found, nn.Module):
        raise ValueError(
            f"drop_path must be 0 for this model: its blocks ({type(block).__name__}) have no {place}"
        )
    return found


class _DropPath(nn.Module):
    """Drops whole branches, image by image, while the tuned model is in training mode."""

    def __init__(self, tuned: nn.Module, rate: float) -> None:
        super().__init__()
        # In a list, which does not make it a part of the block.
        self._tuned = [tuned]
        self._rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return drop_path(x, self._rate, self._tuned[0].training)  # type: ignore[no-any-return]
