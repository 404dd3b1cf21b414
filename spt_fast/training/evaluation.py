"""What a model makes of labelled images: accuracy, of each class too, and the confusion matrix."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import unwrap
from spt_fast.backbones.snapshot import has_head
from spt_fast.data.batches import IGNORED_LABEL, count_labels, labelled_batch
from spt_fast.methods.base import TunedViT
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.support.distributed import ALONE, Processes
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.modes import evaluation_mode
from spt_fast.support.tables import csv_bytes
from spt_fast.support.waiting import OnTheWay, move

CLASSES_NAME, CONFUSION_NAME = "classes.csv", "confusion.csv"
EVALUATION_FILES = (CLASSES_NAME, CONFUSION_NAME)


def evaluate(tuned: nn.Module, loader: Iterable[Any]) -> float:
    """Accuracy in [0, 1]: the share of images whose largest logit is their label.

    `tuned` is evaluated on its own device, without gradients, and then is in the mode that it was in. Batches
    are read as `fit` reads them; images with the label -100 are not counted.

    Raises:
        TypeError: `tuned` is no module, `loader` not iterable, or a batch something else than images and
            labels.
        ValueError: the loader or a batch is empty, labels have another shape or are no classes of the model,
            or `tuned` gives something else than logits [B, classes].
        NonFiniteError: a logit is NaN; `image` is counted from 0 over the loader.
    """
    right = total = 0
    seen = 0
    for labels, predicted, _ in _labels_and_predictions(tuned, loader):
        right += int((labels == predicted).sum())
        total += int((labels != IGNORED_LABEL).sum())
        seen += len(labels)
    if total == 0:
        raise _nothing_to_count(seen)
    return right / total


@dataclass(frozen=True)
class Evaluation:
    """How many images of which class were taken for which.

    Attributes:
        class_names: of the labels 0, 1, ... in this order.
        counts: {(label, predicted label): images}, without pairs that did not occur.
    """

    class_names: tuple[str, ...]
    counts: dict[tuple[int, int], int]

    @property
    def num_images(self) -> int:
        """The number of images with a label."""
        return sum(self.counts.values())

    @property
    def accuracy(self) -> float:
        """In [0, 1], as `evaluate` gives it."""
        return sum(self._right()) / self.num_images

    @property
    def images_per_class(self) -> list[int]:
        """The number of images of each class."""
        images: Counter[int] = Counter()
        for (label, _), count in self.counts.items():
            images[label] += count
        return [images[label] for label in range(len(self.class_names))]

    @property
    def accuracy_per_class(self) -> list[float | None]:
        """In [0, 1], the share of each class's images that are taken for it; None for a class without any."""
        pairs = zip(self._right(), self.images_per_class, strict=True)
        return [right / images if images else None for right, images in pairs]

    @property
    def mean_class_accuracy(self) -> float:
        """The mean of `accuracy_per_class` over the classes with images."""
        known = [accuracy for accuracy in self.accuracy_per_class if accuracy is not None]
        return sum(known) / len(known)

    @property
    def missing_classes(self) -> list[str]:
        """The names of the classes without images."""
        pairs = zip(self.class_names, self.images_per_class, strict=True)
        return [name for name, images in pairs if images == 0]

    def confusion_matrix(self) -> Tensor:
        """Images [classes, classes] int64 by label (row) and predicted label (column)."""
        matrix = torch.zeros(len(self.class_names), len(self.class_names), dtype=torch.int64, device="cpu")
        for pair, count in self.counts.items():
            matrix[pair] = count
        return matrix

    def files(self) -> dict[str, bytes]:
        """CSV files by name: the classes with their accuracy (empty without images), and the matrix."""
        rows = zip(
            self.class_names, self.images_per_class, self._right(), self.accuracy_per_class, strict=True
        )
        matrix = zip(self.class_names, self.confusion_matrix().tolist(), strict=True)
        return {
            CLASSES_NAME: csv_bytes(("class", "images", "correct", "accuracy"), rows),
            CONFUSION_NAME: csv_bytes(
                ("class", *self.class_names), ([name, *counts] for name, counts in matrix)
            ),
        }

    def state(self) -> dict[str, Any]:
        """Strings, numbers and lists from which `of_state` makes the same again."""
        return {"class_names": list(self.class_names), "counts": [[*p, n] for p, n in self.counts.items()]}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> Evaluation:
        """What `state` gave."""
        counts = {(label, predicted): count for label, predicted, count in state["counts"]}
        return cls(tuple(state["class_names"]), counts)

    def _right(self) -> list[int]:
        return [self.counts.get((label, label), 0) for label in range(len(self.class_names))]


