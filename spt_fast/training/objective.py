"""The loss that is minimised: cross entropy of labels that may be smoothed, weighted or mixed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.data import Mixup  # type: ignore[attr-defined]
from torch import Tensor
from torch.nn import functional as F

from spt_fast.data.batches import IGNORED_LABEL


class Objective:
    """Cross entropy, summed over images, so that processes and parts of a batch can be put together.

    Args:
        label_smoothing: the share of a label that is spread over all classes.
        mixup, cutmix: the parameter of the Beta distribution; 0 is off. With both, one is drawn per batch.
        num_classes: needed for mixup and cutmix.
        class_counts: images of each class; classes then weigh the same, as far as there are images of them.
            The weight of an image of class c among M images of C classes is M / (C * count of c).
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        num_classes: int | None = None,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        self._label_smoothing = label_smoothing
        self._mix: Mixup | None = None
        if mixup > 0 or cutmix > 0:
            if num_classes is None:
                raise ValueError("mixup and cutmix need a model that states num_classes")
            self._mix = Mixup(  # type: ignore[no-untyped-call]
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
        self._weights = None if class_counts is None else class_weights(class_counts)

    def prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets of a batch: labels [B], or shares of classes [B, C] where images are mixed.

        timm's Mixup pairs the first image with the last; the last of an odd number stays as it is. Images
        without a label are left out where images are mixed. Random numbers are NumPy's.
        """
        if self._mix is None:
            return images, labels
        given = labels != IGNORED_LABEL
        if not bool(given.all()):
            images, labels = images[given.to(images.device)], labels[given]
        labels = labels.to(images.device, non_blocking=True)
        even = len(images) - len(images) % 2
        # A copy, because timm mixes in place and the loader may keep its images.
        mixed, targets = self._mix(images[:even].clone(), labels[:even])
        if even == len(images):
            return mixed, targets
        rest = F.one_hot(labels[even:], targets.shape[1]).to(targets.dtype)
        smooth = self._label_smoothing
        rest = rest * (1 - smooth) + smooth / targets.shape[1]
        return torch.cat((mixed, images[even:])), torch.cat((targets, rest))

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The sum of the losses of all images with a label, in float32."""
        logits = logits.float()
        if targets.is_floating_point():
            return F.cross_entropy(logits, targets, reduction="sum")
        weights = None if self._weights is None else self._weights.to(logits.device, non_blocking=True)
        return F.cross_entropy(
            logits,
            targets,
            weights,
            ignore_index=IGNORED_LABEL,
            reduction="sum",
            label_smoothing=self._label_smoothing,
        )


def class_weights(counts: Sequence[int]) -> Tensor:
    """Weights [C] float32 by which classes weigh the same: M / (C * count), with a mean of 1 over M images.

    A class without images has the weight 0, and is none of the C.
    """
    images = torch.tensor(counts, dtype=torch.float64, device="cpu")
    present = images > 0
    weights = torch.where(present, images.sum() / (present.sum() * images.clamp(min=1)), 0.0)
    return weights.float()
