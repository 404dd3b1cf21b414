"""Backbones by name: any model of timm, weights from a file, and the backbone that ships with the package."""

from __future__ import annotations

import difflib
from pathlib import Path

from torch import nn

from spt_fast.data.shipped import load_backbone
from spt_fast.support.errors import first_line
from spt_fast.support.files import check_input_path
from spt_fast.support.randomness import seeded

SHIPPED_MODEL = "shipped"
_HUB_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:")


def open_model(name: str, *, pretrained: bool = True, checkpoint: str | Path | None = None) -> nn.Module:
    """A Vision Transformer without a head, in eval mode.

    Args:
        name: a timm model name ("vit_base_patch16_224.mae"; hub names too), "shipped" for this package's
            backbone, or a file that examples/pretrain_backbone.py wrote.
        pretrained: timm's weights, from its cache or the network; ignored with `checkpoint`. False: random
            weights, the same in every process. The caller's random generators do not advance.
        checkpoint: file with weights for the timm model `name`.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: no such model, or a checkpoint that does not fit it.
        RuntimeError: the pretrained weights cannot be loaded.
    """
    if checkpoint is not None:
        check_input_path(checkpoint, argument="checkpoint")
    if name == SHIPPED_MODEL:
        return load_backbone()
    if Path(name).is_file():
        return load_backbone(name)
    _check_timm_name(name)
    return _timm_model(name, pretrained, checkpoint).eval()


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
def _timm_model(name: str, pretrained: bool, checkpoint: str | Path | None) -> nn.Module:
    import timm

    if checkpoint is not None:
        return _with_checkpoint(timm.create_model(name, pretrained=False, num_classes=0), checkpoint)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    # Hub clients raise different errors without a network, depending on their version.
    except Exception as error:
        if not pretrained:
            raise
        raise RuntimeError(
            f"pretrained weights of {name} could not be had ({first_line(error)}); "
            "offline, give --checkpoint FILE, or --no-pretrained for random weights"
        ) from error
    return model


def _with_checkpoint(model: nn.Module, checkpoint: str | Path) -> nn.Module:
    from timm.models import load_state_dict

    try:
        state = {
            name: value for name, value in load_state_dict(str(checkpoint)).items() if not _of_head(name)
        }
        missing, foreign = model.load_state_dict(state, strict=False)
    # timm picks a reader by the file's ending; each raises other errors for a broken file.
    except Exception as error:
        raise ValueError(
            f"checkpoint {checkpoint} cannot be read into this model: {first_line(error)}"
        ) from error
    missing = [name for name in missing if not _of_head(name)]
    if missing or foreign:
        raise ValueError(
            f"checkpoint {checkpoint} does not fit this model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(foreign)} unknown {foreign[:3]}"
        )
    return model


def _of_head(name: str) -> bool:
    return name.startswith(("head.", "head_dist."))
