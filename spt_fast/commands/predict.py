"""`spt-fast predict`: the classes of images, in CSV or JSON lines."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spt_fast.commands import options

if TYPE_CHECKING:
    from spt_fast.commands.options import Commands


def add(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "predict",
        help="classes of images, by tuned prompts",
        description="The most probable classes of images, a line for each image, in the order given; a "
        "folder's images in the order of their names, at any depth. Messages go to stderr.",
        epilog="example: spt-fast predict --model vit_base_patch16_224.mae --tuned folder/tuned.safetensors "
        "photos --top-k 3 --out photos.csv",
    )
    options.add_model(parser)
    options.add_tuned(parser)
    parser.add_argument("data", nargs="+", metavar="FILE_OR_FOLDER", help="images, or folders of images")
    options.add_reading(parser.add_argument_group("images"))
    output = parser.add_argument_group("output")
    output.add_argument("--top-k", type=int, default=1, metavar="K", help="classes per image (default: 1)")
    output.add_argument(
        "--format", choices=("csv", "jsonl"), help="default: jsonl if --out ends in it, else csv"
    )
    output.add_argument("--out", type=Path, metavar="FILE", help="default: standard output")
    output.add_argument("--overwrite", action="store_true", help="write over FILE if it is there")
    options.add_device(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the predictions: to standard output batch by batch, to a file completely or not at all."""
    from spt_fast.data.images import open_files
    from spt_fast.support.files import check_output_path, write_bytes
    from spt_fast.training.predictions import predict, write_predictions

    if args.out is not None:
        check_output_path(args.out, overwrite=args.overwrite)
    elif args.overwrite:
        raise ValueError("overwrite is for a file, but out is standard output")
    tuned = options.open_tuned(args)
    made = options.compared_with(args, args.tuned, tuned.preprocessing)
    files = open_files(args.data, tuned.model, tuned=made, **options.reading_options(args))
    say = partial(print, file=sys.stderr)
    if tuned.class_names is None:
        say(f"spt-fast predict: warning: {args.tuned} does not name its classes; they are given by number")
    options.print_images(files.loader, "images", file=sys.stderr)
    found = predict(tuned, files, top_k=args.top_k, progress=True)
    lines = write_predictions(found, args.format or _format_of(args.out), args.top_k)
    if args.out is None:
        _stream(lines)
    else:
        write_bytes(args.out, b"".join(lines), overwrite=args.overwrite)
        say(f"wrote {args.out}")
    options.print_unreadable(files.loader.unreadable, file=sys.stderr)


def _format_of(out: Path | None) -> str:
    return "jsonl" if out is not None and out.suffix == ".jsonl" else "csv"


def _stream(lines: Iterable[bytes]) -> None:
    """Write to standard output as bytes, whatever the encoding of the terminal is."""
    for line in lines:
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
