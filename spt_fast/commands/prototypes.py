"""`spt-fast prototypes`: prompts from a model and images, in one pass."""

from __future__ import annotations

import argparse
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
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--overwrite", action="store_true", help="write over FILE if it is there")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--num-prompts", type=int, help="default: 20 (deep), 100 (shallow)")
    prompts.add_argument("--depth", choices=("deep", "shallow"), default="deep")
    prompts.add_argument("--strategy", choices=("kmeans", "mean", "max", "random"), default="kmeans")
    prompts.add_argument(
        "--mode", choices=("stream", "exact"), default="stream", help="of kmeans (default: stream)"
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
        "--layer", type=int, metavar="BLOCK", help="prompts of this block, from 1, for all (Table S2)"
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

    processes.on_rank_0(partial(check_output_path, args.out, overwrite=args.overwrite))
    model, images = processes.rank_0_first(open_both)
    processes.on_rank_0(partial(options.print_images, images, "images"))
    _check_num_prompts(args, model, images.num_images)
    _check_layer(args, model)
    started = time.perf_counter()
    with options.nothing_readable_explained(images):
        prototypes = build_prototypes(
            model,
            images,
            num_prompts=args.num_prompts,
            depth=args.depth,
            strategy=args.strategy,
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
    if args.layer is not None:
        prototypes = prototypes.repeat_layer(args.layer - 1)
    if args.last_output:
        prototypes = prototypes.repeat_last_output()
    seconds = time.perf_counter() - started
    if images.preprocessing is not None:
        prototypes.metadata[PREPROCESSING] = images.preprocessing.to_json()

    def save_and_print() -> None:
        prototypes.save(args.out, overwrite=args.overwrite)
        print(f"{args.out}: {summary(prototypes, seconds)}")
        options.print_unreadable(*unreadable)

    unreadable = processes.gather(images.unreadable)
    processes.on_rank_0(save_and_print)


def _check_layer(args: argparse.Namespace, model: nn.Module) -> None:
    """Refuse before the pass what `repeat_layer` would refuse after it."""
    if args.layer is None:
        return
    from spt_fast.backbones.anatomy import get_blocks

    last = len(get_blocks(model)) if args.depth == "deep" else 1
    if not 1 <= args.layer <= last:
        raise ValueError(f"--layer must be a block with prompts, 1 to {last}, got {args.layer}")


def _check_num_prompts(args: argparse.Namespace, model: nn.Module, num_images: int | None) -> None:
    if num_images is None:
        return
    images = num_images if args.max_images is None else min(num_images, args.max_images)
    where = "images"
    if args.strategy != "kmeans":
        images, where = min(images, args.batch_size), "images in a batch"
    options.check_num_prompts(args.num_prompts, args.depth, model, images, where)
