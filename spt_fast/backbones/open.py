"""Backbones by name: any model of timm, weights from a file, and the backbone that ships with the package."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import nn

from spt_fast.backbones.checkpoints import LoadReport, load_state, load_weights
from spt_fast.backbones.pooling import (
    NORMS,
    PAPER_FOR_MAE,
    POOLS,
    Norm,
    Pool,
    Pooling,
    is_mae,
    set_pooling,
    stated_pooling,
    timm_options,
)
from spt_fast.data.shipped import load_backbone
from spt_fast.support.arguments import check_choice
from spt_fast.support.errors import first_line, one_line
from spt_fast.support.files import check_input_path
from spt_fast.support.randomness import seeded

SHIPPED_MODEL = "shipped"
# Options of `timm.create_model` that `open_model` gives itself, or that make another kind of model.
_SET_HERE = {"num_classes", "pretrained", "checkpoint_path", "features_only", "scriptable", "exportable"}
# Options that say how a model pools; with one of them `pool` is left to the user.
_POOLING_OPTIONS = {"global_pool", "fc_norm"}
# Whose authors normalise images by ImageNet's mean and standard deviation (their code).
_TRAINED_ON_IMAGENETS = ("MAE", "MoCo-v3", "DINOv2", "iBOT")
_HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


def open_model(
    name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    model_options: Mapping[str, Any] | None = None,
    pool: Literal["auto"] | Pool | None = "auto",
    norm: Norm = "own",
) -> nn.Module:
    """A Vision Transformer without a head, in eval mode.

    MAE's weights come in the paper's form, unless `pool` or `norm` asks for another one: the head gets the
    average of patch tokens and prompts, then normalised by MAE's own norm. One line on stderr says so.

    Args:
        name: a timm model name ("vit_base_patch16_224.mae"; hub names too), "shipped" for this package's
            backbone, or a file that examples/pretrain_backbone.py wrote.
        pretrained: timm's weights, from its cache or the network; ignored with `checkpoint`. False: random
            weights, the same in every process. The caller's random generators do not advance.
        checkpoint: file with weights for the timm model `name`, in one of the layouts of docs/weights.md.
            One line on stderr says what was renamed, resized and left out.
        model_options: of `timm.create_model`, such as {"global_pool": "avg", "img_size": 384, "in_chans": 1}.
            timm resizes position embeddings; `pretrained_cfg` of the model states the images that it takes.
        pool: what the head gets: "token", the class token after the final norm; "avg", the average of the
            patch tokens, then the norm; "avg-with-prompts", that of patch tokens and prompts, then the norm,
            for which `PromptedViT` sees to the prompts. None is the pooling that timm gives the model. "auto"
            is "avg-with-prompts" for MAE's weights, known by timm's tag "mae", by the name of their file
            ("mae_*"), or as the shipped ones; else None. So it is with `global_pool` or `fc_norm` among
            `model_options`.
        norm: the final norm: "own", that of the weights, or "new", with weights 1 and biases 0. A
            `PromptedViT` freezes both. VPT's published rows for MAE have a new one.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: no such model, a checkpoint that does not fit it, options that it does not take, options
            or weights for a model not of timm, or a pooling that it cannot have.
        RuntimeError: the pretrained weights cannot be loaded.
    """
    if checkpoint is not None:
        check_input_path(checkpoint, argument="checkpoint")
    is_file = name == SHIPPED_MODEL or Path(name).is_file()
    options = dict(model_options or {})
    if options and is_file:
        raise ValueError(
            f"model_options are for models of timm, got {options} for {name} "
            "(--img-size, --in-chans, --model-option)"
        )
    if is_file and (checkpoint is not None or not pretrained):
        given = "pretrained=False" if checkpoint is None else f"checkpoint={str(checkpoint)!r}"
        raise ValueError(
            f"checkpoint and pretrained are for models of timm, got {given} for {name}, which has its own "
            "weights (--checkpoint, --no-pretrained)"
        )
    set_here = sorted(_SET_HERE & options.keys())
    if set_here:
        raise ValueError(f"model_options must not set {', '.join(set_here)}, which open_model sets")
    if not is_file:
        _check_timm_name(name)
    pooling = _choose_pooling(is_file or is_mae(name, checkpoint), pool, norm, options)
    if is_file:
        model: nn.Module = load_backbone(None if name == SHIPPED_MODEL else name)
    else:
        options.update(timm_options(None if pooling is None else pooling.pool))
        model = _timm_model(name, pretrained, checkpoint, options).eval()
        _state_input(model)
    if pooling is not None:
        own = str(getattr(model, "global_pool", ""))
        set_pooling(model, pooling if pooling.pool else Pooling(own, pooling.norm))
        if pool == "auto":
            whose = ", the paper's for MAE" if pooling == PAPER_FOR_MAE else ""
            _print_once(f"pooling of {name}: {stated_pooling(model)}{whose} (--pool, --norm)")
    return model


def _choose_pooling(mae: bool, pool: str | None, norm: str, options: Mapping[str, Any]) -> Pooling | None:
    """The form to open a model in; None leaves it as it is, and an empty `pool` its pooling."""
    check_choice("norm", norm, NORMS)
    if pool is not None:
        check_choice("pool", pool, ("auto", *POOLS))
    given = sorted(_POOLING_OPTIONS & options.keys())
    if given and pool in POOLS:
        raise ValueError(f"pool={pool!r} sets {', '.join(given)} of model_options, which must not be given")
    if pool == "auto":
        pool = PAPER_FOR_MAE.pool if mae and not given else None
    return None if pool is None and norm == "own" else Pooling(pool or "", norm)


def _check_timm_name(name: str) -> None:
    import timm

    if name.startswith(_HUB_PREFIXES) or timm.is_model(name):
        return
    if "/" in name or name.endswith((".safetensors", ".pth", ".pt", ".bin")):
        check_input_path(name, argument="model")
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
    hint = f"; close names: {', '.join(close)}" if close else ""
    raise ValueError(f"model: timm has no model named {name!r}{hint}")


@seeded(0)
def _timm_model(
    name: str, pretrained: bool, checkpoint: str | Path | None, options: dict[str, Any]
) -> nn.Module:
    if checkpoint is not None:
        return _with_checkpoint(name, _without_weights(name, options), checkpoint)
    if not pretrained:
        return _without_weights(name, options)
    try:
        return _with_pretrained(name, {**options, "num_classes": 0})
    # Hub clients raise different errors without a network, depending on their version.
    except Exception as error:
        if options:
            _without_weights(name, options)
        raise RuntimeError(
            f"pretrained weights of {name} could not be had ({first_line(error)}); "
            "offline, give --checkpoint FILE, or --no-pretrained for random weights"
        ) from error


def _without_weights(name: str, options: dict[str, Any]) -> nn.Module:
    """The model with random weights; ValueError where it does not take the options."""
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    # Models check their options in different ways, or not at all.
    except Exception as error:
        if not options:
            raise
        raise ValueError(f"model_options {options} do not fit {name}: {one_line(error)}") from error
    return model


def _state_input(model: nn.Module) -> None:
    """Let `pretrained_cfg` state the images that the model takes; timm's is that of its weights."""
    config: Any = getattr(model, "pretrained_cfg", None)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if not isinstance(config, dict) or not config.get("input_size") or first is None:
        return
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    input_size = (first.in_channels, *(size or config["input_size"][1:]))
    if input_size == tuple(config["input_size"]):
        return
    pixels = {
        key: (sum(config[key]) / len(config[key]),) * first.in_channels
        for key in ("mean", "std")
        if config.get(key) and len(config[key]) != first.in_channels
    }
    vars(model).update(pretrained_cfg={**config, "input_size": input_size, **pixels})


