"""How images become tensors: resized, cropped, augmented and normalised, by timm's transforms."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from spt_fast.data.channels import fit_transform
from spt_fast.support.arguments import check_choice
from spt_fast.support.files import open_safetensors

RESIZES = ("model", "fgvc", "vtab", "short")
AUGMENTS = ("resized-crop", "crop", "none")
MEAN_STD = ("model", "imagenet")
# The name that files have for `Preprocessing.to_json`.
PREPROCESSING = "preprocessing"

# As timm's `create_transform` takes them; a side of 256 for a crop of 224 is a crop of 0.875.
_TIMM: dict[str, dict[str, Any]] = {
    "model": {},
    "fgvc": {"crop_pct": 0.875, "crop_mode": "center"},
    "vtab": {"crop_pct": 1.0, "crop_mode": "squash"},
    "short": {"crop_pct": 1.0, "crop_mode": "center"},
}
_RESIZE_WORDS = {
    "model": "timm's transform for the model, {size}",
    "fgvc": "short side by 8/7 too large, centre {size}",
    "vtab": "straight to {size}",
    "short": "short side to that of {size}, centre",
}
_AUGMENT_WORDS = {
    "resized-crop": "random resized crops to {size} ({interpolation}) and flips",
    "crop": "random crops in place of the centre, and flips",
    "none": "no augmentation",
}
# By benchmark: --resize and --augment where none is given, and what the paper's rows used.
_DEFAULTS = {"vtab": ("vtab", "none"), "fgvc": ("fgvc", "resized-crop")}
_PAPER = {
    "vtab": "--resize vtab in its text, but short in its code; 224 x 224, bicubic; no augmentation; "
    "--mean-std imagenet",
    "fgvc": "random resized crops to 224 x 224, bicubic, and flips; --resize fgvc to test; "
    "--mean-std imagenet",
}


@dataclass(frozen=True)
class Preprocessing:
    """What is done to images for evaluation; training may crop and flip them besides.

    Attributes:
        resize: "model", timm's transform for the model; "fgvc", short side to 256 and the centre's 224, or
            the same in proportion for another image size; "vtab", straight to the image size, whatever the
            proportions; "short", short side to the image size and the centre.
        mean_std: "model", the mean and standard deviation the model was trained with, or "imagenet".
    """

    resize: str = "model"
    mean_std: str = "model"

    def __post_init__(self) -> None:
        check_choice("resize", self.resize, RESIZES)
        check_choice("mean_std", self.mean_std, MEAN_STD)

    def transform(self, model: nn.Module, augment: str = "none") -> Callable[[Any], Any]:
        """PIL image -> tensor [C, H, W] in the size, scale and interpolation of `model`.

        Args:
            augment: "resized-crop", timm's random resized crops, whatever `resize` is; "crop", a random crop
                where `resize` takes the centre; both with horizontal flips; or "none".
        """
        from timm.data.transforms_factory import create_transform

        check_choice("augment", augment, AUGMENTS)
        config = {**_config(model), **self._normalisation(model)}
        if augment == "resized-crop":
            transform = create_transform(**config, is_training=True, color_jitter=0.0)
        else:
            transform = create_transform(**{**config, **_TIMM[self.resize]})
        return fit_transform(_at_random(transform) if augment == "crop" else transform, channels_of(model))

    def describe(self, model: nn.Module, augment: str = "none") -> str:
        """One line: what is done."""
        config = _config(model)
        height, width = config["input_size"][-2:]
        words = {"size": f"{width} x {height}", "interpolation": config["interpolation"]}
        resized = f"--resize {self.resize} ({_RESIZE_WORDS[self.resize]}, {{interpolation}})"
        augmented = _AUGMENT_WORDS[check_choice("augment", augment, AUGMENTS)]
        steps = [augmented] if augment == "resized-crop" else [resized, augmented]
        done = ", ".join([*steps, f"--mean-std {self.mean_std}"]).format(**words)
        return f"transform: {done}"

    def to_json(self) -> str:
        """Text for the facts of a file; see `from_json`."""
        return json.dumps({"resize": self.resize, "mean_std": self.mean_std})

    @classmethod
    def from_json(cls, text: str) -> Preprocessing:
        """What `to_json` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{PREPROCESSING} must be resize and mean_std in JSON, got {text!r}") from error

    def __str__(self) -> str:
        return f"--resize {self.resize} --mean-std {self.mean_std}"

    def mean_and_std(self, model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What pixels in [0, 1] are normalised with, a number for each channel that `model` takes."""
        config = {**_config(model), **self._normalisation(model)}
        return tuple(config["mean"]), tuple(config["std"])

    def _normalisation(self, model: nn.Module) -> Mapping[str, Any]:
        if self.mean_std == "model":
            return {}
        from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        channels = channels_of(model)
        if channels == 1:
            mean, std = (sum(each) / 3 for each in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
            return {"mean": (mean,), "std": (std,)}
        if channels != 3:
            raise ValueError(f"mean_std='imagenet' is for 1 or 3 channels, but the model has {channels}")
        return {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}


def split_transform(transform: Any) -> tuple[list[Any], list[Any]]:
    """The steps of a transform, as those that begin it and are the same every time, and all others.

    Steps of unknown classes, which may be random, and those that do not give a PIL image are of the others.
    """
    from torchvision import transforms

    steps = list(transform.transforms) if type(transform) is transforms.Compose else [transform]
    count = next((at for at, step in enumerate(steps) if not _is_fixed(step)), len(steps))
    return steps[:count], steps[count:]


def _is_fixed(step: Any) -> bool:
    """Whether a step gives a PIL image, the same every time."""
    from timm.data.transforms import CenterCropOrPad, ResizeKeepRatio
    from torchvision import transforms

    if type(step) is ResizeKeepRatio:
        return not (step.random_scale_prob or step.random_aspect_prob)
    return type(step) in (transforms.Resize, transforms.CenterCrop, transforms.Grayscale, CenterCropOrPad)


def is_random(transform: Any) -> bool:
    """Whether a transform has steps that are not known to do the same every time."""
    from timm.data.transforms import MaybePILToTensor, MaybeToTensor
    from torchvision import transforms

    fixed_classes = (
        *(transforms.ToTensor, transforms.PILToTensor, MaybeToTensor, MaybePILToTensor),
        *(transforms.ConvertImageDtype, transforms.Normalize),
    )
    return any(type(step) not in fixed_classes for step in split_transform(transform)[1])


def choose(
    benchmark: str,
    resize: str | None = None,
    mean_std: str | None = None,
    tuned: Preprocessing | None = None,
) -> Preprocessing:
    """What is asked for, else what a file was tuned with, else what a benchmark ("vtab", "fgvc") wants."""
    default = tuned or Preprocessing(_DEFAULTS.get(benchmark, ("model",))[0])
    return Preprocessing(resize or default.resize, mean_std or default.mean_std)


def recorded(path: str | os.PathLike[str]) -> Preprocessing | None:
    """What a file of prompts says it was made with; None where it says nothing.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or says something else.
    """
    with open_safetensors(path) as file:
        text = (file.metadata() or {}).get(PREPROCESSING)
    return None if text is None else Preprocessing.from_json(text)


def papers_rows(benchmark: str) -> list[str]:
    """A line that says what the paper's rows of a benchmark had done; none for other data."""
    return [f"the paper's rows: {_PAPER[benchmark]}"] if benchmark in _PAPER else []


def default_augment(benchmark: str) -> str:
    """How training images are augmented where nothing is asked for: not on VTAB, else by resized crops."""
    return _DEFAULTS.get(benchmark, ("", "resized-crop"))[1]


def channels_of(model: nn.Module) -> int:
    """Of the images that a model takes."""
    channels: int = _config(model)["input_size"][0]
    return channels


def size_of(model: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model takes, in pixels; timm's 224 where nothing says it."""
    embedded = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = embedded or _config(model)["input_size"][-2:]
    return height, width


def _config(model: nn.Module) -> dict[str, Any]:
    from timm.data.config import resolve_model_data_config

    found: dict[str, Any] = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    return found


def _at_random(transform: Any) -> Any:
    """A transform of timm with random crops for those of the centre, and then flips."""
    from timm.data.transforms import CenterCropOrPad, RandomCropOrPad
    from torchvision.transforms import CenterCrop, Compose, RandomCrop, RandomHorizontalFlip

    steps = []
    for step in transform.transforms:
        if isinstance(step, CenterCrop):
            steps += [RandomCrop(step.size), RandomHorizontalFlip()]
        elif isinstance(step, CenterCropOrPad):
            steps += [RandomCropOrPad(step.size, fill=step.fill), RandomHorizontalFlip()]
        else:
            steps.append(step)
    return Compose(steps)
