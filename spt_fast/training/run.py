"""A training run from its start to its files: prompts with a new head, and what each epoch leaves on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from spt_fast.backbones.identity import check_backbone
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.plots import training_curves
from spt_fast.prototypes.result import Prototypes
from spt_fast.support.arguments import check_choice, check_number, check_seed
from spt_fast.support.files import check_output_path
from spt_fast.support.randomness import seeded
from spt_fast.support.results import png, write_results
from spt_fast.training.history import History
from spt_fast.training.loop import Batches, fit

if TYPE_CHECKING:
    import torch

TUNED_NAME = "tuned.safetensors"
HISTORY_NAME = "train.csv"
FIGURE_NAME = "train.png"
HEAD_INITS = ("timm", "trunc_normal")
FILE_NAMES = (TUNED_NAME, HISTORY_NAME, FIGURE_NAME)


def add_prompts_and_head(
    model: nn.Module,
    prompts: Prototypes | Path | str | int,
    *,
    class_names: Sequence[str],
    depth: Literal["deep", "shallow"] = "deep",
    freeze_prompts: bool = False,
    prompt_dropout: float = 0.0,
    head_init: Literal["timm", "trunc_normal"] = "timm",
    head_std: float | None = None,
    weight_dtype: torch.dtype | Literal["bf16", "fp16"] | None = None,
    allow_other_backbone: bool = False,
    seed: int = 0,
) -> PromptedViT:
    """`model` with prompts and with a new head for `class_names`, which `seed` decides.

    Args:
        model: taken over, as `PromptedViT` does.
        prompts: what they start from: `Prototypes`, a file of `Prototypes.save`, or how many random ones.
        depth, freeze_prompts, prompt_dropout, weight_dtype, allow_other_backbone: as in `PromptedViT`.
        head_init, head_std: as in `start_head`.
        seed: of the head and of random prompts; the caller's random state is not touched.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: the file holds something else, or prototypes of another backbone; or as
            `PromptedViT`.
    """
    _check_head_start(head_init, head_std)
    if isinstance(prompts, str | Path):
        path = prompts
        prompts = Prototypes.load(path)
        check_backbone(path, prompts.metadata, model, allow_other_backbone=allow_other_backbone)
    with seeded(check_seed(seed)):
        tuned = PromptedViT(
            model,
            prompts,
            depth=depth,
            num_classes=len(class_names),
            freeze_prompts=freeze_prompts,
            prompt_dropout=prompt_dropout,
            weight_dtype=weight_dtype,
            allow_other_backbone=allow_other_backbone,
        )
        start_head(tuned.head, head_init, head_std)
    tuned.class_names = tuple(class_names)
    return tuned


def start_head(
    head: nn.Module,
    init: Literal["timm", "trunc_normal"] = "trunc_normal",
    std: float | None = None,
) -> None:
    """Draw the weights of a new head, from torch's global generator.

    Args:
        head: a linear layer, or a module that holds some.
        init: "timm" leaves them as timm's new head has them; "trunc_normal" draws from a truncated normal
            distribution, with zero bias, as the paper's released code does.
        std: of "trunc_normal"; None is 0.02, as in the released code, which has 0.01 for MoCo-v3.

    Raises:
        TypeError, ValueError: no such start, `std` is not above 0 or without effect, or no layer to draw.
    """
    std = _check_head_start(init, std)
    if init == "timm":
        return
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(f"head_init='trunc_normal' needs a linear head, got {type(head).__name__}")
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _check_head_start(init: str, std: float | None) -> float:
    if check_choice("head_init", init, HEAD_INITS) == "timm" and std is not None:
        raise ValueError(f"head_std is for head_init='trunc_normal', got {std} with 'timm'")
    return 0.02 if std is None else check_number("head_std", std, above=0)


def fit_and_save(
    tuned: PromptedViT,
    train_loader: Batches,
    val_loader: Iterable[Any] | None,
    paths: Mapping[str, Path],
    *,
    overwrite: bool = False,
    title: str = "",
    **recipe: Any,
) -> History:
    """`fit`, with the model and its history written after every epoch and a figure of it at the end.

    With `keep="best"` the model is written after an epoch that is the best so far by validation, so the file
    is always that of the best epoch; the history is written after every epoch, and says which that was.

    Args:
        tuned, train_loader, val_loader, recipe: as in `fit`.
        paths: where each of FILE_NAMES goes, from `result_folder`, which leaves the figure out where
            matplotlib is missing.
        overwrite: write over files that were there before.
        title: of the figure.

    Raises:
        FileExistsError: one of the files is there, also if it appeared meanwhile, and not `overwrite`.
        OSError: one of the files cannot be written, which is found before training.
        TypeError, ValueError, FloatingPointError: as `fit`.
    """
    for path in paths.values():
        check_output_path(path, overwrite=overwrite)
    model_is_ours = overwrite

    def save(epoch: int, history: History) -> None:
        # After the first time the files there are this run's own.
        nonlocal model_is_ours
        if history.kept_epoch == epoch:
            tuned.save(paths[TUNED_NAME], overwrite=model_is_ours)
            model_is_ours = True
        write_results(paths, {HISTORY_NAME: history.to_csv()}, overwrite=overwrite or epoch > 1)

    history = fit(tuned, train_loader, val_loader, on_epoch=save, **recipe)
    if FIGURE_NAME in paths:
        figure = training_curves(paths[HISTORY_NAME], title=title)
        write_results(paths, {FIGURE_NAME: png(figure)}, overwrite=overwrite)
    return history
