"""`spt-fast train`: prompts and a new head, learned on labelled images."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spt_fast.commands import options

if TYPE_CHECKING:
    from torch import nn

    from spt_fast.commands.options import Commands
    from spt_fast.data.cache import ImageCache
    from spt_fast.methods.prompted_vit import PromptedViT
    from spt_fast.prototypes.result import Prototypes


def add(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "train",
        help="tune prompts and a head on labelled images",
        description="Prompts and a new head, learned on labelled images (Sec. 4.1: AdamW, linear warm-up, "
        "cosine; random crops and flips, except for VTAB and the digits). Writes tuned.safetensors, "
        "train.csv, train.png; the first two after every epoch.",
        epilog="example: spt-fast train --model shipped --data digits --val-split val --epochs 20 "
        "--out folder",
    )
    training = options.add_model_and_data(parser, batch_size=32)
    training.add_argument(
        "--augment",
        choices=("resized-crop", "crop", "none"),
        help="training images: random resized crops (timm), or random crops after --resize, both with flips "
        "(default: resized-crop; none on VTAB)",
    )
    training.add_argument(
        "--drop-last", action="store_true", help="leave out a last training batch that is not full"
    )
    options.add_cache(training)
    options.add_pooling(parser, "avg-with-prompts for MAE's weights, else timm's own")
    images = parser.add_argument_group("validation")
    images.add_argument("--val-data", help="as --data; default: that, with --val-split")
    images.add_argument("--val-split", help="as --split (default: the one to validate with)")
    images.add_argument(
        "--allow-overlap", action="store_true", help="validate also on files that are training images"
    )
    _add_prompts(parser)
    _add_recipe(parser)
    options.add_allow_other_backbone(parser)
    options.add_folder(parser)
    options.add_device(parser)
    options.add_seed(parser)
    parser.set_defaults(run=run)


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_argument_group("prompts")
    source = prompts.add_mutually_exclusive_group()
    source.add_argument("--prompts", type=Path, metavar="FILE", help="of `spt-fast prototypes`")
    options.add_random(source)
    source.add_argument(
        "--num-prompts", type=int, help="of prototypes built first (default: 20 deep, 100 shallow)"
    )
    prompts.add_argument("--depth", choices=("deep", "shallow"), default="deep")
    prompts.add_argument("--freeze-prompts", action="store_true", help="learn the head only (Table 4a)")
    prompts.add_argument(
        "--prompt-dropout", type=float, default=0.0, metavar="SHARE", help="while training (VPT's runs: 0.1)"
    )


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, default=100)
    recipe.add_argument("--warmup-epochs", type=float, help="default: a tenth of --epochs")
    recipe.add_argument("--lr", type=float, default=1e-2, help="highest, of the head (default: 0.01)")
    recipe.add_argument(
        "--prompt-lr",
        type=float,
        help="highest, of the prompts (default: in proportion to --lr and the prompts' root mean square)",
    )
    recipe.add_argument("--weight-decay", type=float, default=1e-4)
    recipe.add_argument("--head-weight-decay", type=float, help="default: as --weight-decay")
    recipe.add_argument(
        "--head-init",
        choices=("timm", "trunc_normal"),
        default="timm",
        help="start of the head: timm's (default), or a truncated normal with zero bias (released code)",
    )
    recipe.add_argument(
        "--head-std", type=float, help="of trunc_normal (default: 0.02; the code's MoCo: 0.01)"
    )
    recipe.add_argument(
        "--keep",
        choices=("last", "best"),
        default="last",
        help="write the last epoch (default), or the best by validation, never by test images",
    )
    # float16 would need its gradients scaled.
    recipe.add_argument("--weight-dtype", choices=("bf16",), help="run the frozen backbone in it")


def run(args: argparse.Namespace) -> None:
    """Train, and write what was learned."""
    from spt_fast.support.results import result_folder
    from spt_fast.training.loop import check_recipe
    from spt_fast.training.run import FILE_NAMES

    check_recipe(**_recipe(args))
    if args.keep == "best" and args.val_data is None and args.val_split is None:
        raise ValueError("keep='best' is chosen by validation images: give val_data or val_split")
    with result_folder(args.out, FILE_NAMES, overwrite=args.overwrite) as paths:
        _train_into(paths, args)


def _train_into(paths: dict[str, Path], args: argparse.Namespace) -> None:
    from spt_fast.data.images import open_validation_images, training_split
    from spt_fast.data.names import SHIPPED_IMAGES, takes_root
    from spt_fast.training.run import add_prompts_and_head, fit_and_save

    model = options.open_model(args, args.pool or "auto", args.norm)
    cache = options.open_cache(args, model)
    args.split = args.split or training_split(args.data, args.val_data, args.val_split)
    made = options.made_with(args, args.prompts)
    of_validation = options.image_options(args)
    if args.val_data is not None and takes_root(args.val_data) and not takes_root(args.data):
        # It is for the validation images alone.
        args.root = None
    train = options.open_labelled(
        args,
        model,
        training=True,
        seed=args.seed,
        augment=args.augment,
        drop_last=args.drop_last,
        tuned=made,
        cache=cache,
    )
    preprocessing = train.loader.preprocessing
    val = open_validation_images(
        model=model,
        val_data=args.val_data,
        val_split=args.val_split,
        class_names=train.class_names,
        cache=cache,
        tuned=preprocessing,
        **of_validation,
    )
    options.print_images(train.loader, "training")
    if val is not None:
        options.print_images(val.loader, "validation")
        if train.paths and val.paths:
            _check_overlap(train.paths, val.paths, allow=args.allow_overlap)
        elif args.data != SHIPPED_IMAGES:
            print("validation: not checked for training images: they do not all lie in files of their own")
    for line in cache.description() if cache is not None else ():
        print(line)
    tuned = add_prompts_and_head(
        model,
        _prompts(args, model, cache),
        class_names=train.class_names,
        depth=args.depth,
        freeze_prompts=args.freeze_prompts,
        prompt_dropout=args.prompt_dropout,
        head_init=args.head_init,
        head_std=args.head_std,
        weight_dtype=args.weight_dtype,
        allow_other_backbone=args.allow_other_backbone,
        seed=args.seed,
    )
    tuned.preprocessing = preprocessing
    _print_rates(tuned, args)
    history = fit_and_save(
        tuned,
        train.loader,
        None if val is None else val.loader,
        paths,
        overwrite=args.overwrite,
        title=f"{args.data}, {tuned.num_prompts} prompts",
        seed=args.seed,
        keep=args.keep,
        **_recipe(args),
    )
    print(history.summary())
    for line in cache.summary() if cache is not None else ():
        print(line)
    options.print_unreadable(train.loader.unreadable, {} if val is None else val.loader.unreadable)
    for path in paths.values():
        print(f"wrote {path}")


def _check_overlap(training: Sequence[Path], validation: Sequence[Path], *, allow: bool) -> None:
    """Refuse validation images that are trained on, or say how many there are."""
    from spt_fast.data.listing import some_names
    from spt_fast.data.overlap import find_overlap

    shared = find_overlap(training, validation)
    if not shared:
        return
    message = (
        f"{len(shared)} of {len(validation)} validation images are training images too, byte for byte: "
        + some_names([str(path) for path in shared])
    )
    if not allow:
        raise ValueError(f"{message}; remove them, or validate on them all the same with --allow-overlap")
    print(f"validation: {message}")


def _prompts(args: argparse.Namespace, model: nn.Module, cache: ImageCache | None) -> Path | int | Prototypes:
    """What the prompts start from: a file, random ones, or prototypes of the training images."""
    if args.prompts is not None:
        return Path(args.prompts)
    if args.random is not None:
        return int(args.random)
    from spt_fast.prototypes.build import build_prototypes

    images = options.open_images(args, model, in_classes=True, cache=cache)
    options.check_num_prompts(args.num_prompts, args.depth, model, images.num_images)
    with options.nothing_readable_explained(images):
        return build_prototypes(
            model,
            images,
            num_prompts=args.num_prompts,
            depth=args.depth,
            seed=args.seed,
        )


def _print_rates(tuned: PromptedViT, args: argparse.Namespace) -> None:
    """Say how fast prompts and head learn: the prompts' rate may be a default that depends on them."""
    groups = tuned.parameter_groups(args.lr, args.prompt_lr)
    names = ("prompts" if group["name"] == "prompts" else "head" for group in groups)
    rates = {name: f"{group['lr']:.3g}" for name, group in zip(names, groups, strict=True)}
    print("learning rates: " + ", ".join(f"{name} {rate}" for name, rate in rates.items()))


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
    names = ("epochs", "lr", "prompt_lr", "weight_decay", "head_weight_decay", "warmup_epochs")
    return {name: getattr(args, name) for name in names}
