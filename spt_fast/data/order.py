"""Which images are in which batch of which epoch, and which of them a process reads.

Limits: on the host, with eight bytes for each image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from spt_fast.support.arguments import check_int
from spt_fast.support.distributed import ALONE, Processes
from spt_fast.support.randomness import seed_of


@dataclass(frozen=True)
class Order:
    """The batches of a data set, in each epoch a function of these fields and the epoch alone.

    Attributes:
        count: of images in the data set.
        batch_size: of all processes together where `in_step`, else of each.
        shuffle: a new order in each epoch, which `seed` decides.
        weights: [count] float64; each epoch draws as many images as there are to take with replacement, with
            chances in proportion to these; None takes each image once.
        images: the images to take, in this order unless it is shuffled; None is all of them.
        drop_last: leave out a last batch that is smaller than the others.
        processes: those that share the images.
        in_step: all processes share each batch, so that they have the same number of batches; one may have no
            image of a batch. Otherwise they share the images, and may differ in their numbers of batches.
    """

    count: int
    batch_size: int = 1
    seed: int = 0
    shuffle: bool = False
    weights: Tensor | None = None
    images: Sequence[int] | None = None
    drop_last: bool = False
    processes: Processes = ALONE
    in_step: bool = False

    def __post_init__(self) -> None:
        check_int("batch_size", self.batch_size, 1)

    def __len__(self) -> int:
        return len(self._spans)

    def batches(self, epoch: int, skip: int = 0) -> Iterator[list[int]]:
        """The images of each batch of this process, from batch `skip` on."""
        order = self._order(epoch)
        return (order[span.start : span.stop].tolist() for span in self._spans[skip:])

    def draws(self, skip: int = 0) -> Iterator[Sequence[int]]:
        """Numbers that tell the draws of one image in an epoch apart, for each image of `batches`."""
        repeated = self.weights is not None
        return (span if repeated else [0] * len(span) for span in self._spans[skip:])

    def each_once(self) -> Order:
        """All images in the order of the data set, for each process."""
        return replace(self, shuffle=False, weights=None, images=None, drop_last=False, processes=ALONE)

    def _order(self, epoch: int) -> Tensor:
        """All images of an epoch, those of other processes too."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch, "order"))
        taken = (
            torch.arange(self.count, device="cpu")
            if self.images is None
            else torch.tensor(self.images, device="cpu")
        )
        if self.weights is not None:
            weights = self.weights[taken]
            return taken[torch.multinomial(weights, len(taken), replacement=True, generator=generator)]
        return taken[torch.randperm(len(taken), generator=generator, device="cpu")] if self.shuffle else taken

    @property
    def total(self) -> int:
        """The images of an epoch, of all processes where they share the images."""
        return self.count if self.images is None else len(self.images)

    @cached_property
    def _spans(self) -> list[range]:
        """The places in `_order` of each batch of this process."""
        total = self.total
        if self.in_step:
            spans = self._cut(range(total), self.batch_size)
            return [self._share(span) for span in spans]
        return self._cut(self._share(range(total)), self.batch_size)

    def _share(self, span: range) -> range:
        """What this process has of consecutive places."""
        share = self.processes.share_of(len(span))
        return span[share.start : share.stop]

    def _cut(self, span: range, size: int) -> list[range]:
        spans = [span[first : first + size] for first in range(0, len(span), size)]
        return spans[:-1] if self.drop_last and spans and len(spans[-1]) < size else spans
