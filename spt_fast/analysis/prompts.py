"""What prompts share with patch tokens, layer by layer: NMI (eq. 7, 8) and CKA (App. B.4) over a loader.

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
from tqdm import tqdm

from spt_fast.backbones.anatomy import check_backbone, get_blocks, num_prefix_tokens
from spt_fast.data.batches import image_batches
from spt_fast.ops.cka import StreamingCKA
from spt_fast.plots import analysis_figure
from spt_fast.prompting.prompted_vit import PromptedViT
from spt_fast.prototypes.result import Prototypes
from spt_fast.support.arguments import check_int
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.files import read_safetensors
from spt_fast.support.randomness import seeded
from spt_fast.support.results import png
from spt_fast.support.tables import csv_bytes, format_table

FILE_NAMES = ("nmi.csv", "cka.csv", "nmi.png")
NMI_COLUMNS = ("step", "layer", "nmi")
CKA_COLUMNS = ("prompt_layer", "token_layer", "cka")

# Called with the index of a block and what enters it, [B, N, D].
_Measure = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Analysis:
    """What was measured of one set of prompts.

    Attributes:
        nmi: [M, L] NMI of each image's patch tokens and the prompts entering the same block.
        cka: [L, L], linear CKA without bias; rows are prompts, columns patch tokens, of block 1 to L.
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
            contents["nmi.png"] = png(analysis_figure({"": self.nmi}, self.cka, title=title))
        return contents

    def nmi_csv(self) -> bytes:
        """Mean over images in the columns step, layer, nmi, with step 0."""
        means = self.nmi.mean(dim=0).tolist()
        return csv_bytes(NMI_COLUMNS, [(0, layer, value) for layer, value in enumerate(means, start=1)])

    def cka_csv(self) -> bytes:
        """The map in the columns prompt_layer, token_layer, cka."""
        rows = [
            (row, column, value)
            for row, values in enumerate(self.cka.tolist(), start=1)
            for column, value in enumerate(values, start=1)
        ]
        return csv_bytes(CKA_COLUMNS, rows)


def analyse(
    tuned: PromptedViT, loader: Iterable[Any], *, max_images: int | None = 512, progress: bool = True
) -> Analysis:
    """NMI per layer and CKA between layers, over the images of `loader`.

    CKA takes channels as examples, D of them, and prompts or patch tokens as features: so sets of different
    number are compared, by how their values vary together over channels. Each image is a minibatch.

    Args:
        tuned: the model with its prompts; its mode and its prompts stay as they are.
        loader: batches of images, as in `build_prototypes`.
        max_images: stop after this many; None reads the whole loader.

    Raises:
        TypeError, ValueError: the loader is empty or holds something else; tokens are NaN or infinite (the
            layer is named); fewer than 4 channels; no prompts.
    """
    max_images = None if max_images is None else check_int("max_images", max_images, 1)
    if tuned.num_prompts == 0:
        raise ValueError("tuned must have at least one prompt per block, got none")
    depth = len(get_blocks(tuned.model))
    device = tuned.prompts.device
    cka, nmi = StreamingCKA(depth, depth), []
    with torch.no_grad(), tqdm(desc="analysis", unit=" images", disable=not progress) as bar:
        for images in image_batches(loader, max_images):
            nmi.append(_analyse_batch(tuned, images.to(device), cka))
            bar.update(len(images))
    if not nmi:
        raise ValueError("loader must give at least one batch of images, got none")
    return Analysis(torch.cat(nmi), cka.result())


def random_prompts(
    num_prompts: int, model: nn.Module, *, depth: Literal["deep", "shallow"] = "deep", seed: int = 0
) -> PromptedViT:
    """`model` with VPT's random prompts of one seed; the caller's random state is not touched."""
    with seeded(seed):
        return PromptedViT(model, num_prompts, depth=depth)


def load_prompts(path: str | os.PathLike[str], model: nn.Module) -> PromptedViT:
    """`model` with the prompts of a file of `Prototypes.save` or `PromptedViT.save`; the head is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds neither, or prompts for another backbone.
    """
    prompts, facts = _read_prompts(path)
    check_backbone(path, facts, model)
    shallow = facts.get("prompt_depth") == "shallow"
    return PromptedViT(model, prompts, depth="shallow" if shallow else "deep")


def _read_prompts(path: str | os.PathLike[str]) -> tuple[Tensor, dict[str, str]]:
    try:
        prototypes = Prototypes.load(path)
        return prototypes.prompts, prototypes.metadata
    except ValueError as error:
        try:
            tensors, facts = read_safetensors(path, kind="prompted_vit")
        except ValueError:
            raise error from None
    return tensors["prompts"], facts


def _analyse_batch(tuned: PromptedViT, images: Tensor, cka: StreamingCKA) -> Tensor:
    """NMI [B, L] of one batch, whose tokens are also added to `cka`."""
    nmi: list[Tensor] = []
    every_prompt: list[Tensor] = []

    def collect(layer: int, x: Tensor) -> None:
        every_prompt.append(_split(tuned, layer, x)[0])

    def measure(layer: int, x: Tensor) -> None:
        tokens = _split(tuned, layer, x)[1]
        _check_finite(layer, tokens)
        nmi.append(tuned._nmi_at(layer, x))
        cka.update([prompts.mT for prompts in every_prompt], tokens.mT, layer)

    if tuned.depth == "deep":
        every_prompt += [prompts[None] for prompts in tuned.prompts.detach()]
    else:
        # What block 1 sees is compared with what the last block sees, so all prompts must be known first.
        _at_each_block(tuned, images, collect)
    _at_each_block(tuned, images, measure)
    return torch.stack(nmi, dim=1).cpu()


def _at_each_block(tuned: PromptedViT, images: Tensor, measure: _Measure) -> None:
    """Run the model on `images` and hand out what enters each block."""

    def hook(layer: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        measure(layer, inputs[0])

    blocks = get_blocks(tuned.model)
    handles = [block.register_forward_pre_hook(partial(hook, layer)) for layer, block in enumerate(blocks)]
    try:
        tuned.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()


def _split(tuned: PromptedViT, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts [1 or B, N_p, D] of a block and the patch tokens [B, N_e, D] of its input x, in one dtype."""
    tokens = x.to(tuned.prompts.dtype)[:, num_prefix_tokens(tuned.model) :]
    if tuned.depth == "deep" or layer == 0:
        return tuned.prompts[layer].detach()[None], tokens
    first_prompt = tokens.shape[1] - tuned.num_prompts
    return tokens[:, first_prompt:], tokens[:, :first_prompt]


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
