"""`spt-fast prototypes`: prompts from a model and images, in one pass."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spt_fast.commands import options

if TYPE_CHECKING:
    from torch import nn

    from spt_fast.commands.options import Commands
    from spt_fast.data.loading import ImageLoader
    from spt_fast.support.distributed import Processes


def add(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "prototypes",
        help="build prompts from a model and images, in one pass",
        description="Prototypes of a data set's patch tokens, for SPT; written as safetensors.",
        epilog="example: spt-fast prototypes --model vit_small_patch16_224 --data photos --out p.safetensors "
        "(several processes share the images: torchrun --nproc-per-node 4 --no-python spt-fast prototypes "
        "...)",
    )
    options.add_limit(options.add_model_and_data(parser))
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="of several lengths, p.safetensors stands for p-1.safetensors, p-5.safetensors, ...",
    )
    parser.add_argument("--overwrite", action="store_true", help="write over FILE if it is there")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--num-prompts",
        type=int,
        nargs="+",
        metavar="N",
        help="one length, or several from the same pass, a file each (default: 20 deep, 100 shallow)",
    )
    prompts.add_argument(
        "--with-sample",
        action="store_true",
        help="also write the sample of the pass, from which Python solves other lengths later",
    )
    prompts.add_argument("--depth", choices=("deep", "shallow"), default="deep")
    prompts.add_argument("--strategy", choices=("kmeans", "mean", "max", "random"), default="kmeans")
    prompts.add_argument(
        "--mode", choices=("stream", "exact"), default="stream", help="of kmeans (default: stream)"
    )
    prompts.add_argument(
        "--metric",
        choices=("euclidean", "cosine"),
        default="euclidean",
        help="of kmeans: cosine clusters the directions of the tokens (default: euclidean)",
    )
    prompts.add_argument(
        "--capacity", type=int, help="of stream: tokens kept per layer (default: 20000 or 500 per prompt)"
    )
    prompts.add_argument(
        "--memory-budget",
        metavar="SIZE",
        help="of exact: memory for tokens, such as 800MB; the others go to a temporary file (default: 4GiB)",
    )
    prompts.add_argument(
        "--init", choices=("k-means++", "random", "uniform"), help="of exact (default: k-means++)"
    )
    prompts.add_argument("--n-init", type=int, help="of exact: starts (default: 1)")
    prompts.add_argument(
        "--sampling",
        choices=("batch", "all"),
        default="batch",
        help="of mean, max, random: from one batch, as in the paper, or from all images, as in its code",
    )
    prompts.add_argument(
        "--no-position-embedding",
        action="store_true",
        help="tokens of block 1 without position embedding, as in the paper's code",
    )
    repeated = prompts.add_mutually_exclusive_group()
    repeated.add_argument(
        "--block", type=int, metavar="N", help="prompts of block N, from 1, for all (Table S2)"
    )
    repeated.add_argument(
        "--last-output", action="store_true", help="prompts of the last block's output for all (Table S2)"
    )
    prompts.add_argument("--device", help="default: cuda where there is one (torchrun: one each), else cpu")
    options.add_seed(prompts)
    parser.set_defaults(run=run, several_processes=True)


def run(args: argparse.Namespace) -> None:
    """Build the prototypes, in all processes that torchrun started."""
    from spt_fast.support.distributed import joined_by_environment

    with joined_by_environment(options.find_device(args)) as processes:
        _build_and_save(args, processes)


def _build_and_save(args: argparse.Namespace, processes: Processes) -> None:
    import time

    from spt_fast.data.transforms import PREPROCESSING
    from spt_fast.prototypes.build import build_prototypes
    from spt_fast.prototypes.report import summary
    from spt_fast.support.files import check_output_path

    def open_both() -> tuple[nn.Module, ImageLoader]:
        model = options.open_model(args)
        return model, options.open_images(args, model, max_images=args.max_images, processes=processes)

    _check_options(args)
    paths = output_paths(args.out, args.num_prompts)
    for path in paths.values():
        processes.on_rank_0(partial(check_output_path, path, overwrite=args.overwrite))
    model, images = processes.rank_0_first(open_both)
    processes.on_rank_0(partial(options.print_images, images, "images"))
    _check_num_prompts(args, model, images.num_images)
    _check_block(args, model)
    started = time.perf_counter()
    with options.nothing_readable_explained(images):
        prototypes = build_prototypes(
            model,
            images,
            num_prompts=max(args.num_prompts) if args.num_prompts else None,
            depth=args.depth,
            strategy=args.strategy,
            metric=args.metric,
            capacity=args.capacity,
            mode=args.mode,
            init=args.init,
            n_init=args.n_init,
            sampling=args.sampling,
            position_embedding=not args.no_position_embedding,
            last_output=args.last_output,
            max_images=args.max_images,
            memory_budget=args.memory_budget,
            seed=args.seed,
        )
    seconds = time.perf_counter() - started
    if images.preprocessing is not None:
        prototypes.metadata[PREPROCESSING] = images.preprocessing.to_json()

    def save_and_print() -> None:
        for length, path in paths.items():
            found = prototypes.select(length, progress=True) if len(paths) > 1 else prototypes
            if args.block is not None:
                found = found.repeat_layer(args.block - 1)
            if args.last_output:
                found = found.repeat_last_output()
            found.save(path, overwrite=args.overwrite, with_sample=args.with_sample)
            print(f"{path}: {summary(found, seconds)}")
        options.print_unreadable(*unreadable)

    unreadable = processes.gather(images.unreadable)
    processes.on_rank_0(save_and_print)


def output_paths(out: Path, lengths: Sequence[int] | None) -> dict[int, Path]:
    """The file of each length; of a single one, or of the default, it is `out` itself."""
    if lengths is None or len(lengths) == 1:
        return {lengths[0] if lengths else 0: out}
    return {length: out.with_name(f"{out.stem}-{length}{out.suffix}") for length in lengths}


def _check_options(args: argparse.Namespace) -> None:
    """Refuse before the pass what `select` and `save` would refuse after it."""
    from spt_fast.support.arguments import check_int

    lengths = args.num_prompts or []
    for length in lengths:
        check_int("num_prompts", length, 1)
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"--num-prompts must be different lengths, got {' '.join(map(str, lengths))}")
    for option, wanted in (("several --num-prompts", len(lengths) > 1), ("--with-sample", args.with_sample)):
        if wanted and (args.strategy != "kmeans" or args.mode != "stream"):
            raise ValueError(
                f"{option} must come from the sample that --strategy kmeans --mode stream makes, "
                f"got --strategy {args.strategy} --mode {args.mode}"
            )
    if args.with_sample and (args.block is not None or args.last_output):
        raise ValueError("--with-sample must come without --block and --last-output, which keep no sample")


def _check_block(args: argparse.Namespace, model: nn.Module) -> None:
    """Refuse before the pass what `repeat_layer` would refuse after it."""
    if args.block is None:
        return
    from spt_fast.backbones.anatomy import get_blocks

    last = len(get_blocks(model)) if args.depth == "deep" else 1
    if not 1 <= args.block <= last:
        raise ValueError(f"--block must be a block with prompts, 1 to {last}, got {args.block}")


def _check_num_prompts(args: argparse.Namespace, model: nn.Module, num_images: int | None) -> None:
    if num_images is None:
        return
    images = num_images if args.max_images is None else min(num_images, args.max_images)
    where = "images"
    if args.strategy != "kmeans" and args.sampling == "batch":
        images, where = min(images, args.batch_size), "images in a batch"
    longest = max(args.num_prompts) if args.num_prompts else None
    options.check_num_prompts(longest, args.depth, model, images, where)
