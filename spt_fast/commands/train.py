"""`spt-fast train`: prompts and a new head, learned on labelled images, in a folder that can be resumed."""

from __future__ import annotations

import argparse
import io
import sys
from contextlib import nullcontext, redirect_stderr
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spt_fast.commands import options
from spt_fast.commands.recipe_options import add_recipe, recipe_of
from spt_fast.commands.train_start import find_start

if TYPE_CHECKING:
    from torch import nn

    from spt_fast.commands.options import Commands
    from spt_fast.data.cache import ImageCache
    from spt_fast.data.task import TaskImages
    from spt_fast.methods.base import TunedViT
    from spt_fast.training.folder import RunFolder
    from spt_fast.training.recipe import Recipe


def add(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "train",
        help="tune prompts and a head on labelled images",
        description="Prompts and a new head, learned on labelled images by a recipe (default: the paper's, "
        "Sec. 4.1). Writes run.yaml, tuned.safetensors, train.csv and more into a folder, from which a run "
        "that was interrupted goes on (--resume).",
        epilog="example: spt-fast train --model shipped --data digits --val-split val --epochs 20 "
        "--out folder (several processes share each batch: torchrun --nproc-per-node 2 --no-python spt-fast "
        "train ...)",
    )
    images = options.add_model_and_data(parser, batch_size=None)
    options.add_cache(images)
    _add_evaluation(parser)
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="of `spt-fast prototypes`: where prompts start (default: as --prompt-init says)",
    )
    options.add_allow_other_backbone(prompts)
    _add_output(parser)
    add_recipe(parser)
    parser.set_defaults(run=run, several_processes=True)


