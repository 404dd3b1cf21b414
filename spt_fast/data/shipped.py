"""The backbone and the images that ship with the package, so that the demo runs offline.

The backbone is a small masked autoencoder's encoder (assets/BACKBONE.md), the images are the
handwritten digits of Alpaydin and Kaynak (assets/DIGITS.md). Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spt_fast.support.arguments import check_choice, check_int, check_seed
from spt_fast.support.files import open_safetensors
from spt_fast.support.randomness import seeded

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

BACKBONE_NAME = "spt_fast_mae_tiny_patch8_64"
DIGITS_MAX = 16
DIGITS_CLASSES = tuple(map(str, range(10)))
# Rows of the file, which keeps the order of the collection: neighbours are alike (same writers), and
# contiguous splits mix them less than a shuffled split would.
DIGITS_SPLITS = {"train": (0, 897), "val": (897, 1197), "test": (1197, 1797)}
_ARCHITECTURE_KEYS = {"img_size", "patch_size", "embed_dim", "depth", "num_heads"}


def load_backbone(path: str | Path | None = None) -> VisionTransformer:
    """The shipped ViT without a head, float32, in eval mode: [B, 3, 64, 64] -> [B, D].

    `path` names another file written by examples/pretrain_backbone.py. Mean, standard deviation
    and image size are in `model.pretrained_cfg`, where timm looks for them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a backbone of that kind.
    """
    from timm.models.vision_transformer import VisionTransformer

    with _backbone_file(path) as (file, facts):
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    # The constructor draws weights, which the file's replace; the caller's random state stays as it is.
    with seeded(0):
        model = VisionTransformer(
            **facts["architecture"], class_token=False, global_pool="avg", fc_norm=False, num_classes=0
        )
    model.load_state_dict(weights)
    size = facts["architecture"]["img_size"]
    config: dict[str, Any] = {
        "architecture": BACKBONE_NAME if path is None else Path(path).stem,
        "input_size": (3, size, size),
        "mean": tuple(facts["mean"]),
        "std": tuple(facts["std"]),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "num_classes": 0,
    }
    # Plain attributes to timm, which reads them by these names; nn.Module's annotations know no such thing.
    vars(model).update(pretrained_cfg=config, default_cfg=config)
    return model.eval()


def backbone_facts(path: str | Path | None = None) -> dict[str, Any]:
    """What the pretraining script wrote beside the weights: architecture, mean, std, epochs, loss.

    Raises:
        FileNotFoundError, ValueError: as `load_backbone`.
    """
    with _backbone_file(path) as (_, facts):
        return facts


def load_digits(split: str) -> tuple[Tensor, Tensor]:
    """Shipped digits of one split, as the shipped backbone wants them.

    Args:
        split: "train" (897 images), "val" (300) or "test" (600).

    Returns:
        images [M, 3, 64, 64] float32, upsampled bilinearly from 8x8 and normalised with the
        backbone's mean and standard deviation, and labels [M] int64 in 0..9.

    Raises:
        ValueError: there is no such split.
    """
    first, last = DIGITS_SPLITS[check_choice("split", split, DIGITS_SPLITS)]
    with as_file(_asset("digits.safetensors")) as path, open_safetensors(path) as stored:
        # Slices of the file would be made on torch's default device.
        raw: Tensor = stored.get_tensor("images")[first:last]
        labels: Tensor = stored.get_tensor("labels")[first:last]
    facts = backbone_facts()
    size = facts["architecture"]["img_size"]
    grey = F.interpolate(raw.unsqueeze(1).float() / DIGITS_MAX, size=(size, size), mode="bilinear")
    mean, std = (
        torch.tensor(facts[key], dtype=torch.float32, device="cpu").view(3, 1, 1) for key in ("mean", "std")
    )
    return (grey - mean) / std, labels.long()


def few_per_class(labels: Tensor, per_class: int, *, seed: int) -> Tensor:
    """Indices [classes * per_class] of a random draw with `per_class` images of every class.

    Raises:
        TypeError: `per_class` or `seed` is not an integer.
        ValueError: `per_class` is below 1, or a class has fewer images.
    """
    per_class = check_int("per_class", per_class, 1)
    generator = torch.Generator().manual_seed(check_seed(seed))
    chosen = []
    for label in torch.unique(labels).tolist():
        rows = (labels == label).nonzero().squeeze(1)
        if len(rows) < per_class:
            raise ValueError(
                f"per_class must be at most {len(rows)}, the images of class {label}, got {per_class}"
            )
        chosen.append(rows[torch.randperm(len(rows), generator=generator, device="cpu")[:per_class]])
    return torch.cat(chosen)


def _asset(name: str) -> Any:
    return files("spt_fast") / "assets" / name


@contextmanager
def _backbone_file(path: str | Path | None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The open file of a backbone, and the facts in its metadata."""
    asset = _asset("backbone.safetensors") if path is None else Path(path)
    with as_file(asset) as source, open_safetensors(source) as file:
        yield file, _parse_facts(file.metadata() or {}, source)


def _parse_facts(metadata: dict[str, str], source: object) -> dict[str, Any]:
    try:
        facts = {key: json.loads(metadata[key]) for key in ("architecture", "mean", "std", "epochs", "loss")}
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{source} was not written by examples/pretrain_backbone.py: {error}") from error
    if set(facts["architecture"]) != _ARCHITECTURE_KEYS:
        raise ValueError(f"{source} describes no ViT that this version knows: {facts['architecture']}")
    return facts
