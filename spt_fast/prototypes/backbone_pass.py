"""One run of a frozen backbone over a loader: the patch tokens of each layer, and how many there were."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from spt_fast.backbones.token_extractor import TokenExtractor
from spt_fast.data.batches import image_batches
from spt_fast.ops.kmeans import TOKEN_DTYPES
from spt_fast.prototypes.result import Prototypes, from_layers
from spt_fast.prototypes.side_stream import SideStream
from spt_fast.support.distributed import Processes
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.progress import progress_bar
from spt_fast.support.waiting import OnTheWay

_NO_BATCH = "loader must give at least one batch of images, got none"
_Consume = Callable[[int, Tensor], Tensor | None]


class _Report(NamedTuple):
    """What was found in the tokens of one batch."""

    first_image: int
    tokens_per_image: int
    rows: OnTheWay  # [n_layers]: the first bad row of each layer, or -1


class BackbonePass:
    """Runs a backbone over a loader once, hands out the tokens of each layer and counts images and tokens.

    Call `run` or `run_one_batch`, once. `num_images` and `num_tokens` (per layer) are then those of all ranks
    together.

    Args:
        model: the backbone, as `TokenExtractor` takes it.
        loader: this rank's batches, as `image_batches` takes them.
        processes: the ranks that run together, each over its own loader.
        max_images: of all ranks together, shared evenly; None for no limit.
        progress: show a bar on rank 0.
        extractor_options: keyword arguments of `TokenExtractor`.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        processes: Processes,
        *,
        max_images: int | None,
        progress: bool,
        **extractor_options: Any,
    ) -> None:
        self.processes = processes
        self.progress = progress and processes.rank == 0
        self.num_images = 0
        self.num_tokens = 0
        self._extractor = TokenExtractor(model, self._receive, **extractor_options)
        self._loader = loader
        self._length = _length_of(loader)
        self._token_dtype: torch.dtype | None = None
        self._max_images = None if max_images is None else len(processes.share_of(max_images))
        self._first_image = 0  # of the batch that the model is working on
        self._consume: _Consume | None = None
        self._side_stream: SideStream | None = None
        self._bad_rows: list[Tensor] = []  # of the layers of one batch
        self._reports: deque[_Report] = deque()

    @property
    def n_layers(self) -> int:
        """The layers that `consume` gets, the last block's output among them if it was asked for."""
        return self._extractor.n_outputs

    @property
    def device(self) -> torch.device:
        """The model's, where the tokens are."""
        return self._extractor.device

    def run(
        self,
        consume: _Consume,
        side_stream: SideStream | None = None,
        token_dtype: torch.dtype | None = None,
    ) -> None:
        """Run the model on every image.

        `consume(layer, tokens)` is called with tokens [B, N_e, D] of each layer of each batch: at once, or on
        `side_stream` while the model is at the next batch. Tokens are rounded to `token_dtype`; None keeps
        what the model gives, or takes float32 where k-means cannot read that. `consume` returns the number of
        the first row of tokens that is not fit for its work, or -1, int64 where the tokens are; that is
        looked at one batch later, so that the host never waits for the device. It may return None and raise
        NonFiniteError instead.

        Raises:
            NonFiniteError: pixels are not finite, or `consume` has found a row or has raised one; `image` is
                set, and for tokens `layer`.
        """
        self._side_stream = side_stream
        self._token_dtype = token_dtype
        with self.processes.together(), self._extractor, closing(self._numbered_batches()) as batches:
            for first_image, images in batches:
                self._run_batch(first_image, images, consume)
                if side_stream is not None:
                    side_stream.advance()
            if side_stream is not None:
                side_stream.finish()
            self._look_at_reports(0)
        self._count_all_ranks()

    def run_one_batch(self, consume: _Consume, generator: torch.Generator) -> int:
        """Run the model on one batch, drawn from those of all ranks with equal chances; returns its rank.

        `consume` and errors as in `run`.
        """
        # `max_images` leaves an unknown number of batches, as nobody knows their sizes yet.
        length = self._length if self._max_images is None else None
        with self.processes.together(), closing(self._numbered_batches()) as batches:
            chosen, n_batches = _choose_batch(batches, length, generator)
        owner = _draw_rank(self.processes, n_batches, generator)
        with self.processes.together(), self._extractor:
            if owner == self.processes.rank and chosen is not None:
                self._run_batch(*chosen, consume)
                self._look_at_reports(0)
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
        """Prototypes from `from_layers`, with what this pass has counted."""
        return from_layers(
            prompts,
            counts,
            inertia,
            num_images=self.num_images,
            num_tokens=self.num_tokens,
            with_last_output=self._extractor.n_outputs > self._extractor.n_layers,
            **more,
        )

    def _run_batch(self, first_image: int, images: Tensor, consume: _Consume) -> None:
        self._first_image = first_image
        self._consume = consume
        self.num_images += len(images)
        self._extractor.run(images)

    def _receive(self, layer: int, tokens: Tensor) -> None:
        """The callback of the extractor."""
        assert self._consume is not None
        if layer == 0:
            self.num_tokens += tokens.shape[0] * tokens.shape[1]
        hand_on = partial(self._hand_on, self._consume, self._first_image, layer)
        dtype = self._token_dtype or (tokens.dtype if tokens.dtype in TOKEN_DTYPES else torch.float32)
        if self._side_stream is None:
            hand_on(tokens.to(dtype))
        else:
            self._side_stream.add(hand_on, tokens, dtype)

    def _hand_on(self, consume: _Consume, first_image: int, layer: int, tokens: Tensor) -> None:
        """Call `consume`, and look at what it has found in the batch before."""
        try:
            bad_row = consume(layer, tokens)
        except NonFiniteError as error:
            # Other layers or batches may have been bad before.
            self._report(first_image, tokens.shape[1])
            self._look_at_reports(0)
            self._refuse(layer, first_image + (error.row or 0) // tokens.shape[1])
        self._bad_rows.append(torch.full((), -1, device=tokens.device) if bad_row is None else bad_row)
        if layer == self.n_layers - 1:
            self._report(first_image, tokens.shape[1])
            self._look_at_reports(1)

    def _report(self, first_image: int, tokens_per_image: int) -> None:
        """Send what was found in the layers of a batch so far."""
        if self._bad_rows:
            rows = OnTheWay(torch.stack(self._bad_rows))
            self._reports.append(_Report(first_image, tokens_per_image, rows))
            self._bad_rows = []

    def _look_at_reports(self, unread: int) -> None:
        """Raise NonFiniteError where a batch held a bad row; the last batches, `unread` of them, can wait."""
        while len(self._reports) > unread:
            first_image, tokens_per_image, rows = self._reports.popleft()
            for layer, row in enumerate(rows.read()):
                if row >= 0:
                    self._refuse(layer, first_image + row // tokens_per_image)

    def _refuse(self, layer: int, image: int) -> NoReturn:
        raise NonFiniteError(
            f"tokens must be finite, but {self._extractor.name(layer)} holds NaN, infinity or numbers "
            f"too large to be squared in float32 for image {image} (counted from 0)",
            image=image,
            layer=layer,
        ) from None

    def _numbered_batches(self) -> Generator[tuple[int, Tensor], None, None]:
        """This rank's batches, each with the number of its first image; shows a bar."""
        if self._max_images == 0:
            return
        first_image = 0
        with progress_bar(show=self.progress, desc="prototypes", unit=" images") as bar:
            for images in image_batches(self._loader, self._max_images):
                if first_image == 0:
                    bar.total = _estimate_total(self._length, len(images), self._max_images)
                yield first_image, images
                first_image += len(images)
                bar.update(len(images))
            # The last batch may have been smaller than the first.
            bar.total = first_image
            bar.refresh()

    def _count_all_ranks(self) -> None:
        counted = self.processes.gather((self.num_images, self.num_tokens))
        self.num_images, self.num_tokens = (sum(values) for values in zip(*counted, strict=True))
        if self.num_images == 0:
            raise ValueError(_NO_BATCH)


def _choose_batch(
    batches: Iterator[tuple[int, Tensor]], length: int | None, generator: torch.Generator
) -> tuple[tuple[int, Tensor] | None, int]:
    """One of the batches, each with the same chance, and their number; holds no more than one at a time.

    With a known length, reading stops at the batch drawn. Otherwise the i-th batch replaces the one held with
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
    """A rank, drawn with a chance proportional to the number of its batches; rank 0 draws for all."""
    counts = processes.gather(n_batches)
    if sum(counts) == 0:
        raise ValueError(_NO_BATCH)
    if processes.size == 1:
        return 0
    target = processes.gather(_draw(sum(counts), generator))[0]
    return int(np.searchsorted(np.cumsum(counts), target, side="right"))


def _draw(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator, device="cpu"))


def _length_of(loader: Iterable[Any]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def _estimate_total(length: int | None, batch_size: int, max_images: int | None) -> int | None:
    """The number of images to come, as far as anyone can tell: the last batch may be smaller."""
    known = [n for n in (None if length is None else length * batch_size, max_images) if n is not None]
    return min(known, default=None)
