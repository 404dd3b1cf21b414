"""What `spt-fast train` lets prompts start from: prototypes of the training images, or VIPAMIN."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from spt_fast.commands import options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spt_fast.data.cache import ImageCache
    from spt_fast.data.loading import ImageLoader
    from spt_fast.prototypes.result import Prototypes
    from spt_fast.support.distributed import Processes
    from spt_fast.training.folder import RunFolder
    from spt_fast.training.recipe import Recipe


def find_start(
    folder: RunFolder,
    args: argparse.Namespace,
    recipe: Recipe,
    model: nn.Module,
    class_names: Sequence[str],
    cache: ImageCache | None,
) -> Prototypes | Tensor | None:
    """What prompts start from, made of training images; a run that goes on has it already."""
    from spt_fast.data.task import own_place
    from spt_fast.training.build import check_buildable

    if args.prompts is not None or recipe.prompts_from not in ("prototypes", "vipamin"):
        return None
    if (kept := folder.kept_start()) is not None:
        return kept
    check_buildable(model, recipe, class_names)
    place = own_place(args.data, (args.val_data, args.test_data), root=args.root, download=args.download)
    open_images = partial(options.open_images, args, model, in_classes=True, cache=cache, **place)
    make = _prototypes if recipe.prompts_from == "prototypes" else _vipamin
    return make(recipe, model, open_images, folder.processes)


def _prototypes(
    recipe: Recipe, model: nn.Module, open_images: Callable[..., ImageLoader], processes: Processes
) -> Prototypes:
    from spt_fast.prototypes.build import build_prototypes

    count = _count(recipe)
    images = open_images(processes=processes)
    options.check_num_prompts(count, recipe.depth, model, images.num_images)
    with options.nothing_readable_explained(images):
        return build_prototypes(model, images, num_prompts=count, depth=recipe.depth, seed=recipe.seed)


def _vipamin(
    recipe: Recipe, model: nn.Module, open_images: Callable[..., ImageLoader], processes: Processes
) -> Tensor:
    """Of a few images, drawn at random: each process looks at all of them, and all take what rank 0 found."""
    from spt_fast.methods.vipamin import VIPAMIN_IMAGES, check_vipamin, vipamin_prompts

    count = _count(recipe)
    given: dict[str, Any] = {**recipe.prompt_init_options, "depth": recipe.depth}
    check_vipamin(model, count, **given)
    most = given.get("max_images", VIPAMIN_IMAGES)
    images = open_images(max_images=most)
    with options.nothing_readable_explained(images):
        found = vipamin_prompts(model, images, count, seed=recipe.seed, **given)
    return processes.gather(found)[0]


def _count(recipe: Recipe) -> int:
    count = recipe.prompts_per_block
    assert count is not None
    return count