def evaluate_classes(
    tuned: nn.Module,
    loader: Iterable[Any],
    class_names: Sequence[str] | None = None,
    *,
    processes: Processes = ALONE,
    argument: str = "loader",
) -> Evaluation:
    """Which images of a loader are taken for which class; images and errors as in `evaluate`.

    Args:
        class_names: one for each logit; None takes `tuned.class_names`, or else the labels as text.
        processes: those that evaluate together, each with a loader over its own share of the images, of which
            some may be empty; all of them get the whole.
        argument: what the caller calls `loader`, for messages.

    Raises:
        ValueError: also where the number of names is not that of the logits.
    """
    counts: Counter[tuple[int, int]] = Counter()
    names: tuple[str, ...] | None = None
    with processes.together():
        for labels, predicted, width in _labels_and_predictions(tuned, loader, argument):
            names = names or names_of_logits(tuned, width, class_names)
            counts.update(zip(labels.tolist(), predicted.tolist(), strict=True))
    shares = processes.gather((counts, names))
    counts = sum((share for share, _ in shares), Counter())
    names = next((found for _, found in shares if found is not None), None)
    found = {pair: count for pair, count in counts.items() if pair[0] != IGNORED_LABEL}
    if names is None or not found:
        raise _nothing_to_count(counts.total(), argument)
    return Evaluation(names, found)


def names_of_logits(
    tuned: nn.Module, width: int, class_names: Sequence[str] | None = None
) -> tuple[str, ...]:
    """The names of `width` logits: those given, those of `tuned`, or their numbers.

    Raises:
        ValueError: there are more or fewer names.
    """
    names = class_names if class_names is not None else getattr(tuned, "class_names", None)
    if names is None:
        return tuple(map(str, range(width)))
    if len(names) != width:
        raise ValueError(f"class_names must be {width} names, one for each logit, got {len(names)}")
    return tuple(names)


@contextmanager
def inference(tuned: nn.Module) -> Iterator[None]:
    """`tuned` in eval mode, with its prompts fixed and without gradients; then in its own modes."""
    fixed = tuned.fixed_prompts() if isinstance(tuned, PromptedViT) else nullcontext()
    with evaluation_mode(tuned), torch.no_grad(), fixed:
        yield


def logits_of(tuned: nn.Module, images: Tensor) -> Tensor:
    """The logits [B, classes] of images [B, ...]; ValueError where `tuned` gives something else."""
    logits = tuned(move(images, device_of(tuned), _input_dtype(tuned)))
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"tuned must give logits [{len(images)}, classes], got {found}")
    return logits


def check_gives_logits(tuned: nn.Module) -> None:
    """Refuse what is no model, and a backbone without a head: its features would pass for logits.

    Raises:
        TypeError: `tuned` is no module.
        ValueError: it has no head.
    """
    if not isinstance(tuned, nn.Module):
        raise TypeError(f"tuned must be a PromptedViT or another module, got {type(tuned).__name__}")
    inner = unwrap(tuned)
    model = inner.model if isinstance(inner, TunedViT) else inner
    if getattr(model, "num_classes", None) == 0 and not has_head(model):
        raise ValueError(
            f"tuned must give logits, but this {type(inner).__name__} has no head (num_classes=0) and gives "
            "features; give num_classes=N for a head of N classes"
        )


def device_of(tuned: nn.Module) -> torch.device:
    """That of the first parameter or buffer; the CPU where there is none."""
    first = next(iter(_tensors(tuned)), None)
    return torch.device("cpu") if first is None else first.device


def _labels_and_predictions(
    tuned: nn.Module, loader: Iterable[Any], argument: str = "loader"
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Labels [B] and the places of the largest logits [B], on the CPU, and the number of logits, by batch.

    Each batch is read while the device is at the next one.
    """
    check_gives_logits(tuned)
    if not isinstance(loader, Iterable):
        raise TypeError(f"{argument} must be an iterable of batches, got {type(loader).__name__}")
    seen = 0
    unread: deque[tuple[int, Tensor, OnTheWay, int]] = deque()

    def read_next() -> tuple[Tensor, Tensor, int]:
        first_image, labels, sent, width = unread.popleft()
        largest = sent.read()
        if -1 in largest:
            image = first_image + largest.index(-1)
            raise NonFiniteError(
                f"tuned must give finite logits, but image {image} (counted from 0) gave NaN", image=image
            )
        return labels, torch.tensor(largest, device="cpu"), width

    with inference(tuned):
        for index, batch in enumerate(loader):
            where = f"batch {index} of {argument}"
            images, labels = labelled_batch(batch, where)
            logits = logits_of(tuned, images)
            labels = labels.cpu()
            count_labels(labels, logits.shape[1], where)
            # In one transfer: -1 stands for NaN.
            largest = logits.argmax(dim=1).masked_fill(logits.isnan().any(dim=1), -1)
            unread.append((seen, labels, OnTheWay(largest), logits.shape[1]))
            seen += len(labels)
            if len(unread) > 1:
                yield read_next()
        while unread:
            yield read_next()


def _nothing_to_count(seen: int, argument: str = "loader") -> ValueError:
    kind = f"labels other than {IGNORED_LABEL}" if seen else "images"
    return ValueError(f"{argument} must give at least one image with a label, got no {kind}")


def _input_dtype(tuned: nn.Module) -> torch.dtype:
    """That of the first floating-point parameter or buffer; float32 where `weight_dtype` autocasts."""
    if getattr(unwrap(tuned), "weight_dtype", None) is not None:
        return torch.float32
    return next((tensor.dtype for tensor in _tensors(tuned) if tensor.is_floating_point()), torch.float32)


def _tensors(tuned: nn.Module) -> Iterator[Tensor]:
    yield from tuned.parameters()
    yield from tuned.buffers()
