"""`spt-fast eval`: accuracy of tuned prompts on labelled images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
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
        description="Share of images whose largest logit is their label; with --out also classes.csv (the "
        "same for each class) and confusion.csv (images by class and predicted class).",
        epilog="example: spt-fast eval --model shipped --tuned folder/tuned.safetensors --data digits "
        "--split test",
    )
    options.add_model_and_data(parser)
    options.add_tuned(parser)
    options.add_folder(parser, optional=True)
    options.add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Print the accuracy, and write the tables of the classes where a folder is given."""
    from spt_fast.support.results import result_folder
    from spt_fast.training.evaluation import EVALUATION_FILES

    if args.out is None:
        if args.overwrite:
            raise ValueError("overwrite is for the files of out, but no folder is given")
        _evaluate(args)
        return
    with result_folder(args.out, EVALUATION_FILES, overwrite=args.overwrite) as paths:
        _evaluate(args, paths)


def _evaluate(args: argparse.Namespace, paths: Mapping[str, Path] | None = None) -> None:
    from spt_fast.data.listing import some_names
    from spt_fast.support.progress import progress_bar
    from spt_fast.support.results import write_results
    from spt_fast.training.evaluation import evaluate_classes

    tuned = options.open_tuned(args)
    images = options.open_labelled(
        args,
        tuned.model,
        tuned=options.compared_with(args, args.tuned, tuned.preprocessing),
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
    with options.nothing_readable_explained(images.loader):
        found = evaluate_classes(tuned, progress_bar(images.loader, unit="batch"), images.class_names)
    print(f"accuracy {found.accuracy:.2%} of {found.num_images} images")
    missing = found.missing_classes
    print(
        f"mean of the classes' accuracies {found.mean_class_accuracy:.2%}, "
        f"of {len(found.class_names) - len(missing)} classes"
    )
    if missing:
        readable = "readable " if images.loader.unreadable else ""
        print(f"classes without {readable}images ({len(missing)}): {some_names(missing)}")
    options.print_unreadable(images.loader.unreadable)
    for path in write_results(paths, found.files(), overwrite=args.overwrite) if paths else ():
        print(f"wrote {path}")
