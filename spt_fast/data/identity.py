"""What is known of a data set of labelled images without reading them: labels, and a fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from torch.utils.data import TensorDataset

from spt_fast.data.datasets import DecodedImages


def labels_of(dataset: Any, rows: Sequence[int] | None = None) -> tuple[int, ...] | None:
    """The labels of all images, or of those with these indices, in the order of the data set.

    They are those that batches have; None where they are not known without the images.
    """
    labels = _labels(dataset)
    return labels if labels is None or rows is None else tuple(labels[row] for row in sorted(rows))


def _labels(dataset: Any) -> tuple[int, ...] | None:
    if isinstance(dataset, TensorDataset):
        return tuple(dataset.tensors[1].tolist())
    labels = dataset.labels() if isinstance(dataset, DecodedImages) else None
    if labels is None or dataset.target_transform is None:
        return None if labels is None else tuple(labels)
    return tuple(map(dataset.target_transform, labels))


def fingerprint_of(dataset: Any, class_names: Sequence[str], rows: Sequence[int] | None = None) -> str:
    """16 hex digits of names, labels and classes of the images, or of those with these indices."""
    if isinstance(dataset, TensorDataset):
        names = [str(list(dataset.tensors[0].shape))]
    else:
        names = dataset.portable_names()
    taken = [] if rows is None else [sorted(rows)]
    text = json.dumps([names, labels_of(dataset), list(class_names), *taken])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
