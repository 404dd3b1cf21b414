"""What prompts share with patch tokens, block by block: NMI (eq. 7, 8) and CKA (App. B.4) over a loader.

One pass for deep prompts, two per batch for shallow ones; memory is that of one batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import block_input_hooks
from spt_fast.backbones.identity import check_backbone
from spt_fast.backbones.snapshot import has_head, placement
from spt_fast.data.batches import image_batches
from spt_fast.methods.file_format import PROMPTED_KIND, TunedState
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.ops.cka import StreamingCKA
from spt_fast.plots import analysis_figure
from spt_fast.prompting.nmi import nmi_per_image
from spt_fast.prototypes.result import Prototypes
from spt_fast.support.arguments import check_int
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.files import read_kind
from spt_fast.support.modes import evaluation_mode
from spt_fast.support.progress import progress_bar
from spt_fast.support.randomness import seeded
from spt_fast.support.results import png
from spt_fast.support.tables import csv_bytes, format_table

FILE_NAMES = ("nmi.csv", "cka.csv", "nmi.png")
NMI_COLUMNS = ("step", "block", "nmi")
CKA_COLUMNS = ("prompt_block", "token_block", "cka")


@dataclass(frozen=True)
class Analysis:
    """What was measured of one set of prompts.

    Attributes:
        nmi: [M, L], NMI of each image's patch tokens and the prompts of the same block.
        cka: [L, L], linear CKA; rows are prompts, columns patch tokens, of block 1 to L.
    """

    nmi: Tensor
    cka: Tensor

    @property
    def num_images(self) -> int:
        return len(self.nmi)

    def table(self) -> str:
        """A row per block: NMI (mean, deviation over images), CKA, and which tokens are most like it."""
        header = ("block", "NMI", "± images", "CKA", "largest CKA", "with tokens of block")
        rows = [
            (
                str(layer + 1),
                f"{self.nmi[:, layer].mean():.4e}",
                f"{self.nmi[:, layer].std(correction=0):.1e}",
                f"{self.cka[layer, layer]:.3f}",
                f"{self.cka[layer].max():.3f}",
                str(int(self.cka[layer].argmax()) + 1),
            )
            for layer in range(len(self.cka))
        ]
        return format_table([header, *rows])

    def files(self, title: str | None) -> dict[str, bytes]:
        """What `spt-fast nmi` writes, by name; the figure only with a title for it."""
        contents = {"nmi.csv": self.nmi_csv(), "cka.csv": self.cka_csv()}
        if title is not None:
            contents["nmi.png"] = png(analysis_figure({"": self.nmi}, self.cka, rows="images", title=title))
        return contents

    def nmi_csv(self) -> bytes:
        """Mean over images in the columns step, block, nmi, with step 0."""
        means = self.nmi.mean(dim=0).tolist()
        return csv_bytes(NMI_COLUMNS, [(0, block, value) for block, value in enumerate(means, start=1)])

    def cka_csv(self) -> bytes:
        """The map in the columns prompt_block, token_block, cka."""
        rows = [
            (row, column, value)
            for row, values in enumerate(self.cka.tolist(), start=1)
            for column, value in enumerate(values, start=1)
        ]
        return csv_bytes(CKA_COLUMNS, rows)


def analyse(
    tuned: PromptedViT,
    loader: Iterable[Any],
    *,
    max_images: int | None = 512,
    scale: float = 1.0,
    normalize: bool = False,
    unbiased: bool = True,
    progress: bool = True,
) -> Analysis:
    """NMI per block and CKA between blocks, over the images of `loader`.

    CKA takes the D channels as examples, and prompts or patch tokens as features. So it compares sets of
    different sizes, by how their values vary together over the channels. Each image is a minibatch.

    Args:
        tuned: the model with its prompts, measured in evaluation mode; it comes back as it was.
        loader: batches of images, as in `build_prototypes`.
        max_images: stop after this many; None reads the whole loader.
        scale, normalize: of the scores of NMI, as in `sigmoid_nmi`; by default they are eq. 7's.
        unbiased: False for the biased form of `cka`.

    Raises:
        TypeError: `tuned` is no `PromptedViT`, or the loader holds something else than images.
        ValueError: the loader is empty; fewer than 4 channels; no prompts.
        NonFiniteError: a token is NaN or infinite; names the image in its batch and the layer.
    """
    max_images = None if max_images is None else check_int("max_images", max_images, 1, "or None")
    if not isinstance(tuned, PromptedViT):
        raise TypeError(f"tuned must be a PromptedViT, got {type(tuned).__name__}")
    if tuned.num_prompts == 0:
        raise ValueError("tuned must have at least one prompt per block, got none")
    depth = len(tuned.prompted_blocks)
    device = tuned.prompts.device
    cka, nmi = StreamingCKA(depth, depth, unbiased=unbiased), []
    measure = partial(nmi_per_image, scale=scale, normalize=normalize)
    # Dropout of prompts would make another result of each call.
    with (
        evaluation_mode(tuned),
        torch.no_grad(),
        progress_bar(show=progress, desc="analysis", unit=" images") as bar,
    ):
        for images in image_batches(loader, max_images):
            nmi.append(_analyse_batch(tuned, images.to(device), measure, cka))
            bar.update(len(images))
    if not nmi:
        raise ValueError("loader must give at least one batch of images, got none")
    return Analysis(torch.cat(nmi), cka.result())


def random_prompts(
    num_prompts: int, model: nn.Module, *, depth: Literal["deep", "shallow"] = "deep", seed: int = 0
) -> PromptedViT:
    """`model` with VPT's random prompts of one seed; the caller's random state is not touched."""
    with seeded(seed, placement(model)[0]):
        return PromptedViT(model, num_prompts, depth=depth, num_classes=_keep_head(model), pool_prompts=False)


def load_prompts(
    path: str | os.PathLike[str], model: nn.Module, *, allow_other_backbone: bool = False
) -> PromptedViT:
    """`model` with the prompts of a file of `Prototypes.save` or `PromptedViT.save`, without the file's head.

    Args:
        allow_other_backbone: take prompts that were made with other weights or for another image size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds neither, or prompts for another backbone.
    """
    prompts, facts = _read_prompts(path)
    check_backbone(path, facts, model, allow_other_backbone=allow_other_backbone)
    shallow = facts.get("prompt_depth") == "shallow"
    depth: Literal["deep", "shallow"] = "shallow" if shallow else "deep"
    # What is measured enters the blocks; the pooling is no matter.
    return PromptedViT(model, prompts, depth=depth, num_classes=_keep_head(model), pool_prompts=False)


def _keep_head(model: nn.Module) -> int | None:
    """`num_classes` of a `PromptedViT` that has the head of `model`, or none where the model has none."""
    return None if has_head(model) else 0


def _read_prompts(path: str | os.PathLike[str]) -> tuple[Tensor, dict[str, str]]:
    if read_kind(path) == PROMPTED_KIND:
        tuned = TunedState.read(path)
        return tuned.tensors["prompts"], dict(tuned.facts)
    prototypes = Prototypes.load(path)
    return prototypes.prompts, prototypes.metadata


def _analyse_batch(
    tuned: PromptedViT, images: Tensor, nmi_of: Callable[[Tensor, Tensor], Tensor], cka: StreamingCKA
) -> Tensor:
    """NMI [B, L] of one batch, whose tokens are also added to `cka`."""
    nmi: list[Tensor] = []
    every_prompt = _prompts_of_all_blocks(tuned, images)

    def measure(layer: int, x: Tensor) -> None:
        prompts, tokens = tuned.prompts_and_tokens(layer, x)
        _check_finite(layer, tokens)
        nmi.append(nmi_of(prompts, tokens))
        cka.update([each.mT for each in every_prompt], tokens.to(tuned.prompts.dtype).mT, layer)

    with block_input_hooks(tuned.prompted_blocks, measure):
        tuned.forward_features(images)
    return torch.stack(nmi, dim=1).cpu()


def _prompts_of_all_blocks(tuned: PromptedViT, images: Tensor) -> list[Tensor]:
    """Prompts [1 or B, N_p, D] of each block, all in one dtype.

    In a shallow model they are outputs, for which it runs once more: CKA compares the prompts of each block
    with the tokens of all blocks, so all prompts must be known before the first tokens.
    """
    if tuned.depth == "deep":
        return [prompts[None] for prompts in tuned.prompts]
    found: list[Tensor] = []

    def collect(layer: int, x: Tensor) -> None:
        found.append(tuned.prompts_and_tokens(layer, x)[0].to(tuned.prompts.dtype))

    with block_input_hooks(tuned.prompted_blocks, collect):
        tuned.forward_features(images)
    return found


def _check_finite(layer: int, tokens: Tensor) -> None:
    bad = (~torch.isfinite(tokens)).any(dim=-1).flatten().nonzero()
    if len(bad):
        image = int(bad[0]) // tokens.shape[1]
        raise NonFiniteError(
            f"tokens entering block {layer + 1} must be finite, "
            f"but image {image} of a batch holds NaN or infinity",
            image=image,
            layer=layer,
        )
