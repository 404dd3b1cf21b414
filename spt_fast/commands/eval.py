"""`spt-fast eval`: accuracy of tuned prompts on labelled images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from spt_fast.commands import options

if TYPE_CHECKING:
    from spt_fast.commands.options import Commands


def add(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "eval",
        help="accuracy of tuned prompts on labelled images",
        description="Share of images whose largest logit is their label.",
        epilog="example: spt-fast eval --model shipped --tuned folder/tuned.safetensors --data digits "
        "--split test",
    )
    options.add_model_and_data(parser)
    parser.add_argument(
        "--tuned", type=Path, required=True, metavar="FILE", help="of `spt-fast train`, or PromptedViT.save"
    )
    parser.add_argument("--weight-dtype", choices=("bf16", "fp16"), help="run the backbone in it")
    options.add_allow_other_backbone(parser)
    options.add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the accuracy."""
    from tqdm import tqdm

    from spt_fast.prompting.prompted_vit import PromptedViT
    from spt_fast.training.loop import evaluate

    tuned = PromptedViT.from_file(
        args.tuned,
        options.open_model(args),
        weight_dtype=args.weight_dtype,
        allow_other_backbone=args.allow_other_backbone,
    )
    images = options.open_labelled(
        args,
        tuned.model,
        tuned=options.made_with(args, args.tuned),
        class_names=tuned.class_names,
        num_classes=getattr(tuned.model, "num_classes", None),
    )
    if tuned.class_names is None:
        print(
            f"spt-fast eval: warning: {args.tuned} does not name its classes; "
            f"they are taken to be those of {args.data}, in this order: {', '.join(images.class_names)}",
            file=sys.stderr,
        )
    options.print_images(images.loader, "images")
    accuracy = evaluate(tuned, tqdm(images.loader, unit="batch"))
    unreadable = images.loader.unreadable
    print(f"accuracy {accuracy:.2%} of {images.num_images - len(unreadable)} images")
    options.print_unreadable(unreadable)
