"""Features that do not change while a head is trained: computed once for each image, not once per epoch.

It serves models of which nothing but `head` learns, as in a linear probe or with frozen prompts, and images
that are the same in every epoch. The head then sees the rows that it would see anyway, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from spt_fast.data.batches import labelled_batch
from spt_fast.data.loading import ImageLoader
from spt_fast.support.memory import free_memory
from spt_fast.training.evaluation import device_of, inference, logits_of

# What the features of all images may take of the memory that is free.
_SHARE = 0.25


def trains_head_only(tuned: nn.Module) -> bool:
    """Whether nothing before the head of `tuned` learns, or is random or counts batches while training."""
    head = getattr(tuned, "head", None)
    if not isinstance(head, nn.Module) or isinstance(head, nn.ModuleList | nn.Identity):
        return False
    of_head = {id(parameter) for parameter in head.parameters()}
    learning = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    inside = set(head.modules())
    mode = tuned.training
    tuned.train()
    changing = [module for module in tuned.modules() if module not in inside and _changes(module)]
    tuned.train(mode)
    return bool(learning) and all(id(each) in of_head for each in learning) and not changing


@dataclass(frozen=True)
class Features:
    """The inputs of a head for all images of a loader, in the order of its data set.

    Attributes:
        rows: [M, D], on the device of the model.
        labels: [M] int64, in host memory.
        batch: how many images were computed at a time.
    """

    rows: Tensor
    labels: Tensor
    batch: int

    @classmethod
    def of(cls, tuned: nn.Module, loader: ImageLoader, known: Iterable[Features] = ()) -> Features | None:
        """One pass over the images; None where the head is not all that follows, or an image is missing.

        Args:
            known: features of the same data set, maybe by another model. Where those of the first batch are
                the same bits, they are returned, and the pass ends.
        """
        rows: list[Tensor] = []
        labels: list[Tensor] = []
        with inference(tuned), _inputs_of(tuned) as inputs:
            for batch in loader.in_order():
                images, of_batch = labelled_batch(batch)
                logits = logits_of(tuned, images)
                if len(inputs) != 1 or not _are_rows(inputs[0], len(images)):
                    return None
                features = inputs.pop()
                # With the first batch it is seen whether the head gives the logits.
                if not rows and not torch.equal(HeadOnly(tuned)(features), logits):
                    return None
                if not rows and (same := next((each for each in known if each.begins_with(features)), None)):
                    return same
                inputs.clear()  # of that comparison
                # Of a class token they are a view, which would keep the tokens of all images.
                rows.append(features.clone())
                labels.append(of_batch)
        if sum(map(len, rows)) != len(loader.dataset):
            return None
        return cls(torch.cat(rows), torch.cat(labels), len(rows[0]))

    def begins_with(self, rows: Tensor) -> bool:
        """Whether `rows` are those of the first batch, and it was as large."""
        return self.batch == len(rows) and torch.equal(self.rows[: self.batch], rows)

    def batches(self, indices: Iterable[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows and labels of images, batch by batch."""
        for chosen in indices:
            at = torch.tensor(chosen, device="cpu")
            yield self.rows[at.to(self.rows.device, non_blocking=True)], self.labels[at]

    def in_order(self, indices: Sequence[int] | None = None) -> list[tuple[Tensor, Tensor]]:
        """Rows and labels of all images, or of some, as one batch."""
        return [(self.rows, self.labels)] if indices is None else list(self.batches([list(indices)]))


class FeatureStore:
    """Features that outlive a run: later runs whose models give the same ones look at one batch alone.

    Each entry is a function of the data set, the model and the size of a batch, whoever computed it.

    Args:
        limit: how many entries are kept, the last that were used.
    """

    def __init__(self, limit: int = 8) -> None:
        self._limit = limit
        # With the data sets, so that no other one gets the number of one that is gone.
        self._entries: list[tuple[Any, Features]] = []

    def of(self, tuned: nn.Module, loader: ImageLoader) -> Features | None:
        """As `Features.of`."""
        known = [features for dataset, features in self._entries if dataset is loader.dataset]
        found = Features.of(tuned, loader, known)
        if found is not None:
            others = [entry for entry in self._entries if entry[1] is not found]
            self._entries = [*others, (loader.dataset, found)][-self._limit :]
        return found


class HeadOnly(nn.Module):
    """The head of `tuned`, as it runs inside: [M, D] -> logits [M, C]."""

    def __init__(self, tuned: nn.Module) -> None:
        super().__init__()
        self.head: nn.Module = tuned.head  # type: ignore[assignment]
        self._dtype = getattr(tuned, "weight_dtype", None)

    def forward(self, rows: Tensor) -> Tensor:
        if self._dtype is None:
            return self.head(rows)  # type: ignore[no-any-return]
        with torch.autocast(rows.device.type, dtype=self._dtype):
            return self.head(rows)  # type: ignore[no-any-return]


def fits_memory(tuned: nn.Module, loader: Any) -> bool:
    """Whether the images of `loader` are the same in every epoch, and their features fit into memory."""
    if not isinstance(loader, ImageLoader) or loader.is_random or loader.num_images is None:
        return False
    width = getattr(tuned, "num_features", None)
    if not isinstance(width, int):
        return False
    device = device_of(tuned)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    return 4 * width * len(loader.dataset) <= _SHARE * free


def _changes(module: nn.Module) -> bool:
    """Whether a module gives something else in training mode than in evaluation mode, where it is in it."""
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return isinstance(module, _BatchNorm) or type(module).__name__ == "DropPath"


class _Inputs(list[Tensor]):
    """The inputs of a module, as a hook finds them."""

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.extend(inputs)


@contextmanager
def _inputs_of(tuned: Any) -> Iterator[_Inputs]:
    inputs = _Inputs()
    handle = tuned.head.register_forward_pre_hook(inputs)
    try:
        yield inputs
    finally:
        handle.remove()


def _are_rows(features: object, count: int) -> bool:
    return isinstance(features, Tensor) and features.ndim == 2 and len(features) == count
