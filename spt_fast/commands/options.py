"""Options that several commands share, and what they name: the model and the images."""

from __future__ import annotations

import argparse
import ast
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    import torch
    from torch import nn

    from spt_fast.data.cache import ImageCache
    from spt_fast.data.images import LabelledImages
    from spt_fast.data.loading import ImageLoader
    from spt_fast.data.transforms import Preprocessing
    from spt_fast.methods.base import TunedViT

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_model_and_data(
    parser: argparse.ArgumentParser, batch_size: int | None = 64
) -> argparse._ArgumentGroup:
    """Options that name a model and images; returns the group of those about images.

    Args:
        batch_size: by default; None leaves out the options about images that a recipe has.
    """
    add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="folder of images, list (x.txt, x.json), x.tar, vtab/TASK, fgvc/SET, timm data set "
        "(torch/cifar10), or 'digits'",
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--root", type=Path, metavar="FOLDER", help="where the files of a list, or the data set, lie"
    )
    images.add_argument("--split", help="of data that have several; the command says which it took")
    images.add_argument("--download", action="store_true", help="let timm download the data set")
    add_reading(images, batch_size)
    return images


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Options that name a model and its weights."""
    parser.add_argument(
        "--model",
        required=required,
        help="timm model name, 'shipped', or a file of examples/pretrain_backbone.py",
    )
    weights = parser.add_argument_group("a timm model")
    weights.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="timm's weights (default) or random ones, the same every time",
    )
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights from a file instead")
    weights.add_argument(
        "--img-size",
        type=_image_size,
        metavar="SIZE",
        help="of its images, such as 384 or 384x288 (height first); position embeddings are resized",
    )
    weights.add_argument("--in-chans", type=int, metavar="N", help="channels of its images: 3, or 1 for grey")
    weights.add_argument(
        "--model-option",
        type=key_and_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any other option of timm.create_model, such as global_pool=avg; may be repeated",
    )


def add_pooling(parser: argparse.ArgumentParser, default: str) -> None:
    """In which form the backbone ends, and what that is where nothing is asked for."""
    pooling = parser.add_argument_group("pooling")
    pooling.add_argument(
        "--pool",
        choices=("token", "avg", "avg-with-prompts"),
        help="what the head gets: the class token, or the average of patches, or of patches and prompts "
        f"(default: {default})",
    )
    pooling.add_argument(
        "--norm",
        choices=("own", "new"),
        help="the final norm: that of the weights, or a new one, frozen too (default: likewise, else own)",
    )


def add_reading(images: argparse._ArgumentGroup, batch_size: int | None = 64) -> None:
    """Options that say how images are read, wherever they lie; `batch_size` as in `add_model_and_data`."""
    if batch_size is not None:
        add_preprocessing(images)
        images.add_argument("--batch-size", type=int, default=batch_size)
    images.add_argument("--workers", type=int, default=4)
    images.add_argument(
        "--bad-images",
        choices=("error", "skip"),
        default="error",
        help="stop at an image that cannot be read (default), or leave it out and list it at the end",
    )


def add_cache(images: argparse._ArgumentGroup) -> None:
    """Whether decoded images are kept for the next epoch."""
    images.add_argument(
        "--cache",
        choices=("auto", "ram", "device", "off"),
        default="auto",
        help="keep decoded images in memory; on the device too if they fit and are not augmented (default: "
        "auto, if they take a quarter of its free memory at most)",
    )
    images.add_argument(
        "--cache-budget",
        metavar="SIZE",
        help="memory for them, such as 2GiB; the others are decoded in each epoch (default: half of what is "
        "free)",
    )


def add_tuned(parser: argparse.ArgumentParser) -> None:
    """The file of a tuned model, and how it is opened."""
    parser.add_argument(
        "--tuned",
        type=Path,
        required=True,
        metavar="FILE",
        help="of `spt-fast train`, or of `save` in Python",
    )
    parser.add_argument("--weight-dtype", choices=("bf16", "fp16"), help="run the backbone in it")
    add_pooling(parser, "as the file was tuned")
    add_allow_other_backbone(parser)


def add_preprocessing(images: argparse._ArgumentGroup) -> None:
    """What is done to images before a model sees them."""
    images.add_argument(
        "--resize",
        choices=("model", "fgvc", "vtab", "short"),
        help="timm's for the model; short side 256, centre 224; straight to the square; short side, centre "
        "(default: as the prompts were made, or as fits the data)",
    )
    images.add_argument(
        "--mean-std", choices=("model", "imagenet"), help="of pixels (default: likewise, else the model's)"
    )


def add_limit(images: argparse._ArgumentGroup, default: int | None = None) -> None:
    """The largest number of images."""
    limit = "stop after M images, drawn at random" + (f" (default: {default})" if default else "")
    images.add_argument("--max-images", type=int, metavar="M", default=default, help=limit)


def add_random(source: argparse._MutuallyExclusiveGroup) -> None:
    """The number of random prompts, instead of a file."""
    source.add_argument("--random", type=int, metavar="N_P", help="as many random ones, as VPT starts from")


def add_folder(
    parser: argparse.ArgumentParser, default: Path | None = None, *, optional: bool = False
) -> None:
    """The folder that a command writes into; without a default it has to be given unless it is optional."""
    where = "where to write, made if need be" + (" (default: here)" if default else "")
    parser.add_argument(
        "--out",
        type=Path,
        required=default is None and not optional,
        default=default,
        metavar="FOLDER",
        help=where,
    )
    parser.add_argument("--overwrite", action="store_true", help="write over these files if they are there")


def add_allow_other_backbone(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The way around the check that a file of prompts was made with the weights that the model has."""
    parser.add_argument(
        "--allow-other-backbone",
        action="store_true",
        help="take prompts that were made with other weights or for another image size",
    )