def _with_pretrained(name: str, options: dict[str, Any]) -> nn.Module:
    """timm's weights. With another pooling than theirs they keep their norm, which timm would leave out."""
    import timm

    if "global_pool" not in options:
        model: nn.Module = timm.create_model(name, pretrained=True, **options)
        return model
    as_trained = {option: value for option, value in options.items() if option != "global_pool"}
    trained: nn.Module = timm.create_model(name, pretrained=True, **as_trained)
    if getattr(trained, "global_pool", None) == options["global_pool"]:
        return trained
    model = timm.create_model(name, pretrained=False, **options)
    _tell(name, load_state(model, trained.state_dict(), name))
    return model


def _tell(source: str | Path, report: LoadReport) -> None:
    _print_once(f"weights of {source}: {report}")


def _print_once(line: str) -> None:
    # Under torchrun one process tells it for all.
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _with_checkpoint(name: str, model: nn.Module, checkpoint: str | Path) -> nn.Module:
    report = load_weights(model, checkpoint)
    config: Any = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict):
        pixels, whose = _pixels_of(name, checkpoint, report.kind)
        # Its tag names weights of timm's, which these are not.
        config = {**config, "tag": Path(checkpoint).name, **pixels}
        vars(model).update(pretrained_cfg=config)
        if config.get("mean") and config.get("std"):
            mean, std = (" ".join(f"{value:g}" for value in config[key]) for key in ("mean", "std"))
            report.notes.append(f"pixels with mean {mean}, std {std} ({whose}; --mean-std)")
    _tell(checkpoint, report)
    return model


def _pixels_of(name: str, checkpoint: str | Path, kind: str) -> tuple[dict[str, Any], str]:
    """Mean and standard deviation of the images that a file's weights were trained on, and who says so."""
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    found = "MAE" if is_mae(name, checkpoint) else kind
    if found.startswith(_TRAINED_ON_IMAGENETS):
        return {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}, f"as {found} was trained"
    return {}, f"as timm's {name}"
