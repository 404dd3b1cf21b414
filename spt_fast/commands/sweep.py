"""`spt-fast sweep`: methods, rates, prompt lengths and seeds on many tasks, from a YAML file or options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spt_fast.commands import options
from spt_fast.commands.recipe_options import add_recipe, recipe_of

if TYPE_CHECKING:
    from spt_fast.commands.options import Commands

# Keys of the file that options of the same name set; what is not given is the file's, or the default.
_KEYS = (
    "model", "pretrained", "checkpoint", "img_size", "in_chans", "root", "download", "workers", "bad_images",
    "cache", "cache_budget", "allow_overlap", "seeds", "nmi",
)  # fmt: skip
_OF_TASK = ("data", "split", "val_data", "val_split", "test_data", "test_split")


def add(commands: Commands) -> None:
    """Declare the command and its options."""
    parser = commands.add_parser(
        "sweep",
        help="compare methods: values chosen by validation, tests over seeds",
        description="Tune by every method on every task: validation chooses values, with the first seed; "
        "with what was chosen, training and validation images are learned, and test images tested, once for "
        "each seed. Writes a row of runs.csv for each run. The same command goes on where one was ended.",
        epilog="example: spt-fast sweep --model shipped --data digits --methods spt-deep vpt-deep --search "
        "lr=1e-3,1e-2 --seeds 0 1 2 --epochs 30 --out folder",
    )
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE.yaml", help="what to do; options win over it"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where to write, or to go on"
    )
    options.add_model(parser, required=False)
    _add_tasks(parser)
    _add_comparison(parser)
    _add_work(parser)
    add_recipe(parser)
    # What is given differs from what is not.
    parser.set_defaults(**dict.fromkeys((*_KEYS, "model_option")))
    parser.set_defaults(run=run)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    images = parser.add_argument_group("tasks")
    images.add_argument(
        "--data", nargs="+", action="extend", metavar="NAME", help="one or more, as `spt-fast train --data`"
    )
    images.add_argument("--root", metavar="FOLDER", help="where the files of lists, or the data sets, lie")
    images.add_argument(
        "--split", help="to learn from, of a single --data (default: beside that to choose by)"
    )
    images.add_argument(
        "--val-data", help="to choose by, for a single --data (default: that, with --val-split)"
    )
    images.add_argument("--val-split", help="likewise (default: the one to validate with)")
    images.add_argument("--test-data", help="to test with, for a single --data (default: that)")
    images.add_argument("--test-split", help="likewise (default: the one to test with)")
    images.add_argument("--download", action="store_true", help="let timm download the data sets")
    images.add_argument(
        "--allow-overlap", action="store_true", help="accept images that two of the sets share"
    )
    options.add_reading(images, batch_size=None)
    options.add_cache(images)
    few = images.add_mutually_exclusive_group()
    few.add_argument(
        "--share", type=float, metavar="X", help="learn from a share of the images, drawn by the seed"
    )
    few.add_argument("--per-class", type=int, metavar="N", help="learn from N images of each class, likewise")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    comparison = parser.add_argument_group("comparison")
    comparison.add_argument(
        "--methods", nargs="+", action="extend", metavar="NAME", help="what is compared, of docs/methods.md"
    )
    comparison.add_argument(
        "--search",
        nargs="+",
        action="extend",
        type=_axis,
        metavar="FIELD=VALUES",
        help="of a recipe, to choose from by validation: lr=1e-3,1e-2, or, to draw from, lr=1e-4..1e-1",
    )
    comparison.add_argument(
        "--compare",
        nargs="+",
        action="extend",
        type=_axis,
        metavar="FIELD=VALUES",
        help="not to choose from but to compare: num_prompts=5,20,50, share=0.1,0.5,1 or per_class=5,10",
    )
    comparison.add_argument(
        "--random", type=int, metavar="N", help="draw N trials (default: all combinations)"
    )
    comparison.add_argument(
        "--random-seed", type=int, metavar="N", help="by which they are drawn (default: 0)"
    )
    comparison.add_argument(
        "--seeds", type=int, nargs="+", action="extend", metavar="N", help="of the final runs (default: 0)"
    )
    comparison.add_argument(
        "--nmi", action="store_true", help="measure NMI in final runs whose prompts learn"
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("work")
    work.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="runs at a time, a GPU each (default: 1)"
    )
    work.add_argument("--max-runs", type=int, metavar="N", help="begin no more than N runs now")
    work.add_argument("--max-minutes", type=float, metavar="X", help="begin no run after X minutes")
    work.add_argument("--dry-run", action="store_true", help="say which runs there are, and do none")
    options.add_device(work)


def run(args: argparse.Namespace) -> None:
    """Sweep, or go on with it."""
    from spt_fast.study.sweeps.sweep import sweep

    sweep(
        plan_of(args),
        out=args.out,
        jobs=args.jobs,
        device=args.device,
        max_runs=args.max_runs,
        max_minutes=args.max_minutes,
        dry_run=args.dry_run,
        say=lambda line: print(line, flush=True),
    )


def plan_of(args: argparse.Namespace) -> dict[str, Any]:
    """The mapping that file and options make.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no YAML, or options contradict each other.
    """
    from spt_fast.study.sweeps.sweep import read_plan

    plan = {} if args.file is None else read_plan(args.file)
    plan |= {key: vars(args)[key] for key in _KEYS if vars(args)[key] is not None}
    if args.model_option:
        plan["model_options"] = options.given_once("model_option", args.model_option)
    plan |= _tasks(args)
    plan |= _recipe(args, plan.get("recipe"))
    for key, value in (
        ("arms", args.methods),
        ("search", args.search and options.given_once("search", args.search)),
        ("compare", args.compare and options.given_once("compare", args.compare)),
        ("random", _random(args, plan.get("random"))),
        (
            "images",
            {name: vars(args)[name] for name in ("share", "per_class") if vars(args)[name] is not None},
        ),
    ):
        if value:
            plan[key] = value
    if "checkpoint" in plan:
        plan["checkpoint"] = str(plan["checkpoint"])
    return plan


def _random(args: argparse.Namespace, of_file: Any) -> Any:
    """Trials and seed; what is not given is that of the file."""
    if args.random is None and args.random_seed is None:
        return None
    given = {"trials": args.random, "seed": args.random_seed}
    known = of_file if isinstance(of_file, dict) else {}
    found = {**known, **{name: value for name, value in given.items() if value is not None}}
    if "trials" not in found:
        raise ValueError(f"random_seed is for random trials (--random N), got {args.random_seed} without")
    return found


def _tasks(args: argparse.Namespace) -> dict[str, Any]:
    others = {name: vars(args)[name] for name in _OF_TASK[1:] if vars(args)[name] is not None}
    if others and len(args.data or ()) != 1:
        raise ValueError(f"{next(iter(others))} is for a single --data, got {args.data or 'none'}")
    if not args.data:
        return {}
    return {"data": [{"data": args.data[0], **others}] if others else args.data}


def _recipe(args: argparse.Namespace, of_file: Any) -> dict[str, Any]:
    """Fields that options state, over the file's recipe or over `--recipe`."""
    from spt_fast.study.sweeps.plan import shared_recipe
    from spt_fast.training.recipe import options as fields

    given = {field.name: vars(args)[field.name] for field in fields() if field.name in args}
    for name, instead in (("method", "--methods"), ("method_options", "arms of a file"), ("seed", "--seeds")):
        if name in given:
            raise ValueError(f"{name} is the same for no two arms or seeds of a sweep: give {instead}")
    if args.recipe is not None:
        of_file = recipe_of(args)
    elif not given:
        return {}
    values = {name: None if value == "unset" else value for name, value in given.items()}
    return {"recipe": {**shared_recipe(of_file), **values}}


def _axis(text: str) -> tuple[str, Any]:
    """ "lr=1e-3,1e-2" or "lr=1e-4..1e-1": a field and its values."""
    name, equals, values = text.partition("=")
    if not (equals and name.isidentifier() and values):
        raise argparse.ArgumentTypeError(f"must be FIELD=VALUES, such as lr=1e-3,1e-2, got {text!r}")
    low, dots, high = values.partition("..")
    if dots:
        return name, {"low": _value(low), "high": _value(high)}
    return name, [_value(value) for value in values.split(",")]


def _value(text: str) -> Any:
    return options.key_and_value(f"value={text}")[1]
