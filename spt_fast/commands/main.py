"""The command `spt-fast`: arguments to functions, no logic of its own.

Exit codes: 0 done, 1 `doctor --check` found something wrong, 2 bad input (one line on stderr says what),
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from spt_fast.data.images import LabelledImages
    from spt_fast.prompting.prompted_vit import PromptedViT
    from spt_fast.prototypes.result import Prototypes
    from spt_fast.support.distributed import Processes
    from spt_fast.training.loop import History

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

WRONG = 1
INTERRUPTED = 130
BAD_INPUT = 2
TUNED_NAME = "tuned.safetensors"
TRAINED_NAMES = (TUNED_NAME, "train.csv", "train.png")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_args(argv)
    try:
        code: int | None = args.run(args)
    except KeyboardInterrupt:
        print("spt-fast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        if args.traceback:
            raise
        print(f"spt-fast {args.command}: error: {_one_line(error)}", file=sys.stderr)
        return BAD_INPUT
    return code or 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spt-fast", description="Self-Prompt Tuning of Vision Transformers."
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_prototypes(commands)
    _add_train(commands)
    _add_eval(commands)
    _add_nmi(commands)
    _add_doctor(commands)
    return parser


def _add_demo(commands: Commands) -> None:
    parser = commands.add_parser(
        "demo",
        help="tune the shipped backbone on a few shipped images, offline",
        description="SPT-Deep, VPT-Deep and a linear probe on a few handwritten digits, shipped backbone: "
        "prints a table, writes figures (spt_fast_demo.png, spt_fast_demo_nmi.png) and numbers "
        "(spt_fast_demo.json, spt_fast_demo_nmi.csv). Minutes on two cores.",
    )
    _add_folder(parser, default=Path())
    parser.add_argument("--epochs", type=int, help="of tuning, instead of the documented budget")
    parser.add_argument("--seeds", type=int, help="number of seeds, instead of the documented budget")
    parser.set_defaults(run=_demo)


def _add_prototypes(commands: Commands) -> None:
    parser = commands.add_parser(
        "prototypes",
        help="build prompts from a model and images, in one pass",
        description="Prototypes of a data set's patch tokens, for SPT; written as safetensors.",
        epilog="example: spt-fast prototypes --model vit_small_patch16_224 --data photos --out p.safetensors "
        "(several processes share the images: torchrun --nproc-per-node 4 -m spt_fast prototypes ...)",
    )
    _add_limit(_add_model_and_data(parser))
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
        "--capacity", type=int, help="tokens kept per layer (default: 20000 or 500 per prompt)"
    )
    prompts.add_argument("--device", help="default: cuda where there is one (torchrun: one each), else cpu")
    prompts.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_prototypes)


def _add_train(commands: Commands) -> None:
    parser = commands.add_parser(
        "train",
        help="tune prompts and a head on labelled images",
        description="Prompts and a new head, learned on images in one folder per class (Sec. 4.1: AdamW, "
        "linear warm-up, cosine; random crops and flips, but for the digits). Writes "
        f"{', '.join(TRAINED_NAMES)}; the first two after every epoch.",
        epilog="example: spt-fast train --model shipped --data digits --val-split val --epochs 20 "
        "--out folder",
    )
    _add_model_and_data(parser, batch_size=32)
    images = parser.add_argument_group("validation")
    images.add_argument("--val-data", help="as --data; default: that, if --val-split is given")
    images.add_argument("--val-split", help="as --split")
    prompts = parser.add_argument_group("prompts")
    source = prompts.add_mutually_exclusive_group()
    source.add_argument("--prompts", type=Path, metavar="FILE", help="of `spt-fast prototypes`")
    _add_random(source)
    source.add_argument(
        "--num-prompts", type=int, help="of prototypes built first (default: 20 deep, 100 shallow)"
    )
    prompts.add_argument("--depth", choices=("deep", "shallow"), default="deep")
    prompts.add_argument("--freeze-prompts", action="store_true", help="learn the head only (Table 4a)")
    _add_recipe(parser)
    _add_folder(parser)
    _add_device(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_train)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--epochs", type=int, default=100)
    recipe.add_argument("--warmup-epochs", type=float, help="default: a tenth of --epochs")
    recipe.add_argument("--lr", type=float, default=1e-2, help="highest, of the head (default: 0.01)")
    recipe.add_argument("--prompt-lr", type=float, help="highest, of the prompts (default: as --lr)")
    recipe.add_argument("--weight-decay", type=float, default=1e-4)
    # float16 would need its gradients scaled.
    recipe.add_argument("--weight-dtype", choices=("bf16",), help="run the frozen backbone in it")


def _add_eval(commands: Commands) -> None:
    parser = commands.add_parser(
        "eval",
        help="accuracy of tuned prompts on labelled images",
        description="Share of images whose largest logit is their label.",
        epilog="example: spt-fast eval --model shipped --tuned folder/tuned.safetensors --data digits "
        "--split test",
    )
    _add_model_and_data(parser)
    parser.add_argument(
        "--tuned", type=Path, required=True, metavar="FILE", help="of `spt-fast train`, or PromptedViT.save"
    )
    parser.add_argument("--weight-dtype", choices=("bf16", "fp16"), help="run the backbone in it")
    _add_device(parser)
    parser.set_defaults(run=_eval)


def _add_nmi(commands: Commands) -> None:
    parser = commands.add_parser(
        "nmi",
        help="what prompts share with patch tokens, layer by layer",
        description="NMI (eq. 7, 8) and CKA (App. B.4) of prompts and patch tokens per layer: prints a "
        "table, writes nmi.csv, cka.csv and nmi.png.",
        epilog="example: spt-fast nmi --model shipped --data digits --random 20 --out folder",
    )
    _add_limit(_add_model_and_data(parser), default=512)
    prompts = parser.add_argument_group("prompts")
    source = prompts.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts", type=Path, metavar="FILE", help="of `spt-fast prototypes`, or of a tuned PromptedViT"
    )
    _add_random(source)
    prompts.add_argument(
        "--depth", choices=("deep", "shallow"), default="deep", help="of --random (default: deep)"
    )
    _add_folder(parser, default=Path())
    _add_device(parser)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_nmi)


def _add_doctor(commands: Commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what is installed, which code each operation runs here, and why",
        description="What is installed, which code each operation runs here, and why; "
        "or, with --check, whether the results are right.",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="run every operation on every device and compare it with float64; exit code 1 if one is wrong",
    )
    parser.set_defaults(run=_doctor)


def _add_model_and_data(parser: argparse.ArgumentParser, batch_size: int = 64) -> argparse._ArgumentGroup:
    """Options that name them; the group of those about images."""
    parser.add_argument(
        "--model",
        required=True,
        help="timm model name, 'shipped', or a file of examples/pretrain_backbone.py",
    )
    parser.add_argument(
        "--data", required=True, help="folder of images, timm data set (torch/cifar10), or 'digits'"
    )
    weights = parser.add_argument_group("weights of a timm model")
    weights.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="timm's weights (default) or random ones, the same every time",
    )
    weights.add_argument("--checkpoint", type=Path, metavar="FILE", help="weights from a file instead")
    images = parser.add_argument_group("images")
    images.add_argument("--root", type=Path, metavar="FOLDER", help="where a timm data set lies")
    images.add_argument("--split", default="train", help="of a timm data set or the digits (default: train)")
    images.add_argument("--download", action="store_true", help="let timm download the data set")
    images.add_argument("--batch-size", type=int, default=batch_size)
    images.add_argument("--workers", type=int, default=4)
    return images


def _add_limit(images: argparse._ArgumentGroup, default: int | None = None) -> None:
    limit = "stop after M images, drawn at random" + (f" (default: {default})" if default else "")
    images.add_argument("--max-images", type=int, metavar="M", default=default, help=limit)


def _add_random(source: argparse._MutuallyExclusiveGroup) -> None:
    source.add_argument("--random", type=int, metavar="N_P", help="as many random ones, as VPT starts from")


def _add_folder(parser: argparse.ArgumentParser, default: Path | None = None) -> None:
    """Where a command writes its files; without a default it has to be given."""
    where = "where to write, made if need be" + (" (default: here)" if default else "")
    parser.add_argument(
        "--out", type=Path, required=default is None, default=default, metavar="FOLDER", help=where
    )
    parser.add_argument("--overwrite", action="store_true", help="write over these files if they are there")


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")


def _demo(args: argparse.Namespace) -> None:
    from spt_fast.commands import demo

    budget = demo.Budget().scaled(epochs=args.epochs, seeds=args.seeds)
    demo.output_paths(args.out, overwrite=args.overwrite)
    print(demo.introduction(budget), flush=True)
    report = demo.run_demo(args.out, overwrite=args.overwrite, budget=budget)
    print(report.summary())


def _prototypes(args: argparse.Namespace) -> None:
    from spt_fast.support.distributed import device_of_this_process, joined_by_environment

    device = device_of_this_process(args.device)
    with joined_by_environment(device) as processes:
        _build_and_save(args, processes)


def _build_and_save(args: argparse.Namespace, processes: Processes) -> None:
    import time

    from spt_fast.prototypes.build import build_prototypes
    from spt_fast.support.files import check_output_path

    def open_both() -> tuple[nn.Module, Iterable[Any]]:
        if processes.rank == 0:
            check_output_path(args.out, overwrite=args.overwrite)
        model = _open_model(args)
        return model, _open_images(args, model, max_images=args.max_images, processes=processes)

    model, images = processes.rank_0_first(open_both)
    started = time.perf_counter()
    prototypes = build_prototypes(
        model,
        images,
        num_prompts=args.num_prompts,
        depth=args.depth,
        strategy=args.strategy,
        capacity=args.capacity,
        mode=args.mode,
        max_images=args.max_images,
        seed=args.seed,
    )
    seconds = time.perf_counter() - started
    with processes.together():
        if processes.rank == 0:
            prototypes.save(args.out, overwrite=args.overwrite)
            _print_prototypes(args.out, prototypes, seconds)


def _print_prototypes(out: Path, prototypes: Prototypes, seconds: float) -> None:
    layers, num_prompts, width = prototypes.prompts.shape
    print(f"{out}: {layers} x {num_prompts} prompts of width {width}")
    print(
        f"{prototypes.num_images} images in {seconds:.1f} s, {prototypes.num_images / seconds:.1f} images/s"
    )
    for layer, distance in enumerate(prototypes.mean_squared_distance.tolist(), start=1):
        print(f"block {layer:2d}: mean squared distance per token {distance:.4g}")


def _train(args: argparse.Namespace) -> None:
    from spt_fast.support.results import result_folder
    from spt_fast.training.loop import check_recipe

    _check_alone()
    check_recipe(**_recipe(args))
    with result_folder(args.out, TRAINED_NAMES, overwrite=args.overwrite) as paths:
        _train_into(paths, args)


def _recipe(args: argparse.Namespace) -> dict[str, Any]:
    names = ("epochs", "lr", "prompt_lr", "weight_decay", "warmup_epochs")
    return {name: getattr(args, name) for name in names}


def _train_into(paths: dict[str, Path], args: argparse.Namespace) -> None:
    from spt_fast.plots import training_curves
    from spt_fast.support.results import png, write_results
    from spt_fast.training.loop import fit

    model = _open_model(args)
    train = _open_labelled(args, model, training=True, seed=args.seed)
    val = _open_validation(args, model, train.class_names)
    tuned = _prompted(args, model, train.class_names)

    def keep(epoch: int, history: History) -> None:
        # After the first epoch the files there are this run's own.
        overwrite = args.overwrite or epoch > 1
        tuned.save(paths[TUNED_NAME], overwrite=overwrite)
        write_results(paths, {"train.csv": history.to_csv()}, overwrite=overwrite)

    history = fit(
        tuned,
        train.loader,
        None if val is None else val.loader,
        seed=args.seed,
        on_epoch=keep,
        **_recipe(args),
    )
    if "train.png" in paths:
        figure = training_curves(paths["train.csv"], title=f"{args.data}, {tuned.num_prompts} prompts")
        write_results(paths, {"train.png": png(figure)}, overwrite=args.overwrite)
    print(f"{history.epochs} epochs in {history.train_seconds:.1f} s, loss {history.loss[-1]:.4g}")
    if history.val_accuracy:
        print(f"validation accuracy {history.val_accuracy[-1]:.2%}")
    for path in paths.values():
        print(f"wrote {path}")


def _check_alone() -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise ValueError(f"train runs in one process, got WORLD_SIZE={processes}; start it without torchrun")


def _prompted(args: argparse.Namespace, model: nn.Module, class_names: tuple[str, ...]) -> PromptedViT:
    """The model with the prompts that the arguments name, and a new head."""
    from spt_fast.backbones.anatomy import check_backbone
    from spt_fast.prompting.prompted_vit import PromptedViT
    from spt_fast.prototypes.result import Prototypes
    from spt_fast.support.randomness import seeded

    start: Prototypes | int
    if args.prompts is not None:
        start = Prototypes.load(args.prompts)
        check_backbone(args.prompts, start.metadata, model)
    elif args.random is not None:
        start = args.random
    else:
        start = _prototypes_of(args, model)
    with seeded(args.seed):
        tuned = PromptedViT(
            model,
            start,
            depth=args.depth,
            num_classes=len(class_names),
            freeze_prompts=args.freeze_prompts,
            weight_dtype=args.weight_dtype,
        )
    tuned.class_names = class_names
    return tuned


def _prototypes_of(args: argparse.Namespace, model: nn.Module) -> Prototypes:
    from spt_fast.prototypes.build import build_prototypes

    return build_prototypes(
        model, _open_images(args, model), num_prompts=args.num_prompts, depth=args.depth, seed=args.seed
    )


def _eval(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from spt_fast.prompting.prompted_vit import PromptedViT
    from spt_fast.training.loop import evaluate

    tuned = PromptedViT.from_file(args.tuned, _open_model(args), weight_dtype=args.weight_dtype)
    images = _open_labelled(
        args,
        tuned.model,
        class_names=tuned.class_names,
        num_classes=getattr(tuned.model, "num_classes", None),
    )
    if tuned.class_names is None:
        print(
            f"spt-fast eval: warning: {args.tuned} does not name its classes; "
            f"they are taken to be those of {args.data}, in this order: {', '.join(images.class_names)}",
            file=sys.stderr,
        )
    accuracy = evaluate(tuned, tqdm(images.loader, unit="batch"))
    print(f"accuracy {accuracy:.2%} of {images.num_images} images")


def _nmi(args: argparse.Namespace) -> None:
    from spt_fast.analysis.prompts import FILE_NAMES
    from spt_fast.support.results import result_folder

    with result_folder(args.out, FILE_NAMES, overwrite=args.overwrite) as paths:
        _nmi_into(paths, args)


def _nmi_into(paths: dict[str, Path], args: argparse.Namespace) -> None:
    from spt_fast import analysis
    from spt_fast.support.results import write_results

    model = _open_model(args)
    images = _open_images(args, model)
    if args.prompts is not None:
        tuned = analysis.load_prompts(args.prompts, model)
    else:
        tuned = analysis.random_prompts(args.random, model, depth=args.depth, seed=args.seed)
    result = analysis.analyse(tuned, images, max_images=args.max_images)
    print(result.table())
    print(f"{result.num_images} images")
    prompts = args.prompts.name if args.prompts else f"{args.random} random prompts"
    title = f"{prompts}; model {args.model}, images {args.data}"
    contents = result.files(title if "nmi.png" in paths else None)
    for path in write_results(paths, contents, overwrite=args.overwrite):
        print(f"wrote {path}")


def _doctor(args: argparse.Namespace) -> int:
    from spt_fast.commands import doctor, self_check

    if args.check:
        return 0 if self_check.report() else WRONG
    print(doctor.report())
    return 0


def _open_model(args: argparse.Namespace) -> nn.Module:
    """The model that the arguments name, on their device."""
    from spt_fast.backbones.open import open_model
    from spt_fast.support.distributed import device_of_this_process

    device = device_of_this_process(args.device)
    return open_model(args.model, pretrained=args.pretrained, checkpoint=args.checkpoint).to(device)


def _open_images(args: argparse.Namespace, model: nn.Module, **share: Any) -> Iterable[Any]:
    from spt_fast.data.images import open_images

    return open_images(model=model, seed=args.seed, **_image_options(args), **share)


def _open_labelled(args: argparse.Namespace, model: nn.Module, **use: Any) -> LabelledImages:
    from spt_fast.data.images import open_labelled_images

    return open_labelled_images(model=model, **(_image_options(args) | use))


def _open_validation(
    args: argparse.Namespace, model: nn.Module, class_names: tuple[str, ...]
) -> LabelledImages | None:
    if args.val_data is None and args.val_split is None:
        return None
    from spt_fast.data.images import are_same_images, has_splits

    if args.val_data is None and not has_splits(args.data):
        raise ValueError(f"--val-split is for data sets with splits, not for the folder {args.data}")
    data, split = args.val_data or args.data, args.val_split or args.split
    if are_same_images(data, split, args.data, args.split):
        raise ValueError(f"--val-data and --val-split name the images of training, {data}, split {split}")
    return _open_labelled(args, model, data=data, split=split, class_names=class_names)


def _image_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("data", "root", "split", "download", "batch_size", "workers")
    return {name: getattr(args, name) for name in names}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
