"""The patches of a task's own images that are nearest to each prompt: where they are, how far, how they look.

One pass over the images; memory holds one batch and the patches found so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spt_fast.backbones.anatomy import block_input_hooks, patch_size, unwrap
from spt_fast.backbones.token_extractor import TokenExtractor
from spt_fast.data.batches import image_batches
from spt_fast.methods.prompted_vit import PromptedViT
from spt_fast.ops.kmeans import squared_distances
from spt_fast.prototypes.result import Prototypes
from spt_fast.support.arguments import check_bool, check_int, check_tensor
from spt_fast.support.errors import NonFiniteError
from spt_fast.support.modes import evaluation_mode
from spt_fast.support.progress import progress_bar

# Called with a layer, from 0, and its patch tokens [B, N_e, D].
_Measure = Callable[[int, Tensor], None]


@dataclass(frozen=True, repr=False)
class NearestPatches:
    """The k patch tokens nearest to each of N_p prompts in each of L layers, the nearest first; on the CPU.

    Attributes:
        images: [L, N_p, k] int64: the number of the image in the loader, from 0.
        rows, columns: [L, N_p, k] int64: the patch's place on the image's grid, from 0 at the top left.
        distances: [L, N_p, k] float32: Euclidean, from prompt to token.
        pictures: [L, N_p, k, C, H, W] float32: the patch with `context` patches around it, as the loader gave
            its pixels; beyond the image its border is repeated.
        context: patches around each on every side.
    """

    images: Tensor
    rows: Tensor
    columns: Tensor
    distances: Tensor
    pictures: Tensor
    context: int

    def __repr__(self) -> str:
        layers, prompts, k = self.images.shape
        return f"NearestPatches({layers} layers, {prompts} prompts, k={k})"


@torch.no_grad()
def nearest_patches(
    prompts: Prototypes | PromptedViT | Tensor,
    model: nn.Module,
    loader: Iterable[Any],
    *,
    k: int = 8,
    context: int = 1,
    one_per_image: bool = False,
    max_images: int | None = None,
    progress: bool = True,
) -> NearestPatches:
    """What the prompts look at: for each, the k patches whose tokens are nearest to it.

    Args:
        prompts: `Prototypes`, the prompts [L, N_p, D] of all blocks or [1, N_p, D] of the first, or a
            `PromptedViT`, for its own.
        model: the backbone, as in `build_prototypes`; or a `PromptedViT`, whose blocks get its prompts and
            so give other tokens. It comes back as it was.
        loader: batches of images, as in `build_prototypes`.
        k: patches for each prompt.
        context: patches around each, on every side, that `pictures` show too.
        one_per_image: at most one patch of an image for each prompt: neighbours are often much alike.
        max_images: stop after this many.

    Raises:
        TypeError: an argument has the wrong type, or the model does not say how large its patches are.
        ValueError: prompts of another width or number of layers; fewer patches than k (or images, with
            `one_per_image`); patch tokens that are no grid of the image's patches; an empty loader; a
            backbone that belongs to a tuned model.
        NonFiniteError: a token is NaN or infinite; `image` and `layer` are set.
    """
    k, context = check_int("k", k, 1), check_int("context", context, 0)
    one_per_image = check_bool("one_per_image", one_per_image)
    max_images = None if max_images is None else check_int("max_images", max_images, 1, "or None")
    values = _prompt_values(prompts)
    source = _TokenSource(model, len(values))
    layers = [_Nearest(prompts_of_layer.to(source.device), k, one_per_image) for prompts_of_layer in values]
    first_image = 0
    with source, progress_bar(show=progress, desc="nearest patches", unit=" images") as bar:
        for images in image_batches(loader, max_images):
            batch = _Batch(images, first_image, source.patch_size, context)
            source.run(images, partial(_look, layers, batch))
            first_image += len(images)
            bar.update(len(images))
    if first_image == 0:
        raise ValueError("loader must give at least one batch of images, got none")
    return _collect(layers, k, context, one_per_image)


def _look(layers: list[_Nearest], batch: _Batch, layer: int, tokens: Tensor) -> None:
    layers[layer].look_at(layer, tokens, batch)


def _prompt_values(prompts: Prototypes | PromptedViT | Tensor) -> Tensor:
    """[L, N_p, D], float32."""
    if isinstance(prompts, (Prototypes, PromptedViT)):
        prompts = prompts.prompts.detach()
    values = check_tensor("prompts", prompts, ("L", "N_p", "D")).float()
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError("prompts must be finite, but they hold NaN or infinity")
    return values


class _TokenSource:
    """Patch tokens that enter the blocks of a backbone, or of a `PromptedViT` in evaluation mode."""

    def __init__(self, model: nn.Module, n_layers: int) -> None:
        self._tuned = model if isinstance(model, PromptedViT) else None
        self._measure: _Measure | None = None
        if self._tuned is None:
            self._extractor = TokenExtractor(
                model, self._receive, depth="deep" if n_layers > 1 else "shallow"
            )
            available, self.device = self._extractor.n_layers, self._extractor.device
            self.patch_size = patch_size(unwrap(model))
        else:
            available, self.device = len(self._tuned.prompted_blocks), self._tuned.prompts.device
            self.patch_size = patch_size(self._tuned.model)
        if n_layers not in (1, available):
            raise ValueError(f"prompts must be for 1 or {available} layers of this model, got {n_layers}")
        self._n_layers = n_layers

    def __enter__(self) -> _TokenSource:
        if self._tuned is None:
            self._extractor.__enter__()
        else:
            self._modes = evaluation_mode(self._tuned)
            self._modes.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._tuned is None:
            self._extractor.__exit__(*error)
        else:
            self._modes.__exit__(*error)

    def run(self, images: Tensor, measure: _Measure) -> None:
        """Run the model on a batch; `measure` gets the tokens of each layer that has prompts."""
        self._measure = measure
        if self._tuned is None:
            self._extractor.run(images)
            return
        tuned = self._tuned

        def take(layer: int, x: Tensor) -> None:
            if layer < self._n_layers:
                measure(layer, tuned.prompts_and_tokens(layer, x)[1])

        with block_input_hooks(tuned.prompted_blocks, take):
            tuned.forward_features(images.to(self.device))

    def _receive(self, layer: int, tokens: Tensor) -> None:
        assert self._measure is not None
        self._measure(layer, tokens)


class _Batch:
    """A batch of images, and how to cut a patch out of them."""

    def __init__(self, images: Tensor, first: int, patch: tuple[int, int], context: int) -> None:
        self._images, self.first = images, first
        self._patch, self._context = patch, context
        self.grid = (images.shape[2] // patch[0], images.shape[3] // patch[1])

    def picture(self, image: int, row: int, column: int) -> Tensor:
        """The pixels [C, H, W] of a patch of image `image` of the batch, with its surroundings."""
        (height, width), around = self._patch, self._context
        rows = torch.arange((row - around) * height, (row + around + 1) * height, device="cpu")
        columns = torch.arange((column - around) * width, (column + around + 1) * width, device="cpu")
        pixels = self._images[image]
        rows, columns = rows.clamp(0, pixels.shape[1] - 1), columns.clamp(0, pixels.shape[2] - 1)
        return pixels[:, rows[:, None], columns].float().cpu()


class _Nearest:
    """The nearest patches of one layer so far."""

    def __init__(self, prompts: Tensor, k: int, one_per_image: bool) -> None:
        self._prompts, self._k, self._one_per_image = prompts, k, one_per_image
        # [N_p, found], ascending
        self.squared = torch.empty(len(prompts), 0, dtype=torch.float32, device="cpu")
        self.places = torch.empty(len(prompts), 0, 3, dtype=torch.int64, device="cpu")  # image, row, column
        self.pictures: list[list[Tensor]] = [[] for _ in prompts]

    def look_at(self, layer: int, tokens: Tensor, batch: _Batch) -> None:
        """Take in the tokens [B, N_e, D] of a batch."""
        rows, columns = batch.grid
        if rows * columns != tokens.shape[1]:
            raise ValueError(
                f"patch tokens must be a grid of patches, {rows} x {columns} of these images, "
                f"got {tokens.shape[1]} that enter block {layer + 1}"
            )
        squared = self._distances(layer, tokens, batch)  # [N_p, B, N_e]
        if self._one_per_image:
            nearest = squared.min(2)
            squared, patches = nearest.values, nearest.indices
        else:
            squared, patches = squared.flatten(1), None
        best = squared.topk(min(self._k, squared.shape[1]), largest=False)
        chosen = best.indices.cpu()
        if patches is None:
            image, patch = chosen // tokens.shape[1], chosen % tokens.shape[1]
        else:
            image, patch = chosen, patches.cpu().gather(1, chosen)
        places = torch.stack([image, patch // columns, patch % columns], dim=-1)
        self._merge(best.values.cpu(), places, batch)

    def _distances(self, layer: int, tokens: Tensor, batch: _Batch) -> Tensor:
        """Squared distances [N_p, B, N_e]."""
        flat = tokens.float().reshape(1, -1, tokens.shape[-1])
        if flat.shape[-1] != self._prompts.shape[-1]:
            raise ValueError(
                f"prompts must have the tokens' width {flat.shape[-1]}, got {self._prompts.shape[-1]}"
            )
        squared = squared_distances(flat, self._prompts[None], shift=flat.mean(1))[0].T
        squared = squared.view(-1, *tokens.shape[:2])
        bad = (~torch.isfinite(squared)).any(2).any(0)
        if bool(bad.any()):
            image = batch.first + int(bad.nonzero()[0])
            raise NonFiniteError(
                f"tokens must be finite, but the input of block {layer + 1} is not for image {image}",
                image=image,
                layer=layer,
            )
        return squared

    def _merge(self, squared: Tensor, places: Tensor, batch: _Batch) -> None:
        held = self.squared.shape[1]
        merged = torch.cat([self.squared, squared], dim=1).sort(dim=1, stable=True)
        order = merged.indices[:, : self._k]
        self.squared = merged.values[:, : self._k]
        for prompt, (old, indices) in enumerate(zip(self.pictures, order.tolist(), strict=True)):
            self.pictures[prompt] = [
                old[i] if i < held else batch.picture(*places[prompt, i - held].tolist()) for i in indices
            ]
        places = places + torch.tensor([batch.first, 0, 0], device="cpu")
        self.places = torch.cat([self.places, places], dim=1).gather(1, order[..., None].expand(-1, -1, 3))


def _collect(layers: list[_Nearest], k: int, context: int, one_per_image: bool) -> NearestPatches:
    found = layers[0].squared.shape[1]
    if found < k:
        what = "images" if one_per_image else "patches"
        raise ValueError(f"k must be at most the number of {what}, {found}, got {k}")
    places = torch.stack([layer.places for layer in layers])
    images, rows, columns = places.unbind(-1)
    return NearestPatches(
        images=images,
        rows=rows,
        columns=columns,
        distances=torch.stack([layer.squared for layer in layers]).clamp_min(0).sqrt(),
        pictures=torch.stack([torch.stack([torch.stack(p) for p in layer.pictures]) for layer in layers]),
        context=context,
    )
