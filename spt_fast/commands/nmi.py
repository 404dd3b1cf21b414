"""`spt-fast nmi`: what prompts share with patch tokens, block by block."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from spt_fast.commands import options

if TYPE_CHECKING:
    from spt_fast.commands.options import Commands


def add(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "nmi",
        help="what prompts share with patch tokens, block by block",
        description="NMI (eq. 7, 8) and CKA (App. B.4) of prompts and patch tokens per block: prints a "
        "table, writes nmi.csv, cka.csv and nmi.png.",
        epilog="example: spt-fast nmi --model shipped --data digits --random 20 --out folder",
    )
    options.add_limit(options.add_model_and_data(parser), default=512)
    prompts = parser.add_argument_group("prompts")
    source = prompts.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help="of `spt-fast prototypes`, or of a tuned PromptedViT"
    )
    options.add_random(source)
    prompts.add_argument(
        "--depth", choices=("deep", "shallow"), default="deep", help="of --random (default: deep)"
    )
    measures = parser.add_argument_group("measures")
    measures.add_argument(
        "--scale", type=float, default=1.0, help="of the scores in the sigmoid (default: 1, as eq. 7 has it)"
    )
    measures.add_argument(
        "--normalize", action="store_true", help="scores of prompts and tokens divided by their lengths"
    )
    measures.add_argument(
        "--biased-cka", action="store_true", help="the CKA of Kornblith et al. (default: the unbiased form)"
    )
    options.add_allow_other_backbone(parser)
    options.add_folder(parser, default=Path())
    options.add_device(parser)
    options.add_seed(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the files."""
    from spt_fast.analysis.prompts import FILE_NAMES
    from spt_fast.support.results import result_folder

    with result_folder(args.out, FILE_NAMES, overwrite=args.overwrite) as paths:
        _analyse_into(paths, args)


def _analyse_into(paths: dict[str, Path], args: argparse.Namespace) -> None:
    from spt_fast import analysis
    from spt_fast.support.results import write_results

    model = options.open_model(args)
    images = options.open_images(args, model, tuned=options.made_with(args, args.prompts))
    options.print_images(images, "images")
    if args.prompts is not None:
        tuned = analysis.load_prompts(args.prompts, model, allow_other_backbone=args.allow_other_backbone)
    else:
        tuned = analysis.random_prompts(args.random, model, depth=args.depth, seed=args.seed)
    with options.nothing_readable_explained(images):
        result = analysis.analyse(
            tuned,
            images,
            max_images=args.max_images,
            scale=args.scale,
            normalize=args.normalize,
            unbiased=not args.biased_cka,
        )
    print(result.table())
    print(f"{result.num_images} images")
    options.print_unreadable(images.unreadable)
    prompts = args.prompts.name if args.prompts else f"{args.random} random prompts"
    title = f"{prompts}; model {args.model}, images {args.data}"
    contents = result.files(title if "nmi.png" in paths else None)
    for path in write_results(paths, contents, overwrite=args.overwrite):
        print(f"wrote {path}")
