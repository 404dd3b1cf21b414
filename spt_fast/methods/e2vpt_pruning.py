"""E2VPT's pruning: how much each prompt and each piece of it matters, and leaving out the least.

Masks of ones on tokens, m [N_p], and on pieces, M [N_p, 16], the same for all blocks, multiply the prompts.
Their importance is the mean over batches of |d loss / d m| and |d loss / d M| (Han et al., ICCV 2023). The
released code adds gradients with their signs, keeps a pruned token as a vector of zeros, and has every
sixteenth channel in a piece; here a pruned token is gone, and a piece is D / 16 neighbouring channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spt_fast.data.batches import labelled_batch
from spt_fast.methods.e2vpt import E2VPT, MaskedPrompts
from spt_fast.methods.prompt_variant import part_of
from spt_fast.support.arguments import check_number, check_tensor
from spt_fast.support.modes import evaluation_mode

NUM_PIECES = 16


class Importance(NamedTuple):
    """Of tokens [N_p], and of their pieces [N_p, 16]; at least float32."""

    tokens: Tensor
    pieces: Tensor


def importance(tuned: E2VPT, loader: Iterable[Any]) -> Importance:
    """How much the loss (cross entropy) of `tuned`, in evaluation mode, depends on its masks.

    Args:
        loader: batches of images and labels, as `training.fit` takes them; read once.

    Raises:
        TypeError: `tuned` is no `E2VPT`, or a batch holds something else.
        ValueError: there is no batch, D is no multiple of 16, or the prompts are frozen.
    """
    source = _source_of(tuned)
    learned = source.prompts
    found = [learned.new_zeros(learned.shape[1]), learned.new_zeros(learned.shape[1], NUM_PIECES)]
    count = 0
    with evaluation_mode(tuned):
        for batch in loader:
            count += 1
            images, labels = (each.to(learned.device) for each in labelled_batch(batch, "loader"))
            (gradient,) = torch.autograd.grad(F.cross_entropy(tuned(images).float(), labels), [learned])
            # By the chain rule, summed over the blocks, which share the masks.
            pieces = _pieces((gradient * learned.detach()).sum(0)).sum(-1)
            found = [found[0] + pieces.sum(1).abs(), found[1] + pieces.abs()]
    if count == 0:
        raise ValueError("loader must give at least one batch, got none")
    return Importance(*(each / count for each in found))


@torch.no_grad()
def prune(tuned: E2VPT, of: Importance, tokens: float = 0.5, pieces: float = 0.5) -> Tensor:
    """Leave out the least important tokens, and set the least important pieces of each other one to zero.

    The parameter of the prompts is a new one then: make optimisers afterwards.

    Args:
        of: the importance in `tuned`.
        tokens, pieces: the share of them that goes, at least 0 and below 1; numbers are rounded down.

    Returns:
        The tokens that stay, int64, by their numbers before.

    Raises:
        TypeError, ValueError: a share is out of range, `of` is of another number of prompts, or these are
            frozen.
    """
    source = check_shares(tuned, tokens, pieces)
    count = source.prompts.shape[1]
    check_tensor("of.tokens", of.tokens, (count,))
    check_tensor("of.pieces", of.pieces, (count, NUM_PIECES))
    kept = of.tokens.argsort(descending=True, stable=True)[: count - part_of(count, tokens)].sort().values
    goes = of.pieces[kept].argsort(dim=1, stable=True)[:, : part_of(NUM_PIECES, pieces)]
    stays = source.mask.new_ones(len(kept), NUM_PIECES).scatter_(1, goes, 0)
    mask = _pieces(source.mask[kept]) * stays[..., None]
    source.mask = mask.flatten(1)
    source.prompts = nn.Parameter(source.prompts[:, kept] * source.mask)
    return kept


def check_shares(tuned: E2VPT, tokens: float, pieces: float) -> MaskedPrompts:
    """The prompts of `tuned`; errors as `prune`."""
    for name, share in (("tokens", tokens), ("pieces", pieces)):
        if check_number(name, share, 0) >= 1:
            raise ValueError(f"{name} must be a share below 1, got {share}")
    return _source_of(tuned)


def _source_of(tuned: E2VPT) -> MaskedPrompts:
    if not isinstance(tuned, E2VPT):
        raise TypeError(f"tuned must be an E2VPT, got {type(tuned).__name__}")
    tuned._check_not_released()
    source = tuned.source
    assert isinstance(source, MaskedPrompts)
    if not source.prompts.requires_grad:
        raise ValueError("tuned must have prompts that learn, got freeze_prompts=True")
    width = source.prompts.shape[2]
    if width % NUM_PIECES:
        raise ValueError(f"tuned must have a width that is a multiple of {NUM_PIECES}, got {width}")
    return source


def _pieces(values: Tensor) -> Tensor:
    """[N_p, D] as [N_p, 16, D / 16]."""
    return values.reshape(len(values), NUM_PIECES, values.shape[1] // NUM_PIECES)
