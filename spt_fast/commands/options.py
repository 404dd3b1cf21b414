"""Options that several commands share, and what they name: the model and the images."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spt_fast.data.images import LabelledImages
    from spt_fast.data.loading import ImageLoader

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_model_and_data(parser: argparse.ArgumentParser, batch_size: int = 64) -> argparse._ArgumentGroup:
    """Options that name a model and images; returns the group of those about images."""
    parser.add_argument(
        "--model",
        required=True,
        help="timm model name, 'shipped', or a file of examples/pretrain_backbone.py",
    )
    parser.add_argument(
        "--data", required=True, help="folder of images, timm data set (torch/cifar10), or 'digits'"
    )
    weights = parser.add_argument_group("weights of a timm model")
    weights.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="timm's weights (default) or random ones, the same every time",
    )
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights from a file instead")
    images = parser.add_argument_group("images")
    images.add_argument("--root", type=Path, metavar="FOLDER", help="where a timm data set lies")
    images.add_argument("--split", help="of a timm data set or the digits (default: train)")
    images.add_argument("--download", action="store_true", help="let timm download the data set")
    images.add_argument("--batch-size", type=int, default=batch_size)
    images.add_argument("--workers", type=int, default=4)
    images.add_argument(
        "--bad-images",
        choices=("error", "skip"),
        default="error",
        help="stop at an image that cannot be read (default), or leave it out and list it at the end",
    )
    return images


def add_limit(images: argparse._ArgumentGroup, default: int | None = None) -> None:
    """The largest number of images."""
    limit = "stop after M images, drawn at random" + (f" (default: {default})" if default else "")
    images.add_argument("--max-images", type=int, metavar="M", default=default, help=limit)


def add_random(source: argparse._MutuallyExclusiveGroup) -> None:
    """The number of random prompts, instead of a file."""
    source.add_argument("--random", type=int, metavar="N_P", help="as many random ones, as VPT starts from")


def add_folder(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    """The folder that a command writes its files into; without a default it has to be given."""
    where = "where to write, made if need be" + (" (default: here)" if default else "")
    parser.add_argument(
        "--out", type=Path, required=default is None, default=default, metavar="FOLDER", help=where
    )
    parser.add_argument("--overwrite", action="store_true", help="write over these files if they are there")


def add_allow_other_backbone(parser: argparse.ArgumentParser) -> None:
    """The way around the check that a file of prompts was made with the weights that the model has."""
    parser.add_argument(
        "--allow-other-backbone",
        action="store_true",
        help="take prompts that were made with other weights or for another image size",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """The device of the model."""
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")


def add_seed(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The seed of everything that is drawn."""
    parser.add_argument("--seed", type=int, default=0)


def find_device(args: argparse.Namespace) -> torch.device:
    """The device that the arguments name, once it is found to work; under torchrun that of this process."""
    from spt_fast.support.arguments import check_device
    from spt_fast.support.distributed import device_of_this_process

    if args.device is not None and args.device != "cuda":
        return check_device("device", args.device)
    return check_device("device", device_of_this_process(args.device))


def open_model(args: argparse.Namespace) -> nn.Module:
    """The model that the arguments name, on their device."""
    from spt_fast.backbones.open import open_model

    device = find_device(args)
    return open_model(args.model, pretrained=args.pretrained, checkpoint=args.checkpoint).to(device)


def open_images(args: argparse.Namespace, model: nn.Module, **share: Any) -> ImageLoader:
    """Batches of the images that the arguments name, for `model`; `share` as in `data.images.open_images`."""
    from spt_fast.data.images import open_images

    return open_images(model=model, seed=args.seed, **image_options(args), **share)


def open_labelled(args: argparse.Namespace, model: nn.Module, **use: Any) -> LabelledImages:
    """The same with labels; `use` as in `data.images.open_labelled_images`."""
    from spt_fast.data.images import open_labelled_images

    return open_labelled_images(model=model, **image_options(args), **use)


def check_num_prompts(
    num_prompts: int | None, depth: str, model: nn.Module, images: int | None, where: str = "images"
) -> None:
    """Refuse, before the pass, more prototypes than `images` images have patches, as far as that is known."""
    from timm.data.config import resolve_model_data_config

    from spt_fast.backbones.anatomy import patch_size
    from spt_fast.prototypes.build import DEFAULT_NUM_PROMPTS

    wanted = DEFAULT_NUM_PROMPTS[depth] if num_prompts is None else num_prompts
    size = resolve_model_data_config(model)["input_size"][1:]  # type: ignore[no-untyped-call]
    try:
        patches = math.prod(
            math.ceil(side / patch) for side, patch in zip(size, patch_size(model), strict=True)
        )
    except TypeError:
        return
    if images is not None and wanted > images * patches:
        raise ValueError(
            f"num_prompts must be at most the number of patch tokens, {images * patches} per layer "
            f"({images} {where} with {patches} patches each), got {wanted}"
        )


def print_images(loader: ImageLoader, use: str) -> None:
    """Say what is about to be read: images, classes, images in each, and what is left out."""
    for line in loader.description:
        print(f"{use}: {line}")


def print_unreadable(*unreadable: dict[str, str]) -> None:
    """Say what `--bad-images skip` has left out, given as {name: reason} of each loader."""
    found = {name: reason for each in unreadable for name, reason in each.items()}
    if found:
        print(f"left out {len(found)} images that cannot be read:")
    for name, reason in sorted(found.items()):
        print(f"  {name} ({reason})")


def image_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments about images, by the names that the functions of `data.images` give them."""
    names = ("data", "root", "split", "download", "batch_size", "workers", "bad_images")
    return {name: getattr(args, name) for name in names}