def add_device(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
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


def open_model(args: argparse.Namespace, pool: str | None = None, norm: str | None = None) -> nn.Module:
    """The model that the arguments name, on their device; `pool` as in `backbones.open.open_model`."""
    from spt_fast.backbones.open import open_model

    device = find_device(args)
    return open_model(
        args.model,
        pretrained=args.pretrained,
        checkpoint=args.checkpoint,
        model_options=model_options(args),
        pool=pool,  # type: ignore[arg-type]
        norm=norm or "own",  # type: ignore[arg-type]
    ).to(device)


def model_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `timm.create_model` that the arguments give.

    Raises:
        ValueError: one is given twice.
    """
    given = [("img_size", args.img_size), ("in_chans", args.in_chans)]
    pairs = [*((name, value) for name, value in given if value is not None), *args.model_option]
    return given_once("model_option", pairs)


def given_once(argument: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as a mapping; ValueError where a name comes twice."""
    names = [name for name, _ in pairs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{argument} must give each option once, got {twice} more than once")
    return dict(pairs)


def _image_size(text: str) -> int | tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"must be a size such as 384 or 384x288, got {text!r}")
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def key_and_value(text: str) -> tuple[str, Any]:
    """ "key=value", with a Python literal, true, false, none or a plain string as its value."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, such as global_pool=avg, got {text!r}")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def open_tuned(args: argparse.Namespace) -> TunedViT:
    """The tuned model in the file that the arguments name, in the form it was tuned in unless they ask."""
    from spt_fast.methods.file_format import TunedState
    from spt_fast.methods.registry import of_state

    pool, norm = args.pool, args.norm
    state = TunedState.read(args.tuned)
    stated = state.stated_pooling
    if stated is not None and stated.is_named and not _pools_by_option(args):
        pool, norm = pool or stated.pool, norm or stated.norm
    elif stated is not None:
        norm = norm or stated.norm
    return of_state(
        state,
        args.tuned,
        open_model(args, pool, norm),
        weight_dtype=args.weight_dtype,
        allow_other_backbone=args.allow_other_backbone,
    )


def _pools_by_option(args: argparse.Namespace) -> bool:
    return any(name in ("global_pool", "fc_norm") for name, _ in args.model_option)


def open_cache(args: argparse.Namespace, model: nn.Module) -> ImageCache | None:
    """Where decoded images are kept, for a model on its device; None with `--cache off`."""
    from spt_fast.data.cache import ImageCache
    from spt_fast.support.distributed import processes_of_this_machine

    if args.cache == "off":
        if args.cache_budget is not None:
            raise ValueError(f"cache_budget is without effect with cache='off', got {args.cache_budget}")
        return None
    device = next(model.parameters()).device
    return ImageCache(args.cache, args.cache_budget, device=device, sharing=processes_of_this_machine())


def open_images(args: argparse.Namespace, model: nn.Module, **share: Any) -> ImageLoader:
    """Batches of the images that the arguments name, for `model`; `share` as in `data.images.open_images`."""
    from spt_fast.data.images import open_images

    return open_images(model=model, seed=args.seed, **{**image_options(args), **share})


def open_labelled(args: argparse.Namespace, model: nn.Module, **use: Any) -> LabelledImages:
    """The same with labels; `use` as in `data.images.open_labelled_images`."""
    from spt_fast.data.images import open_labelled_images

    return open_labelled_images(model=model, **image_options(args), **use)


def made_with(args: argparse.Namespace, path: Path | None) -> Preprocessing | None:
    """What was done to the images that a file of prompts was made with; says so where now it is another."""
    from spt_fast.data.transforms import recorded

    return None if path is None else compared_with(args, path, recorded(path))


def compared_with(args: argparse.Namespace, path: Path, made: Preprocessing | None) -> Preprocessing | None:
    """`made`, what `path` says was done to its images; says so where now it is another."""
    from spt_fast.data.transforms import choose

    if made is not None and (asked := choose("", args.resize, args.mean_std, made)) != made:
        print(
            f"spt-fast {args.command}: warning: {path} was made with {made}, not with {asked} as now",
            file=sys.stderr,
        )
    return made


def check_num_prompts(
    num_prompts: int | None, depth: str, model: nn.Module, images: int | None, where: str = "images"
) -> None:
    """Refuse, before the pass, more prototypes than `images` images have patches, as far as that is known."""
    from timm.data.config import resolve_model_data_config

    from spt_fast.backbones.anatomy import patch_size
    from spt_fast.prototypes.options import DEFAULT_NUM_PROMPTS

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


def print_images(loader: ImageLoader, use: str, file: TextIO | None = None) -> None:
    """Say what is about to be read: images, classes, images in each, and what is left out."""
    for line in loader.description:
        print(f"{use}: {line}", file=file)


def print_unreadable(*unreadable: dict[str, str], file: TextIO | None = None) -> None:
    """Say what `--bad-images skip` has left out, given as {name: reason} of each loader."""
    found = {name: reason for each in unreadable for name, reason in each.items()}
    if found:
        print(f"left out {len(found)} images that cannot be read:", file=file)
    for name, reason in sorted(found.items()):
        print(f"  {name} ({reason})", file=file)


@contextmanager
def nothing_readable_explained(loader: ImageLoader) -> Iterator[None]:
    """Where none of the images can be read, the error says so, and not that the loader is empty."""
    try:
        yield
    except ValueError as error:
        if loader.unreadable and len(loader.unreadable) == loader.num_images:
            name, reason = next(iter(loader.unreadable.items()))
            raise ValueError(
                f"data: none of the {loader.num_images} images can be read, such as {name} ({reason})"
            ) from error
        raise


def image_options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments about images, by the names that the functions of `data.images` give them."""
    names = ("data", "root", "split", "download")
    return {**{name: getattr(args, name) for name in names}, **reading_options(args)}


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those of them that say how images are read, wherever they lie."""
    names = ("resize", "mean_std", "batch_size", "workers", "bad_images")
    return {name: getattr(args, name) for name in names}