def _add_evaluation(parser: argparse.ArgumentParser) -> None:
    evaluation = parser.add_argument_group("validation and test")
    evaluation.add_argument("--val-data", help="as --data; default: that, with --val-split")
    evaluation.add_argument("--val-split", help="as --split (default: the one to validate with)")
    evaluation.add_argument("--test-data", help="as --data, for --eval-test (default: that)")
    evaluation.add_argument(
        "--eval-test",
        nargs="?",
        const="",
        metavar="SPLIT",
        help="evaluate the weights that were kept on test images, once, at the end; they choose nothing "
        "(SPLIT: default the one to test with)",
    )
    evaluation.add_argument(
        "--allow-overlap",
        action="store_true",
        help="validate and test also on files that are training images",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    options.add_folder(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in that folder; start it if there is none"
    )
    parser.add_argument(
        "--save-every",
        type=int,
        metavar="STEPS",
        help="write the checkpoint after so many steps too (default: after every epoch)",
    )
    parser.add_argument("--tensorboard", action="store_true", help="write for TensorBoard too (extra: train)")
    parser.add_argument("--nmi", action="store_true", help="measure NMI while training; writes nmi.csv")
    options.add_device(parser)


def run(args: argparse.Namespace) -> None:
    """Train, or go on with it, in all processes that torchrun started."""
    from spt_fast.data.task import training_split
    from spt_fast.support.distributed import joined_by_environment
    from spt_fast.training.folder import run_folder
    from spt_fast.training.tensorboard import check_tensorboard

    recipe = recipe_of(args)
    _check_options(args, recipe)
    if args.tensorboard:
        check_tensorboard()
    # Where other commands have options of their own.
    for name in ("batch_size", "resize", "mean_std", "seed"):
        setattr(args, name, getattr(recipe, name))
    args.split = args.split or training_split(args.data, args.val_data, args.val_split)
    with (
        joined_by_environment(options.find_device(args)) as processes,
        run_folder(args.out, resume=args.resume, overwrite=args.overwrite, processes=processes) as folder,
    ):
        try:
            _train_in(folder, args, recipe)
        except KeyboardInterrupt:
            if processes.rank == 0 and (kept := folder.what_is_kept()):
                print(f"spt-fast train: {kept}; go on from there with --resume", file=sys.stderr)
            raise


def _check_options(args: argparse.Namespace, recipe: Recipe) -> None:
    """Refuse before any work what would be refused after it."""
    from spt_fast.methods.registry import METHODS
    from spt_fast.support.arguments import check_int
    from spt_fast.training.build import method_options
    from spt_fast.training.outputs import check_prompts_learn

    method_options(recipe)
    if args.overwrite:
        _check_inputs_stay(args)
    if args.save_every is not None:
        check_int("save_every", args.save_every, 1, "or None")
    if args.nmi:
        check_prompts_learn(recipe.has_prompts and not recipe.freeze_prompts)
    validates = args.val_data is not None or args.val_split is not None
    for name, chooses in (("keep", recipe.keep == "best"), ("patience", recipe.patience is not None)):
        if chooses and not validates:
            raise ValueError(
                f"{name}={getattr(recipe, name)!r} is chosen by validation images: give val_data or val_split"
            )
    if args.prompts is not None and recipe.prompt_init is not None:
        raise ValueError(
            f"prompts and prompt_init both say where prompts start, got {args.prompts} and "
            f"{recipe.prompt_init!r}: give one of them"
        )
    if args.prompts is not None and METHODS[recipe.method_name].prompts not in ("prototypes", "any"):
        raise ValueError(
            f"prompts is for methods whose prompts may start from a file, got {args.prompts} with "
            f"method={recipe.method!r}"
        )
    if args.test_data is not None and args.eval_test is None:
        raise ValueError(f"test_data is for eval_test (--eval-test), got {args.test_data} without it")


def _check_inputs_stay(args: argparse.Namespace) -> None:
    """ValueError where a file that the run reads is one that `--overwrite` takes away."""
    from spt_fast.training.folder import FILE_NAMES

    own = {(args.out / name).resolve() for name in FILE_NAMES}
    for name in ("prompts", "checkpoint", "data", "val_data", "test_data"):
        given = getattr(args, name)
        if given is not None and Path(given).resolve() in own:
            raise ValueError(
                f"{name} must not be a file that overwrite takes away, got {given} with out={args.out}: "
                "move it, or choose another folder for the run"
            )


def _train_in(folder: RunFolder, args: argparse.Namespace, recipe: Recipe) -> None:
    from spt_fast.training.build import build
    from spt_fast.training.loaders import check_two_images
    from spt_fast.training.run import train_in

    processes = folder.processes
    # What is said on the way is said by rank 0.
    with redirect_stderr(io.StringIO()) if processes.rank else nullcontext():
        model, cache, images = processes.rank_0_first(partial(_open, args, recipe, folder))
    if recipe.head_norm == "batch":
        check_two_images(images.train.loader, "data")
    lines = [*images.description, *(cache.description() if cache is not None else ())]
    if kept := folder.what_is_kept():
        lines.append(f"resume: {kept}")
    processes.on_rank_0(lambda: print("\n".join(lines)))
    start = find_start(folder, args, recipe, model, images.train.class_names, cache)
    tuned = build(
        model,
        recipe,
        args.prompts or start,
        class_names=images.train.class_names,
        allow_other_backbone=args.allow_other_backbone,
    )
    tuned.preprocessing = images.train.loader.preprocessing
    processes.on_rank_0(lambda: print(_rates(tuned, recipe)))
    with options.nothing_readable_explained(images.train.loader):
        found = train_in(
            folder,
            tuned,
            images.train,
            images.val,
            recipe,
            overwrite=args.overwrite,
            test_data=images.test,
            nmi=args.nmi,
            tensorboard=args.tensorboard,
            facts=_facts(args),
            save_every=args.save_every,
            start=start,
        )
    sets = [each for each in (images.train, images.val, images.test) if each is not None]
    unreadable = processes.gather([each.loader.unreadable for each in sets])

    def report() -> None:
        print(found.summary())
        for line in cache.summary() if cache is not None else ():
            print(line)
        options.print_unreadable(*(each for of_rank in unreadable for each in of_rank))
        for path in found.paths.values():
            print(f"wrote {path}")

    processes.on_rank_0(report)


def _open(
    args: argparse.Namespace, recipe: Recipe, folder: RunFolder
) -> tuple[nn.Module, ImageCache | None, TaskImages]:
    """The model, and the images that it is trained and evaluated on."""
    from spt_fast.data.task import open_task

    model = options.open_model(args, recipe.pool or "auto", recipe.norm)
    cache = options.open_cache(args, model)
    training = {name: getattr(recipe, name) for name in ("augment", "drop_last", "balance", "seed")}
    images = open_task(
        model,
        val_data=args.val_data,
        val_split=args.val_split,
        test_data=args.test_data,
        test_split=args.eval_test,
        training=training,
        chooses=recipe.keep == "best" or recipe.patience is not None,
        allow_overlap=args.allow_overlap,
        tuned=options.made_with(args, args.prompts),
        cache=cache,
        processes=folder.processes,
        **options.image_options(args),
    )
    return model, cache, images


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    """The names of model, images and prompts, without the folders that they lie in."""
    names = ("model", "checkpoint", "data", "split", "val_data", "val_split", "prompts")
    given = {name: getattr(args, name) for name in names}
    return {
        name: Path(value).resolve().name if Path(value).exists() else str(value)
        for name, value in given.items()
        if value is not None
    }


def _rates(tuned: TunedViT, recipe: Recipe) -> str:
    """How fast prompts and head learn: the prompts' rate may be a default that depends on them."""
    found: dict[str, list[str]] = {}
    for group in tuned.parameter_groups(recipe.peak_lr, recipe.peak_prompt_lr):
        name = "prompts" if group["name"] == "prompts" else "head"
        rates = found.setdefault(name, [])
        rates += [] if (rate := f"{group['lr']:.3g}") in rates else [rate]
    return "learning rates: " + ", ".join(f"{name} {' and '.join(rates)}" for name, rates in found.items())
