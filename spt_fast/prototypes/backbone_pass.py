"""One run of a frozen backbone over a loader: the patch tokens of each layer, and how many there were."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from spt_fast.backbones.token_extractor import TokenTap
from spt_fast.data.batches import image_batches
from spt_fast.ops.kmeans import TOKEN_DTYPES
from spt_fast.prototypes.result import Prototypes, from_layers
from spt_fast.prototypes.side_stream import Overlap
from spt_fast.support.distributed import Processes
from spt_fast.support.errors import NonFiniteError

_NO_BATCH = "loader must give at least one batch of images, got none"
_Consume = Callable[[int, Tensor], object]


class BackbonePass:
    """One run of the model over the loader: hands out the tokens of each layer and counts what it saw.

    After a run the counts are those of all ranks together.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        processes: Processes,
        *,
        max_images: int | None,
        progress: bool,
        **tap_options: Any,
    ) -> None:
        self.processes = processes
        self.progress = progress and processes.rank == 0
        self.num_images = 0
        self.num_tokens = 0
        self.tap = TokenTap(model, self._take, **tap_options)
        self._loader = loader
        self._length = _length(loader)
        self._max_images = None if max_images is None else len(processes.share_of(max_images))
        self._first = 0
        self._consume: _Consume | None = None
        self._overlap: Overlap | None = None

    def run(self, consume: _Consume, *, overlap: Overlap | None = None) -> None:
        """Run the model on every image; `consume(layer, tokens)` gets the tokens, with `overlap` later."""
        self._overlap = overlap
        with self.processes.together(), self.tap, closing(self._numbered_batches()) as batches:
            for first, images in batches:
                self._run_batch(first, images, consume)
                if overlap is not None:
                    overlap.advance()
            if overlap is not None:
                overlap.finish()
        self._count_all_ranks()

    def run_one_batch(self, consume: _Consume, generator: torch.Generator) -> int:
        """Run the model on one batch, each batch of each rank having the same chance; returns its rank."""
        # How many batches `max_images` leaves is not known before their size is.
        length = self._length if self._max_images is None else None
        with self.processes.together(), closing(self._numbered_batches()) as batches:
            chosen, n_batches = _choose_batch(batches, length, generator)
        owner = _draw_rank(self.processes, n_batches, generator)
        with self.processes.together(), self.tap:
            if owner == self.processes.rank and chosen is not None:
                self._run_batch(*chosen, consume)
        self._count_all_ranks()
        return owner

    def check_enough_tokens(self, num_prompts: int, where: str = "loader") -> None:
        """Raise ValueError if there are fewer tokens than prompts."""
        if self.num_tokens < num_prompts:
            raise ValueError(
                f"num_prompts must be at most the number of patch tokens, but {where} gave "
                f"{self.num_tokens} per layer (from {self.num_images} images) for {num_prompts} prompts"
            )

    def result(self, prompts: Tensor, counts: Tensor, inertia: Tensor, **more: Any) -> Prototypes:
        """Prototypes of layers [G, N_p, D], with what this pass has counted."""
        return from_layers(
            prompts,
            counts,
            inertia,
            num_images=self.num_images,
            num_tokens=self.num_tokens,
            with_last_output=self.tap.n_outputs > self.tap.n_layers,
            **more,
        )

    def _run_batch(self, first: int, images: Tensor, consume: _Consume) -> None:
        self._first = first
        self._consume = consume
        self.num_images += len(images)
        self.tap.run(images)

    def _take(self, layer: int, tokens: Tensor) -> None:
        assert self._consume is not None
        if layer == 0:
            self.num_tokens += tokens.shape[0] * tokens.shape[1]
        give = partial(self._give, self._consume, self._first, layer)
        if self._overlap is None:
            give(tokens)
        else:
            self._overlap.add(give, tokens)

    def _give(self, consume: _Consume, first: int, layer: int, tokens: Tensor) -> None:
        try:
            consume(layer, tokens if tokens.dtype in TOKEN_DTYPES else tokens.float())
        except NonFiniteError as error:
            image = first + (error.row or 0) // tokens.shape[1]
            raise NonFiniteError(
                f"tokens must be finite, but {self.tap.name(layer)} holds NaN, infinity or numbers too large "
                f"to be squared in float32 for image {image} (counted from 0)",
                image=image,
                layer=layer,
            ) from None

    def _numbered_batches(self) -> Generator[tuple[int, Tensor], None, None]:
        """This rank's batches, each with the number of its first image; shows a bar."""
        if self._max_images == 0:
            return
        first = 0
        with tqdm(desc="prototypes", unit=" images", disable=not self.progress) as bar:
            for images in image_batches(self._loader, self._max_images):
                if first == 0:
                    bar.total = _estimate_total(self._length, len(images), self._max_images)
                yield first, images
                first += len(images)
                bar.update(len(images))
            bar.total = first

    def _count_all_ranks(self) -> None:
        counted = self.processes.gather((self.num_images, self.num_tokens))
        self.num_images, self.num_tokens = (sum(values) for values in zip(*counted, strict=True))
        if self.num_images == 0:
            raise ValueError(_NO_BATCH)


def _choose_batch(
    batches: Iterator[tuple[int, Tensor]], length: int | None, generator: torch.Generator
) -> tuple[tuple[int, Tensor] | None, int]:
    """One of the batches, each with the same chance, and their number; holds no more than one at a time.

    With a known length, reading stops at the one drawn. Otherwise the i-th batch replaces the one held with
    probability 1 / i, which leaves each with the same chance at the end.
    """
    chosen = next(batches, None)
    if chosen is None:
        return None, 0
    if length:
        target = _draw(length, generator)
        for _, chosen in zip(range(target), batches, strict=False):  # noqa: B007
            pass
        return chosen, length
    seen = 1
    for seen, batch in enumerate(batches, start=2):
        if _draw(seen, generator) == 0:
            chosen = batch
    return chosen, seen


def _draw_rank(processes: Processes, n_batches: int, generator: torch.Generator) -> int:
    """The rank whose batch is taken, drawn by the number of its batches; rank 0 draws for all."""
    counts = processes.gather(n_batches)
    if sum(counts) == 0:
        raise ValueError(_NO_BATCH)
    if processes.size == 1:
        return 0
    target = processes.gather(_draw(sum(counts), generator))[0]
    return int(np.searchsorted(np.cumsum(counts), target, side="right"))


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))


def _length(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _estimate_total(length: int | None, batch_size: int, max_images: int | None) -> int | None:
    """Number of images to come, as far as it can be known: a last batch may be smaller."""
    known = [n for n in (None if length is None else length * batch_size, max_images) if n is not None]
    return min(known, default=None)
